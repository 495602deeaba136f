"""Begin a run in a folder, or pick it up again: options, text and checkpoint are checked for agreement."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .checkpoint import Checkpoint, CheckpointError, list_checkpoints, newest_checkpoint
from .config import RunConfig
from .corpus import Corpus, open_packed, pack
from .distributed import Team
from .distributed_checkpoint import newest_for_all
from .loop import Trainer
from .sources import find_sources, standard_library

FREE_OPTIONS = frozenset({"checkpoint_every", "eval_every", "sample_bytes"})
"""Options that a resumed run may change: they do not change what is learned."""


def parse_device(name: str) -> torch.device:
    """The device of a name; "auto" is CUDA where there is one, else the CPU.

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used: {reason}; 'cpu' always can") from None
    if device.type == "meta":
        raise ValueError("device 'meta' holds no data; choose 'cpu' or 'cuda'")
    return device


def _pack(config: RunConfig, folder: Path) -> Corpus:
    sources = find_sources([Path(path) for path in config.data]) if config.data else standard_library()
    fraction, length = config.training.held_out_fraction, config.model.context_length
    return pack(sources, folder / "data", held_out_fraction=fraction, context_length=length)


def start_run(
    config: RunConfig, folder: Path, *, device: torch.device, compile_model: bool = False, team: Team | None = None
) -> Trainer:
    """Pack the text of ``config`` into ``folder`` and begin a run there; with a ``team`` every rank calls it.

    Raises:
        ValueError: the text is missing, unreadable or too short; the folder holds a run or cannot be made.
    """
    if existing := list_checkpoints(folder / "checkpoints"):
        raise ValueError(
            f"{str(folder)!r} already holds a run at step {existing[0][0]}; continue it with --resume or "
            "name another folder with --output"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder {str(folder)!r}: {error.strerror}") from None
    corpus = _pack_once(config, folder, team)
    return Trainer(config, corpus, folder, device=device, compile_model=compile_model, team=team)


def _pack_once(config: RunConfig, folder: Path, team: Team | None) -> Corpus:
    """The packed text, which with a team rank 0 packs for all."""
    if team is None:
        return _pack(config, folder)
    return team.after_main(lambda: _pack(config, folder), lambda: open_packed(folder / "data"))


def resume_run(
    folder: Path,
    given: Mapping[str, Any],
    *,
    device: torch.device | None,
    compile_model: bool = False,
    team: Team | None = None,
) -> tuple[Trainer, list[str]]:
    """Continue the run in ``folder`` from its newest complete checkpoint; returns it and notes for the user.

    ``given`` holds options by name as the user gave them; they must be those of the run, but for
    `FREE_OPTIONS`. The text is the packed copy in the folder; where that is missing or damaged, it is packed
    again from its sources. ``device`` None is the kind of device that the run was on, if there is one here.
    With a ``team`` every rank calls it; the run may have had other ranks, or one process, before.

    Raises:
        CheckpointError: no complete checkpoint, or one that does not fit.
        ValueError: an option differs from the run's, or the text is gone or has changed.
    """
    where: Path | None = None
    if team is None:
        checkpoint, notes = newest_checkpoint(folder / "checkpoints")
    else:
        where, checkpoint, notes = newest_for_all(folder / "checkpoints", team)
    notes = [f"{message}; continuing from step {checkpoint.step}" for message in notes]
    try:
        config = RunConfig.from_dict(checkpoint.records["run"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"the checkpoint in {str(folder)!r} is not one of this command: {error}") from None
    training = dataclasses.asdict(config.training)
    own = {
        "preset": config.preset,
        "data": config.data,
        "context_length": config.model.context_length,
        **training,
    }
    for name, value in given.items():
        if own[name] != value and name not in FREE_OPTIONS:
            option = "--" + name.replace("_", "-")
            raise ValueError(
                f"{option} is {_shown(value)}, but the run in {str(folder)!r} has {_shown(own[name])}; leave "
                f"{option} out, or start a new run in another folder"
            )
    changed = {name: given[name] for name in FREE_OPTIONS & given.keys()}
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, **changed))
    corpus, problem = _packed_before(config, folder, team)
    notes += [f"{problem}; packing the text again"] if problem else []
    device = device or _device_of(checkpoint)
    trainer = Trainer(config, corpus, folder, device=device, compile_model=compile_model, team=team)
    return trainer, notes + trainer.restore(checkpoint, where)


def _packed_before(config: RunConfig, folder: Path, team: Team | None) -> tuple[Corpus, str]:
    """The text that a run has packed, and why it had to be packed again, if so."""

    def open_or_pack() -> tuple[Corpus, str]:
        try:
            return open_packed(folder / "data"), ""
        except ValueError as error:
            return _pack(config, folder), str(error)

    if team is None:
        return open_or_pack()
    return team.after_main(open_or_pack, lambda: (open_packed(folder / "data"), ""))


def _device_of(checkpoint: Checkpoint) -> torch.device:
    """The kind of device that wrote a checkpoint, or "auto" where that cannot be used or is not recorded."""
    try:
        return parse_device(str(checkpoint.records["progress"]["environment"]["device"]))
    except (KeyError, TypeError, ValueError):
        return parse_device("auto")


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(repr, value)) or "the standard library"
    return repr(value)
