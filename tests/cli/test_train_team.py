"""What ``dilated-attention train`` refuses before any rank starts to work."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from dilated_attention_pytorch.cli import app
from dilated_attention_pytorch.cli.train_team import _without_neighbours
from dilated_attention_pytorch.training import RunConfig

NO_RANKS = {"RANK": None, "WORLD_SIZE": None, "TORCHELASTIC_RUN_ID": None}
RANKS = {"RANK": "0", "WORLD_SIZE": "3"}


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (["--context-parallel", "2"], NO_RANKS, ["torchrun", "--no-python"]),
        (["--fsdp"], NO_RANKS, ["torchrun"]),
        (["--context-parallel", "3"], RANKS, ["--output"]),
        (["--context-parallel", "3", "--output", "x", "--compile"], RANKS, ["--compile"]),
        (["--context-parallel", "2", "--output", "x", "--device", "cpu"], RANKS, ["2", "3 ranks", "divisor"]),
        (["--context-parallel", "0", "--output", "x", "--device", "cpu"], RANKS, ["context_parallel is 0"]),
        (["--context-parallel", "3", "--output", "x", "--device", "cuda:7"], RANKS, ["cuda:7", "auto"]),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, arguments, environment, words):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["train", *arguments], env=environment)
    assert result.exit_code == 2, result.output
    assert len(result.stderr.strip().splitlines()) == 1
    for word in words:
        assert word in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_preset_loses_only_what_reads_a_neighbours_rows():
    demo = RunConfig.from_preset("demo")
    left, notes = _without_neighbours(demo, sharded=True)
    assert left.model.ngram_sizes == ()
    assert left.model.short_convolution == 0
    assert left.training == demo.training
    assert len(notes) == 1
    assert _without_neighbours(demo, sharded=False) == (demo, [])
    small = RunConfig.from_preset("small")
    if not (small.model.ngram_sizes or small.model.short_convolution):
        assert _without_neighbours(small, sharded=True) == (small, [])
