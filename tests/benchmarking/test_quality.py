"""Recall, error and work of patterns against dense softmaxes written out."""

from __future__ import annotations

import pytest
import torch

from dilated_attention_pytorch import ContentTopK, DilatedPattern, GlobalLocal, LocalWindow, RandomBlocks, Union
from dilated_attention_pytorch.benchmarking.quality import measure_quality, search_patterns
from dilated_attention_pytorch.patterns.formula import pair_counts


@pytest.mark.parametrize("is_causal", [False, True], ids=["both", "causal"])
@pytest.mark.parametrize(
    "pattern", [LocalWindow(16, 16), Union((GlobalLocal(0, 1, block_size=16), RandomBlocks(1, block_size=16)))], ids=str
)
def test_recall_error_and_work_are_those_of_the_dense_weights(pattern, is_causal):
    q, k, v = torch.randn(3, 2, 100, 2, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = measure_quality(q, k, v, pattern, is_causal=is_causal)
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / 8**0.5
    allowed = torch.ones(100, 100).tril().bool() if is_causal else torch.ones(100, 100).bool()
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    position = torch.arange(100)
    seen = pair_counts(pattern, 2, position, position, 100, is_causal=is_causal).bool()
    torch.testing.assert_close(found.recall, (weights * seen).sum(-1).mean((0, 2)))
    kept = scores.masked_fill(~(seen & allowed), -torch.inf).softmax(-1)
    dense, sparse = (torch.einsum("bhnm,bmhd->bnhd", w, v) for w in (weights, kept))
    error = (dense - sparse).square().sum((0, 1, 3)).sqrt() / dense.square().sum((0, 1, 3)).sqrt()
    torch.testing.assert_close(found.error, error)
    assert found.work == pytest.approx(float((seen & allowed).double().mean() / allowed.double().mean()))


def test_selected_pairs_are_counted_row_by_row():
    q, k, v = torch.randn(3, 1, 100, 1, 8, generator=torch.Generator().manual_seed(1))
    found = measure_quality(q, k, v, ContentTopK(1, block_size=16), is_causal=True)
    row = torch.arange(100)
    assert found.work == pytest.approx(float((row % 16 + 1 + 16 * (row >= 16)).sum()) / 5050)


def test_a_pattern_of_everything_loses_nothing():
    q, k, v = torch.randn(3, 1, 100, 2, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = measure_quality(q, k, v, LocalWindow(128, 16), is_causal=True)
    torch.testing.assert_close(found.recall, torch.ones(2, dtype=torch.float64))
    assert float(found.error.max()) < 1e-12
    assert found.work == 1.0


def test_the_search_finds_where_the_weight_lies_within_the_budget():
    """Every row looks at the first block: global tokens win over windows of the same work, and content finds it too."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = torch.randn(3, 1, 512, 1, 16, generator=generator)
    k[:, :16] = 3 * q.mean((0, 1))
    q, k = q + 2, k.index_fill(1, torch.arange(16), 2.0)
    tried = [LocalWindow(32, 16), GlobalLocal(16, 16, block_size=16), LocalWindow(512, 16)]
    found = search_patterns(q, k, v, budget=0.4, candidates=tried, is_causal=True)
    assert [quality.pattern for quality in found] == [tried[1], tried[0]]
    assert found[0].recall > 2 * found[1].recall
    with pytest.raises(ValueError, match="budget is 0"):
        search_patterns(q, k, v, budget=0)
    with pytest.raises(ValueError, match=r"no candidate costs at most 0\.001, the cheapest costs 0\.1"):
        search_patterns(q, k, v, budget=0.001, candidates=tried, is_causal=True)
    with pytest.raises(ValueError, match="counts pairs several times"):
        measure_quality(q, k, v, Union((tried[0], DilatedPattern((8,), (1,))), multiplicity=True))
