"""Blocks that rows choose for themselves: packed rows, by our kernels and by PyTorch's, against the dense oracle."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from dilated_attention_pytorch import (
    BlockList,
    ContentTopK,
    LocalWindow,
    RandomBlocks,
    Union,
    sparse_attention_with_lse,
)
from dilated_attention_pytorch.backends.sparse import chosen

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, where kernels take log2(0)

CONTENT = ContentTopK(2, block_size=16)
OVERLAPPING = Union((ContentTopK(2, block_size=16), LocalWindow(32, 16), RandomBlocks(1, 3, 16)))
LISTED = BlockList.from_mask(torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(1)) < 0.4, block_size=16)
OPTIONS = {
    "plain": {},
    "more choices than blocks": {"pattern": ContentTopK(9, always_first=1, block_size=16)},
    "grouped": {"kv_heads": 1, "group": 3},
    "union": {"pattern": OVERLAPPING},
    "union with a list": {"pattern": Union((CONTENT, LISTED)), "batch": 2},
    "parts of blocks": {"pattern": ContentTopK(1, always_local=1, block_size=32), "key_rows": 110},
    "value dim": {"head_dim": 24, "value_dim": 10},
    "mask": {"hidden": "random", "batch": 2},
    "dropout": {"dropout_p": 0.3},
    "packed": {"cuts": (9, 9, 31, 84)},
    "left padding": {"key_start": (-20, -3), "batch": 2},
    "evicted": {"key_start": 27, "query_rows": 5},
    "chunk": {"query_rows": 29, "pattern": OVERLAPPING},
    "one row": {"key_rows": 1},
    "all of it left padding": {"key_start": -89},
    "layouts": {"layouts": ("packed", "columns", "expanded", "strided_rows"), "batch": 2},
}
SHORT = ("grouped", "union", "mask", "all of it left padding")
SHAPE = {"seed": 3, "key_rows": 89, "kv_heads": 2, "head_dim": 16, "pattern": CONTENT, "is_causal": True}


def violations(oracle, case):
    backends = ("triton",) if case.dropout_p else ("triton", "sdpa")
    return oracle.violations(case, backends, counts=partial(oracle.chosen_multiset, case))


@pytest.mark.parametrize(
    "name", [name if name in SHORT else pytest.param(name, marks=pytest.mark.full) for name in OPTIONS]
)
def test_bound_b_of_every_option(name, oracle):
    case = oracle.Case(**{"grad_lse": True, **SHAPE, **OPTIONS[name]})
    assert not (found := violations(oracle, case)), "\n".join(found)


def test_some_heads_at_a_time(oracle, monkeypatch):
    monkeypatch.setattr(chosen, "_PARTIAL_BYTES", 1)
    monkeypatch.setattr(chosen, "_TILES", 1)
    case = oracle.Case(**SHAPE, dtype=torch.float16)
    assert not (found := violations(oracle, case)), "\n".join(found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_of_vendor_kernels(dtype, oracle):
    case = oracle.Case(**{**SHAPE, "pattern": OVERLAPPING}, dtype=dtype, grad_lse=True)
    found = oracle.violations(case, ("sdpa",), counts=partial(oracle.chosen_multiset, case))
    assert not found, "\n".join(found)


@pytest.mark.parametrize(("backend", "rows"), [("triton", 50), ("sdpa", 700)])
def test_the_future_changes_no_bit(backend, rows):
    q, k, v = (torch.randn(1, rows, 4, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    k, v = k[:, :, :2], v[:, :, :2]
    attend = partial(sparse_attention_with_lse, pattern=CONTENT, is_causal=True, backend=backend)
    before = attend(q, k, v)
    for t in (15, 16, rows - 10):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, t] = 3.0
        after = attend(*changed)
        assert torch.equal(after.out[:, :t], before.out[:, :t])
        assert torch.equal(after.lse[..., :t], before.lse[..., :t])


@pytest.mark.full
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("part", range(4))
@settings(max_examples=50, phases=[Phase.generate], deadline=None, database=None, derandomize=True,
          suppress_health_check=list(HealthCheck))  # fmt: skip
@given(data=st.data())
def test_bound_b_of_random_calls(part, data, oracle):
    def one_of(*values):
        return data.draw(st.sampled_from(values))

    def integer(low, high):
        return data.draw(st.integers(low, high))

    size, rows = one_of(16, 16, 32), integer(1, 130)
    content = ContentTopK(integer(1, 4), integer(0, 1), integer(0, 2), one_of("mean", "sub_means"), size)
    others = one_of((), (), (LocalWindow(size, size),), (RandomBlocks(2, 7, size), LocalWindow(0, size)))
    start = one_of("zero", "zero", "one", "each", "packed")
    batch = 1 if start == "packed" else integer(1, 2)
    key_start = {"zero": 0, "packed": 0, "one": integer(-rows, 60)}
    case = oracle.Case(
        pattern=Union((content, *others)) if others else content,
        seed=integer(0, 2**31),
        key_rows=rows,
        query_rows=one_of(None, None, integer(1, rows)),
        batch=batch,
        kv_heads=integer(1, 2),
        group=integer(1, 2),
        head_dim=one_of(8, 16, 24),
        dtype=one_of(torch.float32, torch.float16),
        is_causal=True,
        scale=one_of(None, 0.5),
        dropout_p=one_of(0.0, 0.0, 0.3),
        hidden=one_of(None, None, "random"),
        cuts=tuple(sorted(integer(0, rows) for _ in range(integer(0, 4)))) if start == "packed" else None,
        key_start=key_start[start] if start in key_start else tuple(integer(-rows, 30) for _ in range(batch)),
        grad_lse=data.draw(st.booleans()),
    )
    assert not (found := violations(oracle, case)), "\n".join(found)
