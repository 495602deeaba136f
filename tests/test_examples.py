"""The examples run, small, and show what they say."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> ModuleType:
    """An example as a module, without running it."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_plain_loop_learns_and_writes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    example = load("train_plain_loop")
    monkeypatch.setattr(sys, "argv", ["train_plain_loop.py", "--steps", "25", "--context", "128"])
    example.main()
    first, text = capsys.readouterr().out.split("\n", 1)
    losses = [float(word) for word in first.replace(",", "").split() if word[0].isdigit()]
    assert losses[0] > 7.5  # about 8 bits: nothing is known yet
    assert losses[1] < 6.5
    assert text.startswith("    def ")
    assert len(text) > 100


def test_compiled_and_exported_models_compute_the_same(tmp_path: Path):
    example = load("compile_and_export")
    model = example.build()
    assert example.compile_model(model, compiler="aot_eager") < 1e-5
    path = tmp_path / "model.pt2"
    assert example.export_model(model, path) < 1e-5
    with torch.no_grad():
        model.embedding.weight.mul_(2)  # the comparison can fail
        tokens = torch.randint(256, (1, 20))
        assert example.difference(torch.export.load(path).module()(tokens), model(tokens)) > 1e-3


def test_the_slide_classifier_learns(capsys: pytest.CaptureFixture[str]):
    assert load("classify_slides").main(["--steps", "30"]) >= 0.8
    assert "synthetic" in capsys.readouterr().out
