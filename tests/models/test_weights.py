"""Reading weights: what is damaged, foreign or dangerous is refused with its name, and nothing of it runs."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dilated_attention_pytorch.models.weights import WeightsError, materialise, read_weights

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2).half()}


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def assert_state(found: dict[str, torch.Tensor]) -> None:
    assert found.keys() == STATE.keys()
    assert all(torch.equal(found[name], STATE[name]) and found[name].dtype == STATE[name].dtype for name in STATE)


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors", "weights"])
def test_content_decides_and_not_the_name(name: str, tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / name)
    assert_state(read_weights(tmp_path / name))
    save_file(STATE, tmp_path / name)
    assert_state(read_weights(str(tmp_path / name)))
    torch.save(STATE, tmp_path / name, _use_new_zipfile_serialization=False)
    assert_state(read_weights(tmp_path / name))


def test_wrappers_and_what_training_scripts_put_beside(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    beside = {"epoch": 3, "args": argparse.Namespace(lr=0.1), "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}}
    torch.save({"model": STATE, **beside}, path)
    assert_state(read_weights(path))
    assert_state(read_weights({"model": STATE}))
    assert_state(read_weights({"teacher": STATE}, wrappers=("model", "teacher")))
    with pytest.raises(WeightsError, match="'epoch' is a int, not a tensor"):
        read_weights({"epoch": 3, **STATE})


@pytest.mark.parametrize("how", ["zip", "legacy", "pickle", "in the model"])
def test_a_pickle_bomb_does_not_go_off(how: str, tmp_path: Path) -> None:
    fuse, path = tmp_path / "exploded", tmp_path / "weights.pth"
    content: Any = {"model": {**STATE, "a.bomb": Bomb(fuse)}} if how == "in the model" else Bomb(fuse)
    if how == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how != "legacy")
    with pytest.raises(WeightsError, match=rf"'{re.escape(str(path))}' is no readable file.*could run code") as caught:
        read_weights(path)
    assert not fuse.exists()
    assert "weights_only" not in str(caught.value)
    pickle.loads(pickle.dumps(Bomb(fuse)))  # it would have
    assert fuse.exists()


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_and_damaged_files(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "weights"
    if kind == "safetensors":
        save_file(STATE, path)
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    for cut in (0, 1, 7, 8, 9, 20, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(WeightsError, match="is no readable file of weights"):
            read_weights(path)
    path.write_bytes(b"\0" * 8 + whole[8:])
    with pytest.raises(WeightsError, match="is no readable file of weights"):
        read_weights(path)


def test_foreign_files(tmp_path: Path) -> None:
    path, buffer = tmp_path / "weights", io.BytesIO()
    np_like = b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }"
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("readme.txt", "hello")
    for content in (b"hello", b'{"a": 1}', np_like, buffer.getvalue(), b"\x89HDF\r\n\x1a\n" + b"\0" * 64):
        path.write_bytes(content)
        with pytest.raises(WeightsError, match="is no readable file of weights"):
            read_weights(path)
    for content in (torch.ones(3), [1, 2], {}):
        torch.save(content, path)
        with pytest.raises(WeightsError, match="holds no weights"):
            read_weights(path)
    torch.save({"a": torch.arange(3)}, path)
    with pytest.raises(WeightsError, match=r"has a as torch.int64"):
        read_weights(path)


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"cannot read '.*nothing.pth': No such file"):
        read_weights(tmp_path / "nothing.pth")
    with pytest.raises(WeightsError, match=r"cannot read '.*': Is a directory"):
        read_weights(tmp_path)


def test_every_weight_has_to_fit() -> None:
    def model() -> nn.Module:
        return nn.ModuleDict({"a": nn.Linear(3, 2, device="meta")})

    loaded = model()
    materialise(loaded, STATE, STATE)
    assert torch.equal(loaded["a"].weight, STATE["a.weight"])  # type: ignore[index]
    assert loaded["a"].bias.dtype == torch.float32  # type: ignore[index]
    wrong = {"a.weight": torch.ones(3, 2), "b": torch.ones(1)}
    message = (
        "state dict does not fit ModuleDict: a.bias is missing; b is unknown; a.weight has shape (3, 2), not (2, 3)"
    )
    with pytest.raises(WeightsError, match=re.escape(message)):
        materialise(model(), wrong, wrong)
    many = {**STATE, **{f"x{i}": torch.ones(1) for i in range(9)}}
    with pytest.raises(WeightsError, match=r"x0 is unknown; .*x5 is unknown and 3 more$"):
        materialise(model(), many, "file.pth")
