"""A learned gate for `ContentTopK`: its gradient against a dense float64 oracle; nothing else changes."""

from __future__ import annotations

import math

import pytest
import torch

from dilated_attention_pytorch import ContentTopK, LocalWindow, SparseAttention, sparse_attention_with_lse
from dilated_attention_pytorch.backends.philox import keep_mask
from dilated_attention_pytorch.backends.sparse.selection import sparse_select
from dilated_attention_pytorch.testing import error_bound, max_error

ROWS, HEADS, KV_HEADS, BLOCKS = 75, 4, 2, 5
PATTERN = ContentTopK(2, always_local=1, always_first=1, block_size=16)
HIDDEN = torch.rand(2, ROWS, generator=torch.Generator().manual_seed(9)) < 0.3
HIDDEN[0, :20] = True  # causal, the first rows have no key
PLACES = {
    "whole": (1, ROWS, {}),
    "hidden": (2, ROWS, {"key_padding_mask": HIDDEN}),
    "last rows": (1, 23, {}),
    "packed": (1, ROWS, {"cu_seqlens": torch.tensor([0, 37, ROWS])}),
    "dropout": (1, ROWS, {"dropout_p": 0.3}),
}


def inputs(batch, queries, dtype=torch.float64):
    """Query, key, value and gate that require gradients; the query is not contiguous."""
    generator = torch.Generator().manual_seed(4)
    sizes = (batch, HEADS, queries, 8), (batch, ROWS, KV_HEADS, 8), (batch, ROWS, KV_HEADS, 16)
    q, k, v, g = (
        torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)
        for size in (*sizes, (batch, HEADS, queries, BLOCKS + 1))
    )
    return [t.requires_grad_() for t in (q.transpose(1, 2).detach(), k, v, g)]


