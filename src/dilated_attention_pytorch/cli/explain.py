"""``dilated-attention explain``: what a call will do and cost, without doing it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import typer

from .errors import one_line_errors
from .problem import (
    BackendName,
    Batch,
    Causal,
    Device,
    Dtype,
    ElementType,
    HeadDim,
    Heads,
    Json,
    KvHeads,
    Length,
    PaddingRule,
    QueryLength,
    Rates,
    Segments,
    read_problem,
)

if TYPE_CHECKING:
    from ..explanation import Explanation


def explain(
    length: Length = 32768,
    query_length: QueryLength = None,
    batch: Batch = 1,
    heads: Heads = 16,
    kv_heads: KvHeads = None,
    head_dim: HeadDim = 64,
    segments: Segments = None,
    rates: Rates = None,
    causal: Causal = False,
    dtype: ElementType = Dtype.float32,
    device: Device = "cpu",
    backend: BackendName = "auto",
    padding: PaddingRule = "mask",
    as_json: Json = False,
) -> None:
    """Show which backend and which fused calls compute a pattern on given shapes, and what they cost."""
    with one_line_errors():
        from .. import explain as explain_call

        arguments, options = read_problem(
            length=length, query_length=query_length, batch=batch, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
            segments=segments, rates=rates, dtype=dtype, device=device, backend=backend, is_causal=causal,
            padding=padding,
        )  # fmt: skip
        found = explain_call(*arguments, **options)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=1))
    else:
        _show(found, arguments)


def _show(found: Explanation, arguments: tuple[Any, ...]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(str(found), markup=False, highlight=False, soft_wrap=True)
    if not found.calls:
        return
    table = Table("branch", "segment", "rate", title="Fused calls (alike ones together)")
    for name in ("calls", "problems each", "query rows", "key rows", "zero keys"):
        table.add_column(name, justify="right")
    table.add_column("mask")
    alike: dict[tuple[Any, ...], int] = {}
    for call in found.calls:
        key = (
            call.branch, call.dilation_rate, call.outer * call.inner, call.query_len, call.key_len, call.zero_keys,
            "causal" if call.is_causal else "full",
        )  # fmt: skip
        alike[key] = alike.get(key, 0) + 1
    shown = list(alike.items())[:40]
    for (branch, rate, problems, queries, keys, zeros, mask), count in shown:
        segment = arguments[3][branch]
        row = (branch, segment, rate, count, problems, queries, keys, zeros, mask)
        table.add_row(*map(str, row))
    console.print(table)
    if len(alike) > len(shown):
        console.print(f"and {len(alike) - len(shown)} more kinds; --json lists every call", highlight=False)
