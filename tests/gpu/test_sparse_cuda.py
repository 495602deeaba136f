"""Block-sparse backends on a GPU, against the dense oracle in float64 on the CPU."""

from __future__ import annotations

from functools import partial

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
from dilated_attention_pytorch.backends.sparse.selection import sparse_select
from dilated_attention_pytorch.sparse_testing import SparseCase, chosen_multiset, sparse_violations

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


CHOICES = {
    "rows_64": {"pattern": ContentTopK(2, block_size=64), "is_causal": True},
    "rows_128_grouped": {
        "pattern": ContentTopK(2, 1, 1), "is_causal": True, "kv_heads": 1, "group": 3, "key_rows": 1100,
    },
    "rows_and_a_window": {
        "pattern": Union((ContentTopK(3, block_size=64), LocalWindow(64, 64), RandomBlocks(1, 3, 64))),
        "is_causal": True, "cuts": (5, 300, 390),
    },
    "rows_of_a_chunk": {"pattern": ContentTopK(3, block_size=64), "is_causal": True, "query_rows": 300},
    "tiles": {"pattern": ContentTopK(2), "key_rows": 1100},
    "tiles_packed": {"pattern": ContentTopK(1, 1, 1), "cuts": (5, 300, 390), "kv_heads": 1, "group": 2},
    "tiles_64": {"pattern": ContentTopK(2, block_size=64), "batch": 2},
}  # fmt: skip


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("backend", ["triton", "gluon"])
@pytest.mark.parametrize("name", CHOICES)
def test_bound_b_of_blocks_chosen_by_content(name, backend, head_dim):
    if backend == "gluon" and (reason := gluon.unavailable()):
        pytest.skip(reason)
    case = case_of(
        {"key_rows": 700, "grad_lse": True, **CHOICES[name]}, head_dim=head_dim, dtype=torch.bfloat16
    )  # fmt: skip
    counts = partial(chosen_multiset, case, device="cuda")
    assert not (found := sparse_violations(case, (backend,), device="cuda", counts=counts)), "\n".join(found)


ALONE = {"float32": {"dtype": torch.float32}, "dropout": {"dropout_p": 0.3}, "mask": {"hidden": "random", "batch": 2}}


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("block_size", [16, 128])
def test_bound_b_of_rows_that_choose_for_themselves(block_size, name):
    pattern = ContentTopK(2, always_first=1, block_size=block_size)
    case = case_of({"key_rows": 600, "is_causal": True, "dtype": torch.float16, "pattern": pattern, **ALONE[name]})
    counts = partial(chosen_multiset, case, device="cuda")
    assert not (found := sparse_violations(case, ("triton",), device="cuda", counts=counts)), "\n".join(found)


@pytest.mark.parametrize("keep", [2, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_choose_the_blocks_of_the_largest_scores(dtype, keep):
    size, rows, content = 64, 6000, ContentTopK(keep, block_size=64)
    query, key = (torch.randn(1, rows, 2, 64, device="cuda").to(dtype) for _ in range(2))
    found = sparse_select(query, key, None, None, None, content.code, 0, True, None)[0].long()
    blocks = rows // size
    means = key[0, : blocks * size].double().unflatten(0, (blocks, size)).mean(1)
    scores = torch.einsum("nhd,shd->hns", query[0].double(), means) / 8
    past = torch.arange(blocks, device="cuda") < torch.arange(rows, device="cuda")[:, None] // size
    scores = scores.masked_fill(~past, -torch.inf)
    best = scores.topk(keep).values
    got = scores.gather(2, found.clamp(min=0)).masked_fill(found < 0, -torch.inf).sort(2, descending=True).values
    assert all(len(set(row)) == len(row) for row in found[0, -5:].tolist())
    torch.testing.assert_close(got, best, rtol=0, atol=1e-4)


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
