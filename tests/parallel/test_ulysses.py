"""Who gets which heads, and which rows; the exchange itself is tested over ranks in `test_attention`."""

from __future__ import annotations

import pytest

from dilated_attention_pytorch.parallel.hybrid import rows_of_ranks
from dilated_attention_pytorch.parallel.ulysses import HeadSlice, share_heads
from dilated_attention_pytorch.patterns import DilatedPattern


@pytest.mark.parametrize("kv_heads", range(1, 9))
@pytest.mark.parametrize("group", range(1, 6))
def test_every_head_has_one_rank_and_its_key_head(kv_heads, group):
    heads = kv_heads * group
    for ranks in range(1, heads + 1):
        shares = share_heads(heads, kv_heads, ranks)
        assert len(shares) == ranks
        assert [h for s in shares for h in range(s.head, s.head + s.heads)] == list(range(heads))
        for s in shares:
            assert s.heads % s.kv_heads == 0
            for h in range(s.heads):
                # As an operator over the slice finds the key head, and as one over all heads does.
                assert s.kv_head + h * s.kv_heads // s.heads == (s.head + h) * kv_heads // heads
    with pytest.raises(ValueError, match=f"{heads} query heads for {heads + 1} ranks"):
        share_heads(heads, kv_heads, heads + 1)


@pytest.mark.parametrize("offsets", ["contiguous", "interleaved"])
def test_a_slice_keeps_the_offsets_of_its_heads(offsets):
    whole = DilatedPattern((16, 64), (2, 5), offsets)
    part = HeadSlice((16, 64), (2, 5), offsets, first=3, total=7)
    for rate in (2, 5):
        assert [part.head_offset(h, rate, 4) for h in range(4)] == [whole.head_offset(h, rate, 7) for h in range(3, 7)]


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("mesh", [(1,), (5,), (2, 3), (3, 2), (4, 1), (1, 4)])
def test_every_row_has_one_rank_and_every_rank_a_row(mesh, layout):
    world = mesh[0] * (mesh[1] if len(mesh) == 2 else 1)
    for length in range(world, world + 30):
        held = rows_of_ranks(length, mesh, layout)
        assert len(held) == world
        assert all(any(start < stop for start, stop in part) for part in held)
        assert sorted(row for part in held for a, b in part for row in range(a, b)) == list(range(length))
