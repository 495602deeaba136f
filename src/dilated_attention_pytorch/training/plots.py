"""Plots of a run: loss over training, bits per byte by position and context. matplotlib loads when drawing."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .evaluate import BITS, ContextTable, PositionCurve
from .files import replace_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # told apart under colour blindness
DPI = 130


def _figure() -> tuple[Figure, Any]:
    # The object interface: pyplot would pick a backend and keep state for the whole process.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=DPI, layout="constrained")
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
    _log_bytes(axes)
    axes.set(
        title=title,
        xlabel="position in the context, from half of this to this (bytes, log scale)",
        ylabel="bits per byte, held-out files",
    )
    axes.legend(frameon=False)
    _save(figure, path)


def plot_contexts(table: ContextTable, path: Path, *, title: str) -> None:
    """Two panels: bits by position, a line for each context; and what each context is worth on the same bytes."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2)
    shades = colormaps["viridis"]
    middles = [max(1.0, (low * high) ** 0.5) if low else high / 2 for low, high in pairwise(table.edges)]
    for n, context in enumerate(table.contexts):
        color = shades(0.9 * (1 - n / max(1, len(table.contexts) - 1)))
        label = f"at most {context:,} bytes" if context < table.contexts[-1] else "the whole window"
        left.plot(middles, [row[n] for row in table.bits], color=color, marker="o", markersize=4, label=label)
    left.set(title="Bytes at each position", xlabel="position in the window (bytes, log scale)")
    left.legend(frameon=False, title="the model sees")
    curve = table.curve
    gain = [bits - curve.bits[-1] for bits in curve.bits]
    right.errorbar(curve.positions, gain, yerr=curve.error, color=COLORS[0], marker="o", markersize=4, capsize=3)
    right.axhline(0, color="#888888", linestyle=":", linewidth=1)
    right.set(
        title="Second half of the windows, the same bytes",
        xlabel="context that the model sees (bytes, log scale)",
        ylabel="bits per byte more than with the whole window",
    )
    left.set_ylabel("bits per byte")
    for axes in (left, right):
        _log_bytes(axes)
        axes.grid(True, color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    _save(figure, path)


def _log_bytes(axes: Any) -> None:
    """A logarithmic axis of bytes, with whole numbers on it."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
