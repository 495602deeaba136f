"""The options by which `explain` and `verify` are told a shape and a pattern."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer


class Dtype(StrEnum):
    """Dtypes of query, key and value."""

    float64 = "float64"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Length = Annotated[int, typer.Option(help="Rows of the key, N.")]
QueryLength = Annotated[int | None, typer.Option(help="Rows of the query, the last of the key; by default all.")]
Batch = Annotated[int, typer.Option(help="Batch size.")]
Heads = Annotated[int, typer.Option(help="Query heads.")]
KvHeads = Annotated[int | None, typer.Option(help="Key/value heads; by default as many as query heads.")]
HeadDim = Annotated[int, typer.Option(help="Head dim.")]
Segments = Annotated[
    str | None,
    typer.Option(help="Segment lengths, e.g. 2048,4096. By default LongNet's rule for the length."),
]
Rates = Annotated[str | None, typer.Option(help="Dilation rates, one for each segment length, e.g. 1,2.")]
Causal = Annotated[bool, typer.Option("--causal", help="Attend only to rows at or before.")]
ElementType = Annotated[Dtype, typer.Option("--dtype", help="Of query, key and value.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
BackendName = Annotated[str, typer.Option("--backend", help="auto, or the name of a backend.")]
PaddingRule = Annotated[str, typer.Option("--padding", help="mask, or zeros (torchscale's).")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def read_problem(
    *,
    length: int,
    query_length: int | None,
    batch: int,
    heads: int,
    kv_heads: int | None,
    head_dim: int,
    segments: str | None,
    rates: str | None,
    dtype: Dtype,
    device: str,
    **options: Any,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments for `explain` and `verify`; ValueError where an option makes no sense."""
    import torch

    from .. import DilatedPattern
    from ..training import parse_device

    if length < 1:
        raise ValueError(f"the length of the sequence is {length}; give at least 1")
    if (segments is None) != (rates is None):
        raise ValueError("one of --segments and --rates is given; give both, or neither for LongNet's rule")
    if segments is None or rates is None:
        pattern = DilatedPattern.geometric(length, max_rate=max(1, heads))
    else:
        pattern = DilatedPattern(integers("--segments", segments), integers("--rates", rates))
    kv = heads if kv_heads is None else kv_heads
    shapes = (
        (batch, length if query_length is None else query_length, heads, head_dim),
        (batch, length, kv, head_dim),
        (batch, length, kv, head_dim),
    )
    for shape in shapes:
        if min(shape) < 1:
            raise ValueError(f"shape {shape} of (batch, rows, heads, head dim); every size must be at least 1")
    chosen = {"device": parse_device(device), "dtype": getattr(torch, dtype.value), **options}
    return (*shapes, pattern.segment_lengths, pattern.dilation_rates), chosen


def integers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{name} is {text!r}; give integers with commas between, e.g. 2048,4096") from None


def grid_shape(name: str, text: str) -> tuple[int, ...]:
    """``64x64`` or ``16x16x16`` as sizes, each at least 1."""
    parts = text.lower().split("x")
    if len(parts) not in (2, 3) or not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise ValueError(f"{name} is {text!r}; give height and width of a grid, or depth, height and width, e.g. 64x64")
    return tuple(map(int, parts))
