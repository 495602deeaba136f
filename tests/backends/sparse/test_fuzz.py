"""Bound B over all patterns and options at once: random calls against the dense oracle in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

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
from dilated_attention_pytorch.backends.sparse import sdpa

LAYOUTS = ("contiguous", "contiguous", "heads_first", "packed", "strided_rows", "columns", "expanded")


@st.composite
def patterns(draw: st.DrawFn, heads: int, blocks: int, size: int, union: bool = True):
    """Any pattern for documents of up to ``blocks`` blocks."""

    def integer(low: int, high: int) -> int:
        return draw(st.integers(low, high))

    kinds = ["local", "global", "dilated", "hierarchical", "random", "list", *(["union", "union"] if union else [])]
    match draw(st.sampled_from(kinds)):
        case "local":
            return LocalWindow(size * integer(0, 3), size)
        case "global":
            held = tuple(integer(0, size * blocks) for _ in range(integer(0, 2)))
            return GlobalLocal(size * integer(0, 2), integer(0 if held else 1, 2 * size), held, size)
        case "dilated":
            lengths = tuple(integer(1, 5) for _ in range(integer(1, 3)))
            rates = tuple(integer(1, length) for length in lengths)
            offsets = draw(st.sampled_from(["contiguous", "interleaved"]))
            return DilatedBlocks(tuple(size * length for length in lengths), rates, size, offsets)
        case "hierarchical":
            levels = [(size * integer(0, 5), size * integer(1, 3)) for _ in range(integer(1, 3))]
            return Hierarchical(tuple(levels), size)
        case "random":
            return RandomBlocks(integer(1, 3), integer(0, 2**40), size)
        case "list":
            generator = torch.Generator().manual_seed(integer(0, 2**31))
            shape = (draw(st.sampled_from([1, heads])), blocks, blocks + integer(0, 2))
            return BlockList.from_mask(torch.rand(shape, generator=generator) < 0.4, block_size=size)
        case _:
            coarse = draw(st.sampled_from([size, size, 2 * size]))
            members = [draw(patterns(heads, blocks, size, union=False))]
            members += [draw(patterns(heads, blocks, coarse, union=False)) for _ in range(integer(0, 2))]
            if draw(st.sampled_from([False, False, True])):
                length = integer(1, 60)
                members.append(DilatedPattern((length, 40), (integer(1, min(length, 4)), 3)))
            return Union(tuple(members))


@st.composite
def cases(draw: st.DrawFn, make):
    """Any call of the operator that is small enough for a dense oracle."""

    def integer(low: int, high: int) -> int:
        return draw(st.integers(low, high))

    def one_of(*values):
        return draw(st.sampled_from(values))

    size = one_of(16, 16, 32)
    head_dim, value_dim = one_of((8, None), (16, None), (24, 8), (8, 20), (64, None), (17, 3))
    rows = integer(1, 100)
    batch, kv_heads, group = integer(1, 2), integer(1, 2), one_of(1, 1, 2)
    start = one_of("zero", "zero", "one", "each", "packed")
    batch = 1 if start == "packed" else batch
    key_start = {"zero": 0, "packed": 0, "one": integer(-rows, 60)}
    key_start = key_start[start] if start in key_start else tuple(integer(-rows, 30) for _ in range(batch))
    hidden = one_of(None, None, "random", "suffix")
    return make(
        pattern=draw(patterns(kv_heads * group, 12 if size == 16 else 8, size)),
        seed=integer(0, 2**31),
        key_rows=rows,
        query_rows=one_of(None, None, integer(1, rows)),
        batch=batch,
        kv_heads=kv_heads,
        group=group,
        head_dim=head_dim,
        value_dim=value_dim,
        dtype=one_of(torch.float32, torch.bfloat16, torch.float16, torch.float64),
        is_causal=draw(st.booleans()),
        scale=one_of(None, None, 0.25, 1.0),
        dropout_p=one_of(0.0, 0.0, 0.0, 0.3),
        hidden=tuple(integer(0, rows) for _ in range(batch)) if hidden == "suffix" else hidden,
        cuts=tuple(sorted(integer(0, rows) for _ in range(integer(0, 4)))) if start == "packed" else None,
        key_start=key_start,
        layouts=tuple(one_of(*LAYOUTS) for _ in range(4)),
        grad_lse=draw(st.booleans()),
    )


def check(oracle, case) -> None:
    parts = isinstance(case.pattern, Union) and case.pattern.dilated
    backends = ("reference",) if case.dropout_p or parts else ("reference", "sdpa")
    assert not (found := oracle.violations(case, backends)), "\n".join(found)


SHARED = {"deadline": None, "database": None, "derandomize": False, "suppress_health_check": list(HealthCheck)}


@pytest.mark.parametrize("part", range(4))  # 500 cases, in parts that workers can share
@settings(max_examples=125, phases=[Phase.generate], **SHARED)
@given(data=st.data())
def test_bound_b(part, data, oracle):
    check(oracle, data.draw(cases(oracle.Case)))


@pytest.mark.full
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("part", range(4))  # 10,000 cases
@settings(max_examples=2500, phases=[Phase.generate], **SHARED)
@given(data=st.data())
def test_bound_b_at_length(part, data, oracle):
    check(oracle, data.draw(cases(oracle.Case)))


def test_a_nan_and_a_wrong_number_are_violations(oracle, monkeypatch):
    case = oracle.Case(seed=1, key_rows=70, pattern=LocalWindow(16, 16), group=2)
    right = sdpa.forward
    for wrong in (torch.nan, 0.01):

        def forward(*args, wrong=wrong, **kwargs):
            out, lse = right(*args, **kwargs)
            out[0, 7, 1, 3] += wrong
            return out, lse

        monkeypatch.setattr(sdpa, "forward", forward)
        assert [line.split()[0] for line in oracle.violations(case, ("reference", "sdpa"))][:1] == ["out"]
