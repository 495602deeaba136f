"""``dilated-attention bench ordering``: what orders of a grid are worth to segments, and what they cost."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import one_line_errors
from .problem import Dtype, Json, grid_shape

if TYPE_CHECKING:
    import torch

MOST_PAIRS = 1 << 31
"""Pairs of cells whose distance is taken, a few seconds of one core."""
LONGEST_BY_DEFAULT = 1024


def ordering(
    shape: Annotated[str, typer.Option(help="Sizes of the grid, e.g. 64x64 or 16x16x16.")] = "64x64",
    segment_length: Annotated[
        int | None, typer.Option(help="Cells of a segment; by default a sixteenth of the grid, at most 1024.")
    ] = None,
    channels: Annotated[int, typer.Option(help="Channels of the rows that are permuted.")] = 768,
    dtype: Annotated[Dtype | None, typer.Option(help="Of them; by default bfloat16 on CUDA, float32 on a CPU.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    repeats: Annotated[int, typer.Option(help="Runs of which the median counts.")] = 7,
    as_json: Json = False,
) -> None:
    """Compare orders of a grid: how compact their segments are, and the time to compute and to apply each.

    Inside: the share of a cell's neighbours in space (8 in a plane, 26 in a volume) that lie in its segment. Distance:
    the mean, in cells, of two cells of a segment. Times are milliseconds; an order is computed once for a grid, and the
    rows are permuted twice in a pass of a model, beside a copy of them.
    """
    with one_line_errors():
        found = _measure(shape, segment_length, channels, dtype, device, repeats)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        _show(found)


def _measure(
    shape: str, segment_length: int | None, channels: int, dtype: Dtype | None, device: str, repeats: int
) -> dict[str, Any]:
    """Everything as plain data; ValueError where an option makes no sense."""
    import torch

    from ..benchmarking.measure import run_seconds
    from ..ordering import GRID_ORDERS, grid_ordering, recommend_ordering
    from ..ordering.locality import attended_distance, neighbours_inside
    from ..training import parse_device

    sizes = grid_shape("--shape", shape)
    cells = torch.Size(sizes).numel()
    length = max(min(cells // 16, LONGEST_BY_DEFAULT), 1) if segment_length is None else segment_length
    for name, value in (("--segment-length", length), ("--channels", channels), ("--repeats", repeats)):
        if value < 1:
            raise ValueError(f"{name} is {value}; give at least 1")
    if cells * min(length, cells) > MOST_PAIRS:
        raise ValueError(
            f"--shape is {shape!r} with segments of {length}: {cells * length:,} pairs of cells, and at most "
            f"{MOST_PAIRS:,} are measured; give a shorter --segment-length or a smaller grid"
        )
    where = parse_device(device)
    kind = dtype or (Dtype.bfloat16 if where.type == "cuda" else Dtype.float32)
    rows = torch.ones(1, cells, channels, device=where, dtype=getattr(torch, kind.value))

    def milliseconds(run: Callable[[], object]) -> float:
        run()
        return 1e3 * statistics.median(run_seconds(run, where, repeats))

    orders = {}
    for name, order_of in GRID_ORDERS.items():
        order = order_of(*sizes)
        moved = grid_ordering(name, *sizes)
        orders[name] = {
            "inside": neighbours_inside(order, sizes, length),
            "distance": attended_distance(order, sizes, [length], [1]),
            "order_ms": milliseconds(partial(order_of, *sizes, device=where)),
            "permutation_ms": 0.0 if moved is None else milliseconds(partial(moved.apply, rows)),
        }
    return {
        "shape": list(sizes),
        "segment_length": length,
        "channels": channels,
        "dtype": kind.value,
        "device": _name(where),
        "copy_ms": milliseconds(rows.clone),
        "orders": orders,
        "recommended": recommend_ordering(*sizes, segment_lengths=[length]),
    }


def _name(device: torch.device) -> str:
    from .doctor import devices

    return devices().get("cpu" if device.type == "cpu" else f"cuda:{device.index or 0}", str(device))


def _show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    grid = " x ".join(map(str, found["shape"]))
    table = Table(title=f"{grid} cells, segments of {found['segment_length']:,}; {found['device']}")
    for n, column in enumerate(("order", "inside", "distance", "to compute, ms", "to permute, ms")):
        table.add_column(column, justify="right" if n else "left", no_wrap=True)
    for name, row in found["orders"].items():
        permuted = f"{row['permutation_ms']:.3f}" if row["permutation_ms"] else "-"
        table.add_row(name, f"{row['inside']:.3f}", f"{row['distance']:.2f}", f"{row['order_ms']:.3f}", permuted)
    Console().print(table)
    typer.echo(f"a copy of the rows, {found['channels']} channels of {found['dtype']}: {found['copy_ms']:.3f} ms")
    typer.echo(f"recommend_ordering: {found['recommended']}")
