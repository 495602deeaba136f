"""``dilated-attention bench parallel``: context parallelism on the ranks of this machine, or of torchrun."""

from __future__ import annotations

import json
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import FAILED, fail, one_line_errors
from .problem import Batch, Causal, Dtype, HeadDim, KvHeads, Rates, Segments, integers

if TYPE_CHECKING:
    from ..benchmarking.parallel import ParallelMeasurement, Plan

STRATEGIES = ("ring", "gather", "ulysses", "hybrid")


class ShardLayout(StrEnum):
    """How rows are dealt to ranks."""

    contiguous = "contiguous"
    zigzag = "zigzag"


def parallel(
    ranks: Annotated[
        int | None, typer.Option(help="Processes to start; by default the GPUs of this machine, or 2 on a CPU.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens a rank; by default 131072 on CUDA, 2048 on a CPU.")] = None,
    strategies: Annotated[str, typer.Option(help="Names with commas between.")] = ",".join(STRATEGIES),
    segments: Segments = None,
    rates: Rates = None,
    batch: Batch = 1,
    heads: Annotated[int | None, typer.Option(help="Heads; by default 16 on CUDA, 4 on a CPU.")] = None,
    kv_heads: KvHeads = None,
    head_dim: HeadDim = 64,
    causal: Causal = False,
    layout: Annotated[ShardLayout, typer.Option(help="Zigzag gives ranks equal causal work.")] = ShardLayout.contiguous,
    dtype: Annotated[Dtype | None, typer.Option(help="By default bfloat16 on CUDA, float32 on a CPU.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    repeats: Annotated[int, typer.Option(help="Runs of which the median counts.")] = 5,
    output: Annotated[Path, typer.Option(help="The JSON file of the results.")] = Path("runs/bench_parallel.json"),
) -> None:
    """Time context parallelism over 1, 2, 4, ... ranks: weak and strong scaling, bytes, hidden communication.

    Starts its own processes on this machine (gloo on CPUs, NCCL on GPUs), or is one of torchrun's. Every point is a
    forward and a backward pass, the same with exchanges that move nothing, and the exchanges alone; bytes and messages
    are compared with the formula, and the exchange with an all-gather of all keys and values. "hybrid", in which pairs
    of ranks divide heads, is measured on 4, 8, ... ranks. The file gets every measurement, and the rates that
    `dilated-attention plan --measured` reckons with.

    Exit code 1 where a byte count is not what the formula says.
    """
    with one_line_errors():
        from ..benchmarking import ranks as processes
        from ..training.files import replace_file

        plan = _read(
            ranks=ranks, tokens=tokens, strategies=strategies, segments=segments, rates=rates, batch=batch, heads=heads,
            kv_heads=kv_heads, head_dim=head_dim, causal=causal, layout=layout, dtype=dtype, device=device,
            repeats=repeats,
        )  # fmt: skip
        found = processes.join(plan, _say) if processes.started_by_torchrun() else processes.spawn(plan, _say)
        if found is None:
            return
        output.parent.mkdir(parents=True, exist_ok=True)
        report = {"run": _run(plan), **found}
        replace_file(output, [(json.dumps(report, indent=1, allow_nan=False) + "\n").encode()])
    _show(found)
    typer.echo(f"wrote {output}")
    if wrong := [one for one in found["measurements"] if not one["formula"]]:
        raise fail(f"{len(wrong)} points sent other bytes or messages than the formula says", FAILED)


def _read(
    *,
    ranks: int | None,
    tokens: int | None,
    strategies: str,
    segments: str | None,
    rates: str | None,
    batch: int,
    heads: int | None,
    kv_heads: int | None,
    head_dim: int,
    causal: bool,
    layout: ShardLayout,
    dtype: Dtype | None,
    device: str,
    repeats: int,
) -> Plan:
    """The run that the options ask for; ValueError where one makes no sense."""
    import torch

    from ..benchmarking import ranks as processes
    from ..benchmarking.parallel import ParallelSetting, Plan
    from ..patterns import DilatedPattern
    from ..training import parse_device

    kind = parse_device(device).type
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"--device is {device!r}; ranks run on cpu or cuda")
    world = torch.cuda.device_count() if kind == "cuda" else 2
    if processes.started_by_torchrun():
        world = processes.world_of_torchrun()
        if ranks not in (None, world):
            raise ValueError(f"--ranks is {ranks}, and torchrun started {world}; leave --ranks out")
    world = world if ranks is None else ranks
    if kind == "cuda" and world > torch.cuda.device_count() and not processes.started_by_torchrun():
        raise ValueError(f"--ranks is {world}, and there are {torch.cuda.device_count()} GPUs; give at most that many")
    each = tokens if tokens is not None else 131072 if kind == "cuda" else 2048
    for name, value in (("--ranks", world), ("--tokens", each), ("--repeats", repeats)):
        if value < 1:
            raise ValueError(f"{name} is {value}; give at least 1")
    names = tuple(name.strip() for name in strategies.split(",") if name.strip())
    for name in names:
        if name not in STRATEGIES:
            raise ValueError(f"--strategies has {name!r}; choose from {', '.join(STRATEGIES)}")
    if not names:
        raise ValueError(f"--strategies is {strategies!r}; choose from {', '.join(STRATEGIES)}")
    if (segments is None) != (rates is None):
        raise ValueError("one of --segments and --rates is given; give both, or neither for LongNet's rule")
    count = heads if heads is not None else 16 if kind == "cuda" else 4
    if segments is None or rates is None:
        pattern = DilatedPattern.geometric(each * world, first_segment=max(1, each // 4), ratio=4, max_rate=count)
    else:
        pattern = DilatedPattern(integers("--segments", segments), integers("--rates", rates))
    kv = count if kv_heads is None else kv_heads
    if min(batch, count, kv, head_dim) < 1 or count % kv:
        raise ValueError(f"--batch {batch}, --heads {count}, --kv-heads {kv} and --head-dim {head_dim} do not fit")
    chosen = dtype or (Dtype.bfloat16 if kind == "cuda" else Dtype.float32)
    setting = ParallelSetting(
        pattern=pattern, batch=batch, heads=count, kv_heads=kv, head_dim=head_dim, dtype=getattr(torch, chosen.value),
        device=kind, is_causal=causal, layout=layout.value, repeats=repeats,
    )  # fmt: skip
    worlds = tuple(sorted({1, world, *(1 << n for n in range(world.bit_length()) if 1 << n <= world)}))
    return Plan(setting=setting, worlds=worlds, tokens_per_rank=each, strategies=names)  # type: ignore[arg-type]


def _run(plan: Plan) -> dict[str, Any]:
    """What was measured, on what."""
    from .doctor import devices, versions

    setting = plan.setting
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "versions": versions(),
        "devices": devices(),
        "tokens_per_rank": plan.tokens_per_rank,
        "segment_lengths": setting.pattern.segment_lengths,
        "dilation_rates": setting.pattern.dilation_rates,
        "batch": setting.batch, "heads": setting.heads, "kv_heads": setting.kv_heads, "head_dim": setting.head_dim,
        "dtype": str(setting.dtype).removeprefix("torch."), "device": setting.device,
        "is_causal": setting.is_causal, "layout": setting.layout, "repeats": setting.repeats,
    }  # fmt: skip


def _say(one: ParallelMeasurement) -> None:
    """A line for each point; runs in the first rank's process."""
    typer.echo(
        f"{one.scaling:<7} {one.world} ranks  {one.tokens:>10,} tokens  {one.strategy:<8} forward "
        f"{one.forward.total:,.1f} ms, forward and backward {one.both.total:,.1f} ms"
    )


def _show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=max(126, Console().width))
    table = Table(title="Context parallelism")
    columns = "scaling", "ranks", "strategy", "tokens", "tokens/s", "efficiency", "MiB sent", "exposed", "exchange"
    for name in (*columns, "all-gather", "MiB"):
        table.add_column(name, justify="left" if name in ("scaling", "strategy") else "right", no_wrap=True)
    alone = {
        (one["scaling"], one["strategy"]): one["tokens_per_second"]
        for one in found["measurements"]
        if one["world"] == 1
    }
    for one in found["measurements"]:
        first = alone.get((one["scaling"], one["strategy"]), alone.get(("weak", one["strategy"])))
        exposed = one["both"]["exposed"]
        table.add_row(
            one["scaling"], str(one["world"]), one["strategy"], f"{one['tokens']:,}",
            f"{one['tokens_per_second']:,.0f}",
            "" if first is None else f"{one['tokens_per_second'] / one['world'] / first:.1%}",
            f"{one['bytes_both'] / 2**20:,.2f}", "" if exposed is None else f"{exposed:.0%}",
            f"{one['forward']['exchange']:,.2f} ms", f"{one['full_gather_ms']:,.2f} ms",
            f"{(one['peak_bytes'] or one['receive_bytes']) / 2**20:,.1f}",
        )  # fmt: skip
    console.print(table)
    console.print(
        "exposed: the share of the exchanges that computing does not hide, forward and backward; exchange: of a "
        "forward pass, alone; all-gather: of all keys and values, alone; MiB: of a rank, device memory, on a CPU "
        "receive buffers",
        highlight=False,
    )
    rates = found["rates"]
    console.print(
        f"rates: forward {rates['forward_flops'] / 1e12:,.3g} TFLOP/s, backward {rates['backward_flops'] / 1e12:,.3g} "
        f"TFLOP/s, {rates['bandwidth'] / 1e9:,.3g} GB/s, {1e6 * rates['latency']:,.3g} us an exchange",
        highlight=False,
    )
