"""A run small enough to be repeated many times."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from dilated_attention_pytorch.models import LongNetLMConfig
from dilated_attention_pytorch.training import RunConfig, TrainingConfig


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few files of words, enough for contexts of 64 bytes."""
    folder = tmp_path_factory.mktemp("text")
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "(x, y)", "\n"]
    for number in range(8):
        generator = random.Random(number)
        (folder / f"{number}.txt").write_text(" ".join(generator.choices(words, k=150 + 40 * number)))
    return folder


@pytest.fixture
def tiny(text_folder: Path) -> RunConfig:
    """Two layers, width 32, context 64, dropout on, so that random state matters; 8 steps in three stages."""
    return make_config(text_folder)


def make_config(text_folder: Path, *, dropout: float = 0.1, **training: Any) -> RunConfig:
    """The configuration of `tiny` with other training options."""
    model = LongNetLMConfig(
        context_length=64,
        embed_dim=32,
        num_layers=2,
        num_heads=4,
        segment_lengths=(16, 64),
        dilation_rates=(1, 2),
        norm="pre-rms",
        ngram_sizes=(2, 3),
        short_convolution=2,
        dropout=dropout,
        attention_dropout=dropout,
    )
    options: dict[str, Any] = {
        "steps": 8,
        "batch_size": 2,
        "learning_rate": 1e-2,
        "optimizer": "muon",
        "stages": ((0.25, 16, 4), (0.25, 32, 2)),
        "warmup_steps": 2,
        "eval_every": 4,
        "eval_windows": 3,
        "checkpoint_every": 3,
        "sample_bytes": 5,
    }
    return RunConfig(
        preset="demo", model=model, training=TrainingConfig(**options | training), data=(str(text_folder),)
    )
