"""``dilated-attention train``: a byte-level LongNet language model from text."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import INTERRUPTED, one_line_errors

if TYPE_CHECKING:
    from rich.console import Console

    from ..training import Trainer

RUNS = Path("runs")


class Preset(StrEnum):
    """Sizes to choose from."""

    demo = "demo"
    small = "small"
    base = "base"


class Dtype(StrEnum):
    """What matrix products run in."""

    float32 = "float32"
    bfloat16 = "bfloat16"


def train(
    data: Annotated[
        list[Path] | None,
        typer.Option(help="File or folder of text; repeat for more. By default the Python standard library's source."),
    ] = None,
    preset: Annotated[
        Preset | None,
        typer.Option(help="Sizes: demo (a CPU, minutes; the default), small, base (the paper's)."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder of the run. By default runs/PRESET, numbered if that is taken."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the output folder.")] = False,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Windows a step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    context_length: Annotated[
        int | None, typer.Option(help="Bytes of context. Another than the preset's gets segments of its own.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, windows and the sample.")] = None,
    device: Annotated[str, typer.Option(help="auto (with --resume, as before), cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[
        Dtype | None, typer.Option(help="bfloat16 is autocast. By default bfloat16 on CUDA, else float32.")
    ] = None,
    compile_model: Annotated[bool, typer.Option("--compile/--no-compile", help="Use torch.compile.")] = False,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    eval_every: Annotated[int | None, typer.Option(help="Steps between evaluations on held-out text.")] = None,
    sample_bytes: Annotated[int | None, typer.Option(help="Bytes of text generated at the end; 0 for none.")] = None,
    context_parallel: Annotated[
        int | None, typer.Option(help="Under torchrun: ranks that share each sequence, a divisor of their number.")
    ] = None,
    fsdp: Annotated[bool, typer.Option("--fsdp", help="Under torchrun: shard weights and optimizer too.")] = False,
    peer_timeout: Annotated[
        float, typer.Option(help="Under torchrun: seconds after which a silent rank counts as failed.")
    ] = 30.0,
) -> None:
    """Train a byte-level LongNet language model on text.

    The output folder gets metrics.jsonl, loss.png, position.png (bits per byte by position in the context),
    sample.txt, summary.json and checkpoints/. Ctrl-C saves a checkpoint; --resume continues a run, after a
    kill too, and on the CPU bit for bit.

    Under torchrun, --context-parallel N shards every sequence over N ranks; replicas share the windows of a
    step. A restart by torchrun --max-restarts goes on from the last complete checkpoint.

    Text is any UTF-8 file without NUL bytes. Some files are held out to measure on (of a single file, its
    end).
    """
    given: dict[str, Any] = {
        "preset": None if preset is None else preset.value,
        "data": None if not data else tuple(map(str, data)),
        "dtype": None if dtype is None else dtype.value,
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "context_length": context_length,
        "seed": seed,
        "checkpoint_every": checkpoint_every,
        "eval_every": eval_every,
        "sample_bytes": sample_bytes,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if context_parallel is not None or fsdp or "TORCHELASTIC_RUN_ID" in os.environ:
        from ..training import TeamConfig
        from .train_team import train_in_team

        config = TeamConfig(
            context_parallel=1 if context_parallel is None else context_parallel, fsdp=fsdp, timeout=peer_timeout
        )
        train_in_team(given, output, resume=resume, device=device, compile_model=compile_model, config=config)
        return
    with one_line_errors():
        trainer, notes, console = _open(given, output, resume=resume, device=device, compile_model=compile_model)
    hint = f"continue with: dilated-attention train --output {trainer.folder} --resume"
    try:
        with one_line_errors(hint=f"the last checkpoint is complete; {hint}"):
            _run(trainer, notes, console, hint)
    except KeyboardInterrupt:
        console.print(f"\nInterrupted; {hint}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None


def _open(
    given: dict[str, Any], output: Path | None, *, resume: bool, device: str, compile_model: bool
) -> tuple[Trainer, list[str], Console]:
    from rich.console import Console

    from ..training import RunConfig, parse_device, resume_run, start_run

    preset = given.get("preset", "demo")
    if resume:
        folder = output or _default_folder(preset, taken=True)
        same = None if device == "auto" else parse_device(device)
        trainer, notes = resume_run(folder, given, device=same, compile_model=compile_model)
    else:
        where = parse_device(device)
        config = RunConfig.from_preset(
            **{"preset": preset, "dtype": "bfloat16" if where.type == "cuda" else "float32", **given}
        )
        folder = output or _default_folder(preset, taken=False)
        trainer, notes = start_run(config, folder, device=where, compile_model=compile_model), []
    return trainer, notes, Console()


def _default_folder(preset: str, *, taken: bool) -> Path:
    """runs/<preset>, runs/<preset>-2, ...: the first that is free, or the last that is taken."""
    count = 0
    while _numbered(preset, count + 1).exists():
        count += 1
    return _numbered(preset, max(1, count) if taken else count + 1)


def _numbered(preset: str, number: int) -> Path:
    return RUNS / (preset if number == 1 else f"{preset}-{number}")


def _run(trainer: Trainer, notes: list[str], console: Console, hint: str) -> None:
    from ..training import finish_run
    from .progress import TrainingProgress
    from .summary import show_end, show_start

    show_start(console, trainer)
    for note in notes:
        console.print(f"note: {note}", markup=False, highlight=False)
    progress = TrainingProgress.of(console, trainer)
    with stop_on_signal() as should_stop, progress:
        finished = trainer.train(progress, should_stop=should_stop)
    if not finished:
        raise KeyboardInterrupt
    console.print("Evaluating on held-out text and drawing a sample ...", highlight=False)
    summary, sample, files = finish_run(trainer)
    show_end(console, summary, sample, files)


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Ask to stop after the step at hand on SIGINT or SIGTERM; a second one interrupts at once."""
    asked = False

    def handle(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
