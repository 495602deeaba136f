"""Checkpoints on disk: folders of safetensors and JSON that are complete or not there.

A checkpoint is written into a temporary folder beside its place, every file is synced, the manifest (sizes
and SHA-256 of the others) comes last, and one rename makes it visible. Reading checks the manifest, and
executes nothing that a file contains: no pickle is involved.

One process writes a file for each kind of tensors; several ranks write a file of shards each, which reading joins.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import sync_folder, write_synced

_FORMAT = "dilated-attention checkpoint 1"
_MANIFEST = "manifest.json"
_SHARD = "shard-"
_NAME = re.compile(r"step-(\d{8,})")
_TEMPORARY = re.compile(r"\.step-\d{8,}\.\d+\.tmp")


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or not one of this command."""


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint: JSON records by name and tensors by file name and tensor name."""

    step: int
    records: Mapping[str, Any]
    tensors: Mapping[str, Mapping[str, Tensor]]


def write_checkpoint(root: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write a checkpoint below ``root`` and delete all but the newest ``keep``.

    Raises:
        OSError: the disk refuses; what was complete before is untouched and the part written is gone.
    """
    from safetensors.torch import save

    target, beside = begin_folder(root, checkpoint.step)
    try:
        table: dict[str, dict[str, Any]] = {}
        contents = {
            f"{name}.json": json.dumps(record, indent=1).encode() for name, record in checkpoint.records.items()
        }
        for name, content in contents.items():
            table[name] = _write_member(beside / name, content)
        for name, tensors in checkpoint.tensors.items():  # serialised one by one, to hold one copy at a time
            table[f"{name}.safetensors"] = _write_member(beside / f"{name}.safetensors", save(dict(tensors)))
        finish_folder(beside, target, checkpoint.step, table, keep=keep)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return target


def begin_folder(root: Path, step: int) -> tuple[Path, Path]:
    """(where the checkpoint of a step goes, a new temporary folder beside it); removes what killed processes left."""
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.iterdir():
        if _TEMPORARY.fullmatch(leftover.name):
            shutil.rmtree(leftover, ignore_errors=True)
    target = root / f"step-{step:08d}"
    beside = root / f".{target.name}.{os.getpid()}.tmp"
    beside.mkdir()
    return target, beside


def finish_folder(beside: Path, target: Path, step: int, files: Mapping[str, Any], *, keep: int) -> None:
    """Make a temporary folder of synced ``files`` a complete checkpoint, and delete all but the newest ``keep``."""
    manifest = {"format": _FORMAT, "step": step, "files": files}
    write_synced(beside / _MANIFEST, [json.dumps(manifest, indent=1).encode()])
    sync_folder(beside)
    if target.exists():
        shutil.rmtree(target)
    beside.rename(target)
    sync_folder(target.parent)
    for _, old in list_checkpoints(target.parent)[keep:]:
        shutil.rmtree(old, ignore_errors=True)


