"""Block-sparse backends on a GPU, against the dense oracle in float64 on the CPU."""

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
    sparse_attention_with_lse,
)
from dilated_attention_pytorch.backends import gluon
from dilated_attention_pytorch.sparse_testing import SparseCase, sparse_violations

pytestmark = pytest.mark.gpu

BIG = Union((GlobalLocal(0, 1, block_size=16), RandomBlocks(1, seed=3, block_size=16)))
PAIRS = Union((LocalWindow(16, 16), DilatedPattern((27, 50), (2, 5), "interleaved")))
OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "per_head": {"pattern": BIG},
    "per_head_causal_grouped": {"pattern": BIG, "is_causal": True, "kv_heads": 1, "group": 2},
    "list": {"pattern": "list"},
    "block_32": {"pattern": LocalWindow(32, 32), "is_causal": True},
    "block_64": {"pattern": GlobalLocal(64, 1, block_size=64), "key_rows": 300},
    "block_128": {"pattern": GlobalLocal(128, 1, block_size=128), "key_rows": 700, "is_causal": True},
    "dilated_blocks": {"pattern": DilatedBlocks((64, 128), (1, 2), 16)},
    "hierarchical": {"pattern": Hierarchical(((32, 16), (128, 64)), 16)},
    "pairs": {"pattern": PAIRS},
    "pairs_causal": {"pattern": PAIRS, "is_causal": True},
    "value_dim": {"head_dim": 24, "value_dim": 40},
    "random_mask": {"hidden": "random", "batch": 2},
    "random_mask_causal": {"hidden": "random", "is_causal": True},
    "packed": {"cuts": (9, 9, 31, 101)},
    "packed_causal": {"cuts": (9, 9, 31, 101), "is_causal": True, "pattern": BIG},
    "left_padding": {"key_start": (-20, -3), "batch": 2, "is_causal": True},
    "evicted": {"key_start": 27, "query_rows": 5, "is_causal": True, "pattern": BIG},
    "chunk": {"query_rows": 29},
    "one_row": {"key_rows": 1},
    "scale": {"scale": 0.9},
    "layouts": {"layouts": ("packed", "columns", "expanded", "strided_rows"), "batch": 2},
}  # fmt: skip


def case_of(options, block_size: int = 16, **rest) -> SparseCase:
    given = {"seed": 3, "key_rows": 141, "kv_heads": 2, "head_dim": 16, "pattern": LocalWindow(16, 16), **options}
    if given["pattern"] == "list":
        shown = torch.rand(2, 11, 11, generator=torch.Generator().manual_seed(1)) < 0.4
        given["pattern"] = BlockList.from_mask(shown, block_size=block_size)
    return SparseCase(**{**given, **rest})


@pytest.mark.parametrize(
    ("dtype", "dropout_p"),
    [("bfloat16", 0.0), ("float32", 0.0), ("float16", 0.3)],
    ids=["bfloat16", "float32", "float16-dropout"],
)
@pytest.mark.parametrize("name", OPTIONS)
def test_bound_b_of_every_option_of_triton(name, dtype, dropout_p):
    case = case_of(OPTIONS[name], grad_lse=True, dtype=getattr(torch, dtype), dropout_p=dropout_p)
    assert not (found := sparse_violations(case, ("triton",), device="cuda")), "\n".join(found)


HOPPER = {
    "local_64": {"pattern": LocalWindow(128, 64)},
    "local_128": {"pattern": LocalWindow(128, 128)},
    "global_64": {"pattern": GlobalLocal(64, 1, (300,), 64)},
    "random_64_per_head": {"pattern": RandomBlocks(2, 1, 64)},
    "random_128_grouped": {"pattern": RandomBlocks(2, 1, 128), "kv_heads": 2, "group": 3},
    "shared_grouped": {"pattern": GlobalLocal(128, 1), "kv_heads": 1, "group": 3},
    "dilated_64": {"pattern": DilatedBlocks((192, 576), (1, 3), 64), "kv_heads": 4},
    "list_64": {"pattern": "list"},
    "packed": {"cuts": (5, 300, 390), "pattern": GlobalLocal(64, 1, block_size=64)},
    "chunk": {"query_rows": 300, "key_start": 77, "pattern": LocalWindow(128, 64)},
    "left_padding": {"key_start": (-300, -2), "batch": 2, "pattern": GlobalLocal(128, 1)},
    "projection": {"pattern": LocalWindow(64, 64), "layouts": ("packed", "packed", "packed", "heads_first")},
}  # fmt: skip


@pytest.fixture
def hopper() -> None:
    if reason := gluon.unavailable():
        pytest.skip(reason)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("grad_lse", [False, True], ids=["out", "out_and_lse"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("name", HOPPER)
def test_bound_b_of_the_hopper_kernels(name, is_causal, grad_lse):
    found = []
    for dtype, head_dim in (("bfloat16", 128), ("float16", 48)) if grad_lse else (("bfloat16", 64), ("float16", 96)):
        case = case_of(
            {"key_rows": 700, **HOPPER[name]}, is_causal=is_causal, grad_lse=grad_lse, head_dim=head_dim,
            dtype=getattr(torch, dtype), block_size=64,
        )  # fmt: skip
        found += sparse_violations(case, ("gluon",), device="cuda")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["plain", "causal", "per_head", "block_128", "random_mask_causal", "packed", "chunk"])
def test_bound_b_of_the_vendor_kernels(name, dtype):
    case = case_of(OPTIONS[name], grad_lse=True, dtype=getattr(torch, dtype))
    assert not (found := sparse_violations(case, ("sdpa",), device="cuda")), "\n".join(found)


@pytest.mark.parametrize("head_dim", [48, 64, 80, 128, 256])
def test_bound_b_of_every_head_dim_of_triton(head_dim):
    found = []
    for is_causal in (False, True):
        pattern = GlobalLocal(64, 1, block_size=64)
        case = case_of({}, pattern=pattern, head_dim=head_dim, key_rows=400, is_causal=is_causal, dtype=torch.bfloat16)
        found += sparse_violations(case, ("triton",), device="cuda")
    assert not found, "\n".join(found)


def test_rows_that_select_for_themselves():
    """Content selection: bits of rows in the forward kernel and in both kernels of the backward pass."""
    pattern = ContentTopK(1, block_size=64)
    tensors = [torch.randn(1, 457, 2, 64, generator=torch.Generator().manual_seed(i)).cuda() for i in range(3)]
    found = []
    for backend in ("triton", "reference"):
        leaves = [t.clone().requires_grad_() for t in tensors]
        out, lse = sparse_attention_with_lse(*leaves, pattern, is_causal=True, backend=backend)
        found.append([out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), leaves)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("backend", ["triton", "gluon"])
def test_exp_lse_is_the_number_of_keys(backend, block_size, is_causal):
    if backend == "gluon" and (reason := gluon.unavailable()):
        pytest.skip(reason)
    rows, heads, window = 200_011, 4, 1024
    key = torch.randn(1, rows, heads, 64, device="cuda", dtype=torch.bfloat16)
    pattern = LocalWindow(window, block_size)
    _, lse = sparse_attention_with_lse(torch.zeros_like(key), key, key, pattern, is_causal=is_causal, backend=backend)
    block = torch.arange(rows) // block_size
    first = (block * block_size - window).clamp(min=0)
    last = torch.arange(rows) + 1 if is_causal else ((block + 1) * block_size + window).clamp(max=rows)
    assert torch.equal(lse[0].double().exp().round().long().cpu(), (last - first).expand(heads, rows))
