"""``dilated-attention draw``: a pattern as matrices, or an order of a grid as a curve and its segments as regions."""

from __future__ import annotations

import importlib.util
import io
import math
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import one_line_errors
from .problem import integers

if TYPE_CHECKING:
    from torch import Tensor

MOST_CELLS = 1 << 18
"""A picture of more would show nothing but its outline, and take minutes."""


class Order(StrEnum):
    """Orders of a grid."""

    hilbert = "hilbert"
    morton = "morton"
    snake = "snake"
    raster = "raster"


class BlockPatternName(StrEnum):
    """Block-sparse patterns."""

    longformer = "longformer"
    bigbird = "bigbird"
    local = "local"
    hierarchical = "hierarchical"
    dilated_blocks = "dilated-blocks"


def draw(
    order: Annotated[Order | None, typer.Option(help="Order of the cells; by default hilbert.")] = None,
    shape: Annotated[str | None, typer.Option(help="Height and width of the grid; by default 32x32.")] = None,
    segment_length: Annotated[
        int | None, typer.Option(help="Cells of a segment; by default a sixteenth of the grid.")
    ] = None,
    segment_lengths: Annotated[
        str | None, typer.Option(help="Draw a pattern instead: segment lengths of its branches, e.g. 16,32,64.")
    ] = None,
    dilation_rates: Annotated[str | None, typer.Option(help="One for each segment length, e.g. 1,2,4.")] = None,
    pattern: Annotated[
        BlockPatternName | None,
        typer.Option(help="Draw a block-sparse pattern; dilated-blocks takes segment lengths and dilation rates."),
    ] = None,
    parameters: Annotated[
        str | None, typer.Option(help="Integers of the block-sparse pattern, e.g. window=512,block_size=64.")
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(
            help="Rows of the pattern; by default the longest segment, or the most that fit; of blocks, 32 blocks."
        ),
    ] = None,
    heads: Annotated[int | None, typer.Option(help="Heads of the pattern; by default 4.")] = None,
    causal: Annotated[bool, typer.Option("--causal", help="Attend only to rows at or before.")] = False,
    head_offsets: Annotated[
        str | None, typer.Option(help="contiguous (torchscale's, the default), or interleaved (the paper's).")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="The PNG to write. By default order.png, or pattern.png of a pattern.")
    ] = None,
) -> None:
    """Draw a pattern, given its segment lengths: who attends to whom, by branch and head, and how often in all.

    Or a block-sparse pattern, given its name: which key blocks each query block sees, by head.

    Or draw the order of a grid: the curve through its cells, and the segments of attention as coloured regions.
    Needs matplotlib.
    """
    with one_line_errors():
        of_pattern = {
            "--pattern": pattern, "--segment-lengths": segment_lengths, "--dilation-rates": dilation_rates,
            "--length": length, "--heads": heads, "--causal": causal or None, "--head-offsets": head_offsets,
        }  # fmt: skip
        of_order = {"--order": order, "--shape": shape, "--segment-length": segment_length}
        one = _is_pattern(of_pattern, of_order)
        heads = 4 if heads is None else heads
        output = output or Path("pattern.png" if one else "order.png")
        if output.suffix not in ("", ".png"):
            raise ValueError(f"--output is {str(output)!r}; the picture is a PNG, give a name that ends in .png")
        if importlib.util.find_spec("matplotlib") is None:
            raise ValueError("matplotlib is not installed; run: pip install matplotlib")
        if parameters is not None and pattern is None:
            raise ValueError("--parameters is given without --pattern; give the name of a block-sparse pattern")
        if pattern is not None:
            made = _block_pattern(pattern, parameters, segment_lengths, dilation_rates, head_offsets)
            notes = _draw_blocks(pattern.value, made, length, heads, causal, output)
        elif one:
            offsets = head_offsets or "contiguous"
            notes = _draw_pattern(segment_lengths, dilation_rates, length, heads, causal, offsets, output)
        else:
            notes = _draw_order(order or Order.hilbert, shape or "32x32", segment_length, output)
    for line in (*notes, f"wrote {output}"):
        typer.echo(line)


def _is_pattern(of_pattern: dict[str, Any], of_order: dict[str, Any]) -> bool:
    """Whether the options ask for a pattern, not for an order; ValueError where they ask for both, or half of one."""
    pattern, order = ([name for name, value in given.items() if value is not None] for given in (of_pattern, of_order))
    if pattern and order:
        raise ValueError(
            f"{', '.join(order)} draws the order of a grid, {', '.join(pattern)} a pattern; a picture has one of them"
        )
    if pattern and not {"--pattern", "--segment-lengths", "--dilation-rates"} & set(pattern):
        raise ValueError(
            f"{', '.join(pattern)} goes with a pattern; give --segment-lengths and --dilation-rates, or --pattern, too"
        )
    return bool(pattern)


