"""Checkpoints that all ranks write together (torch.distributed.checkpoint), complete or not there like any other.

A folder holds safetensors of shards, one file a rank, and the same JSON records and manifest as a checkpoint of one
process; `checkpoint.read_checkpoint` puts the shards together, so one process reads both kinds. Ranks of any number
read the parts that they hold.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, distribute_tensor

from .checkpoint import (
    Checkpoint,
    CheckpointError,
    begin_folder,
    describe_file,
    finish_folder,
    list_checkpoints,
    newest_checkpoint,
)
from .distributed import Team
from .files import write_synced
from .state import MODEL, OPTIMIZER, RANDOM, Optimizers, optimizer_tensors, random_tensors


def _flat(model: nn.Module, optimizers: Optimizers, team: Team) -> dict[str, Tensor]:
    """All tensors of a run that this rank holds a part of, by the names that they have in a checkpoint."""
    state = {f"{MODEL}.{name}": tensor for name, tensor in model.state_dict().items()}
    state |= {f"{OPTIMIZER}.{name}": tensor for name, tensor in optimizer_tensors(model, optimizers).items()}
    return state | {f"{RANDOM}.{kind}.{team.rank}": t for kind, t in random_tensors(team.device).items()}


def write_sharded(
    root: Path,
    step: int,
    records: Mapping[str, Any],
    model: nn.Module,
    optimizers: Optimizers,
    team: Team,
    *,
    keep: int,
) -> Path:
    """Write a checkpoint below ``root``; every rank calls it. Afterwards it is complete, on every rank.

    Raises:
        OSError: the disk refuses; what was complete before is untouched.
    """
    made: list[Any] = [begin_folder(root, step) if team.is_main else None]
    dist.broadcast_object_list(made, src=0, group=team.group)
    target, folder = made[0]
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    save(_flat(model, optimizers, team), storage_writer=writer, process_group=team.group)
    mine = sorted(folder.glob(f"shard-{team.rank + 1:05d}-*.safetensors"))
    for path in mine:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    table: list[Any] = [None] * team.world
    dist.all_gather_object(table, {path.name: describe_file(path) for path in mine}, group=team.group)
    if team.is_main:
        files = {name: entry for part in table for name, entry in part.items()}
        for name, record in records.items():
            write_synced(folder / f"{name}.json", [json.dumps(record, indent=1).encode()])
            files[f"{name}.json"] = describe_file(folder / f"{name}.json")
        finish_folder(folder, target, step, files, keep=keep)
    team.barrier()
    return target


def newest_for_all(root: Path, team: Team) -> tuple[Path, Checkpoint, list[str]]:
    """The newest complete checkpoint, as rank 0 finds it, its records, and messages about damaged ones.

    Shards are not read yet.

    Raises:
        CheckpointError: there is none; on every rank.
    """
    found: list[Any] = [None, None]
    if team.is_main:
        try:
            checkpoint, notes = newest_checkpoint(root, join=False)
            folder = next(path for step, path in list_checkpoints(root) if step == checkpoint.step)
            found = [(folder, checkpoint, notes), None]
        except CheckpointError as error:
            found = [None, str(error)]
    dist.broadcast_object_list(found, src=0, group=team.group)
    if found[1] is not None:
        raise CheckpointError(found[1])
    return found[0]


def load_sharded(folder: Path, model: nn.Module, optimizers: Optimizers, team: Team) -> None:
    """Fill the model, the optimizers and the random generator of this rank from a checkpoint of all ranks.

    A rank that had no counterpart keeps its own random generator.

    Raises:
        CheckpointError: the tensors are not those of this model.
    """
    reader = HuggingFaceStorageReader(str(folder))
    saved = reader.read_metadata().state_dict_metadata
    _make_state(optimizers)
    wanted = _flat(model, optimizers, team)
    state = {name: tensor for name, tensor in wanted.items() if name in saved or not name.startswith(f"{RANDOM}.")}
    if not any(name.startswith(f"{OPTIMIZER}.") for name in saved):  # before the first step
        for optimizer in optimizers:
            optimizer.state.clear()
        state = {name: tensor for name, tensor in state.items() if not name.startswith(f"{OPTIMIZER}.")}
    for name, tensor in state.items():
        size = tuple(getattr(saved.get(name), "size", ()))
        if name not in saved or size != tuple(tensor.shape):
            raise CheckpointError(
                f"the checkpoint does not fit its own configuration: {name} is {size if name in saved else 'missing'}"
            )
    load(state, storage_reader=reader, process_group=team.group)
    # Weights and moments were filled in place.
    if (random := state.get(f"{RANDOM}.cpu.{team.rank}")) is not None:
        torch.set_rng_state(random)
    if team.device.type == "cuda" and (random := state.get(f"{RANDOM}.cuda.{team.rank}")) is not None:
        torch.cuda.set_rng_state(random, team.device)


def _make_state(optimizers: Optimizers) -> None:
    """Give every optimizer the state that a first step makes, to have something to load into."""
    for optimizer in optimizers:
        rates = [group["lr"] for group in optimizer.param_groups]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in parameters]
        for p in parameters:
            p.grad = torch.zeros_like(p)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        optimizer.step()
        with torch.no_grad():
            for p, old in zip(parameters, before, strict=True):
                p.copy_(old)
                p.grad = None
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def spread(saved: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors, the same on every rank, as shards where ``like`` has shards."""
    found = {}
    for name, tensor in saved.items():
        shard = like.get(name)
        if isinstance(shard, DTensor):
            # Every rank has the same tensor, and cuts its shard out of its own: nothing is sent.
            tensor = distribute_tensor(tensor.to(shard.device), shard.device_mesh, shard.placements, src_data_rank=None)
        found[name] = tensor
    return found
