"""The two plots of a run: loss over training, bits per byte by position. matplotlib loads when drawing."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .evaluate import BITS, PositionCurve
from .files import replace_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # told apart under colour blindness


def _figure() -> tuple[Figure, Any]:
    # The object interface: pyplot would pick a backend and keep state for the whole process.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    image = io.BytesIO()
    figure.savefig(image, format="png")
    replace_file(path, [image.getbuffer()])


def smooth(values: Sequence[float], weight: float) -> list[float]:
    """Running mean with exponentially falling weights, without a bias to its start.

    >>> [round(v, 2) for v in smooth([4.0, 2.0, 2.0], 0.5)]
    [4.0, 2.67, 2.29]
    """
    result: list[float] = []
    total = norm = 0.0
    for value in values:
        total, norm = weight * total + value, weight * norm + 1
        result.append(total / norm)
    return result


def plot_loss(records: Sequence[dict[str, Any]], path: Path, *, title: str) -> None:
    """Bits per byte of the training batches and of the held-out text over the steps in metrics records."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _figure()
    train = [r for r in records if r["kind"] == "train"]
    held_out = [r for r in records if r["kind"] == "held-out"]
    if train:
        steps = [r["step"] for r in train]
        bits = [r["loss"] * BITS for r in train]
        axes.plot(steps, bits, color=COLORS[0], alpha=0.25, linewidth=0.8, label="training, each step")
        mean = smooth(bits, 1 - 1 / max(1.0, len(bits) / 30))
        axes.plot(steps, mean, color=COLORS[0], linewidth=1.6, label="training, running mean")
    if held_out:
        axes.plot(
            [r["step"] for r in held_out],
            [r["bits_per_byte"] for r in held_out],
            color=COLORS[1],
            marker="o",
            markersize=4,
            label="held-out files, at the context trained so far",
        )
        last = held_out[-1]
        axes.annotate(
            f"{last['bits_per_byte']:.2f}",
            (last["step"], last["bits_per_byte"]),
            xytext=(0, -16),
            textcoords="offset points",
            ha="center",
            color=COLORS[1],
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(title=title, xlabel="optimizer step", ylabel="bits per byte")
    axes.set_xlim(left=0)
    if records:
        axes.legend(frameon=False)
    _save(figure, path)


def plot_position(curve: PositionCurve, path: Path, *, title: str, segment_lengths: Sequence[int] = ()) -> None:
    """Bits per byte of the same bytes by their position in the context, with the segment lengths marked.

    The band is the standard error of the distance to the last value, which is what the line is about.
    """
    from matplotlib.ticker import FuncFormatter, NullLocator

    figure, axes = _figure()
    low = [b - e for b, e in zip(curve.bits, curve.error, strict=True)]
    high = [b + e for b, e in zip(curve.bits, curve.error, strict=True)]
    label = "the same bytes at every position"
    axes.plot(curve.positions, curve.bits, color=COLORS[0], marker="o", markersize=4, label=label)
    label = "standard error of the distance to the last"
    axes.fill_between(curve.positions, low, high, color=COLORS[0], alpha=0.2, linewidth=0, label=label)
    for n, segment in enumerate(s for s in segment_lengths if s <= curve.positions[-1]):
        label = "segment lengths of the pattern" if n == 0 else ""
        axes.axvline(segment, color="#888888", linestyle=":", linewidth=1, label=label)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(
        title=title,
        xlabel="position in the context, from half of this to this (bytes, log scale)",
        ylabel="bits per byte, held-out files",
    )
    axes.legend(frameon=False)
    _save(figure, path)
