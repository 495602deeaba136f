"""`explain_sparse`: lists, pairs, work and coverage against the counts of the formula; errors of wrong calls."""

from __future__ import annotations

import json

import pytest
import torch

from dilated_attention_pytorch import (
    ContentTopK,
    DilatedBlocks,
    DilatedPattern,
    GlobalLocal,
    LocalWindow,
    RandomBlocks,
    Union,
    explain_sparse,
    sparse_attention_with_lse,
)
from dilated_attention_pytorch.patterns.formula import block_mask

HEADS, DIM, VALUE_DIM = 4, 8, 16
LOCAL, RANDOM = LocalWindow(16, 16), RandomBlocks(2, seed=3, block_size=16)
PATTERNS = {
    "local": LOCAL,
    "global": GlobalLocal(0, 1, (100,), 16),
    "random": RANDOM,
    "dilated blocks": DilatedBlocks((64, 128), (2, 4), 16),
    "pairs": Union((LOCAL, DilatedPattern((24, 90), (2, 5)))),
    "pairs by head": Union((RANDOM, DilatedPattern((50,), (3,), "interleaved"))),
}
PLACES = {
    "whole": ((2, 130, 130), {}),
    "last rows": ((1, 37, 130), {"key_start": 5}),
    "left padding": ((1, 90, 90), {"key_start": -7}),
    "packed": ((1, 130, 130), {"cu_seqlens": torch.tensor([0, 7, 70, 130])}),
    "packed, last rows": ((1, 65, 130), {"cu_seqlens": torch.tensor([0, 60, 110, 130])}),
    "starts": ((2, 70, 70), {"key_start": torch.tensor([-3, 40])}),
}


def explained(pattern, batch, queries, rows, **options):
    shapes = (batch, queries, HEADS, DIM), (batch, rows, 2, DIM), (batch, rows, 2, VALUE_DIM)
    return explain_sparse(*shapes, pattern, **options)


@pytest.mark.parametrize("is_causal", [False, True], ids=["both", "causal"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", PATTERNS)
def test_pairs_work_and_coverage_equal_the_count_of_the_formula(name, place, is_causal, oracle):
    (batch, queries, rows), options = PLACES[place]
    found = explained(PATTERNS[name], batch, queries, rows, is_causal=is_causal, **options)
    seen = oracle.multiset(PATTERNS[name], HEADS, batch, rows, queries, is_causal=is_causal, **options)
    assert found.pairs == int(seen.sum())
    assert found.rows == batch * queries * HEADS
    assert found.rows_without_keys == int((seen.sum(-1) == 0).sum())
    assert found.flops_forward == 2 * found.pairs * (DIM + VALUE_DIM)
    assert found.flops_backward == 2 * found.pairs * (3 * DIM + 2 * VALUE_DIM)
    assert 0 < found.blocks <= found.dense_blocks
    json.dumps(found.to_dict())


@pytest.mark.parametrize("is_causal", [False, True], ids=["both", "causal"])
@pytest.mark.parametrize("name", ["local", "global", "random", "dilated blocks"])
def test_blocks_and_bytes_equal_the_block_mask(name, is_causal):
    pattern, rows = PATTERNS[name], 130
    found = explained(pattern, 2, rows, rows, is_causal=is_causal)
    masks = torch.stack([block_mask(pattern, head, HEADS, 9, is_causal=is_causal) for head in range(HEADS)])
    assert found.blocks == 2 * int(masks.sum())
    assert found.dense_blocks == 2 * HEADS * (45 if is_causal else 81)
    assert found.shared_lists == (not pattern.per_head)
    entries, lists = (found.blocks, HEADS) if pattern.per_head else (found.blocks // HEADS, 1)
    assert found.bytes_lists == 4 * (entries + lists * (2 * 9 + 1) + 2 * 2 * 9 * 4)  # columns, pointers, tile tables
    assert found.bytes_lists_backward == found.bytes_lists  # no backend of the CPU turns them


@pytest.mark.parametrize("is_causal", [False, True], ids=["both", "causal"])
def test_selected_blocks_are_counted_as_they_are_attended(is_causal):
    """With a query of zeros exp(lse) is the number of keys of a row, whatever it selects."""
    pattern = ContentTopK(2, always_local=1, block_size=16)
    q, k = torch.zeros(1, 150, 2, 8), torch.randn(1, 150, 2, 8)
    found = explain_sparse(q, k, k, pattern, is_causal=is_causal)
    _, lse = sparse_attention_with_lse(q, k, k, pattern, is_causal=is_causal)
    assert found.pairs == int(lse.double().exp().round().sum())
    assert found.backend == "sdpa"
    assert not found.shared_lists


def test_the_backend_and_why_and_the_text():
    found = explained(PATTERNS["pairs"], 1, 64, 64, is_causal=True)
    assert found.backend == found.backend_backward == "reference"
    assert found.skipped[0][0] == "sdpa"
    assert "parts of blocks" in found.skipped[0][1]
    text = str(found)
    assert "backend  reference\n         not sdpa: the pattern shows parts" in text
    assert f"pairs    {found.pairs:,}, " in text
    assert "coverage 256 of 256 (row, head) pairs have a key" in text
    assert explained(LOCAL, 1, 64, 64, dropout_p=0.1).backend == "reference"
    assert explained(LOCAL, 1, 64, 64, backend="sdpa").skipped == ()


@pytest.mark.parametrize(
    ("pattern", "options", "message"),
    [
        (Union((LOCAL, RANDOM), multiplicity=True), {}, "explain each of pattern.patterns"),
        (ContentTopK(2), {}, "give tensors instead of shapes"),
        (DilatedPattern((4,), (1,)), {}, "call dilated_attention"),
        (LOCAL, {"backend": "fast"}, "backend is 'fast'"),
        (LOCAL, {"backend": "sdpa", "dropout_p": 0.1}, "cannot compute this"),
        (LOCAL, {"scale": "a"}, "scale"),
    ],
)
def test_wrong_calls(pattern, options, message):
    with pytest.raises(ValueError, match=message):
        explained(pattern, 1, 64, 64, **options)


def test_a_query_without_rows_in_a_document_has_no_keys():
    found = explained(LOCAL, 1, 5, 20, key_start=-20)
    assert found.pairs == found.blocks == found.dense_blocks == 0
    assert found.rows_without_keys == found.rows == 5 * HEADS
    assert "0.00% of all" in str(found)
