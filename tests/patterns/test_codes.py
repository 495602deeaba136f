"""Patterns as text: what goes in comes out, and patterns that differ have text that differs."""

from __future__ import annotations

import pytest
import torch

from dilated_attention_pytorch import (
    BlockList,
    ContentTopK,
    DilatedBlocks,
    DilatedPattern,
    GlobalLocal,
    Hierarchical,
    LocalWindow,
    RandomBlocks,
    Union,
)
from dilated_attention_pytorch.patterns.codes import decode
from dilated_attention_pytorch.patterns.union import bind

PATTERNS = [
    LocalWindow(128, 64),
    LocalWindow(128, 128),
    GlobalLocal(128, 1, (5, 700), 64),
    DilatedBlocks((128, 256), (1, 2), 64, "interleaved"),
    Hierarchical(((128, 64), (512, 128)), 64),
    RandomBlocks(3, 2**61, 64),
    ContentTopK(3, 1, 2, "sub_means", 64, 8),
    Union((LocalWindow(128, 64), DilatedPattern((7, 9), (1, 2), "interleaved")), multiplicity=True),
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: type(pattern).__name__)
def test_what_goes_in_comes_out(pattern):
    assert decode(pattern.code) == pattern
    assert decode(pattern.code).code == pattern.code


def test_equal_text_means_equal_patterns():
    assert len({pattern.code for pattern in PATTERNS}) == len(PATTERNS)


def test_tensors_go_beside_the_text():
    first, second = (BlockList.from_mask(torch.eye(n).bool(), block_size=64) for n in (3, 4))
    union = Union((first, LocalWindow(0, 64), second))
    found = bind(decode(union.code), [*first.tensors, *second.tensors])
    for made, given in zip(found.patterns[::2], (first, second), strict=True):
        assert torch.equal(made.row_pointer, given.row_pointer)
        assert torch.equal(made.columns, given.columns)
    assert found.patterns[1] == LocalWindow(0, 64)
