"""What every caller may rely on: causality, masks, packing, decoding, finiteness, determinism, gradients of lse."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from dilated_attention_pytorch import DilatedPattern, dilated_attention, dilated_attention_with_lse
from dilated_attention_pytorch.testing import oracle

SEGMENTS, RATES = (16, 40, 128), (1, 3, 4)
backends = pytest.mark.parametrize("backend", ["reference", "sdpa"])


def draw(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def qkv(batch: int = 1, rows: int = 100, heads: int = 4, dim: int = 16, **options):
    return tuple(draw(batch, rows, heads, dim, seed=i, **options) for i in range(3))


def with_gradients(inputs, grad, **options):
    """out, lse, dq, dk, dv."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out, lse = dilated_attention_with_lse(*leaves, SEGMENTS, RATES, **options)
    return out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, grad)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_later_token_changes_nothing_before_it(backend, dtype):
    inputs = qkv(dtype=dtype)
    before = dilated_attention_with_lse(*inputs, SEGMENTS, RATES, is_causal=True, backend=backend)
    for t in (1, 16, 57, 99):
        changed = [x.clone() for x in inputs]
        for x in changed:
            x[:, t:] = draw(1, 100 - t, 4, 16, dtype=dtype, seed=9)
        after = dilated_attention_with_lse(*changed, SEGMENTS, RATES, is_causal=True, backend=backend)
        assert torch.equal(before.out[:, :t], after.out[:, :t])
        assert torch.equal(before.lse[..., :t], after.lse[..., :t])
        assert not torch.equal(before.out[:, t:], after.out[:, t:])


@backends
def test_nan_under_a_mask_changes_nothing(backend):
    inputs, grad = qkv(2), draw(2, 100, 4, 16, seed=5)
    hidden = torch.rand(2, 100, generator=torch.Generator().manual_seed(1)) < 0.4
    hidden[1, 60:] = True
    clean = with_gradients(inputs, grad, key_padding_mask=hidden, backend=backend)
    poisoned = [inputs[0], *(t.masked_fill(hidden[:, :, None, None], torch.nan) for t in inputs[1:])]
    for a, b in zip(clean, with_gradients(poisoned, grad, key_padding_mask=hidden, backend=backend), strict=True):
        assert torch.equal(a, b)
    dk, dv = clean[3:]
    assert (dk[hidden] == 0).all()
    assert (dv[hidden] == 0).all()


@backends
def test_nan_in_left_padding_changes_nothing(backend):
    inputs, grad = qkv(2), draw(2, 100, 4, 16, seed=5)
    start = torch.tensor([-30, -7])
    padded = torch.arange(100) < -start[:, None]
    clean = with_gradients(inputs, grad, key_start=start, is_causal=True, backend=backend)
    poisoned = [t.masked_fill(padded[:, :, None, None], torch.nan) for t in inputs]
    after = with_gradients(poisoned, grad, key_start=start, is_causal=True, backend=backend)
    for a, b in zip(clean, after, strict=True):
        assert torch.equal(a, b)
    out, lse, *grads = after
    assert (lse.transpose(1, 2)[padded] == -torch.inf).all()
    for tensor in (out, *grads):
        assert (tensor[padded] == 0).all()


@backends
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_huge_logits_stay_finite(backend, dtype, is_causal):
    q, k, v = qkv(dtype=torch.float64)
    q, k = (t / t.norm(dim=-1, keepdim=True) * 200 for t in (q, k))  # scores of +-1e4 at scale 1/4
    grad = draw(1, 100, 4, 16, seed=5, dtype=dtype)
    inputs = [t.to(dtype) for t in (q, k, v)]
    assert (inputs[0].double()[0, :, 0] @ inputs[1].double()[0, :, 0].T / 4).abs().max() > 8e3
    hidden = torch.arange(100)[None] % 5 == 2
    for options in ({}, {"key_padding_mask": hidden}):
        found = with_gradients(inputs, grad, is_causal=is_causal, backend=backend, **options)
        out, lse, *grads = found
        assert all(torch.isfinite(t).all() for t in (out, *grads))
        assert (torch.isfinite(lse) | (lse == -torch.inf)).all()


