"""The command `draw`: the picture read back, and wrong input."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from typer.testing import CliRunner

from dilated_attention_pytorch.cli import app
from dilated_attention_pytorch.cli.draw import perimeters
from dilated_attention_pytorch.ordering import hilbert_order, raster_order


def colors_of_segments(path: Path) -> int:
    """Colours that fill a part of the right half of the picture."""
    picture = matplotlib.image.imread(path)[..., :3]
    right = (picture[:, picture.shape[1] // 2 :].reshape(-1, 3) * 255).round().astype(int)
    colors, counts = np.unique(right, axis=0, return_counts=True)
    return int(np.sum((counts > 0.01 * len(right)) & (colors.sum(1) < 3 * 250) & (colors.sum(1) > 0)))


@pytest.mark.parametrize("order", ["hilbert", "snake"])
def test_a_picture_shows_the_segments(order: str, tmp_path: Path):
    path = tmp_path / "folder" / "picture.png"
    arguments = ["draw", "--order", order, "--shape", "12x20", "--segment-length", "50", "--output", str(path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert str(path) in result.stdout.replace("\n", "")
    assert colors_of_segments(path) == 5


@pytest.mark.parametrize("shape", ["1x1", "1x40", "300x2"])
def test_thin_grids_have_a_picture(shape: str, tmp_path: Path):
    result = CliRunner().invoke(app, ["draw", "--shape", shape, "--output", str(tmp_path / "thin.png")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "thin.png").stat().st_size > 1000


def test_perimeters():
    assert perimeters(hilbert_order(8, 8), 8, 8, 16) == [16] * 4
    assert perimeters(raster_order(8, 8), 8, 8, 16) == [20] * 4
    assert perimeters(raster_order(2, 3), 2, 3, 4) == [10, 6]


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (("--shape", "32"), "'32'; give the height and width"),
        (("--shape", "4x4x4"), "'4x4x4'; give the height and width"),
        (("--shape", "ax4"), "'ax4'; give the height and width"),
        (("--shape", "0x4"), "'0x4'; a picture has 1 to 262,144 cells"),
        (("--shape", "1000x1000"), "1 to 262,144 cells"),
        (("--segment-length", "0"), "--segment-length is 0; give at least 1"),
        (("--order", "peano"), "'peano'"),
        (("--output", "picture.jpg"), "ends in .png"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(arguments: tuple[str, ...], fragment: str):
    result = CliRunner().invoke(app, ["draw", *arguments])
    assert result.exit_code == 2
    assert fragment in " ".join(result.stderr.split())
    assert "Traceback" not in result.output
