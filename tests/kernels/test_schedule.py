"""Tiles of the persistent kernels: which blocks they meet, and who computes them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from dilated_attention_pytorch.kernels.schedule import deal, met_blocks
from dilated_attention_pytorch.patterns import DilatedPattern
from dilated_attention_pytorch.patterns.tiles import cells
from dilated_attention_pytorch.testing import multiplicity
from dilated_attention_pytorch.types import Document, Shape

TILE_ROWS, HEADS, CPU = 4, 4, torch.device("cpu")
PATTERNS = {
    "aligned": ((8, 16, 32), (1, 2, 4)),
    "misaligned": ((7, 20, 50), (1, 3, 4)),
    "sparse": ((12, 40), (4, 8)),
}
DOCUMENTS = {
    "one": (45, (0, 45)),
    "packed": (45, (0, 9, 10, 31, 45)),
    "chunk": (13, (0, 45)),
}


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("side", ["query", "key"])
@pytest.mark.parametrize("given", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_a_tile_meets_the_rows_that_its_own_attend_to(pattern, given, side, is_causal):
    (query_rows, bounds), stride = given, 4
    dilated = DilatedPattern(*pattern)
    shape = Shape(1, query_rows, bounds[-1], HEADS, HEADS, 8, 8)
    documents = tuple(Document(0, 1, low, high - low, 0, high - low) for low, high in itertools.pairwise(bounds))
    table = cells(dilated, shape, documents, TILE_ROWS * stride, side)
    blocks = met_blocks(
        table, side=side, heads=HEADS, stride=stride, segment_lengths=pattern[0],
        dilation_rates=pattern[1], interleaved=False, is_causal=is_causal, tile_rows=TILE_ROWS, block_rows=1,
    )  # fmt: skip
    position, document = torch.zeros(2, bounds[-1], dtype=torch.int64)
    for n, (low, high) in enumerate(itertools.pairwise(bounds)):
        position[low:high], document[low:high] = torch.arange(high - low), n
    pairs = multiplicity(dilated, HEADS, position, document, query_rows, is_causal=is_causal)
    if side == "key":
        pairs = pairs.transpose(2, 3)
    covered = torch.zeros(HEADS, pairs.shape[2], dtype=torch.int64)
    exact = all(rate % stride == 0 or rate == 1 for rate in pattern[1]) and not is_causal
    for head, cell, place in np.ndindex(*blocks.shape):
        _, row, _, rows = table[cell, :4]
        first = place
        own = [row + first + stride * i for i in range(TILE_ROWS) if first + stride * i < rows]
        assert (blocks[head, cell, place] < 0) == (not own)
        covered[head, own] += 1
        met = int(pairs[:, head, own].any(1).sum())
        assert max(blocks[head, cell, place], 0) >= met  # keys of the class that no row of the tile keeps may come too
        if exact and stride >= max(pattern[1]):
            assert blocks[head, cell, place] == met
    assert (covered == 1).all()


@pytest.mark.parametrize("programs", [1, 7, 132])
@pytest.mark.parametrize("count", [1, 131, 133, 5000])
def test_every_wanted_tile_is_dealt_once_and_the_load_is_even(count, programs):
    draw = np.random.default_rng(count)
    costs = draw.integers(0, 300, size=(count, 3)) + 1.5
    wanted = draw.random((count, 3)) < 0.7
    wanted[0, 0] = True
    schedule = deal(costs, wanted, programs, CPU)
    assert schedule is not None
    assert schedule.programs == min(programs, wanted.sum())
    tiles, starts = schedule.tiles.numpy(), schedule.starts.numpy()
    assert (len(starts), starts[0], starts[-1]) == (programs + 1, 0, len(tiles))
    assert np.array_equal(np.sort(tiles), np.flatnonzero(wanted))
    assert (np.diff(starts) > 0).sum() == schedule.programs
    loads = np.add.reduceat(costs.reshape(-1)[tiles], starts[: schedule.programs])
    assert loads.max() <= loads.mean() + costs[wanted].max()
    if wanted.sum() > 50 * programs:
        assert loads.max() <= 1.02 * loads.mean()


def test_nothing_wanted_is_no_schedule():
    assert deal(np.ones(4), np.zeros(4, dtype=bool), 132, CPU) is None
