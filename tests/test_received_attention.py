"""received_attention against the column sums of the dense weights."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from dilated_attention_pytorch import dilated_attention_with_lse, received_attention
from dilated_attention_pytorch.patterns import DilatedPattern
from dilated_attention_pytorch.testing import error_bound, max_error, multiplicity

OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "interleaved": {"head_offsets": "interleaved"},
    "scale": {"scale": 0.7},
    "evicted": {"key_start": 9},
    "zeros": {"padding": "zeros"},
}


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equals_the_column_sums_of_the_dense_weights(options, dtype, backend):
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(2, 50, 4, 16, generator=generator).to(dtype)
    k = torch.randn(2, 50, 2, 16, generator=generator).to(dtype)
    pattern = (12, 40), (1, 3)
    got = received_attention(q, k, *pattern, backend=backend, **options)
    whole = DilatedPattern(*pattern, options.get("head_offsets", "contiguous"))
    position = torch.arange(50) + options.get("key_start", 0)
    m = multiplicity(whole, 4, position, torch.zeros(50), 50, is_causal=options.get("is_causal", False)).sum(0)
    q64, k64 = q.double(), k.double().repeat_interleave(2, dim=2)
    scale = options.get("scale", 16**-0.5)
    scores = torch.einsum("bqhd,bkhd->bhqk", q64, k64) * scale
    value = torch.zeros(2, 50, 2, 1, dtype=torch.float64)
    lse = dilated_attention_with_lse(q64, k.double(), value, *pattern, backend="reference", **options).lse
    weights = m * torch.exp(scores - lse.unsqueeze(-1))
    expected = weights.sum(2).unflatten(1, (2, 2)).sum(2)
    acc = torch.promote_types(dtype, torch.float32)  # in which scores, weights and their sums are computed
    eager = (m * torch.exp(scores.to(acc) - lse.to(acc).unsqueeze(-1))).to(acc).sum(2).unflatten(1, (2, 2)).sum(2)
    assert max_error(got, expected) <= error_bound(expected, eager, acc)
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    if "padding" not in options:
        torch.testing.assert_close(got.sum((1, 2)).double(), torch.full((2,), 200.0).double(), atol=1e-2, rtol=0)


def peak_bytes(rows: int) -> int:
    """Largest sum of live tensors while the attention of one slide is summed up, its result included."""
    key = torch.randn(1, rows, 2, 16, generator=torch.Generator().manual_seed(0))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        received = received_attention(key, key, (256, 1024), (1, 4))
    assert received.shape == (1, 2, rows)
    live = peak = 0
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def test_memory_grows_with_the_rows_and_not_with_their_square():
    short, long = peak_bytes(4096), peak_bytes(16384)
    assert long < 4.2 * short
    assert long < 16384 * 16384 * 4 / 16  # one head's weights in float32 are 1 GiB


def test_gradients_are_left_alone_and_bad_input_is_named():
    q = torch.randn(1, 8, 2, 16, requires_grad=True)
    with torch.no_grad():
        assert not received_attention(q, q, [8], [1]).requires_grad
    assert q.grad is None
    with pytest.raises(ValueError, match=r"give a tensor \(B, N, H_kv, D\)"):
        received_attention(q, None, [8], [1])


def test_in_inference_mode_it_is_the_same():
    query, key = torch.randn(2, 2, 24, 2, 16).unbind()
    mask = torch.arange(24)[None] >= torch.tensor([[24], [17]])
    expected = received_attention(query, key, [8], [2], key_padding_mask=mask)
    with torch.inference_mode():
        found = received_attention(query.clone(), key.clone(), [8], [2], key_padding_mask=mask.clone())
    torch.testing.assert_close(found, expected)
