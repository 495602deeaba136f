"""Rows sorted by the key block that they chose, against loops."""

from __future__ import annotations

import pytest
import torch

from dilated_attention_pytorch.backends.sparse import packing
from dilated_attention_pytorch.backends.sparse.packing import Packed


@pytest.mark.parametrize("at_once", [True, False])
def test_entries_by_key_tile_and_in_pieces(at_once, monkeypatch):
    if not at_once:
        monkeypatch.setattr(packing, "_SHORT", 0)
    generator = torch.Generator().manual_seed(0)
    tiles, keep, size = 7, 2, 4
    choice = torch.randint(-1, tiles - 1, (3, 20 * keep), generator=generator, dtype=torch.int16)  # the last: by nobody
    packed = Packed(choice, keep, tiles)
    pieces, per_list = packed.pieces(size)
    assert pieces.shape == (3, per_list, 3)
    for line, mine in enumerate(choice.tolist()):
        wanted = {tile: [e for e, t in enumerate(mine) if t == tile] for tile in range(tiles)}
        order = packed.order[line].tolist()
        for tile, entries in wanted.items():
            first, count = int(packed.first[line, tile]), int(packed.counts[line, tile])
            assert order[first : first + count] == entries
        found = {tile: [] for tile in range(tiles)}
        for tile, first, count in pieces[line].tolist():
            assert 0 <= count <= size
            found[tile] += order[first : first + count]
        assert found == wanted
