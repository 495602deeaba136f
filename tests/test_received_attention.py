"""received_attention against the column sums of the dense weights."""

from __future__ import annotations

import pytest
import torch

from dilated_attention_pytorch import dilated_attention_with_lse, received_attention
from dilated_attention_pytorch.patterns import DilatedPattern
from dilated_attention_pytorch.testing import multiplicity

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
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    if "padding" not in options:
        torch.testing.assert_close(got.sum((1, 2)).double(), torch.full((2,), 200.0).double(), atol=1e-2, rtol=0)


def test_gradients_are_left_alone_and_bad_input_is_named():
    q = torch.randn(1, 8, 2, 16, requires_grad=True)
    with torch.no_grad():
        assert not received_attention(q, q, [8], [1]).requires_grad
    assert q.grad is None
    with pytest.raises(ValueError, match=r"give a tensor \(B, N, H_kv, D\)"):
        received_attention(q, None, [8], [1])
