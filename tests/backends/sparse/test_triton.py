"""The block-sparse Triton kernels, interpreted on the CPU: every option against the dense oracle, small shapes."""

from __future__ import annotations

import pytest
import torch

from dilated_attention_pytorch import (
    BlockList,
    ContentTopK,
    DilatedBlocks,
    DilatedPattern,
    GlobalLocal,
    LocalWindow,
    RandomBlocks,
    Union,
    sparse_attention_with_lse,
)

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, where kernels take log2(0)

LOCAL = LocalWindow(16, 16)
BIG = Union((GlobalLocal(0, 1, block_size=16), RandomBlocks(1, seed=3, block_size=16)))
LIST = BlockList.from_mask(torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(1)) < 0.4, block_size=16)
PAIRS = Union((LOCAL, DilatedPattern((27, 50), (2, 5), "interleaved")))
OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "per head": {"pattern": BIG},
    "per head causal grouped": {"pattern": BIG, "is_causal": True, "kv_heads": 1, "group": 2},
    "list": {"pattern": LIST},
    "tiles in parts": {"pattern": LocalWindow(32, 32), "is_causal": True, "key_rows": 45},
    "dilated blocks": {"pattern": DilatedBlocks((32, 64), (1, 2), 16), "key_rows": 70},
    "pairs": {"pattern": PAIRS},
    "pairs causal": {"pattern": PAIRS, "is_causal": True},
    "value dim": {"head_dim": 24, "value_dim": 10},
    "random mask": {"hidden": "random", "batch": 2},
    "random mask causal": {"hidden": "random", "is_causal": True},
    "packed": {"cuts": (9, 9, 31, 34)},
    "packed causal": {"cuts": (9, 9, 31, 34), "is_causal": True, "pattern": BIG},
    "left padding": {"key_start": (-20, -3), "batch": 2, "is_causal": True},
    "evicted": {"key_start": 27, "query_rows": 5, "is_causal": True, "pattern": BIG},
    "chunk": {"query_rows": 29},
    "one row": {"key_rows": 1},
    "scale": {"scale": 0.9},
    "layouts": {"layouts": ("packed", "columns", "expanded", "strided_rows"), "batch": 2},
}
SHORT = ("pairs causal", "per head causal grouped", "random mask causal", "tiles in parts")
HALF = ("causal", "per head causal grouped", "pairs", "random mask causal", "evicted")
SHAPE = {"key_rows": 41, "kv_heads": 2, "head_dim": 16, "pattern": LOCAL}


@pytest.mark.parametrize(
    "name", [name if name in SHORT else pytest.param(name, marks=pytest.mark.full) for name in OPTIONS]
)
def test_bound_b_of_every_option(name, oracle):
    case = oracle.Case(**{"seed": 3, "grad_lse": True, **SHAPE, **OPTIONS[name]})
    assert not (found := oracle.violations(case, ("triton",))), "\n".join(found)


@pytest.mark.parametrize("name", [HALF[0], *(pytest.param(name, marks=pytest.mark.full) for name in HALF[1:])])
def test_half_precision_and_dropout(name, oracle):
    case = oracle.Case(**{"seed": 4, **SHAPE, **OPTIONS[name]}, dtype=torch.float16, dropout_p=0.3)
    assert not (found := oracle.violations(case, ("triton",))), "\n".join(found)


def test_rows_that_select_for_themselves():
    """Content selection: bits of rows in the forward kernel and in both kernels of the backward pass."""
    pattern = ContentTopK(1, block_size=16)
    tensors = [torch.randn(1, 57, 2, 16, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in range(3)]
    found = []
    for backend in ("triton", "reference"):
        out, lse = sparse_attention_with_lse(*tensors, pattern, is_causal=True, backend=backend)
        found.append([out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), tensors)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_nan_in_masked_keys_stays_there():
    q, k, v = (torch.randn(1, 20, 2, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    hidden = torch.arange(20)[None] % 3 == 1
    options = {"key_padding_mask": hidden, "backend": "triton"}
    clean = sparse_attention_with_lse(q, k, v, LOCAL, **options)
    k[:, 1::3], v[:, 1::3] = torch.nan, torch.inf
    for a, b in zip(clean, sparse_attention_with_lse(q, k, v, LOCAL, **options), strict=True):
        assert torch.equal(a, b)


def test_refusals_name_the_reason():
    q = torch.randn(1, 8, 2, 16)
    for tensor, options, reason in (
        (q.double(), {}, "float32, too little for float64"),
        (q.bfloat16(), {}, "interpreter multiplies the bits of bfloat16"),
        (q, {"scale": -1.0}, "need a positive scale, not -1.0"),
    ):
        with pytest.raises(ValueError, match=reason):
            sparse_attention_with_lse(tensor, tensor, tensor, LOCAL, backend="triton", **options)
