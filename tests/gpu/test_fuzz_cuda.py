"""Random calls on a GPU, 500 a backend, against the dense oracle in float64 on the same GPU.

A Hopper kernel is compiled for a pattern, so its cases share a few patterns and vary everything else; the other
backends draw their patterns too. Whether a mask is causal is a part's, which halves what has to be compiled.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from dilated_attention_pytorch.backends import gluon
from dilated_attention_pytorch.testing import Case, violations

pytestmark = [pytest.mark.gpu, pytest.mark.full]

PARTS, CASES = 20, 25
LAYOUTS = ("contiguous", "contiguous", "heads_first", "packed", "strided_rows")
HOPPER = (
    ((64, 300, 2000), (1, 2, 4)),
    ((256, 512, 1024), (1, 2, 4)),
    ((48, 700), (1, 3)),
    ((200, 200, 900), (2, 1, 4)),
    ((129, 1000), (1, 4)),
)
"""Patterns of which 512 rows are enough for the Hopper kernels."""


def documents(choose: random.Random, rows: int) -> dict[str, Any]:
    """One document, packed ones, left padding or evicted keys."""
    match choose.choice(("one", "one", "packed", "start", "starts")):
        case "packed":
            return {"cuts": tuple(sorted(choose.randint(0, rows) for _ in range(choose.randint(0, 5))))}
        case "start":
            return {"key_start": choose.randint(-rows, 3000), "batch": choose.randint(1, 2)}
        case "starts":
            return {"key_start": tuple(choose.randint(-rows, 700) for _ in range(2)), "batch": 2}
    return {"batch": choose.randint(1, 2)}


@pytest.mark.parametrize("part", range(PARTS))
def test_gluon(part: int) -> None:
    if reason := gluon.unavailable():
        pytest.skip(reason)
    lengths, rates = HOPPER[part % len(HOPPER)]
    compiled: dict[str, Any] = {
        "segment_lengths": lengths, "dilation_rates": rates, "head_dim": (48, 64, 96, 128)[part // len(HOPPER)],
        "is_causal": part % 2 == 0, "dtype": (torch.bfloat16, torch.float16)[part // 2 % 2],
        "head_offsets": ("contiguous", "interleaved")[part // 3 % 2], "kv_heads": 1 + part % 3,
        "group": 1 + part // 4 % 2,
    }  # fmt: skip
    choose, found = random.Random(part), []
    for number in range(CASES):
        rows = choose.randint(512, 1100)
        padding = "mask" if compiled["is_causal"] else choose.choice(("mask", "mask", "zeros"))
        case = Case(
            seed=100 * part + number, key_rows=rows, query_rows=choose.choice((None, None, choose.randint(512, rows))),
            scale=choose.choice((None, 0.3)), padding=padding, grad_lse=choose.random() < 0.5,
            layouts=tuple(choose.choice(LAYOUTS) for _ in range(4)), **compiled, **documents(choose, rows),
        )  # fmt: skip
        found += violations(case, ("gluon",), device="cuda")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("backend", ["triton", "sdpa"])
@pytest.mark.parametrize("part", range(PARTS))
def test_other_backends(part: int, backend: str) -> None:
    choose, found = random.Random(1000 + part), []
    dtype = (torch.bfloat16, torch.float16, torch.float32, torch.bfloat16)[part % 4]
    head_dim = (16, 24, 48, 64, 128)[part % 5]
    is_causal = part // 2 % 2 == 0
    for number in range(CASES):
        rows, branches = choose.randint(1, 300), choose.randint(1, 4)
        lengths = tuple(choose.randint(1, 400) for _ in range(branches))
        where = documents(choose, rows)
        padding = choose.choice(("mask", "mask", "zeros"))
        hidden = None
        if "cuts" not in where and where.get("key_start", 0) == 0:
            hidden = choose.choice((None, None, "random" if padding == "mask" else None))
        case = Case(
            seed=10_000 + 100 * part + number, key_rows=rows, segment_lengths=lengths,
            dilation_rates=tuple(choose.randint(1, min(length, choose.choice((2, 4, 12)))) for length in lengths),
            query_rows=choose.choice((None, None, choose.randint(1, rows))), kv_heads=choose.randint(1, 3),
            group=choose.choice((1, 1, 2)), head_dim=head_dim, dtype=dtype, is_causal=is_causal,
            dropout_p=choose.choice((0.0, 0.0, 0.3)) if backend == "triton" else 0.0, hidden=hidden, padding=padding,
            head_offsets=choose.choice(("contiguous", "interleaved")),
            mixing_grad=choose.choice(("exact", "exact", "detached")), grad_lse=choose.random() < 0.5,
            layouts=tuple(choose.choice(LAYOUTS) for _ in range(4)), **where,
        )  # fmt: skip
        found += violations(case, (backend,), device="cuda")
    assert not found, "\n".join(found)
