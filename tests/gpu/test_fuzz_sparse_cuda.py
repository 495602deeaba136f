"""Random block-sparse calls on a GPU, 500 a backend, against the dense oracle in float64 on the CPU.

The Hopper kernels are compiled for heads, head dim, dtype and causality alone, so patterns vary freely.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from dilated_attention_pytorch import (
    BlockList,
    DilatedBlocks,
    DilatedPattern,
    GlobalLocal,
    Hierarchical,
    LocalWindow,
    RandomBlocks,
    Union,
)
from dilated_attention_pytorch.backends import gluon
from dilated_attention_pytorch.sparse_testing import SparseCase, sparse_violations

pytestmark = [pytest.mark.gpu, pytest.mark.full]

PARTS, CASES = 20, 25
LAYOUTS = ("contiguous", "contiguous", "heads_first", "packed", "strided_rows")


def pattern_of(choose: random.Random, size: int, heads: int, *, pairs: bool = False) -> Any:
    """A pattern of blocks of ``size``; ``pairs``: or a union that counts pairs of a dilated one."""

    def one() -> Any:
        match choose.randrange(6):
            case 0:
                return LocalWindow(size * choose.randint(0, 3), size)
            case 1:
                return GlobalLocal(size * choose.randint(0, 2), choose.randint(1, 2 * size), (900,), size)
            case 2:
                return DilatedBlocks((size * 3, size * 7), (1, choose.randint(1, 5)), size)
            case 3:
                return Hierarchical(((size * choose.randint(0, 2), size), (size * 6, size * 2)), size)
            case 4:
                return RandomBlocks(choose.randint(1, 4), choose.randrange(1000), size)
        blocks = -(-2000 // size)
        generator = torch.Generator().manual_seed(choose.randrange(1 << 30))
        shape = (choose.choice((1, heads)), blocks, blocks)
        return BlockList.from_mask(torch.rand(shape, generator=generator) < 0.3, block_size=size)

    if pairs and choose.random() < 0.15:
        return Union(
            (LocalWindow(size, size), DilatedPattern((choose.randint(5, 200), 300), (1, choose.randint(1, 5))))
        )
    return one() if choose.random() < 0.7 else Union((one(), one()))


def place(choose: random.Random, rows: int) -> dict[str, Any]:
    """One document, packed ones, left padding or evicted keys; sometimes the last rows of the query alone."""
    where: dict[str, Any] = {"batch": choose.randint(1, 2)}
    match choose.choice(("one", "one", "packed", "start", "starts")):
        case "packed":
            where = {"cuts": tuple(sorted(choose.randint(0, rows) for _ in range(choose.randint(0, 5))))}
        case "start":
            where["key_start"] = choose.randint(-rows, 900)
        case "starts":
            where = {"key_start": tuple(choose.randint(-rows, 700) for _ in range(2)), "batch": 2}
    return {**where, "query_rows": choose.choice((None, None, choose.randint(1, rows)))}


@pytest.mark.parametrize("part", range(PARTS))
def test_gluon(part: int) -> None:
    if reason := gluon.unavailable():
        pytest.skip(reason)
    choose, found = random.Random(part), []
    compiled: dict[str, Any] = {
        "head_dim": (48, 64, 96, 128)[part // 5], "is_causal": part % 2 == 0,
        "dtype": (torch.bfloat16, torch.float16)[part // 2 % 2], "kv_heads": 1 + part % 2, "group": 1 + part // 4 % 3,
    }  # fmt: skip
    for number in range(CASES):
        rows = choose.randint(1, 1100)
        case = SparseCase(
            seed=100 * part + number, key_rows=rows, scale=choose.choice((None, 0.3)), grad_lse=choose.random() < 0.5,
            pattern=pattern_of(choose, choose.choice((64, 128)), compiled["kv_heads"] * compiled["group"]),
            layouts=tuple(choose.choice(LAYOUTS) for _ in range(4)), **compiled, **place(choose, rows),
        )  # fmt: skip
        found += sparse_violations(case, ("gluon",), device="cuda")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("part", range(PARTS))
def test_triton(part: int) -> None:
    choose, found = random.Random(1000 + part), []
    size, heads = (16, 32, 64, 128)[part % 4], (1 + part % 3, 1 + part // 3 % 2)
    compiled: dict[str, Any] = {
        "head_dim": (16, 24, 48, 64, 128)[part // 4], "dtype": (torch.bfloat16, torch.float16, torch.float32)[part % 3],
        "kv_heads": heads[0], "group": heads[1],
    }  # fmt: skip
    for number in range(CASES):
        rows = choose.randint(1, 600)
        case = SparseCase(
            seed=10_000 + 100 * part + number, key_rows=rows, is_causal=choose.random() < 0.5,
            dropout_p=choose.choice((0.0, 0.0, 0.3)), hidden=choose.choice((None, None, "random")),
            pattern=pattern_of(choose, size, heads[0] * heads[1], pairs=True), grad_lse=choose.random() < 0.5,
            layouts=tuple(choose.choice(LAYOUTS) for _ in range(4)), **compiled, **place(choose, rows),
        )  # fmt: skip
        found += sparse_violations(case, ("triton",), device="cuda")
    assert not found, "\n".join(found)
