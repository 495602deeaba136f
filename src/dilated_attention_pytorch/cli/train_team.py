"""``dilated-attention train`` in the ranks that torchrun started."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .errors import FAILED, INTERRUPTED, fail, one_line_errors

if TYPE_CHECKING:
    from ..training import RunConfig, Team, TeamConfig, Trainer

_START = "torchrun --nproc-per-node RANKS --max-restarts 3 --no-python dilated-attention train --output FOLDER ..."


def train_in_team(
    given: dict[str, Any], output: Path | None, *, resume: bool, device: str, compile_model: bool, config: TeamConfig
) -> None:
    """Run this rank's part of a training; rank 0 talks to the user. A restart by torchrun resumes by itself."""
    from ..parallel import PeerFailed
    from ..training import Team
    from ..training.distributed import launched, local_device

    with one_line_errors():
        if not launched():
            raise ValueError(f"--context-parallel and --fsdp need ranks; start them with: {_START}")
        if output is None:
            raise ValueError("--output is missing; name the folder, so that a restarted rank finds the run again")
        if compile_model:
            raise ValueError("--compile does not go with --context-parallel and --fsdp; leave one out")
        team = Team(config, local_device(device))
    hint = "continue with the same command and --resume"
    try:
        with one_line_errors(hint=f"the last checkpoint is complete; {hint}"):
            trainer, notes = _open(given, output, team, resume=resume)
            finished = _train(trainer, team, notes)
            weights = trainer.full_weights()
            team.close()
        if not finished:
            raise KeyboardInterrupt
        if team.is_main:
            with one_line_errors(hint="the training itself is done, and its last checkpoint complete"):
                _finish(trainer, weights)
    except PeerFailed as error:
        raise fail(f"rank {team.rank}: {error}; {hint}, or let torchrun --max-restarts do it", FAILED) from None
    except KeyboardInterrupt:
        if team.is_main:
            typer.echo(f"Interrupted; {hint}")
        raise typer.Exit(INTERRUPTED) from None


def _open(given: dict[str, Any], folder: Path, team: Team, *, resume: bool) -> tuple[Trainer, list[str]]:
    from ..training import RunConfig, resume_run, start_run
    from ..training.checkpoint import list_checkpoints
    from ..training.distributed import restarts

    notes: list[str] = []
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) and not os.environ.get(
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
    ):
        notes.append("set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun, or its restarts may not find each other")
    if restarts() and list_checkpoints(folder / "checkpoints"):
        resume = True
        notes.append(f"restarted by torchrun ({restarts()}); going on from the last complete checkpoint")
    if resume:
        trainer, more = resume_run(folder, given, device=team.device, team=team)
        return trainer, notes + more
    dtype = "bfloat16" if team.device.type == "cuda" else "float32"
    config, left_out = _without_neighbours(
        RunConfig.from_preset(**{"preset": "demo", "dtype": dtype, **given}), sharded=team.parallel is not None
    )
    return start_run(config, folder, device=team.device, team=team), notes + left_out


def _without_neighbours(config: RunConfig, *, sharded: bool) -> tuple[RunConfig, list[str]]:
    """The preset without the layers that read rows of another rank, and a line that says so."""
    model = config.model
    if not sharded or not (model.ngram_sizes or model.short_convolution):
        return config, []
    model = dataclasses.replace(model, ngram_sizes=(), short_convolution=0)
    note = f"preset {config.preset} without its n-grams and short convolution, which read rows of the neighbour rank"
    return dataclasses.replace(config, model=model), [note]


def _train(trainer: Trainer, team: Team, notes: list[str]) -> bool:
    from rich.console import Console

    from .progress import TrainingProgress
    from .summary import show_start
    from .train import stop_on_signal

    console = Console(quiet=not team.is_main)
    show_start(console, trainer)
    where = f"{team.world} ranks, {team.config.context_parallel} to a sequence"
    console.print(f"ranks: {where}{', weights sharded (FSDP2)' if team.config.fsdp else ''}", highlight=False)
    for note in notes:
        console.print(f"note: {note}", markup=False, highlight=False)
    progress = TrainingProgress.of(console, trainer)
    with stop_on_signal() as should_stop, progress if team.is_main else contextlib.nullcontext():
        return trainer.train(progress, should_stop=should_stop)


def _finish(trainer: Trainer, weights: dict[str, Any]) -> None:
    """Evaluate, plot and draw a sample with the whole model on this rank."""
    from rich.console import Console

    from ..training import Trainer, finish_run
    from .summary import show_end

    console = Console()
    console.print("Evaluating on held-out text and drawing a sample ...", highlight=False)
    alone = Trainer(trainer.config, trainer.corpus, trainer.folder, device=trainer.device)
    alone.model.load_state_dict(weights)
    alone.step, alone.seconds = trainer.step, trainer.seconds
    show_end(console, *finish_run(alone))
