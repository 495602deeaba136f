"""The command ``bench ordering``: its figures against measures worked out by hand, and wrong input."""

from __future__ import annotations

import json

import pytest
from click.testing import Result
from typer.testing import CliRunner

from dilated_attention_pytorch.cli import app


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", "ordering", "--device", "cpu", *arguments], env={"COLUMNS": "120"})


def test_figures_of_small_grids():
    result = run("--shape", "4x4", "--segment-length", "4", "--channels", "3", "--dtype", "float64", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["shape"], found["segment_length"], found["channels"], found["dtype"]) == ([4, 4], 4, 3, "float64")
    # Of 84 neighbours (2 x 24 beside each other, 2 x 18 across corners) rows keep 24, squares of 2 x 2 keep 4 x 12.
    inside = {name: row["inside"] for name, row in found["orders"].items()}
    assert inside == pytest.approx({"raster": 24 / 84, "snake": 24 / 84, "morton": 48 / 84, "hilbert": 48 / 84})
    # Of a row of 4: distances 0, 1, 2, 3; of a square: 0, 1, 1 and the diagonal.
    square = (0 + 1 + 1 + 2**0.5) / 4
    assert found["orders"]["raster"]["distance"] == pytest.approx((6 * 1 + 4 * 2 + 2 * 3) / 16)
    assert found["orders"]["hilbert"]["distance"] == pytest.approx(square)
    assert found["orders"]["raster"]["permutation_ms"] == 0
    assert all(row["order_ms"] > 0 for row in found["orders"].values())
    assert all(row["permutation_ms"] > 0 for name, row in found["orders"].items() if name != "raster")
    assert found["copy_ms"] > 0
    assert found["recommended"] == "raster"


def test_the_table_names_what_is_recommended():
    result = run("--shape", "32x64", "--channels", "1", "--repeats", "1")
    assert result.exit_code == 0, result.output
    assert "32 x 64 cells, segments of 128" in result.stdout
    assert "recommend_ordering: hilbert" in result.stdout


def test_volumes():
    result = run("--shape", "2x4x8", "--channels", "1", "--repeats", "1", "--json")
    assert json.loads(result.stdout)["shape"] == [2, 4, 8]


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (("--shape", "64"), "--shape is '64'; give height and width"),
        (("--shape", "0x4"), "--shape is '0x4'; give height and width"),
        (("--shape", "2x2x2x2"), "--shape is '2x2x2x2'"),
        (("--segment-length", "0"), "--segment-length is 0; give at least 1"),
        (("--channels", "0"), "--channels is 0; give at least 1"),
        (("--repeats", "-1"), "--repeats is -1; give at least 1"),
        (("--device", "tpu"), "device 'tpu' cannot be used"),
        (("--shape", "1024x1024", "--segment-length", "65536"), "give a shorter --segment-length"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(arguments: tuple[str, ...], fragment: str):
    result = run(*arguments)
    assert result.exit_code == 2
    assert fragment in result.stderr
    assert result.stderr.count("\n") == 1
