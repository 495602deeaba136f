"""The picture of a comparison: time over length on log-log axes. matplotlib loads when drawing."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from .analysis import crossovers, times_of
from .contenders import Contender, Setting
from .measure import PASSES, Measurement

# Told apart under colour blindness; the first is that of ours in every picture.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
MARKERS = "osD^vP*X"


def short(length: float) -> str:
    """A length as people say it.

    >>> short(2048), short(1048576), short(1000), short(5632)
    ('2K', '1M', '1000', '5.5K')
    """
    if length >= 1 << 20:
        return f"{length / (1 << 20):.4g}M"
    return f"{length / 1024:.4g}K" if length >= 4096 or length % 1024 == 0 else f"{length:.0f}"


def draw(contenders: Sequence[Contender], setting: Setting, measurements: Sequence[Measurement]) -> bytes:
    """A PNG with a panel for each pass."""
    # The object interface: pyplot would pick a backend and keep state for the whole process.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.5, 5.6), dpi=130, layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, which in zip(panels, PASSES, strict=True):
        _panel(axes, which, contenders, measurements)
    panels[0].set_ylabel("time of one pass (milliseconds, log scale)")
    handles: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=min(4, len(handles)), frameon=False
        )
    dtype, causal = str(setting.dtype).removeprefix("torch."), ", causal" if setting.is_causal else ""
    lengths, rates = setting.pattern.segment_lengths, setting.pattern.dilation_rates
    branches = ", ".join(f"{short(w)}/{r}" for w, r in zip(lengths, rates, strict=True))
    batch = f"batch {setting.batch}, " if setting.batch > 1 else ""
    figure.suptitle(
        f"Attention time by sequence length: {batch}{setting.heads} heads of {setting.head_dim}, {dtype}{causal}, "
        f"{setting.device.type.upper()}\nsegment length/dilation rate {branches}",
        fontsize=11,
    )
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()


def _panel(axes: Any, which: str, contenders: Sequence[Contender], measurements: Sequence[Measurement]) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    drawn: dict[str, dict[int, float]] = {}
    for n, contender in enumerate(contenders):
        times = times_of(measurements, contender.name, which)
        if not times:
            continue
        drawn[contender.name] = times
        ours = contender.family == "ours"
        axes.plot(
            list(times), list(times.values()), label=contender.label, color=COLORS[n % len(COLORS)],
            marker=MARKERS[n % len(MARKERS)], markersize=5, linewidth=2.4 if ours else 1.5, zorder=3 if ours else 2,
        )  # fmt: skip
        end = [m for m in measurements if (m.contender, m.which) == (contender.name, which) and m.length > max(times)]
        if end and end[0].status in ("too slow", "out of memory", "failed"):
            above = len(drawn) % 2 == 0  # by turns, for lines that end close together
            axes.annotate(
                end[0].status, (max(times), times[max(times)]), xytext=(6, 4 if above else -10),
                textcoords="offset points", fontsize=8, color=COLORS[n % len(COLORS)], zorder=4,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.5, "pad": 0.5},
            )  # fmt: skip
    lengths = sorted({m.length for m in measurements if m.milliseconds is not None})  # both panels share an axis
    if drawn:
        axes.set_xticks(lengths)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        _guides(axes, lengths, min(t for times in drawn.values() for t in times.values()))
    for crossover in crossovers(contenders, measurements)[:3]:  # those of the first of ours
        if crossover.which == which and crossover.how == "interpolated" and crossover.length is not None:
            right = crossover.length**2 > lengths[0] * lengths[-1]  # in the right half, so the text goes to the left
            axes.axvline(crossover.length, color=COLORS[0], linestyle=":", linewidth=1)
            axes.annotate(
                f"ours faster from {crossover.length:,.0f}", (crossover.length, 0.98),
                xycoords=("data", "axes fraction"), xytext=(-4 if right else 4, 0), textcoords="offset points",
                ha="right" if right else "left", va="top", fontsize=8, color=COLORS[0],
            )  # fmt: skip
    axes.set(title=which, xlabel="sequence length N (log scale)")


def _guides(axes: Any, lengths: Sequence[int], floor: float) -> None:
    """Thin lines of slope 1 and 2 from below the lowest point, to compare slopes with."""
    first, last = lengths[0], lengths[-1]
    if first == last:
        return
    top = axes.get_ylim()[1]
    for slope, style in ((1, (0, (6, 4))), (2, (0, (2, 3)))):
        start = 0.6 * floor
        end = min(float(last), first * (top / start) ** (1 / slope))  # the guides do not stretch the axes
        axes.plot(
            [first, end], [start, start * (end / first) ** slope], color="#888888", linewidth=0.9, linestyle=style,
            label=f"guide: time ∝ N{'²' if slope == 2 else ''}", zorder=1,
        )  # fmt: skip