def dense(q, k, v, g, *, is_causal, seed, key_padding_mask=None, cu_seqlens=None, dropout_p=0.0):
    """Attention with the gate written out, over a dense mask of the blocks that loops collect."""
    batch, queries = q.shape[:2]
    size, first = PATTERN.block_size, ROWS - q.shape[1]
    options = (key_padding_mask, cu_seqlens, None, PATTERN.code, 0, is_causal, None)
    selected = sparse_select(q.detach(), k.detach(), *options).tolist()
    bounds = [0, ROWS] if cu_seqlens is None else cu_seqlens.tolist()
    start = torch.tensor([max(b for b in bounds if b <= t) for t in range(ROWS)])
    block = (torch.arange(ROWS) - start) // size
    seen = torch.zeros(batch, HEADS, queries, ROWS, dtype=torch.bool)
    for b, h, i in ((b, h, i) for b in range(batch) for h in range(HEADS) for i in range(queries)):
        own = int(block[first + i])
        chooser = i if is_causal else max(0, int(start[first + i]) + own * size - first)  # a block's first row
        listed = torch.tensor([0, own - 1, own, own + 1, *selected[b][h][chooser]])
        seen[b, h, i] = (start == start[first + i]) & torch.isin(block, listed)
    if is_causal:
        seen &= torch.arange(ROWS) <= torch.arange(first, ROWS)[:, None]
    if key_padding_mask is not None:
        seen &= ~key_padding_mask[:, None, None]
    scores = q.transpose(1, 2) @ k.transpose(1, 2).repeat_interleave(HEADS // KV_HEADS, 1).mT / math.sqrt(8)
    scores = scores + (g - g.detach())[..., block]
    empty = ~seen.any(-1)
    scores = scores.masked_fill(~seen, -torch.inf).masked_fill(empty[..., None], 0.0)
    p = scores.softmax(-1).masked_fill(empty[..., None], 0.0)
    if dropout_p:
        index = torch.arange(batch * HEADS).view(batch, HEADS)
        rows = torch.arange(first, ROWS)
        keep = keep_mask(seed, dropout_p, branch=0, batch_heads=index, query_rows=rows, key_rows=torch.arange(ROWS))
        p = p * keep / (1 - dropout_p)
    out = p @ v.transpose(1, 2).repeat_interleave(HEADS // KV_HEADS, 1)
    return out.transpose(1, 2), scores.logsumexp(-1).masked_fill(empty, 0.0)


@pytest.mark.parametrize("is_causal", [False, True], ids=["both", "causal"])
@pytest.mark.parametrize("place", PLACES)
def test_gradients_are_those_of_the_dense_oracle(place, is_causal):
    batch, queries, options = PLACES[place]
    for dtype in (torch.float64, torch.float32) if place == "whole" else (torch.float64,):
        given = inputs(batch, queries, dtype)
        torch.manual_seed(11)
        out, lse = sparse_attention_with_lse(*given[:3], PATTERN, is_causal=is_causal, gate=given[3], **options)
        torch.manual_seed(11)
        seed = int(torch.randint(2**62, (1,)))
        exact, eager = ([t.detach().to(d).requires_grad_() for t in given] for d in (torch.float64, dtype))
        expected, rounded = (dense(*ts, is_causal=is_causal, seed=seed, **options) for ts in (exact, eager))
        grads = torch.randn_like(out), torch.randn_like(lse)
        empty = lse == -torch.inf
        got = torch.autograd.grad([out, lse.masked_fill(empty, 0.0)], given, grads)
        gold = torch.autograd.grad(expected, exact, [t.double() for t in grads])
        plain = torch.autograd.grad(rounded, eager, grads)
        assert float(gold[3].abs().max()) > 0.1
        for found, right, near in zip((out, *got), (expected[0], *gold), (rounded[0], *plain), strict=True):
            right, near = right.detach(), near.detach()
            assert max_error(found.detach(), right) <= error_bound(right, near, dtype, summand=float(near.abs().max()))
        assert not got[3][..., BLOCKS:].any()  # no document has this block


@pytest.mark.parametrize("is_causal", [False, True], ids=["both", "causal"])
def test_no_result_and_no_other_gradient_changes(is_causal):
    given = inputs(2, ROWS, torch.float32)
    options = {"is_causal": is_causal, "key_padding_mask": HIDDEN}
    gated = sparse_attention_with_lse(*given[:3], PATTERN, gate=given[3], **options)
    plain = sparse_attention_with_lse(*given[:3], PATTERN, backend="reference", **options)
    for a, b in zip(gated, plain, strict=True):
        assert torch.equal(a, b)
    grad = torch.randn_like(gated.out)
    *with_gate, of_gate = torch.autograd.grad(gated.out, given, grad)
    for a, b in zip(with_gate, torch.autograd.grad(plain.out, given[:3], grad), strict=True):
        assert torch.equal(a, b)
    (alone,) = torch.autograd.grad(
        SparseAttention(PATTERN)(*(t.detach() for t in given[:3]), gate=given[3], **options), given[3], grad
    )
    assert torch.equal(alone, of_gate)
    assert bool(alone.isfinite().all())
    torch.testing.assert_close(alone.sum(-1), torch.zeros(2, HEADS, ROWS), rtol=0, atol=1e-5)  # a shift of a row


def test_a_gate_can_be_shared_by_expansion():
    q, k, v, gate = inputs(2, ROWS)
    one = gate.detach()[:, :1, :1].clone().requires_grad_()
    out, _ = sparse_attention_with_lse(q, k, v, PATTERN, gate=one.expand_as(gate))
    (shared,) = torch.autograd.grad(out.square().sum(), one)
    out, _ = sparse_attention_with_lse(q, k, v, PATTERN, gate=gate)
    (each,) = torch.autograd.grad(out.square().sum(), gate)
    torch.testing.assert_close(shared, each.sum((1, 2), keepdim=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "sdpa"}, "backend 'sdpa' carries no gate"),
        ({"backend": "triton"}, "backend 'triton' carries no gate"),
        ({"pattern": LocalWindow(16, 16)}, "pattern is a LocalWindow; give a ContentTopK alone"),
        ({"gate": torch.zeros(2, HEADS, ROWS, 4)}, "gate has 4 blocks, and a document has 5"),
        ({"gate": torch.zeros(2, 1, ROWS, 6)}, "gate has shape .*give \\(2, 4, 75, blocks\\)"),
        ({"gate": torch.zeros(2, HEADS, ROWS, 6, dtype=torch.int64)}, "floating-point tensor"),
        ({"gate": [1.0]}, "gate is of type list"),
    ],
)
def test_refusals(change, message):
    q, k, v, gate = inputs(2, ROWS)
    with pytest.raises(ValueError, match=message):
        sparse_attention_with_lse(q, k, v, **({"pattern": PATTERN, "gate": gate} | change))
