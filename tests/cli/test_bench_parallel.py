"""`dilated-attention bench parallel` with processes of its own, and what `plan` makes of its report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dilated_attention_pytorch.cli import app


def run(*options: object):
    return CliRunner().invoke(app, [*map(str, options)])


def test_two_ranks_are_measured_and_the_model_is_checked(tmp_path: Path):
    report = tmp_path / "bench.json"
    result = run(
        "bench", "parallel", "--device", "cpu", "--ranks", 2, "--tokens", 192, "--segments", "64,384", "--rates", "1,2",
        "--heads", 2, "--head-dim", 16, "--repeats", 1, "--causal", "--layout", "zigzag", "--output", report,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(report.read_text())
    points = [(one["scaling"], one["world"], one["tokens"], one["strategy"]) for one in found["measurements"]]
    names = ("ring", "gather", "ulysses")
    grid = (("weak", 1, 192), ("weak", 2, 384), ("strong", 1, 384))
    assert points == [(*point, name) for point in grid for name in names]
    for one in found["measurements"]:
        assert one["formula"] is True
        assert (one["bytes_both"] > 0) == (one["world"] == 2)
        assert one["forward"]["total"] > 0
        assert (one["both"]["exposed"] is None) == (one["world"] == 1)
    ring, ulysses = found["measurements"][3], found["measurements"][5]
    # Zigzag, causal: each rank needs the active rows of the other, and 2 x 384 of 192 x 2 x 2 x 16 numbers less.
    assert ring["full_gather_bytes"] == 192 * 2 * 2 * 16 * 4
    assert 0 < ring["bytes_forward"] < ring["full_gather_bytes"]
    assert ulysses["bytes_forward"] == 192 * (3 * 16 + 16 + 1) * 4
    result = run("plan", "--measured", report, "--tokens", 4096, "--devices", 2, "--output", tmp_path / "p.png")
    assert result.exit_code == 0, result.output
    assert "median error of the model" in result.stdout
    assert len(json.loads((tmp_path / "p.json").read_text())["checks"]) == 9


def test_hybrid_is_measured_where_pairs_of_ranks_form_a_ring(tmp_path: Path):
    report = tmp_path / "bench.json"
    result = run(
        "bench", "parallel", "--device", "cpu", "--ranks", 4, "--tokens", 96, "--segments", "64,384", "--rates", "1,2",
        "--heads", 2, "--head-dim", 16, "--repeats", 1, "--strategies", "hybrid,ring", "--output", report,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(report.read_text())
    points = [(one["world"], one["strategy"]) for one in found["measurements"] if one["scaling"] == "weak"]
    assert points == [(1, "ring"), (2, "ring"), (4, "hybrid"), (4, "ring")]
    hybrid = next(one for one in found["measurements"] if one["strategy"] == "hybrid")
    assert hybrid["formula"] is True
    # Rows for heads with the neighbour in the pair, and back: q, k, v, out and lse of one head of two.
    assert hybrid["bytes_forward"] > 96 * (4 * 16 + 1) * 4
    result = run("plan", "--measured", report, "--tokens", 4096, "--devices", 2, "--output", tmp_path / "p.png")
    assert result.exit_code == 0, result.output
    checks = json.loads((tmp_path / "p.json").read_text())["checks"]
    assert [one["strategy"] for one in checks].count("hybrid") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ranks", "0"], "--ranks is 0; give at least 1"),
        (["--tokens", "0"], "--tokens is 0"),
        (["--strategies", "fast"], "--strategies has 'fast'; choose from ring, gather, ulysses, hybrid"),
        (["--strategies", ","], "--strategies is ','"),
        (["--segments", "64"], "give both"),
        (["--heads", "3", "--kv-heads", "2"], "do not fit"),
        (["--device", "warp"], "device 'warp' cannot be used"),
    ],
)
def test_wrong_input_is_one_line(options: list[str], message: str, tmp_path: Path):
    result = run("bench", "parallel", "--device", "cpu", "--output", tmp_path / "b.json", *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "b.json").exists()