@backends
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"head_offsets": "interleaved"}], ids=str)
def test_values_of_one_give_one(backend, options):
    q, k, v = qkv()
    out = dilated_attention(q, k, torch.ones_like(v), SEGMENTS, RATES, backend=backend, **options)
    torch.testing.assert_close(out, torch.ones_like(out), atol=2e-6, rtol=0)


@backends
@pytest.mark.parametrize("is_causal", [False, True])
def test_one_segment_at_rate_1_is_sdpa(backend, is_causal):
    inputs, grad = qkv(2, dtype=torch.float64), draw(2, 100, 4, 16, seed=5, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in inputs]
    expected = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in leaves), is_causal=is_causal).transpose(1, 2)
    for length in (100, 1000):
        out = dilated_attention(*leaves, [length], [1], is_causal=is_causal, backend=backend)
        torch.testing.assert_close(out, expected, atol=1e-13, rtol=0)
        for a, b in zip(
            torch.autograd.grad(out, leaves, grad, retain_graph=True),
            torch.autograd.grad(expected, leaves, grad, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@backends
@pytest.mark.parametrize("padding", ["mask", "zeros"])
@pytest.mark.parametrize("way", ["mask", "pack", "left"])
def test_a_ragged_batch_equals_its_rows_alone(backend, padding, way):
    lengths, longest = (37, 100, 1, 64), 100
    rows = [qkv(rows=n, dtype=torch.float64) for n in lengths]
    grads = [draw(1, n, 4, 16, seed=n, dtype=torch.float64) for n in lengths]
    options = {"padding": padding, "backend": backend}
    alone = [with_gradients(inputs, grad, **options) for inputs, grad in zip(rows, grads, strict=True)]
    if way == "pack":
        bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
        inputs = [torch.cat([row[i] for row in rows], 1) for i in range(3)]
        found = with_gradients(inputs, torch.cat(grads, 1), cu_seqlens=bounds, **options)
        parts = [
            [t[..., a:b] if i == 1 else t[:, a:b] for i, t in enumerate(found)]
            for a, b in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
        ]
    else:
        before = [longest - n if way == "left" else 0 for n in lengths]
        places = [slice(b, b + n) for b, n in zip(before, lengths, strict=True)]

        def batch(tensors):
            whole = draw(len(lengths), longest, 4, 16, seed=77, dtype=torch.float64)  # garbage where padded
            for b, (tensor, place) in enumerate(zip(tensors, places, strict=True)):
                whole[b, place] = tensor[0]
            return whole

        inputs = [batch([row[i] for row in rows]) for i in range(3)]
        grad = torch.zeros_like(inputs[0])
        for b, place in enumerate(places):
            grad[b, place] = grads[b][0]
        if way == "left":
            options["key_start"] = -torch.tensor(before)
        else:
            options["key_padding_mask"] = torch.arange(longest) >= torch.tensor(lengths)[:, None]
        found = with_gradients(inputs, grad, **options)
        parts = [
            [t[b : b + 1, :, p] if i == 1 else t[b : b + 1, p] for i, t in enumerate(found)]
            for b, p in enumerate(places)
        ]
    for part, expected in zip(parts, alone, strict=True):
        for a, b in zip(part, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@backends
def test_token_by_token_equals_the_whole_pass(backend):
    q, k, v = qkv(2, dtype=torch.float64)
    whole = dilated_attention_with_lse(q, k, v, SEGMENTS, RATES, is_causal=True, backend=backend)
    for t in range(100):
        so_far = slice(0, t + 1)
        step = dilated_attention_with_lse(
            q[:, t : t + 1], k[:, so_far], v[:, so_far], SEGMENTS, RATES, is_causal=True, backend=backend
        )
        torch.testing.assert_close(step.out[:, 0], whole.out[:, t], atol=1e-13, rtol=0)
        torch.testing.assert_close(step.lse[..., 0], whole.lse[..., t], atol=1e-13, rtol=0)


@backends
def test_decoding_after_eviction_equals_the_whole_pass(backend):
    segments, rates = (8, 24), (1, 3)
    q, k, v = qkv(dtype=torch.float64)
    whole = dilated_attention(q, k, v, segments, rates, is_causal=True, backend=backend)
    for t in range(100):
        start = t // 24 * 24  # nothing before the current longest segment is ever attended to again
        step = dilated_attention(
            q[:, t : t + 1], k[:, start : t + 1], v[:, start : t + 1], segments, rates,
            is_causal=True, key_start=start, backend=backend,
        )  # fmt: skip
        torch.testing.assert_close(step[:, 0], whole[:, t], atol=1e-13, rtol=0)


@backends
@pytest.mark.parametrize("chunk", [1, 7, 16, 45])
def test_chunked_prefill_equals_the_whole_pass(backend, chunk):
    q, k, v = qkv(dtype=torch.float64)
    whole = dilated_attention(q, k, v, SEGMENTS, RATES, is_causal=True, backend=backend)
    parts = [
        dilated_attention(q[:, a : a + chunk], k[:, : a + chunk], v[:, : a + chunk], SEGMENTS, RATES, is_causal=True)
        for a in range(0, 100, chunk)
    ]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-13, rtol=0)


@backends
def test_repeats_are_bitwise_equal(backend):
    inputs, grad = qkv(2, 300, 6), draw(2, 300, 6, 16, seed=5)
    first = with_gradients(inputs, grad, is_causal=True, backend=backend)
    for _ in range(3):
        for a, b in zip(first, with_gradients(inputs, grad, is_causal=True, backend=backend), strict=True):
            assert torch.equal(a, b)


@backends
def test_a_row_without_keys_is_zero_and_minus_infinity(backend):
    q, k, v = qkv(heads=2)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    # One head pair at rate 4, contiguous: rows at residues 2 and 3 have no head and hence no branch.
    out, lse = dilated_attention_with_lse(*leaves, [32], [4], backend=backend)
    empty = torch.arange(100) % 32 % 4
    for h in range(2):
        gone = empty != h
        assert (out[0, gone, h] == 0).all()
        assert (lse[0, h, gone] == -torch.inf).all()
        assert torch.isfinite(lse[0, h, ~gone]).all()
    grads = torch.autograd.grad(out.sum() + lse[torch.isfinite(lse)].sum(), leaves)
    for grad in grads:
        assert torch.isfinite(grad).all()
        assert (grad[0, empty >= 2] == 0).all()


@backends
def test_everything_masked(backend):
    leaves = [t.requires_grad_() for t in qkv()]
    hidden = torch.ones(1, 100, dtype=torch.bool)
    out, lse = dilated_attention_with_lse(*leaves, SEGMENTS, RATES, key_padding_mask=hidden, backend=backend)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    for grad in torch.autograd.grad(out.sum(), leaves):
        assert (grad == 0).all()


@backends
def test_gradient_of_lse_alone(backend):
    inputs = qkv(dtype=torch.float64)
    weights = draw(1, 4, 100, seed=8, dtype=torch.float64)

    def gradients(attend):
        leaves = [t.detach().clone().requires_grad_() for t in inputs]
        return torch.autograd.grad((attend(*leaves).lse * weights).sum(), leaves, allow_unused=True)

    dq, dk, dv = gradients(lambda *t: dilated_attention_with_lse(*t, SEGMENTS, RATES, backend=backend))
    gold = gradients(lambda *t: oracle(*t, SEGMENTS, RATES))
    torch.testing.assert_close(dq, gold[0], atol=1e-13, rtol=0)
    torch.testing.assert_close(dk, gold[1], atol=1e-13, rtol=0)
    assert (dv == 0).all()


def test_detached_lse_has_no_gradient():
    leaves = [t.requires_grad_() for t in qkv()]
    out, lse = dilated_attention_with_lse(*leaves, SEGMENTS, RATES, mixing_grad="detached")
    assert out.requires_grad
    assert not lse.requires_grad


GRADCHECK = [
    {},
    {"is_causal": True},
    {"head_offsets": "interleaved"},
    {"padding": "zeros"},
    {"scale": 0.7, "is_causal": True},
    {"key_start": 5},
    {"key_start": torch.tensor([-3, 4])},
    {"key_padding_mask": torch.arange(13).expand(2, -1) % 4 == 1},
    {"padding": "zeros", "key_padding_mask": torch.arange(13) >= torch.tensor([[9], [13]])},
    {"queries": 5, "is_causal": True},
]


@backends
@pytest.mark.parametrize("options", GRADCHECK, ids=lambda options: "-".join(options) or "plain")
def test_gradcheck(backend, options):
    options = dict(options)
    rows = options.pop("queries", 13)
    q, k, v = (
        draw(2, rows, 4, 3, dtype=torch.float64),
        *(draw(2, 13, 2, 3, seed=i, dtype=torch.float64) for i in (1, 2)),
    )
    reached = torch.isfinite(dilated_attention_with_lse(q, k, v, (5, 16), (1, 3), **options).lse)

    def attend(*tensors):
        out, lse = dilated_attention_with_lse(*tensors, (5, 16), (1, 3), backend=backend, **options)
        return out, lse[reached]

    assert torch.autograd.gradcheck(attend, [t.requires_grad_() for t in (q, k, v)], fast_mode=True)


def keys_of_each_row(pattern: DilatedPattern, heads: int, rows: int, *, is_causal: bool, zeros: bool) -> torch.Tensor:
    """(H, N): keys that a row sees, by integer arithmetic on its position."""
    n = torch.arange(rows)
    total = torch.zeros(heads, rows, dtype=torch.int64)
    for w, r in zip(pattern.segment_lengths, pattern.dilation_rates, strict=True):
        low = n // w * w
        high = n + 1 if is_causal else (low + w).clamp(max=rows)
        for h in range(heads):
            offset = pattern.head_offset(h, r, heads)
            seen = (high - low - offset + r - 1) // r
            if zeros and not is_causal:
                seen = torch.full_like(n, math.ceil(min(w, rows) / r))
            total[h] += torch.where((n - low) % r == offset, seen.clamp(min=0), 0)
    return total


PROBES = [
    (torch.float32, 1000, {}),
    (torch.float32, 4099, {"is_causal": True}),
    (torch.bfloat16, 8192, {"is_causal": True}),
    (torch.bfloat16, 5000, {"padding": "zeros"}),
    (torch.float16, 16384, {}),
    (torch.float32, 65536, {"is_causal": True}),
    (torch.bfloat16, 65537, {}),
]


@pytest.mark.parametrize(("dtype", "rows", "options"), PROBES, ids=lambda value: str(value).removeprefix("torch."))
def test_probe_counts_the_keys_of_every_row(dtype, rows, options):
    heads = 3
    pattern = DilatedPattern((64, 300, 1024, 70000), (1, 3, 8, 512))
    q, k = torch.zeros(1, rows, heads, 8, dtype=dtype), draw(1, rows, heads, 8, dtype=dtype)
    # The values mark a block of keys: out is the share of the row's keys that lie in it.
    block = (torch.arange(rows) >= rows // 3) & (torch.arange(rows) < rows // 3 + 777)
    v = block.to(dtype)[None, :, None, None].expand(1, rows, heads, 8)
    out, lse = dilated_attention_with_lse(q, k, v, pattern.segment_lengths, pattern.dilation_rates, **options)
    is_causal, zeros = options.get("is_causal", False), options.get("padding") == "zeros"
    expected = keys_of_each_row(pattern, heads, rows, is_causal=is_causal, zeros=zeros)
    assert torch.equal(lse[0].double().exp().round().long(), expected)
    inside = torch.stack([count_in_block(pattern, h, heads, rows, rows // 3, 777, is_causal) for h in range(heads)])
    share = (inside / expected.clamp(min=1)).T
    tolerance = torch.finfo(dtype).eps * 2
    assert float((out[0, :, :, 0].double() - share).abs().max()) <= tolerance


def count_in_block(
    pattern: DilatedPattern, head: int, heads: int, rows: int, first: int, size: int, is_causal: bool
) -> torch.Tensor:
    """(N,): how many of a row's keys lie in [first, first + size)."""
    n = torch.arange(rows)
    total = torch.zeros(rows, dtype=torch.int64)
    for w, r in zip(pattern.segment_lengths, pattern.dilation_rates, strict=True):
        offset = pattern.head_offset(head, r, heads)
        low = n // w * w
        start = low.clamp(min=first)
        stop = torch.minimum((low + w).clamp(max=first + size), n + 1 if is_causal else torch.tensor(rows))
        stop = stop.clamp(max=rows)
        start = start + (offset - (start - low)) % r
        seen = ((stop - start + r - 1) // r).clamp(min=0)
        total += torch.where((n - low) % r == offset, seen, 0)
    return total
