"""``dilated-attention memory``: traces of memory pools recorded, replayed and drawn; who holds memory in a command."""

from __future__ import annotations

import importlib.util
import json
import shlex
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import fail, one_line_errors
from .problem import integers

if TYPE_CHECKING:
    from rich.table import Table

COMPARISON = "memory comparison"
PROFILE = "memory profile"


class What(StrEnum):
    """What can be recorded."""

    ring = "ring"
    streaming = "streaming"
    training = "training"


memory = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode="rich")


@memory.callback()
def main() -> None:
    """Record what is asked of memory pools, compare pools on it, and see who holds memory."""


@memory.command()
def record(
    what: Annotated[What, typer.Argument(help="A ring of processes, streaming through one device, or training.")],
    output: Annotated[Path, typer.Option(help="The trace to write, JSON lines.")] = Path("trace.jsonl"),
    lengths: Annotated[
        str, typer.Option(help="Rows of the sequence, or two bounds of which each step draws its own: 500-4000.")
    ] = "2048",
    steps: Annotated[int, typer.Option(help="Forward and backward passes.")] = 6,
    ranks: Annotated[int, typer.Option(help="Processes of the ring.")] = 2,
    batch: Annotated[int, typer.Option(help="Batch size.")] = 1,
    heads: Annotated[int, typer.Option(help="Heads.")] = 4,
    head_dim: Annotated[int, typer.Option(help="Head dim.")] = 16,
    segments: Annotated[str, typer.Option(help="Segment lengths.")] = "256,1024,4096",
    rates: Annotated[str, typer.Option(help="Dilation rates, one for each segment length.")] = "1,2,4",
    memory_budget: Annotated[int, typer.Option(help="Bytes that streaming may take on its device.")] = 1 << 22,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
) -> None:
    """Run steps and write every acquire and return: of rank 0's pool, of streaming's pool, or of every tensor of at
    least 1 KiB that a training step makes."""
    with one_line_errors():
        from ..patterns import DilatedPattern
        from ..training import parse_device
        from .memory_record import RECORDERS, Workload
        from .memory_record import lengths as draw_lengths

        counts = {"--steps": steps, "--ranks": ranks, "--batch": batch, "--heads": heads, "--head-dim": head_dim}
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name} is {value}; give at least 1")
        low, high = _bounds(lengths)
        pattern = DilatedPattern(integers("--segments", segments), integers("--rates", rates))
        work = Workload(
            lengths=draw_lengths(low, high, steps), batch=batch, heads=heads, head_dim=head_dim, ranks=ranks,
            segment_lengths=pattern.segment_lengths, dilation_rates=pattern.dilation_rates,
            device=str(parse_device(device)), memory_budget=memory_budget,
        )  # fmt: skip
        if what is What.ring and low < ranks:
            raise ValueError(f"--lengths is {lengths!r} with --ranks {ranks}; give every rank a row at least")
        output.parent.mkdir(parents=True, exist_ok=True)
        RECORDERS[what.value](work, output)
    typer.echo(f"wrote {output}")


def _bounds(text: str) -> tuple[int, int]:
    parts = text.split("-")
    if len(parts) > 2 or not all(part.isascii() and part.isdigit() for part in parts):
        raise ValueError(f"--lengths is {text!r}; give a number of rows, or two with a dash, e.g. 500-4000")
    low, high = int(parts[0]), int(parts[-1])
    if not 1 <= low <= high:
        raise ValueError(f"--lengths is {text!r}; give at least 1 row, and the smaller number first")
    return low, high


@memory.command()
def replay(
    trace: Annotated[Path, typer.Argument(help="What `memory record`, or a pool with trace=..., wrote.")],
    output: Annotated[Path, typer.Option(help="The comparison to write, JSON; `memory plot` draws it.")] = Path(
        "memory.json"
    ),
    pools: Annotated[
        str | None, typer.Option(help="Names with commas between, as in the table. By default all pools.")
    ] = None,
    budget: Annotated[int | None, typer.Option(help="Bytes that a pool may hold.")] = None,
    device: Annotated[str | None, typer.Option(help="For all leases; by default as recorded.")] = None,
    repeats: Annotated[int, typer.Option(help="Runs of the timing.")] = 5,
) -> None:
    """Replay a trace through each kind of pool, and time them beside torch.empty.

    In the table: reuse is the share of requests served without new memory, new the other requests from the third step
    on, peak the most bytes held, unasked the share of bytes on loan that nobody asked for, outside the share of idle
    bytes outside the largest idle block (mean over the trace, and worst at ends of steps, after compaction), us the
    median microseconds of an acquire with its return.
    """
    with one_line_errors():
        from rich.console import Console

        from ..memory import MemoryBudgetExceeded, read_trace
        from ..memory.compare import compare
        from ..training import parse_device
        from ..training.files import replace_file

        names = None if pools is None else [name.strip() for name in pools.split(",")]
        if repeats < 1:
            raise ValueError(f"--repeats is {repeats}; give at least 1")
        read = read_trace(trace)
        where = {device} if device else {event.device for event in read.events if event.op == "acquire"}
        for name in sorted(where):
            parse_device(name)
        try:
            found = compare(read, names=names, budget=budget, device=device, repeats=repeats)
        except MemoryBudgetExceeded as error:
            raise ValueError(f"--budget is too small for this trace: {error}") from None
        found = {"kind": COMPARISON, **found}
        replace_file(output, [(json.dumps(found, indent=1) + "\n").encode()])
        Console().print(_table(found))
    typer.echo(f"wrote {output}")


