"""Sums of gradients across chunks: where they lie, how much they take, and that they join once."""

from __future__ import annotations

import pytest
import torch

from dilated_attention_pytorch import Streaming, dilated_attention
from dilated_attention_pytorch.parallel import streaming_attention
from dilated_attention_pytorch.parallel.streaming_plan import Block, BlockRun, Tile, block_runs, rows_of_run
from dilated_attention_pytorch.parallel.streaming_sums import KeySums


def test_shares_of_two_tiles_add_up_on_the_active_rows_of_the_segment():
    sums = KeySums((2, 3), torch.float32)
    first = Block(kv_head=1, row=12, rows=3, rate=4, start=0)  # rows 12, 16, 20 of the segment 10 to 31
    second = Block(kv_head=1, row=20, rows=2, rate=4, start=0, shown=torch.tensor([0, 2]))  # 20 and 28, 24 is hidden
    for block, number in ((first, 1.0), (second, 10.0)):
        tile = Tile(0, 0, 0, (block,), (), (10, 31))
        for place in sums.rows(tile, BlockRun(block, 1, 0, 0)):
            place += number
    totals = [torch.zeros(1, 40, 2, dim) for dim in (2, 3)]
    sums.join(totals)
    expected = torch.zeros(40)
    expected[[12, 16, 20]] += 1
    expected[[20, 24, 28]] += 10
    for total in totals:
        assert torch.equal(total[0, :, 1], expected[:, None].expand(-1, total.shape[3]))
        assert not total[0, :, 0].any()
    sums.join(totals)  # nothing is left to add
    assert float(totals[0].sum()) == 2 * 33


def test_segments_join_when_they_have_ended():
    sums, totals = KeySums((1, 1), torch.float32), [torch.zeros(2, 40, 1, 1) for _ in range(2)]
    for batch in (0, 1):
        for begin, stop in ((0, 20), (20, 40)):
            block = Block(0, begin, 5, 4, 0)
            for place in sums.rows(Tile(0, batch, 0, (block,), (), (begin, stop)), BlockRun(block, 1, 0, 0)):
                place += 1
    ended = []
    for before in ((0, 19), (0, 20), (1, 0), (1, 39), (1, 40)):
        sums.join(totals, before)
        ended.append(totals[0].sum((1, 2, 3)).tolist())
    assert ended == [[0, 0], [5, 0], [10, 0], [10, 5], [10, 10]]
    assert torch.equal(totals[0], totals[1])


def test_blocks_that_advance_evenly_move_together():
    # Rows 13, 14, 15 of heads 0, 1, 2 in a segment that begins at 12; head 3 begins later, head 4 is shorter.
    rows = ((0, 13, 4), (1, 14, 4), (2, 15, 4), (3, 20, 4), (4, 17, 3))
    blocks = tuple(Block(head, row, count, 4, 4 * head) for head, row, count in rows)
    tile = Tile(0, 0, 0, blocks, (), (12, 31))
    runs = list(block_runs(tile))
    assert [(run.first.kv_head, run.blocks, run.head_step, run.row_step) for run in runs] == [
        (0, 3, 1, 1),
        (3, 1, 0, 0),
        (4, 1, 0, 0),
    ]
    keys = torch.randn(1, 40, 5, 2)
    moved = rows_of_run(keys, 0, runs[0])
    assert torch.equal(moved, torch.stack([keys[0, row : row + 13 : 4, head] for head, row, _ in rows[:3]]))
    sums = KeySums((2, 2), torch.float32)
    for place in sums.rows(tile, runs[0]):
        place += moved
    totals = [torch.zeros_like(keys), torch.zeros_like(keys)]
    sums.join(totals)
    for head, row, _ in rows[:3]:
        assert torch.equal(totals[0][0, row : row + 13 : 4, head], keys[0, row : row + 13 : 4, head])
    assert int(totals[1].count_nonzero()) == 3 * 4 * 2


@pytest.mark.parametrize(("lengths", "rates", "share"), [((64, 4096), (1, 16), 1 / 16), ((64, 256), (1, 2), 0)])
def test_only_active_rows_of_cut_segments_are_summed_apart(monkeypatch, lengths, rates, share):
    made: list[KeySums] = []

    class Seen(KeySums):
        def __init__(self, *given):
            super().__init__(*given)
            self.numbers = 0
            made.append(self)

        def rows(self, tile, run):
            before = len(self._sums)
            found = super().rows(tile, run)
            if len(self._sums) > before:
                self.numbers += sum(one.numel() for one in list(self._sums.values())[-1])
            return found

    monkeypatch.setattr(streaming_attention, "KeySums", Seen)
    query, key, value = (torch.randn(1, 2048, 4, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    out = dilated_attention(
        query, key, value, lengths, rates, parallel=Streaming("cpu", memory_budget=1 << 30, chunk=512)
    )
    grads = torch.autograd.grad(out.float().square().sum(), (query, key, value))
    assert [one.numbers for one in made] == [share * 2 * key.numel()]
    assert all(grad.dtype == torch.bfloat16 for grad in grads)
