"""Lists of blocks: tiles of ragged documents, each block once, and the transposed lists."""

from __future__ import annotations

from itertools import pairwise

import torch

from dilated_attention_pytorch.patterns import DilatedBlocks, GlobalLocal, LocalWindow
from dilated_attention_pytorch.patterns.blocks import block_plan
from dilated_attention_pytorch.types import Document, Shape


def lists(plan, head=0):
    edges = plan.row_pointer[head].tolist()
    return [plan.columns[a:b].tolist() for a, b in pairwise(edges)]


def test_tiles_of_packed_documents_start_anew():
    shape = Shape(1, 60, 100, 1, 1, 8, 8)  # the query is the last 60 rows
    documents = (Document(0, 1, 0, 37, 0, 37), Document(0, 1, 37, 63, 0, 63))
    plan = block_plan(LocalWindow(16, 16), shape, documents, is_causal=True, device="cpu")
    # The first document ends before the query begins; of the second all but three rows are asked for.
    assert plan.query_tiles.tolist() == [[0, 0, 3, 13], [0, 13, 16, 16], [0, 29, 32, 16], [0, 45, 48, 15]]
    assert plan.key_tiles.tolist() == [[0, 37, 0, 16], [0, 53, 16, 16], [0, 69, 32, 16], [0, 85, 48, 15]]
    assert lists(plan) == [[0], [0, 1], [1, 2], [2, 3]]


def test_blocks_that_were_dropped_from_a_cache_are_in_no_list():
    shape = Shape(1, 4, 40, 1, 1, 8, 8)
    plan = block_plan(
        GlobalLocal(16, 1, block_size=16), shape, (Document(0, 1, 0, 40, 24, 64),), is_causal=True, device="cpu"
    )
    assert plan.query_tiles.tolist() == [[0, 0, 60, 4]]
    assert plan.key_tiles.tolist() == [[0, 0, 24, 8], [0, 8, 32, 16], [0, 24, 48, 16]]
    assert lists(plan) == [[1, 2]]  # block 0 is global, and gone


def test_batch_entries_with_documents_of_their_own():
    shape = Shape(2, 32, 32, 1, 1, 8, 8)
    documents = (Document(0, 1, 0, 32, 0, 32), Document(1, 1, 10, 22, 0, 22))
    plan = block_plan(LocalWindow(0, 16), shape, documents, is_causal=False, device="cpu")
    assert plan.query_tiles.tolist() == [[0, 0, 0, 16], [0, 16, 16, 16], [1, 10, 0, 16], [1, 26, 16, 6]]
    assert lists(plan) == [[0], [1], [2], [3]]


def test_transposed_lists_hold_the_same_blocks():
    shape, documents = Shape(1, 500, 500, 4, 4, 8, 8), (Document(0, 1, 0, 500, 0, 500),)
    plan = block_plan(DilatedBlocks((64, 256), (1, 4), 16), shape, documents, is_causal=True, device="cpu")
    pointer, tiles, entries = plan.transposed
    assert plan.row_pointer.shape == (4, 33)
    for head in range(4):
        there = {(t, c) for t, row in enumerate(lists(plan, head)) for c in row}
        assert len(there) == int(plan.counts[head].sum())
        edges = pointer[head].tolist()
        back = {(t, c) for c in range(32) for t in tiles[edges[c] : edges[c + 1]].tolist()}
        assert back == there
    rows = plan.entry_rows[entries.long()] % 32
    assert torch.equal(rows.int(), tiles)
