"""The plain Triton kernels, interpreted on the CPU: every option against the dense oracle, small shapes."""

from __future__ import annotations

import pytest
import torch

from dilated_attention_pytorch import dilated_attention_with_lse
from dilated_attention_pytorch.backends import triton
from dilated_attention_pytorch.backends.dispatch import choose
from dilated_attention_pytorch.backends.philox import keep_mask
from dilated_attention_pytorch.testing import Case, violations

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, where kernels take log2(0)

SHAPE = {"key_rows": 37, "segment_lengths": (16, 27), "dilation_rates": (1, 2), "kv_heads": 2, "head_dim": 16}
OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "interleaved": {"head_offsets": "interleaved", "kv_heads": 3},
    "grouped": {"kv_heads": 1, "group": 2},
    "value_dim": {"head_dim": 24, "value_dim": 10},
    "random_mask": {"hidden": "random", "batch": 2},
    "random_mask_causal": {"hidden": "random", "is_causal": True},
    "suffix_zeros": {"hidden": (13, 20), "batch": 2, "padding": "zeros"},
    "zeros_detached": {"padding": "zeros", "mixing_grad": "detached"},
    "detached_causal": {"mixing_grad": "detached", "is_causal": True},
    "packed": {"cuts": (9, 9, 31, 34)},
    "packed_causal": {"cuts": (9, 9, 31, 34), "is_causal": True},
    "left_padding": {"key_start": (-20, -3), "batch": 2, "is_causal": True},
    "evicted": {"key_start": 17, "query_rows": 5, "is_causal": True},
    "one_query": {"query_rows": 1, "is_causal": True},
    "decode": {"query_rows": 3, "key_rows": 300, "segment_lengths": (64, 300), "is_causal": True, "batch": 2},
    "decode_zeros": {"query_rows": 2, "key_rows": 150, "segment_lengths": (64, 200), "padding": "zeros"},
    "decode_mask": {"query_rows": 2, "key_rows": 150, "segment_lengths": (64, 200), "hidden": "random", "group": 2},
    "chunk": {"query_rows": 29},
    "one_row": {"key_rows": 1},
    "more_rate_than_heads": {"segment_lengths": (20, 34), "dilation_rates": (5, 8)},
    "coprime": {"segment_lengths": (12, 17, 30), "dilation_rates": (1, 3, 4), "key_rows": 30},
    "scale": {"scale": 0.9},
    "gradient_of_columns": {"layouts": ("heads_first", "heads_first", "heads_first", "columns")},
    "layouts": {"layouts": ("packed", "columns", "expanded", "strided_rows"), "batch": 2},
}
HALF = ("plain", "decode_mask", "causal", "random_mask_causal", "zeros_detached", "evicted", "coprime")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_bound_b_of_every_option(options):
    case = Case(**{"seed": 3, "grad_lse": True, **SHAPE, **options})
    assert not (found := violations(case, ("triton",))), "\n".join(found)


@pytest.mark.parametrize("name", HALF)
def test_half_precision_and_dropout(name):
    case = Case(**{"seed": 4, **SHAPE, **OPTIONS[name]}, dtype=torch.float16, dropout_p=0.3)
    assert not (found := violations(case, ("triton",))), "\n".join(found)


