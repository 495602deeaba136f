"""Checkpoints: what is written comes back, and neither damage, a kill nor a full disk loses one."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from dilated_attention_pytorch.training import checkpoint as module
from dilated_attention_pytorch.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    list_checkpoints,
    newest_checkpoint,
    read_checkpoint,
    write_checkpoint,
)

FILES = ("model.safetensors", "optimizer.safetensors", "run.json")


def make(step: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    tensors = {
        "model": {
            "weight": torch.randn(5, 3, generator=generator),
            "half": torch.randn(4, generator=generator).bfloat16(),
            "bytes": torch.arange(7, dtype=torch.uint8),
        },
        "optimizer": {
            "weight.step": torch.tensor(float(step)),
            "odd.exp_avg": torch.randn(2, 2)[:, 0].clone(),
        },
    }
    return Checkpoint(step, {"run": {"preset": "demo", "list": [1, 2]}}, tensors)


def assert_same(a: Checkpoint, b: Checkpoint) -> None:
    assert (a.step, a.records, a.tensors.keys()) == (b.step, b.records, b.tensors.keys())
    for name, tensors in a.tensors.items():
        assert tensors.keys() == b.tensors[name].keys()
        for key, tensor in tensors.items():
            assert tensor.dtype == b.tensors[name][key].dtype
            assert tensor.equal(b.tensors[name][key])


def test_what_is_written_comes_back(tmp_path: Path):
    written = make(3)
    folder = write_checkpoint(tmp_path, written, keep=2)
    assert folder == tmp_path / "step-00000003"
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FILES, "manifest.json"])
    assert_same(read_checkpoint(folder), written)
    assert_same(newest_checkpoint(tmp_path)[0], written)


def test_the_newest_are_kept(tmp_path: Path):
    for step in (5, 10, 100000000, 15):  # 9 digits sort behind 8
        write_checkpoint(tmp_path, make(step), keep=2)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [100000000, 15]


def test_writing_a_step_again_replaces_it(tmp_path: Path):
    folder = write_checkpoint(tmp_path, make(5), keep=2)
    (folder / "model.safetensors").write_bytes(b"damage")
    write_checkpoint(tmp_path, make(5), keep=2)
    assert_same(newest_checkpoint(tmp_path)[0], make_like(tmp_path, 5))


def make_like(root: Path, step: int) -> Checkpoint:
    return read_checkpoint(root / f"step-{step:08d}")


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGE = {
    "flip": _flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "grow": lambda path: path.write_bytes(path.read_bytes() + b" "),
    "empty": lambda path: path.write_bytes(b""),
    "remove": Path.unlink,
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named_and_the_one_before_is_taken(tmp_path: Path, name: str, damage: str):
    write_checkpoint(tmp_path, make(1), keep=2)
    folder = write_checkpoint(tmp_path, make(2), keep=2)
    DAMAGE[damage](folder / name)
    with pytest.raises(CheckpointError, match="is damaged") as caught:
        read_checkpoint(folder)
    assert name in str(caught.value)
    found, messages = newest_checkpoint(tmp_path)
    assert found.step == 1
    assert messages == [str(caught.value)]


def _manifest_with(**changes: object):
    def change(folder: Path) -> None:
        path = folder / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


ENTRY = {"bytes": 1, "sha256": "0"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda folder: (folder / "manifest.json").unlink(),
            "is not a checkpoint of this command: it has no manifest",
        ),
        (lambda folder: (folder / "manifest.json").write_text("{"), "is damaged: manifest.json is no JSON"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "has another format"),
        (_manifest_with(format="something else"), "has another format"),
        (_manifest_with(step="3"), "has another format"),
        (_manifest_with(files=None), "has another format"),
        (_manifest_with(files={"model.safetensors": 3}), "has another format"),
        (_manifest_with(files={"../../secret.json": ENTRY}), "has another format"),
        (_manifest_with(files={"/etc/passwd": ENTRY}), "has another format"),
        (_manifest_with(files={"model.pt": ENTRY}), "has another format"),
    ],
)
def test_a_foreign_folder_is_refused(tmp_path: Path, change, message: str):
    folder = write_checkpoint(tmp_path, make(2), keep=2)
    change(folder)
    with pytest.raises(CheckpointError) as caught:
        newest_checkpoint(tmp_path)
    assert message in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_pickle_is_never_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Even with a manifest that vouches for it."""
    import hashlib

    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    folder = write_checkpoint(tmp_path / "root", make(2), keep=2)
    content = pickle.dumps(Payload())
    (folder / "model.safetensors").write_bytes(content)
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    _manifest_with(files={"model.safetensors": entry})(folder)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is malformed"):
        read_checkpoint(folder)
    assert not (tmp_path / "executed").exists()


def test_no_checkpoint_is_an_error(tmp_path: Path):
    for root in (tmp_path, tmp_path / "missing"):
        with pytest.raises(CheckpointError, match="no checkpoint in"):
            newest_checkpoint(root)


class Killed(BaseException):
    """Stands for the end of the process."""


WRITES = len(FILES) + 1


@pytest.mark.parametrize("failing", range(WRITES))
def test_a_full_disk_keeps_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int):
    write_checkpoint(tmp_path, make(1), keep=2)
    real, count = module.write_synced, iter(range(WRITES))

    def write(path: Path, chunks: list[bytes]) -> None:
        if next(count) == failing:
            path.write_bytes(chunks[0][: len(chunks[0]) // 2])
            raise OSError(28, "No space left on device", str(path))
        real(path, chunks)

    monkeypatch.setattr(module, "write_synced", write)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(tmp_path, make(2), keep=2)
    monkeypatch.undo()
    assert_same(newest_checkpoint(tmp_path)[0], make_like(tmp_path, 1))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]  # the part written is gone
    write_checkpoint(tmp_path, make(2), keep=2)
    assert newest_checkpoint(tmp_path)[0].step == 2


@pytest.mark.parametrize("failing", range(WRITES + 1))
def test_a_kill_at_any_write_keeps_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int):
    write_checkpoint(tmp_path, make(1), keep=2)
    real, count = module.write_synced, iter(range(WRITES))

    def write(path: Path, chunks: list[bytes]) -> None:
        if next(count) == failing:
            path.write_bytes(chunks[0][: len(chunks[0]) // 2])
            raise Killed
        real(path, chunks)

    def rename(self: Path, target: Path) -> None:
        raise Killed

    monkeypatch.setattr(module, "write_synced", write)
    monkeypatch.setattr(Path, "rename", rename)  # the kill after the last write
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # nobody cleans up
    with pytest.raises(Killed):
        write_checkpoint(tmp_path, make(2), keep=2)
    monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == 2
    found, messages = newest_checkpoint(tmp_path)
    assert (found.step, messages) == (1, [])
    write_checkpoint(tmp_path, make(2), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_old_checkpoints_go_only_after_the_new_one_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for step in (1, 2):
        write_checkpoint(tmp_path, make(step), keep=2)
    seen: list[list[int]] = []
    real = shutil.rmtree

    def watch(path: Path, **kwargs: bool) -> None:
        seen.append([step for step, _ in list_checkpoints(tmp_path)])
        real(path, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", watch)
    write_checkpoint(tmp_path, make(3), keep=2)
    assert seen == [[3, 2, 1]]
