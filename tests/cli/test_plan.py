"""`dilated-attention plan`: tables, JSON, a picture, and one-line errors."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.image
import pytest
from typer.testing import CliRunner

from dilated_attention_pytorch.cli import app


def run(*options: object):
    return CliRunner().invoke(app, ["plan", *map(str, options)])


def test_a_table_a_json_file_and_a_picture(tmp_path: Path):
    result = run("--tokens", "65536,262144", "--devices", "2,8", "--output", tmp_path / "p.png", "--bandwidth", 10)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "p.json").read_text())
    assert [(one["tokens"], one["devices"]) for one in found["predictions"]] == [
        (65536, 2), (65536, 8), (262144, 2), (262144, 8)
    ]  # fmt: skip
    assert found["rates"]["bandwidth"] == 1e10
    for one in found["predictions"]:
        assert one["seconds"] == one["compute_seconds"] + one["exposed_seconds"] > 0
        assert f"{one['tokens']:,}" in result.stdout
    assert found["predictions"][0]["compute_seconds"] > 3 * found["predictions"][1]["compute_seconds"]
    assert "10 GB/s" in result.stdout
    assert matplotlib.image.imread(tmp_path / "p.png").std() > 0.02


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "a"], "--tokens is 'a'; give integers"),
        (["--tokens", "0"], "--tokens has 0"),
        (["--devices", "0"], "--devices has 0"),
        (["--tokens", "4", "--devices", "8"], "4 tokens are fewer than 8 devices"),
        (["--heads", "6", "--kv-heads", "4"], "do not fit"),
        (["--segments", "64"], "give both"),
        (["--bandwidth", "-1"], "bandwidth is -1000000000.0; give a positive number"),
        (["--strategy", "ulysses", "--heads", "4", "--devices", "8"], "4 query heads for 8 ranks"),
        (["--output", "plan.pdf"], "give a name that ends in .png"),
        (["--measured", "/nowhere"], "No such file"),
    ],
)
def test_wrong_input_is_one_line(options: list[str], message: str, tmp_path: Path):
    result = run("--tokens", "65536", "--devices", "2", "--output", tmp_path / "p.png", *options)
    assert result.exit_code in (1, 2)
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