def test_nan_in_masked_keys_and_huge_logits():
    q, k, v = (torch.randn(1, 30, 2, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    hidden = torch.arange(30)[None] % 3 == 1
    options = {"key_padding_mask": hidden, "backend": "triton"}
    clean = dilated_attention_with_lse(q, k, v, (16, 30), (1, 2), **options)
    k[:, 1::3], v[:, 1::3] = torch.nan, torch.inf
    for a, b in zip(clean, dilated_attention_with_lse(q, k, v, (16, 30), (1, 2), **options), strict=True):
        assert torch.equal(a, b)
    out, lse = dilated_attention_with_lse(100 * q, 100 * clean.out, clean.out, (16, 30), (1, 2), backend="triton")
    assert torch.isfinite(out).all()
    assert torch.isfinite(lse).all()
    assert lse.abs().max() > 1000


def test_dropout_keeps_what_philox_says():
    """With V the identity and q = 0, out shows which keys of a row survive."""
    rows, p, seed = 16, 0.5, 0x1234_5678_9ABC
    q = torch.zeros(1, rows, 2, 16)
    v = torch.eye(rows)[None, :, None].expand(1, rows, 2, rows).contiguous()
    from dilated_attention_pytorch.backends.ops import make_problem

    problem = make_problem(
        q, q, v, None, None, None, [rows], [1], 0, False, None, p, "contiguous", "mask", "exact"
    )  # fmt: skip
    out, _ = triton.forward(q, q, v, problem, seed=seed)
    index = torch.arange(rows)
    for head in range(2):
        kept = keep_mask(seed, p, branch=0, batch_heads=torch.tensor(head), query_rows=index, key_rows=index)
        torch.testing.assert_close(out[0, :, head], kept.float() / (1 - p) / rows)


def test_a_sum_differentiates_like_the_reference():
    q, k, v = (torch.randn(1, 12, 2, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    found = []
    for backend in ("triton", "reference"):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        dilated_attention_with_lse(*leaves, [8, 12], [1, 2], backend=backend).out.sum().backward()
        found.append([t.grad for t in leaves])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_nan_at_rows_without_keys_goes_nowhere_and_elsewhere_it_shows():
    q = torch.randn(1, 20, 1, 16, generator=torch.Generator().manual_seed(1))
    leaves = [q.clone().requires_grad_() for _ in range(3)]
    out, lse = dilated_attention_with_lse(*leaves, [5, 20], [3, 2], backend="triton")
    empty = (lse[0, 0] == -torch.inf).clone()
    assert 0 < empty.sum() < 20
    grad = torch.ones_like(out).masked_fill(empty[None, :, None, None], torch.nan)
    for gradient in torch.autograd.grad(out, leaves, grad):
        assert torch.isfinite(gradient).all()
    q[0, 3] = torch.nan
    out, lse = dilated_attention_with_lse(q, q, q, [20], [1], backend="triton")
    assert lse.isnan().all()
    assert out.isnan().all()


def test_the_default_dtype_changes_nothing():
    q = torch.randn(1, 12, 2, 16)
    expected = dilated_attention_with_lse(q, q, q, [8, 12], [1, 2], backend="triton")
    torch.set_default_dtype(torch.float16)
    try:
        got = dilated_attention_with_lse(q, q, q, [8, 12], [1, 2], backend="triton")
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.lse.dtype == torch.float32
    assert torch.equal(got.out, expected.out)
    assert torch.equal(got.lse, expected.lse)


def test_huge_segments_and_positions():
    q = torch.randn(1, 20, 2, 16, generator=torch.Generator().manual_seed(1))
    for pattern, start in ((([2**31], [1]), 0), (([64, 2**30], [1, 1]), 2**30 - 64), (([2**40, 8], [2**40, 1]), 5)):
        got, expected = (
            dilated_attention_with_lse(q, q, q, *pattern, key_start=start, backend=backend)
            for backend in ("triton", "reference")
        )
        torch.testing.assert_close(got.out, expected.out, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got.lse, expected.lse, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="positions up to 2\\^30, and they reach 1073741844"):
        dilated_attention_with_lse(q, q, q, [64], [2], key_start=2**30, backend="triton")


def test_refusals_name_the_reason():
    q = torch.randn(1, 8, 2, 16)
    for tensor, options, reason in (
        (q.double(), {}, "float32, too little for float64"),
        (q.bfloat16(), {}, "interpreter multiplies the bits of bfloat16"),
        (q, {"scale": -1.0}, "need a positive scale, not -1.0"),
        (torch.randn(1, 8, 2, 264), {}, "a head dim of 264 does not fit a tile; at most 256"),
    ):
        with pytest.raises(ValueError, match=reason):
            dilated_attention_with_lse(tensor, tensor, tensor, [8], [1], backend="triton", **options)


def test_auto_never_interprets():
    from dilated_attention_pytorch.backends.ops import make_problem

    q = torch.randn(1, 8, 2, 16)
    for dropout_p, expected in ((0.0, "sdpa"), (0.2, "reference")):
        problem = make_problem(
            q, q, q, None, None, None, [8], [1], 0, False, None, dropout_p, "contiguous", "mask", "exact"
        )  # fmt: skip
        assert choose("auto", problem).name == expected
