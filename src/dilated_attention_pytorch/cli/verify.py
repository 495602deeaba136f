"""``dilated-attention verify``: outputs and gradients on this machine against the formula in float64."""

from __future__ import annotations

import json
from dataclasses import asdict

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


def verify(
    length: Length = 2048,
    query_length: QueryLength = None,
    batch: Batch = 1,
    heads: Heads = 8,
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
    """Check outputs, log-sum-exp and gradients of a backend on this machine against the oracle.

    Exit code 0 where every error is within its bound, 1 where one is not.
    """
    with one_line_errors():
        from .. import verify as verify_call

        arguments, options = read_problem(
            length=length, query_length=query_length, batch=batch, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
            segments=segments, rates=rates, dtype=dtype, device=device, backend=backend, is_causal=causal,
            padding=padding,
        )  # fmt: skip
        found = verify_call(*arguments, **options)
    if as_json:
        checks = [{**asdict(check), "passed": check.passed} for check in found.checks]
        typer.echo(json.dumps({"backend": found.backend, "passed": found.passed, "checks": checks}, indent=1))
    else:
        from rich.console import Console
        from rich.table import Table

        table = Table("quantity", title=f"backend {found.backend} on {device}, {dtype.value}")
        table.add_column("largest error", justify="right")
        table.add_column("bound", justify="right")
        table.add_column("")
        for check in found.checks:
            verdict = "[green]ok[/]" if check.passed else "[red]FAILED[/]"
            table.add_row(check.name, f"{check.error:.3e}", f"{check.bound:.3e}", verdict)
        Console().print(table)
    if not found.passed:
        raise typer.Exit(1)
