"""Pictures of pools on a trace, and of who holds memory over time. matplotlib loads when drawing."""

from __future__ import annotations

import io
import textwrap
from typing import Any

# Told apart under colour blindness.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")

STYLES = ("-", "--", "-.", ":", (0, (6, 2, 1, 2)), (0, (1, 1)))
"""Of lines that may lie on each other."""


def size_text(size: float) -> str:
    """Bytes as people say them.

    >>> size_text(512), size_text(3 << 20), size_text(1536)
    ('512 B', '3 MiB', '1.5 KiB')
    """
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size >= 1 << power:
            return f"{size / (1 << power):.3g} {unit}"
    return f"{size:.0f} B"


def _png(figure: Any) -> bytes:
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()


def _head(figure: Any, text: str) -> None:
    """A title of lines that fit into the picture, whatever the length of the command; paths are broken too."""
    lines = (part for line in text.splitlines() for part in textwrap.wrap(line, 150))
    figure.suptitle("\n".join(lines), fontsize=10)


def draw_comparison(found: dict[str, Any]) -> bytes:
    """A PNG with the bytes held, external fragmentation, new memory by step and time of every pool."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8.4), dpi=130, layout="constrained")
    (held, fragmented), (misses, times) = figure.subplots(2, 2)
    pools = found["pools"]
    for n, row in enumerate(pools):
        look: dict[str, Any] = {"color": COLORS[n % len(COLORS)], "linestyle": STYLES[n % len(STYLES)]}
        events = [sample["event"] for sample in row["samples"]]
        held.plot(events, [s["held"] / 2**20 for s in row["samples"]], label=row["pool"], linewidth=1.8, **look)
        external = [100 * s["external_fragmentation"] for s in row["samples"]]
        fragmented.plot(events, external, linewidth=1.3, **look)
        steps = range(1, len(row["misses_by_step"]) + 1)
        misses.plot(steps, row["misses_by_step"], marker="o", markersize=3.5, linewidth=1.3, **look)
    asked = found["asked_at_once"] / 2**20
    held.axhline(asked, color="#888888", linestyle=":", linewidth=1.2, label="most asked for at once")
    held.set(title="bytes held", xlabel="events of the trace", ylabel="MiB")
    fragmented.set(title="idle bytes outside the largest idle block", xlabel="events of the trace", ylabel="%")
    fragmented.set_ylim(-2, 102)
    misses.set(title="requests that took new memory", xlabel="step")
    names = ["torch.empty", *(row["pool"] for row in pools)]
    micros = [found["torch_empty_microseconds"], *(row["microseconds"] for row in pools)]
    times.barh(names[::-1], [value or 0 for value in micros][::-1], color=["#999999", *COLORS][: len(names)][::-1])
    times.set(title="acquire and return, median", xlabel="microseconds")
    for axes in (held, fragmented, misses):
        axes.grid(True, color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = held.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    _head(figure, f"{found['what']}\n{found['requests']:,} requests of {found['sizes']:,} sizes")
    return _png(figure)


def draw_profile(found: dict[str, Any]) -> bytes:
    """A PNG of the bytes that each part of the library holds over time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6), dpi=130, layout="constrained")
    axes = figure.subplots()
    names = list(found["bytes"])
    colors = [*COLORS[: len(names) - 1], "#cccccc"][: len(names)]
    layers = [[size / 2**20 for size in found["bytes"][name]] for name in names]
    if found["seconds"]:
        axes.stackplot(found["seconds"], layers, labels=names, colors=colors, step="post", linewidth=0)
    axes.set(xlabel="seconds", ylabel="MiB")
    _head(figure, f"{found['command']}\nat most {size_text(found['peak'])}")
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return _png(figure)
