"""Plots: what they draw, read back from the picture."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from dilated_attention_pytorch.training.evaluate import ContextTable, PositionCurve
from dilated_attention_pytorch.training.plots import COLORS, plot_contexts, plot_loss, plot_position, smooth


def rows_of(path: Path, color: str) -> np.ndarray:
    """Row of the picture, counted from the top, of every pixel of a colour, from the left to the right."""
    picture = matplotlib.image.imread(path)[..., :3]
    rows, columns = np.nonzero(np.abs(picture - to_rgb(color)).max(axis=-1) < 0.02)
    return rows[np.argsort(columns, kind="stable")]


def test_the_loss_plot_shows_training_and_held_out(tmp_path: Path):
    records = [{"kind": "train", "step": n, "loss": 5.0 - n / 25} for n in range(1, 101)]
    records += [{"kind": "held-out", "step": n, "bits_per_byte": 8 - n / 20} for n in (0, 50, 100)]
    plot_loss(records, tmp_path / "loss.png", title="Loss")
    for color in COLORS[:2]:
        rows = rows_of(tmp_path / "loss.png", color)
        assert len(rows) > 200
        # The legend lies at the right; the left fifth of the line is above its middle fifth.
        fifth = len(rows) // 5
        assert rows[:fifth].mean() < rows[2 * fifth : 3 * fifth].mean()


def test_the_loss_plot_needs_no_records(tmp_path: Path):
    plot_loss([], tmp_path / "loss.png", title="Loss")
    assert matplotlib.image.imread(tmp_path / "loss.png").std() > 0.01


def test_the_position_plot_shows_the_curve_and_its_error(tmp_path: Path):
    curve = PositionCurve((32, 64, 128), (3.0, 2.8, 2.0), (0.05, 0.02, 0.0))
    plot_position(curve, tmp_path / "position.png", title="Position", segment_lengths=(32, 128, 4096))
    rows = rows_of(tmp_path / "position.png", COLORS[0])
    assert len(rows) > 200
    assert rows[-50:].mean() > rows[:50].mean() + 100  # it falls


def test_the_context_plot_shows_what_less_context_costs(tmp_path: Path):
    curve = PositionCurve((16, 64, 128), (3.5, 2.8, 2.0), (0.1, 0.05, 0.0))
    table = ContextTable((16, 64, 128), (0, 64, 128), ((3.6, 3.2, 3.2), (3.5, 2.8, 2.0)), curve, 4, 2.6)
    plot_contexts(table, tmp_path / "contexts.png", title="Contexts")
    rows = rows_of(tmp_path / "contexts.png", COLORS[0])  # of the right panel
    assert len(rows) > 200
    assert rows[-50:].mean() > rows[:50].mean() + 100


def test_smoothing_weighs_the_past_less():
    assert smooth([3.0] * 5, 0.9) == pytest.approx([3.0] * 5)
    assert smooth([1.0, 0.0, 0.0], 0.5) == pytest.approx([1, 1 / 3, 1 / 7])
    assert smooth([], 0.5) == []