def _table(found: dict[str, Any]) -> Table:
    from rich.table import Table

    from .memory_pictures import size_text

    table = Table(
        title=f"{found['what'] or 'trace'}: {found['requests']:,} requests of {found['sizes']:,} sizes, at most "
        f"{size_text(found['asked_at_once'])} at once"
    )
    table.add_column("pool", no_wrap=True)
    for name in ("reuse", "new", "peak", "unasked", "outside", "at ends", "us"):
        table.add_column(name, justify="right")
    micros = found["torch_empty_microseconds"]
    table.add_row("torch.empty", *["-"] * 6, "-" if micros is None else f"{micros:.2f}")
    for row in found["pools"]:
        micros = row["microseconds"]
        table.add_row(
            row["pool"], f"{row['reuse']:.1%}", str(sum(row["misses_by_step"][2:])), size_text(row["peak"]),
            f"{row['internal_fragmentation']:.1%}", f"{row['external_fragmentation']:.1%}",
            f"{row['external_fragmentation_after_steps']:.1%}", "-" if micros is None else f"{micros:.2f}",
        )  # fmt: skip
    return table


@memory.command()
def plot(
    found: Annotated[Path, typer.Argument(help="What `memory replay` or `memory profile` wrote.")],
    output: Annotated[Path | None, typer.Option(help="The PNG; by default beside the input.")] = None,
) -> None:
    """Draw a comparison of pools, or who held memory over time. Needs matplotlib."""
    with one_line_errors():
        from ..training.files import replace_file
        from .memory_pictures import draw_comparison, draw_profile

        if importlib.util.find_spec("matplotlib") is None:
            raise ValueError("matplotlib is not installed; run: pip install matplotlib")
        path = found.with_suffix(".png") if output is None else output
        if path.suffix != ".png":
            raise ValueError(f"--output is {str(path)!r}; the picture is a PNG, give a name that ends in .png")
        try:
            content = json.loads(found.read_text(encoding="utf-8"))
            draw = {COMPARISON: draw_comparison, PROFILE: draw_profile}[content["kind"]]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{str(found)!r} is not what `memory replay` or `memory profile` writes") from None
        replace_file(path, [draw(content)])
    typer.echo(f"wrote {path}")


@memory.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def profile(
    command: Annotated[list[str], typer.Argument(help="A command of ours with its options, e.g. train --steps 3.")],
    output: Annotated[Path, typer.Option(help="The profile to write, JSON; `memory plot` draws it.")] = Path(
        "profile.json"
    ),
    device: Annotated[str, typer.Option(help="Whose memory is watched: auto, cpu, cuda, ...")] = "auto",
) -> None:
    """Run a command and write which functions of the library held how much memory over time.

    On a GPU from torch's memory history; on the CPU from every tensor that operators return, without what operators
    need inside. Options of this command come before the command that is run.
    """
    from ..training import parse_device
    from ..training.files import replace_file
    from . import COMMANDS, load_command
    from .memory_pictures import size_text
    from .memory_watch import Change, timeline, watched

    with one_line_errors():
        if command[0] not in COMMANDS or command[0] == "memory":
            allowed = ", ".join(name for name in COMMANDS if name != "memory")
            raise ValueError(f"{command[0]!r} cannot be profiled; choose one of {allowed}")
        where = parse_device(device)
    changes: list[Change] = []
    code: int = 0
    with watched(changes, where):
        try:
            result = load_command(command[0]).main(command[1:], prog_name=command[0], standalone_mode=False)
            code = result if isinstance(result, int) else 0
        except typer.Exit as error:
            code = error.exit_code
        except Exception as error:  # wrong options: of click, or of typer's copy of it
            if (message := getattr(error, "format_message", None)) is None:
                raise
            raise fail(message(), 2) from None
    with one_line_errors():
        found = {"kind": PROFILE, "command": shlex.join(command), "device": str(where), **timeline(changes)}
        replace_file(output, [(json.dumps(found, indent=1) + "\n").encode()])
    typer.echo(f"at most {size_text(found['peak'])}, of which")
    for name, size in list(found["peak_owners"].items())[:8]:
        typer.echo(f"{size_text(size):>12}  {name}")
    typer.echo(f"wrote {output}")
    if code:
        raise typer.Exit(code)
