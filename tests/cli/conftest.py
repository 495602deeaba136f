"""A small run, trained once for all commands that read one."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of a few steps, with contexts of 64 bytes."""
    from dilated_attention_pytorch.models import LongNetLMConfig
    from dilated_attention_pytorch.training import RunConfig, TrainingConfig, start_run

    text, folder = tmp_path_factory.mktemp("text"), tmp_path_factory.mktemp("runs") / "small"
    for number in range(6):
        words = random.Random(number).choices(["alpha", "beta", "(x, y)", "\n"], k=200)
        (text / f"{number}.txt").write_text(" ".join(words))
    model = LongNetLMConfig(
        context_length=64,
        embed_dim=16,
        num_layers=1,
        num_heads=2,
        segment_lengths=(16, 64),
        dilation_rates=(1, 2),
        ngram_sizes=(2,),
        short_convolution=2,
    )
    training = TrainingConfig(steps=2, batch_size=2, learning_rate=1e-2, eval_windows=3, sample_bytes=0)
    config = RunConfig(preset="demo", model=model, training=training, data=(str(text),))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    trainer = start_run(config, folder, device=torch.device("cpu"))
    trainer.train(_Silent(), should_stop=lambda: False)
    torch.set_num_threads(threads)
    return folder


class _Silent:
    """A reporter that reports nothing."""

    def record(self, record: dict[str, object]) -> None:
        """Nothing."""

    def note(self, message: str) -> None:
        """Nothing."""
