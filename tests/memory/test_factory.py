"""The factory: every kind by name, and errors that name what is allowed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import dilated_attention_pytorch
from dilated_attention_pytorch.memory import (
    AdaptivePool,
    Bucketing,
    Fragmentation,
    RecordingPool,
    SimplePool,
    create_memory_pool,
)
from dilated_attention_pytorch.memory.factory import DEFAULTS, STRATEGIES


def test_it_is_public():
    assert dilated_attention_pytorch.create_memory_pool is create_memory_pool
    assert "MemoryPool" in dilated_attention_pytorch.__all__


def test_kinds_and_strategies():
    simple = create_memory_pool(device="cpu", budget=100)
    assert isinstance(simple, SimplePool)
    assert (simple.budget, simple.device) == (100, torch.device("cpu"))
    adaptive = create_memory_pool("adaptive", device="cpu")
    assert isinstance(adaptive, AdaptivePool)
    assert {name for name in ("bucketing", "fragmentation") if getattr(adaptive, name)} == set(DEFAULTS) - {"numa"}
    plain = create_memory_pool("adaptive", device="cpu", strategies=())
    assert isinstance(plain, AdaptivePool)
    assert plain.bucketing is plain.fragmentation is None
    chosen = create_memory_pool(
        "adaptive", device="cpu", strategies=(Bucketing(max_waste=0.1), "fragmentation", "numa"), debug=True
    )
    assert isinstance(chosen, AdaptivePool)
    assert (chosen.bucketing, chosen.fragmentation) == (Bucketing(max_waste=0.1), Fragmentation())
    assert chosen.debug


@pytest.mark.parametrize("strategies", [(), *((name,) for name in STRATEGIES), tuple(STRATEGIES)])
def test_every_combination_serves(strategies: tuple[str, ...]):
    pool = create_memory_pool("adaptive", device="cpu", budget=1 << 20, strategies=strategies)
    for _ in range(3):
        with pool.acquire((10, 10), torch.float32, "cpu") as lease:
            assert float(lease.tensor.fill_(2.0).sum()) == 200
    assert pool.stats().misses == 1
    with pytest.raises(dilated_attention_pytorch.memory.MemoryBudgetExceeded):
        pool.acquire(((1 << 20) + 1,), torch.uint8, "cpu")


def test_a_trace_is_written(tmp_path: Path):
    path = tmp_path / "trace.jsonl"
    pool = create_memory_pool("adaptive", device="cpu", trace=path)
    assert isinstance(pool, RecordingPool)
    pool.acquire((10,), torch.int16, "cpu").release()
    pool.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line.get("op") for line in lines] == [None, "acquire", "return"]
    assert (lines[1]["bytes"], lines[1]["shape"], lines[1]["dtype"]) == (20, [10], "int16")


@pytest.mark.parametrize(
    ("kind", "options", "fragment"),
    [
        ("clever", {}, "kind is 'clever'; choose one of 'simple', 'adaptive'"),
        ("simple", {"strategies": ("bucketing",)}, "a simple pool takes none; make an adaptive one"),
        ("adaptive", {"strategies": ("buckets",)}, "'buckets'; choose from 'bucketing', 'fragmentation', 'numa'"),
        ("adaptive", {"strategies": ("numa", "numa")}, "has numa twice"),
        ("adaptive", {"strategies": ("bucketing", Bucketing())}, "has bucketing twice"),
        ("adaptive", {"strategies": (3,)}, "has '3'; choose from"),
        ("adaptive", {"strategies": "numa"}, "give a sequence of names"),
        ("simple", {"backing": "heap"}, "choose 'allocator' or 'mem_pool'"),
        ("simple", {"backing": "mem_pool"}, "only memory of CUDA devices"),
        ("simple", {"process_group": object()}, "give backing='mem_pool'"),
        ("simple", {"budget": -1}, "give a number of bytes"),
    ],
)
def test_wrong_options_are_named(kind: str, options: dict, fragment: str):
    with pytest.raises(ValueError, match=re.escape(fragment)):
        create_memory_pool(kind, **{"device": "cpu", **options})
