"""The kernel that chooses blocks by their summaries, interpreted, against the choice by PyTorch's topk."""

from __future__ import annotations

import pytest
import torch

from dilated_attention_pytorch import ContentTopK
from dilated_attention_pytorch.backends.sparse import selection
from dilated_attention_pytorch.backends.sparse.selection import sparse_select

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, where numbers wrap around

CASES = {
    "several pieces of blocks": {"rows": 4000, "queries": 20, "keep": 3},
    "more than 32": {"rows": 1200, "queries": 6, "keep": 40},
    "packed": {"rows": 400, "cuts": (0, 53, 400), "size": 32},
    "left padding": {"rows": 150, "key_start": -20},
    "evicted": {"rows": 290, "queries": 30, "key_start": 27},
    "mask": {"rows": 397, "queries": 97, "size": 128, "hidden": True},
    "more than at once": {"rows": 1300, "queries": 6, "keep": 70},
    "tiles": {"rows": 700, "heads": 4, "keep": 5, "is_causal": False},
    "tiles of documents": {"rows": 700, "cuts": (0, 300, 317, 700), "is_causal": False},
    "tiles of a batch": {"rows": 90, "key_start": -20, "size": 64, "hidden": True, "batch": 3, "is_causal": False},
}


def choose(
    pattern, dtype, *, rows, queries=None, heads=2, keep=2, size=16, cuts=None, key_start=0, hidden=False, batch=1,
    is_causal=True,
):  # fmt: skip
    """What rows choose, sorted; of this draw no two scores are equal to as many bits as the kernel compares."""
    draw = torch.Generator().manual_seed(7)
    query = torch.randn(batch, queries or rows, heads, 24, generator=draw).to(dtype)
    key = torch.randn(batch, rows, 2, 24, generator=draw).to(dtype)
    mask = torch.rand(batch, rows, generator=draw) < 0.3 if hidden else None
    bounds = None if cuts is None else torch.tensor(cuts)
    content = ContentTopK(keep, 1, 1, pattern, size)
    return sparse_select(query, key, mask, bounds, None, content.code, key_start, is_causal, None).sort(-1).values


@pytest.mark.parametrize(
    ("name", "pooling", "dtype"),
    [
        ("several pieces of blocks", "mean", torch.float16),
        ("packed", "sub_means", torch.float32),
        ("evicted", "min_max", torch.float16),
        ("mask", "moments", torch.float16),
        ("tiles of a batch", "mean", torch.float16),
        *(
            pytest.param(name, pooling, dtype, marks=pytest.mark.full)
            for name in CASES
            for pooling in ("mean", "sub_means", "min_max", "moments")
            for dtype in (torch.float16, torch.float32)
        ),
    ],
)
def test_the_choice_is_that_of_topk(name, pooling, dtype, monkeypatch):
    expected = choose(pooling, dtype, **CASES[name])
    monkeypatch.setattr(selection, "has_kernel", lambda *_: True)
    assert torch.equal(choose(pooling, dtype, **CASES[name]), expected)


def test_equal_scores_go_to_earlier_blocks(monkeypatch):
    monkeypatch.setattr(selection, "has_kernel", lambda *_: True)
    query, key = torch.ones(1, 64, 1, 16), torch.ones(1, 640, 1, 16)
    key[:, 160:176] = 2.0
    found = sparse_select(query, key, None, None, None, ContentTopK(4, block_size=16).code, 0, True, None)
    assert (found == torch.tensor([10, 0, 1, 2])).all()