def _draw_order(order: Order, shape: str, segment_length: int | None, output: Path) -> list[str]:
    from ..ordering import GRID_ORDERS
    from ..training.files import replace_file

    height, width = _shape(shape)
    length = max(height * width // 16, 1) if segment_length is None else segment_length
    if length < 1:
        raise ValueError(f"--segment-length is {length}; give at least 1")
    found = GRID_ORDERS[order.value](height, width)
    replace_file(output, [picture(found, height, width, length, title=order.value.capitalize())])
    return []


def _draw_pattern(
    segments: str | None, rates: str | None, length: int | None, heads: int, causal: bool, offsets: str, output: Path
) -> list[str]:
    from typing import cast

    from .. import DilatedPattern
    from ..training.files import replace_file
    from ..types import HeadOffsets
    from . import pattern_picture

    if segments is None or rates is None:
        missing = "--dilation-rates" if rates is None else "--segment-lengths"
        raise ValueError(f"{missing} is missing; a pattern has a segment length and a dilation rate for each branch")
    pattern = DilatedPattern(
        integers("--segment-lengths", segments), integers("--dilation-rates", rates), cast(HeadOffsets, offsets)
    )
    rows = min(max(pattern.segment_lengths), pattern_picture.MOST_ROWS) if length is None else length
    for name, value, most in (
        ("--length", rows, pattern_picture.MOST_ROWS),
        ("--heads", heads, pattern_picture.MOST_HEADS),
    ):
        if not 1 <= value <= most:
            raise ValueError(f"{name} is {value}; a picture has 1 to {most}")
    seen = pattern_picture.attended(pattern, rows=rows, heads=heads, is_causal=causal)
    title = f"{rows:,} rows, {heads} heads{', causal' if causal else ''}, {offsets} offsets"
    replace_file(output, [pattern_picture.picture(pattern, seen, title=title)])
    notes = pattern_picture.coverage(seen)
    if rows < (longest := max(pattern.segment_lengths)):
        notes.append(
            f"the longest segment has {longest:,} rows; the picture, like the figures, has the first {rows:,} of them "
            f"(at most {pattern_picture.MOST_ROWS}); to see all of a pattern, divide its segment lengths by one number"
        )
    return notes


def _block_pattern(
    name: BlockPatternName, parameters: str | None, segments: str | None, rates: str | None, offsets: str | None
) -> Any:
    """The pattern that the options describe."""
    from typing import cast

    from .. import DilatedBlocks, get_pattern
    from ..types import HeadOffsets

    given = _assignments(parameters or "")
    if name is not BlockPatternName.dilated_blocks:
        for option, value in (
            ("--segment-lengths", segments),
            ("--dilation-rates", rates),
            ("--head-offsets", offsets),
        ):
            if value is not None:
                raise ValueError(f"{option} goes with --pattern dilated-blocks, not with {name.value}; leave it out")
        return get_pattern(name.value, **given)
    if segments is None or rates is None:
        missing = "--dilation-rates" if rates is None else "--segment-lengths"
        raise ValueError(f"{missing} is missing; dilated-blocks has a segment length and a rate for each branch")
    block_size = given.pop("block_size", 128)
    if given:
        raise ValueError(f"--parameters has {', '.join(given)}; dilated-blocks takes block_size alone")
    return DilatedBlocks(
        integers("--segment-lengths", segments), integers("--dilation-rates", rates), block_size,
        cast(HeadOffsets, offsets or "contiguous"),
    )  # fmt: skip


def _assignments(text: str) -> dict[str, int]:
    """``a=1,b=2`` as a dictionary."""
    found: dict[str, int] = {}
    for part in text.split(",") if text else ():
        name, sign, value = part.strip().partition("=")
        if not (name.isidentifier() and sign and value.isascii() and value.isdigit()):
            raise ValueError(f"--parameters has {part!r}; give name=integer, e.g. window=512,block_size=64")
        if name in found:
            raise ValueError(f"--parameters has {name} twice; give it once")
        found[name] = int(value)
    return found


def _draw_blocks(name: str, pattern: Any, length: int | None, heads: int, is_causal: bool, output: Path) -> list[str]:
    from ..training.files import replace_file
    from . import block_picture
    from .pattern_picture import MOST_HEADS

    size = pattern.block_size
    rows = 32 * size if length is None else length
    for option, value, most in (
        ("--length", rows, block_picture.MOST_BLOCKS * size),
        ("--heads", heads, MOST_HEADS),
    ):
        if not 1 <= value <= most:
            raise ValueError(f"{option} is {value}; a picture has 1 to {most}")
    seen = block_picture.seen_blocks(pattern, blocks=-(-rows // size), heads=heads, is_causal=is_causal)
    title = f"{name}: {rows:,} rows in blocks of {size}{', causal' if is_causal else ''}"
    replace_file(output, [block_picture.picture(pattern, seen, title=title)])
    return block_picture.shares(seen, is_causal=is_causal)


def _shape(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() for part in parts):
        raise ValueError(f"--shape is {text!r}; give the height and width of a grid, e.g. 32x32")
    height, width = map(int, parts)
    if not 1 <= height * width <= MOST_CELLS:
        raise ValueError(f"--shape is {text!r}; a picture has 1 to {MOST_CELLS:,} cells, e.g. 512x512")
    return height, width


def perimeters(order: Tensor, height: int, width: int, length: int) -> list[int]:
    """Sides of cells at which a segment ends, for every segment.

    >>> from dilated_attention_pytorch.ordering import raster_order
    >>> perimeters(raster_order(4, 4), 4, 4, 4)  # four rows
    [10, 10, 10, 10]
    """
    import torch

    from ..ordering.locality import segment_map

    grid = torch.nn.functional.pad(segment_map(order, (height, width), length), (1, 1, 1, 1), value=-1)
    count = torch.zeros(-(-len(order) // length) + 1, dtype=torch.int64)
    for one, other in ((grid[1:], grid[:-1]), (grid[:, 1:], grid[:, :-1])):
        for segment in (one[one != other], other[one != other]):
            count += torch.bincount(segment + 1, minlength=len(count))
    return count[1:].tolist()


def picture(order: Tensor, height: int, width: int, length: int, *, title: str) -> bytes:
    """A PNG with two panels: the curve, from dark to bright, and the segments."""
    from matplotlib.figure import Figure

    from ..ordering.locality import segment_map

    tall = height / width
    size = (11.0, min(max(5.5 * tall, 2.0), 11.0) + 0.9)
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_curve(left, order, width, size=5.0 / max(height, width, 1))
    _draw_segments(right, segment_map(order, (height, width), length))
    around = perimeters(order, height, width, length)
    mean = sum(around) / len(around)
    left.set_title("the order, from dark to bright", fontsize=10)
    right.set_title(
        f"segments of {length:,}: mean perimeter {mean:.1f}, of a square {4 * math.sqrt(length):.1f}", fontsize=10
    )
    for axes in (left, right):
        axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), aspect="equal", xticks=[], yticks=[])
    figure.suptitle(f"{title} order of a {height} x {width} grid", fontsize=11)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()


def _draw_curve(axes: Any, order: Tensor, width: int, *, size: float) -> None:
    import torch
    from matplotlib.collections import LineCollection

    points = torch.stack((order % width, order // width), 1)
    steps = list(torch.stack((points[:-1], points[1:]), 1).numpy())
    line = min(max(72 * 0.25 * size, 0.3), 3.0)  # a quarter of a cell
    curve = LineCollection(steps, cmap="viridis", linewidths=line, capstyle="round")
    curve.set_array(torch.arange(len(steps)).numpy())
    axes.add_collection(curve)
    axes.plot(*points[0].tolist(), "o", color="#d55e00", markersize=max(3 * line, 3.0), zorder=3)


def _draw_segments(axes: Any, segments: Tensor) -> None:
    from matplotlib import colormaps
    from matplotlib.collections import LineCollection

    colors = colormaps["tab20"](((segments * 7) % 20).numpy())  # 7 apart: segments that follow differ in hue
    axes.imshow(colors, interpolation="nearest")
    borders = []
    for row, column in (segments[:, 1:] != segments[:, :-1]).nonzero().tolist():
        borders.append(((column + 0.5, row - 0.5), (column + 0.5, row + 0.5)))
    for row, column in (segments[1:] != segments[:-1]).nonzero().tolist():
        borders.append(((column - 0.5, row + 0.5), (column + 0.5, row + 0.5)))
    axes.add_collection(LineCollection(borders, colors="black", linewidths=0.8))
