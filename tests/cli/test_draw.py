"""The command `draw`: pictures read back, what a pattern covers, and wrong input."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from dilated_attention_pytorch import DilatedPattern, explain_sparse
from dilated_attention_pytorch.cli import app, block_picture
from dilated_attention_pytorch.cli.draw import perimeters
from dilated_attention_pytorch.cli.pattern_picture import attended, coverage
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


BRANCHES = ("--segment-lengths", "256,1024", "--dilation-rates", "1,4")


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
        (("--segment-lengths", "4"), "--dilation-rates is missing"),
        (("--dilation-rates", "4"), "--segment-lengths is missing"),
        (("--segment-lengths", "4,x", "--dilation-rates", "1,2"), "--segment-lengths is '4,x'"),
        (("--segment-lengths", "4", "--dilation-rates", "5"), "dilation rate 5 is larger"),
        (
            ("--segment-lengths", "4", "--dilation-rates", "1", "--length", "513"),
            "--length is 513; a picture has 1 to 512",
        ),
        (("--segment-lengths", "4", "--dilation-rates", "1", "--heads", "0"), "--heads is 0; a picture has 1 to 8"),
        (("--segment-lengths", "4", "--dilation-rates", "1", "--head-offsets", "odd"), "head_offsets is 'odd'"),
        (("--pattern", "moba"), "'moba'"),
        (("--pattern", "longformer", "--parameters", "window=100"), "window is 100, no multiple of block_size 64"),
        (("--pattern", "local", "--parameters", "ratio=2"), "unexpected keyword argument 'ratio'"),
        (("--pattern", "local", "--parameters", "window"), "--parameters has 'window'; give name=integer"),
        (("--pattern", "local", "--parameters", "window=1,window=2"), "--parameters has window twice"),
        (("--pattern", "local", "--segment-lengths", "64"), "--segment-lengths goes with --pattern dilated-blocks"),
        (("--pattern", "local", "--head-offsets", "interleaved"), "--head-offsets goes with --pattern dilated-blocks"),
        (
            ("--order", "snake", "--pattern", "local"),
            "--order draws the order of a grid, --pattern a pattern; a picture",
        ),
        (("--shape", "8x8", "--segment-length", "4", "--segment-lengths", "4"), "--shape, --segment-length draws the"),
        (("--heads", "2", "--shape", "8x8"), "--shape draws the order of a grid, --heads a pattern"),
        (("--causal", "--length", "8"), "--length, --causal goes with a pattern; give --segment-lengths"),
        (("--parameters", "window=64"), "--parameters is given without --pattern"),
        (("--pattern", "dilated-blocks"), "--dilation-rates is missing"),
        (("--pattern", "dilated-blocks", *BRANCHES, "--parameters", "seed=1"), "--parameters has seed"),
        (("--pattern", "local", "--length", "65537"), "--length is 65537; a picture has 1 to 65536"),
        (("--pattern", "local", "--heads", "9"), "--heads is 9; a picture has 1 to 8"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(arguments: tuple[str, ...], fragment: str):
    result = CliRunner().invoke(app, ["draw", *arguments])
    assert result.exit_code == 2
    assert fragment in " ".join(result.stderr.split())
    assert "Traceback" not in result.output


PATTERN = ["--segment-lengths", "8,16", "--dilation-rates", "1,2"]


def share_of(path: Path, color: tuple[float, float, float]) -> float:
    """Part of the picture that has a colour."""
    picture = matplotlib.image.imread(path)[..., :3]
    return float(np.mean(np.abs(picture - np.array(color)).max(-1) < 0.02))


@pytest.mark.parametrize("causal", [False, True])
def test_a_picture_shows_each_branch_of_a_pattern(causal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["draw", *PATTERN, "--heads", "2", *(["--causal"] if causal else [])])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    # Two segments of 8 rows: 64 pairs each, 36 causal; one of 16 with 8 active rows; 4 of these 8 in each short one.
    pairs = (2 * 36, 36) if causal else (128, 64)
    twice = 2 * 10 if causal else 2 * 16
    assert lines[0] == f"branch 1: {pairs[0]:.1f} pairs a head"
    assert lines[1] == f"branch 2: {pairs[1]:.1f} pairs a head"
    assert lines[2].startswith(f"all: {sum(pairs) - twice:.1f} pairs a head")
    assert f"{twice:.1f} of them more than once, at most 2 times" in lines[2]
    assert lines[3] == "wrote pattern.png"
    shares = [share_of(tmp_path / "pattern.png", color) for color in ((0, 0.447, 0.698), (0.835, 0.369, 0))]
    assert shares[1] > 0.01
    assert shares[0] / shares[1] == pytest.approx(pairs[0] / pairs[1], rel=0.15)


def test_a_pattern_that_does_not_fit_is_cut_and_the_output_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for length, rows in (((), 512), (("--length", "100"), 100)):
        arguments = ["draw", "--segment-lengths", "64,2048", "--dilation-rates", "1,2", "--heads", "1", *length]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        assert (
            f"the longest segment has 2,048 rows; the picture, like the figures, has the first {rows} " in result.stdout
        )
    result = CliRunner().invoke(app, ["draw", *PATTERN, "--length", "16"])
    assert "longest segment" not in result.stdout


def test_the_picture_of_the_readme_is_what_its_command_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = Path(__file__).parents[2]
    (command,) = re.findall(r"`dilated-attention (draw [^`]+)`", (root / "README.md").read_text())
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(app, shlex.split(command)).exit_code == 0
    for color in ((0, 0.447, 0.698), (0.835, 0.369, 0), (0, 0.62, 0.451)):
        kept, drawn = (share_of(path, color) for path in (root / "docs/img/pattern.png", tmp_path / "pattern.png"))
        assert kept > 0.005
        assert kept == pytest.approx(drawn, rel=0.05)


def test_what_a_pattern_covers():
    pattern = DilatedPattern((6,), (3,), "interleaved")
    seen = attended(pattern, rows=6, heads=3, is_causal=False)
    for head in range(3):
        rows = [n for n in range(6) if n % 3 == head]
        assert [tuple(pair) for pair in seen[0, head].nonzero().tolist()] == [(q, k) for q in rows for k in rows]
    assert "33.3 % of all pairs are attended by some head" in coverage(seen)[-1]
    assert "11.1 % of the full matrix; 0.0 of them" in coverage(seen)[-1]


@pytest.mark.parametrize(
    ("name", "causal", "options"),
    [
        ("longformer", False, ()),
        ("bigbird", True, ("--parameters", "random_blocks=2, seed=5")),
        ("local", True, ("--parameters", "window=256", "--length", "1500")),
        ("hierarchical", False, ("--length", "8192")),
        ("dilated-blocks", True, (*BRANCHES, "--parameters", "block_size=64")),
    ],
)
def test_a_picture_shows_the_blocks_that_are_attended(
    name: str, causal: bool, options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Counts against the lists that backends compute from; colours against the share of the panels' area."""
    monkeypatch.chdir(tmp_path)
    seen = []

    def kept(pattern: object, found: torch.Tensor, *, title: str) -> bytes:
        seen.append((pattern, found))
        return picture(pattern, found, title=title)

    picture = block_picture.picture
    monkeypatch.setattr(block_picture, "picture", kept)
    arguments = ["draw", "--pattern", name, *options, "--heads", "2", *(["--causal"] if causal else [])]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    ((pattern, found),) = seen
    rows = 1500 if name == "local" else 8192 if name == "hierarchical" else 32 * pattern.block_size
    shape = (1, rows, 2, 8)
    listed = explain_sparse(shape, shape, shape, pattern, is_causal=causal)
    each = found.count_nonzero((1, 2)).tolist()
    assert sum(each) * (2 // len(each)) == listed.blocks
    lines = result.stdout.splitlines()
    names = ["every head"] if listed.shared_lists else ["head 0", "head 1"]
    assert [line.split(" of ")[0] for line in lines[:-1]] == [
        f"{head}: {count:,}" for head, count in zip(names, each, strict=True)
    ]
    assert lines[-1] == "wrote pattern.png"
    # The first part is blue, the second red: their areas are as their numbers of blocks.
    counts = [int((found == number).sum()) for number in (1, 2)]
    areas = [share_of(tmp_path / "pattern.png", color) for color in ((0, 0.447, 0.698), (0.835, 0.369, 0))]
    assert areas[0] > 0.01
    if counts[1]:
        assert areas[1] / areas[0] == pytest.approx(counts[1] / counts[0], rel=0.2)
