"""A million rows: neither lists nor their counts nor a choice by content make a tensor of N x N, or of all blocks."""

from __future__ import annotations

import tracemalloc

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from dilated_attention_pytorch import ContentTopK, GlobalLocal, Hierarchical, LocalWindow, RandomBlocks, Union
from dilated_attention_pytorch.backends.sparse.problem import SparseProblem
from dilated_attention_pytorch.backends.sparse.selection import sparse_select
from dilated_attention_pytorch.patterns.block_counts import keys_of_rows
from dilated_attention_pytorch.types import Document, Options, Shape

ROWS, SIZE = 1 << 20, 128
ALL_BLOCKS = (ROWS // SIZE) ** 2
"""Bytes of a dense mask of blocks, of one head."""


def peak_bytes(function):
    """(largest sum of live bytes of PyTorch and of NumPy and Python during the call, the call's result)."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        tracemalloc.start()
        try:
            result = function()
            peak_of_python = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    live = peak = 0
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak + peak_of_python, result


@pytest.mark.parametrize(
    ("pattern", "heads"),
    [
        (LocalWindow(1024), 16),
        (GlobalLocal(1024, 128), 16),
        (Hierarchical(((1024, 128), (65536, 8192))), 16),
        (RandomBlocks(3), 2),
        (Union((GlobalLocal(128, 128), RandomBlocks(2))), 1),
    ],
    ids=["local", "global", "hierarchical", "random", "union"],
)
def test_lists_and_their_counts(pattern, heads):
    shape, documents = Shape(1, ROWS, ROWS, heads, heads, 8, 8), (Document(0, 1, 0, ROWS, 0, ROWS),)
    options = Options(True, 1.0, 0.0, "mask", "exact")

    def made():
        return SparseProblem(pattern, shape, options, documents, torch.float32, "cpu").plan

    peak, plan = peak_bytes(made)
    entries = len(plan.columns)
    assert entries > 2 * plan.query_tiles.shape[0]
    assert plan.columns.nbytes < peak < min(ALL_BLOCKS, 160 * entries + (8 << 20))
    peak, keys = peak_bytes(lambda: keys_of_rows(plan, heads, is_causal=True))
    assert keys.nbytes <= peak < 4 * keys.nbytes + 64 * entries + (32 << 20)


def test_a_choice_by_content():
    """Not causal: the scores of all blocks with each other, in float32, would take four times `ALL_BLOCKS`."""
    pattern, dim = ContentTopK(1, block_size=SIZE), 2
    query = torch.randn(1, ROWS, 1, dim, generator=torch.Generator().manual_seed(0))
    peak, found = peak_bytes(lambda: sparse_select(query, query, None, None, None, pattern.code, 0, False, None))
    assert found.shape == (1, 1, ROWS, 1)
    assert int(found[:, :, ::SIZE].min()) >= 0
    assert found.nbytes < peak < 4 * ALL_BLOCKS
