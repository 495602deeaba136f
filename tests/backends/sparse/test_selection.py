"""Blocks that content selects: which ones, against loops; what is computed from them, against the dense oracle."""

from __future__ import annotations

import pytest
import torch

from dilated_attention_pytorch import ContentTopK, DilatedPattern, LocalWindow, Union, sparse_attention_with_lse

POOLINGS = ("mean", "sub_means", "min_max", "moments")


def draw(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def block_score(pooling, q, keys, full):
    """The score of a block's keys (n, D) for a query (D,), one formula a pooling; ``full`` has the block's gaps."""
    scores = keys @ q / q.shape[0] ** 0.5
    if pooling == "mean":
        return scores.mean()
    if pooling == "min_max":
        return torch.maximum(q * keys.amin(0), q * keys.amax(0)).sum() / q.shape[0] ** 0.5
    if pooling == "moments":
        deviation = (keys - keys.mean(0)).square().mean(0)
        return scores.mean() + (q.square() @ deviation) / q.shape[0] / 2
    shown = [part[~part[:, 0].isnan()] for part in full.unflatten(0, (4, -1))]  # NaN where there is no key
    return max(part.mean(0) @ q for part in shown if len(part)) / q.shape[0] ** 0.5


def seen(pattern, q, k, hidden, *, is_causal):
    """(H, N, N) bool by loops, for one document that starts at row 0."""
    (n, heads, _), size = q.shape, pattern.block_size
    result, group, blocks = torch.zeros(heads, n, n, dtype=torch.bool), heads // k.shape[1], -(-n // size)
    for h in range(heads):
        for t in range(n):
            own = t // size
            if not is_causal and t % size:  # as the first row of its block
                result[h, t] = result[h, t - 1]
                continue
            mine = q[t, h] if is_causal else q[own * size : (own + 1) * size, h].mean(0)
            always = {j for j in range(blocks) if abs(j - own) <= pattern.always_local or j < pattern.always_first}
            scored = []
            for j in range(own if is_causal else blocks):
                block = slice(j * size, min(n, (j + 1) * size))
                full = torch.full((size, q.shape[2]), torch.nan, dtype=q.dtype)
                full[: block.stop - block.start] = k[block, h // group].masked_fill(hidden[block, None], torch.nan)
                keys = k[block, h // group][~hidden[block]]
                if j not in always and len(keys):
                    scored.append((float(block_score(pattern.pooling, mine, keys, full)), j))
            chosen = always | {j for _, j in sorted(scored, reverse=True)[: pattern.keep]}
            for j in chosen:
                result[h, t, j * size : (j + 1) * size] = True
    result &= ~hidden
    return result & torch.ones(n, n).tril().bool() if is_causal else result


@pytest.mark.parametrize("is_causal", [False, True], ids=["both", "causal"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_bound_b_on_the_blocks_that_loops_select(pooling, is_causal, oracle):
    pattern = ContentTopK(2, always_local=1, always_first=1, pooling=pooling, block_size=16)
    case = oracle.Case(
        pattern=pattern, seed=5, key_rows=70, kv_heads=1, group=2, is_causal=is_causal, hidden="random",
        grad_lse=True,
    )  # fmt: skip
    hidden = case.options()["key_padding_mask"][0]

    def counts(tensors):
        return seen(pattern, tensors[0][0].double(), tensors[1][0].double(), hidden, is_causal=is_causal)[None].long()

    assert not (found := oracle.violations(case, ("reference", "sdpa"), counts=counts)), "\n".join(found)


def test_causal_rows_of_a_block_select_for_themselves():
    """Bits of more than one word, and of the sign bit of a word, in a tile of 64 rows."""
    pattern = ContentTopK(1, block_size=64)
    q, k = draw(1, 200, 1, 8), draw(1, 200, 1, 8, seed=1)
    _, lse = sparse_attention_with_lse(torch.zeros_like(q), k, k, pattern, is_causal=True)
    assert torch.equal(lse[0, 0, 64:].exp().round(), 64 + torch.arange(200)[64:] % 64 + 1.0)
    mask = seen(pattern, q[0], k[0], torch.zeros(200, dtype=torch.bool), is_causal=True)
    out, _ = sparse_attention_with_lse(q, k, torch.ones_like(k).cumsum(1), pattern, is_causal=True)
    scores = (q[0, :, 0] @ k[0, :, 0].T / 8**0.5).masked_fill(~mask[0], -torch.inf)
    torch.testing.assert_close(out[0, :, 0, 0], scores.softmax(-1) @ torch.arange(1.0, 201))


def test_every_document_and_decoding_select_as_the_whole_does():
    pattern = ContentTopK(1, always_first=1, block_size=16)
    q, k, v = (draw(1, 150, 2, 8, seed=i) for i in range(3))
    options = {"is_causal": True}
    packed = sparse_attention_with_lse(q, k, v, pattern, cu_seqlens=torch.tensor([0, 53, 150]), **options).out
    for first, last in ((0, 53), (53, 150)):
        alone = sparse_attention_with_lse(*(t[:, first:last] for t in (q, k, v)), pattern, **options).out
        torch.testing.assert_close(packed[:, first:last], alone, rtol=1e-5, atol=1e-6)
    whole = sparse_attention_with_lse(q, k, v, pattern, **options).out
    for t in (1, 16, 17, 100, 150):
        step = sparse_attention_with_lse(q[:, t - 1 : t], k[:, :t], v[:, :t], pattern, **options).out
        torch.testing.assert_close(step, whole[:, t - 1 : t], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_future_changes_no_bit(pooling):
    pattern = ContentTopK(2, pooling=pooling, block_size=16)
    q, k, v = (draw(1, 130, 2, 8, seed=i) for i in range(3))
    before = sparse_attention_with_lse(q, k, v, pattern, is_causal=True)
    for t in (15, 16, 120):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, t] = 3.0
        after = sparse_attention_with_lse(*changed, pattern, is_causal=True)
        assert torch.equal(after.out[:, :t], before.out[:, :t])
        assert torch.equal(after.lse[..., :t], before.lse[..., :t])


def test_a_union_with_a_window_counts_pairs_once():
    content = ContentTopK(2, block_size=16)
    q, k, v = (draw(1, 150, 2, 8, seed=i) for i in range(3))
    got = sparse_attention_with_lse(q, k, v, Union((content, LocalWindow(16, 16))), is_causal=True)
    hidden = torch.zeros(150, dtype=torch.bool)
    mask = seen(content, q[0], k[0], hidden, is_causal=True)
    block = torch.arange(150) // 16
    mask |= (block[:, None] - block).abs() <= 1
    mask &= torch.ones(150, 150).tril().bool()
    scores = torch.einsum("nhd,mhd->hnm", q[0], k[0]) / 8**0.5
    torch.testing.assert_close(got.lse[0], scores.masked_fill(~mask, -torch.inf).logsumexp(-1))
    with pytest.raises(ValueError, match="selects by content twice"):
        Union((content, content))


def test_refusals():
    with pytest.raises(ValueError, match="pooling is 'max'; choose one of 'mean'"):
        ContentTopK(2, pooling="max")
    with pytest.raises(ValueError, match="keep is 0"):
        ContentTopK(0)
    q = draw(1, 40, 1, 8)
    by_pairs = Union((ContentTopK(1, block_size=16), DilatedPattern((20,), (2,))))
    with pytest.raises(ValueError, match="shows parts of blocks"):
        sparse_attention_with_lse(q, q, q, by_pairs, is_causal=True, backend="sdpa")


@pytest.mark.parametrize("is_causal", [False, True], ids=["both", "causal"])
def test_without_candidates_nothing_is_selected(is_causal):
    """A document of fewer blocks than all rows see anyhow: the result is that of its blocks, all of them."""
    query, key, value = (torch.randn(1, 20, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    content, window = ContentTopK(1, always_first=3, block_size=16), LocalWindow(32, 16)
    results = []
    for pattern in (content, window):
        out, lse = sparse_attention_with_lse(query, key, value, pattern, is_causal=is_causal)
        results.append([out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), (query, key, value))])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)
