"""The examples with Hugging Face libraries run, on fewer steps than by themselves, and learn."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *arguments: str) -> dict[str, Any]:
    """What main() of an example returns; in this process, for loading transformers takes longer than the example."""
    return runpy.run_path(str(EXAMPLES / name))["main"](list(arguments))


def test_huggingface_trainer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run("huggingface_trainer.py", "--steps", "20", "--context", "128", "--output", str(tmp_path))
    assert found["after"] < found["before"] - 2
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {path.name for path in tmp_path.iterdir()}
    assert "class TextWrapper:\n" in capsys.readouterr().out


def test_accelerate_loop(capsys: pytest.CaptureFixture[str]) -> None:
    found = run("accelerate_loop.py", "--steps", "30", "--context", "128")
    assert found["after"] < found["before"] - 0.5
    assert "def wrap(text<mask><mask>width=70): -> def wrap(text" in capsys.readouterr().out


def test_finetune_stock_model(capsys: pytest.CaptureFixture[str]) -> None:
    found = run("finetune_stock_model.py", "--steps", "25", "--context", "128")
    assert found["dense"] < 6  # of 8 bits: it learned something to fine-tune
    assert found["after"] < found["before"]
    assert "dilated (44% of the pairs)" in capsys.readouterr().out
