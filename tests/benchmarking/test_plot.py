"""The picture of a comparison, read back."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

from dilated_attention_pytorch import DilatedPattern
from dilated_attention_pytorch.benchmarking import Setting, choose_contenders, draw
from dilated_attention_pytorch.benchmarking.measure import Measurement
from dilated_attention_pytorch.benchmarking.plot import COLORS, short

SETTING = Setting(1, 16, 64, torch.bfloat16, torch.device("cpu"), False, DilatedPattern((2048, 32768), (1, 16)))


def pixels(image: bytes, color: str) -> tuple[np.ndarray, np.ndarray]:
    picture = matplotlib.image.imread(io.BytesIO(image))[..., :3]
    return np.nonzero(np.abs(picture - to_rgb(color)).max(axis=-1) < 0.02)


def test_every_contender_has_a_line_of_its_slope():
    contenders, found = choose_contenders(["ours", "dense-flash", "flex"]), []
    for which in ("forward", "backward"):
        for n in (2048, 4096, 8192, 16384):
            found.append(Measurement("ours", n, which, "ok", milliseconds=n / 1000))
            found.append(Measurement("dense-flash", n, which, "ok", milliseconds=n**2 / 5e6))
            found.append(Measurement("flex", n, which, "absent"))
    image = draw(contenders, SETTING, found)
    for color in COLORS[:2]:
        rows, columns = pixels(image, color)
        for left, right in ((0, 750), (750, 1500)):  # the two panels, without the legend
            assert np.count_nonzero((rows < 620) & (columns >= left) & (columns < right)) > 300
    rise = [np.ptp(rows[(rows < 620) & (columns < 750)]) for rows, columns in [pixels(image, COLORS[1])]]
    assert rise[0] > 200
    assert len(pixels(image, COLORS[2])[0]) == 0  # one that never ran has no line


def test_nothing_measured_is_still_a_picture(tmp_path: Path):
    image = draw(choose_contenders(), SETTING, [])
    assert matplotlib.image.imread(io.BytesIO(image)).std() > 0.01


@pytest.mark.parametrize(
    ("length", "text"), [(512, "512"), (1024, "1K"), (1000, "1000"), (131072, "128K"), (1 << 20, "1M"), (5632, "5.5K")]
)
def test_lengths_are_short(length: int, text: str):
    assert short(length) == text