def describe_file(path: Path) -> dict[str, Any]:
    """The entry of a file in the manifest."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _write_member(path: Path, content: bytes) -> dict[str, Any]:
    write_synced(path, [content])
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def list_checkpoints(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of what is named like a checkpoint below ``root``, newest first; nothing is checked."""
    if not root.is_dir():
        return []
    found = ((_NAME.fullmatch(path.name), path) for path in root.iterdir())
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def read_checkpoint(folder: Path, *, join: bool = True) -> Checkpoint:
    """Read a checkpoint whose files all have the size and hash of its manifest.

    With ``join`` False the shards of several ranks are checked and stay on disk.

    Raises:
        CheckpointError: something is missing or differs; the message names the folder and the file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    manifest = _manifest(folder)
    records: dict[str, Any] = {}
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, entry in manifest["files"].items():
        path = folder / name
        if name.startswith(_SHARD):
            _check_shard(folder, path, entry)
            continue
        try:
            content = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"checkpoint {str(folder)!r} is damaged: {name}: {error.strerror}") from None
        if len(content) != entry["bytes"] or hashlib.sha256(content).hexdigest() != entry["sha256"]:
            raise CheckpointError(f"checkpoint {str(folder)!r} is damaged: {name} is not what was written")
        try:
            if path.suffix == ".json":
                records[path.stem] = json.loads(content)
            else:
                tensors[path.stem] = load(content)
        except (ValueError, SafetensorError):
            raise CheckpointError(f"{str(folder)!r} is not a checkpoint of this command: {name} is malformed") from None
    if is_sharded(folder) and join:
        tensors = _joined(folder)
    return Checkpoint(manifest["step"], records, tensors)


def is_sharded(folder: Path) -> bool:
    """Whether several ranks wrote the checkpoint in ``folder``."""
    return any(folder.glob(f"{_SHARD}*.safetensors"))


def _check_shard(folder: Path, path: Path, entry: Mapping[str, Any]) -> None:
    try:
        same = describe_file(path) == entry
    except OSError as error:
        raise CheckpointError(f"checkpoint {str(folder)!r} is damaged: {path.name}: {error.strerror}") from None
    if not same:
        raise CheckpointError(f"checkpoint {str(folder)!r} is damaged: {path.name} is not what was written")


def _joined(folder: Path) -> dict[str, dict[str, Tensor]]:
    """All tensors of a checkpoint of several ranks, whole; of the random generators those of the first rank."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = HuggingFaceStorageReader(str(folder))
    found = reader.read_metadata().state_dict_metadata
    flat = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in found.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # as no_dist asks for
        load(flat, storage_reader=reader, no_dist=True)
    tensors: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "random": {}}
    for name, tensor in flat.items():
        kind, _, rest = name.partition(".")
        if kind == "random":
            rest, _, rank = rest.partition(".")
            if rank != "0":
                continue
        tensors.setdefault(kind, {})[rest] = tensor
    return tensors


def _manifest(folder: Path) -> dict[str, Any]:
    foreign = f"{str(folder)!r} is not a checkpoint of this command"
    try:
        manifest = json.loads((folder / _MANIFEST).read_bytes())
    except OSError:
        missing = f"it has no {_MANIFEST}" if folder.exists() else "there is nothing of this name"
        raise CheckpointError(f"{foreign}: {missing}") from None
    except ValueError:
        raise CheckpointError(f"checkpoint {str(folder)!r} is damaged: {_MANIFEST} is no JSON") from None
    try:
        sound = manifest["format"] == _FORMAT and isinstance(manifest["step"], int)
        for name, entry in manifest["files"].items():
            # A name is a plain file name: a manifest cannot make us read elsewhere.
            sound &= re.fullmatch(r"[a-z0-9-]+\.(json|safetensors)", name) is not None
            sound &= isinstance(entry["bytes"], int) and isinstance(entry["sha256"], str)
    except (KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise CheckpointError(f"{foreign}: its {_MANIFEST} has another format")
    return manifest


def newest_checkpoint(root: Path, *, join: bool = True) -> tuple[Checkpoint, list[str]]:
    """The newest complete checkpoint below ``root``, and a message for each newer one that is damaged.

    Raises:
        CheckpointError: there is none.
    """
    messages: list[str] = []
    for _, folder in list_checkpoints(root):
        try:
            return read_checkpoint(folder, join=join), messages
        except CheckpointError as error:
            messages.append(str(error))
    raise CheckpointError("; ".join(messages) or f"no checkpoint in {str(root)!r}; start the run without --resume")


def iter_tensor_problems(saved: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Iterator[str]:
    """What keeps ``saved`` from being loaded into ``expected``: names, shapes, dtypes."""
    for name in sorted(saved.keys() ^ expected.keys()):
        yield f"{name} is {'missing' if name in expected else 'unknown'}"
    for name in sorted(saved.keys() & expected.keys()):
        a, b = saved[name], expected[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            yield f"{name} is {a.dtype} {tuple(a.shape)}, the model has {b.dtype} {tuple(b.shape)}"
