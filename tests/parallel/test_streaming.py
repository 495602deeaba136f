"""One device over tensors in host memory, against the dense oracle; what it holds, what it reads, what it returns."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Iterator
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from dilated_attention_pytorch import (
    DilatedAttention,
    LongNetLM,
    LongNetLMConfig,
    MultiheadDilatedAttention,
    Streaming,
    dilated_attention_with_lse,
)
from dilated_attention_pytorch.memory import SimplePool
from dilated_attention_pytorch.parallel import streaming_attention, streaming_session
from dilated_attention_pytorch.patterns import DilatedPattern
from dilated_attention_pytorch.testing import Case, multiplicity

from .streaming_cases import LaggingMover, counted, violations_of

BIG = 1 << 30
ODD = {"key_rows": 61, "segment_lengths": (9, 25, 100), "dilation_rates": (1, 3, 5), "kv_heads": 4}
CASES = {
    "inside": {"key_rows": 64, "segment_lengths": (4, 8), "dilation_rates": (1, 2), "kv_heads": 4},
    "across": {"key_rows": 60, "segment_lengths": (16, 60), "dilation_rates": (1, 4), "kv_heads": 4},
    "straddling": ODD,
    "causal": {**ODD, "is_causal": True},
    "whole": {"key_rows": 43, "segment_lengths": (50,), "dilation_rates": (1,), "grad_lse": True},
    "grouped": {**ODD, "kv_heads": 2, "group": 3},
    "interleaved": {**ODD, "head_offsets": "interleaved", "grad_lse": True},
    "rates_above_heads": {**ODD, "segment_lengths": (20, 64), "dilation_rates": (5, 8), "kv_heads": 2},
    "packed": {**ODD, "cuts": (3, 40, 41, 55), "batch": 1},
    "packed_causal": {**ODD, "cuts": (3, 40), "batch": 1, "is_causal": True},
    "evicted": {**ODD, "key_start": 29},
    "left_padding": {**ODD, "key_start": -13, "is_causal": True},
    "own_starts": {**ODD, "key_start": (-20, 31)},
    "last_rows": {**ODD, "query_rows": 23},
    "last_rows_causal": {**ODD, "query_rows": 23, "is_causal": True, "grad_lse": True},
    "one_query": {**ODD, "query_rows": 1},
    "mask": {**ODD, "hidden": "random"},
    "mask_causal": {**ODD, "hidden": "random", "is_causal": True, "grad_lse": True},
    "suffix_zeros": {**ODD, "hidden": (13, 40), "padding": "zeros"},
    "zeros": {**ODD, "padding": "zeros"},
    "detached": {**ODD, "mixing_grad": "detached", "is_causal": True},
    "detached_zeros": {**ODD, "mixing_grad": "detached", "padding": "zeros"},
    "dropout": {**ODD, "dropout_p": 0.3},
    "dropout_masked": {**ODD, "dropout_p": 0.2, "hidden": "random", "is_causal": True, "grad_lse": True},
    "dropout_detached": {**ODD, "dropout_p": 0.2, "mixing_grad": "detached", "query_rows": 40},
    "scale": {**ODD, "scale": 0.7},
    "value_dim": {**ODD, "value_dim": 12},
    "bfloat16": {**ODD, "dtype": torch.bfloat16},
    "float16": {**ODD, "dtype": torch.float16, "hidden": "random"},
    "strided": {**ODD, "layouts": ("heads_first", "packed", "strided_rows", "columns")},
    "expanded": {**ODD, "layouts": ("columns", "expanded", "heads_first", "expanded")},
}  # fmt: skip


def make(name: str, **more) -> Case:
    return Case(**{"seed": 2, "batch": 2, **CASES[name], **more})


def least(case: Case, **options) -> int:
    """The least budget, as the error says it, that forward and backward work with."""
    query, key, value, *_ = case.tensors()
    with pytest.raises(ValueError, match="give at least that much") as raised:
        attend(case, Streaming("cpu", memory_budget=1, **options), query.requires_grad_(), key, value)
    return int(re.search(r"needs ([\d,]+)", str(raised.value))[1].replace(",", ""))


def attend(case: Case, streaming: Streaming, *tensors):
    return dilated_attention_with_lse(*tensors, **case.options(), parallel=streaming)


@pytest.mark.parametrize("name", CASES)
def test_bound_b_of_every_option(name):
    assert violations_of(make(name), Streaming("cpu", memory_budget=BIG, chunk=13)) == []


@pytest.mark.parametrize("name", ["straddling", "grouped", "mask", "last_rows", "packed", "detached"])
def test_copies_that_lag_behind_the_computation_change_nothing(monkeypatch, name):
    monkeypatch.setattr(streaming_session, "DirectMover", LaggingMover)
    case = make(name, batch=1)
    small = Streaming("cpu", memory_budget=least(case, chunk=20), chunk=20)  # several tiles of every span of keys
    for streaming in (small, Streaming("cpu", memory_budget=BIG, chunk=15)):
        assert violations_of(case, streaming) == []


def test_tiles_of_a_chunk_are_copied_at_once_where_copies_go_ahead(monkeypatch):
    uploads = []

    class CountingMover(LaggingMover):
        def upload(self, copies, slot):
            uploads.append(slot.feed)
            return super().upload(copies, slot)

    monkeypatch.setattr(streaming_session, "DirectMover", CountingMover)
    case = Case(seed=3, key_rows=600, segment_lengths=(16, 200, 2000), dilation_rates=(1, 4, 20), kv_heads=4)
    streaming = Streaming("cpu", memory_budget=BIG, chunk=64)
    assert violations_of(case, streaming) == []
    assert streaming.moved.tiles > 2 * streaming.moved.chunks  # of both segments, before the chunk and behind it
    assert uploads.count(0) == uploads.count(1) == streaming.moved.chunks


@st.composite
def cases(draw: st.DrawFn) -> tuple[Case, int]:
    """Any call of the operator, and the rows of a chunk: segments inside, across and beyond chunks."""

    def integer(low: int, high: int) -> int:
        return draw(st.integers(low, high))

    def one_of(*values):
        return draw(st.sampled_from(values))

    rows = integer(1, 60)
    branches = integer(1, 3)
    lengths = tuple(integer(1, 90) for _ in range(branches))
    packed, padding, hidden = one_of(False, False, True), one_of("mask", "zeros"), one_of(None, "suffix", "random")
    batch, start = 1 if packed else integer(1, 2), "zero" if packed else one_of("zero", "one", "each")
    if padding == "zeros" and (packed or hidden == "random"):
        hidden = None
    each = tuple(integer(-rows, 40) for _ in range(batch))
    layouts = ("contiguous", "contiguous", "heads_first", "packed", "strided_rows", "columns", "expanded")
    case = Case(
        seed=integer(0, 2**31),
        key_rows=rows,
        query_rows=one_of(None, None, integer(1, rows)),
        segment_lengths=lengths,
        dilation_rates=tuple(integer(1, min(length, one_of(2, 4, 12))) for length in lengths),
        batch=batch,
        kv_heads=integer(1, 3),
        group=one_of(1, 1, 2),
        head_dim=8,
        value_dim=one_of(None, None, None, 5),
        dtype=one_of(torch.float32, torch.float32, torch.bfloat16, torch.float64),
        is_causal=draw(st.booleans()),
        scale=one_of(None, None, 0.25),
        dropout_p=one_of(0.0, 0.0, 0.0, 0.3),
        hidden=tuple(integer(0, rows) for _ in range(batch)) if hidden == "suffix" else hidden,
        cuts=tuple(sorted(integer(0, rows) for _ in range(integer(0, 3)))) if packed else None,
        key_start={"zero": 0, "one": integer(-rows, 90), "each": each}[start],
        head_offsets=one_of("contiguous", "interleaved"),
        padding=padding,
        mixing_grad=one_of("exact", "exact", "exact", "detached"),
        layouts=tuple(one_of(*layouts) for _ in range(4)),
        grad_lse=one_of(False, False, True),
    )
    return case, integer(1, rows + 5)


SHARED = {"deadline": None, "database": None, "derandomize": False, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=40, **SHARED)
@given(drawn=cases())
def test_bound_b(drawn):
    case, chunk = drawn
    assert violations_of(case, Streaming("cpu", memory_budget=BIG, chunk=chunk)) == []


@pytest.mark.full
@pytest.mark.timeout(3600)
@settings(max_examples=1500, phases=[Phase.generate], **SHARED)
@given(drawn=cases())
def test_bound_b_at_length(drawn):
    case, chunk = drawn
    assert violations_of(case, Streaming("cpu", memory_budget=BIG, chunk=chunk)) == []


LONGER = {"seed": 1, "key_rows": 1000, "segment_lengths": (64, 333, 4096), "dilation_rates": (1, 3, 8), "kv_heads": 4,
          "head_dim": 16}  # fmt: skip
BUDGETED = {
    "plain": {},
    "bfloat16": {"dtype": torch.bfloat16, "is_causal": True},
    "grad_lse": {"grad_lse": True},
    "masked": {"hidden": "random"},
    "value_dim": {"value_dim": 24},
    "grouped": {"kv_heads": 2, "group": 4},
    "dense": {"segment_lengths": (5000,), "dilation_rates": (1,)},
    "last_rows": {"query_rows": 400},
    "whole batch rows": {"key_rows": 300, "batch": 5},
}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Every thread of the CPU kernel works in memory of its own, which counts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", [*BUDGETED, pytest.param("dropout", marks=pytest.mark.full)])
def test_what_is_held_on_the_device_stays_within_the_budget(name):
    options = {"dropout_p": 0.2, "key_rows": 200} if name == "dropout" else BUDGETED[name]
    case = Case(**{**LONGER, **options})
    query, key, value, grad_out, grad_lse = case.tensors()
    leaves = [t.requires_grad_() for t in (query, key, value)]
    budget = max(10 * least(case), 1 << 20)
    streaming = Streaming("cpu", memory_budget=budget)
    peak, (out, lse) = counted(lambda: attend(case, streaming, *leaves))
    assert peak - out.nbytes - lse.nbytes <= budget
    assert streaming.moved.chunks + streaming.moved.tiles > 1
    outputs, grads = ([out, lse], [grad_out, grad_lse]) if case.grad_lse else ([out], [grad_out])
    peak, found = counted(lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True))
    held = sum(t.nbytes for t in found) + sum(4 * t.numel() for t in found[1:])  # at most as much in sums across chunks
    assert peak - held <= budget


@pytest.mark.parametrize("chunk", [None, 9])
def test_the_least_budget_that_the_error_names_works(chunk):
    case = make("straddling", batch=1)
    enough = least(case, chunk=chunk)
    assert violations_of(case, Streaming("cpu", memory_budget=enough, chunk=chunk)) == []
    query, key, value, *_ = case.tensors()
    with pytest.raises(ValueError, match=f"{enough - 1:,} bytes.*needs {enough:,}"):
        attend(case, Streaming("cpu", memory_budget=enough - 1, chunk=chunk), query.requires_grad_(), key, value)


def test_segments_that_fit_go_through_whole_and_nothing_is_read_twice():
    case = Case(seed=3, key_rows=1000, segment_lengths=(16, 64, 128), dilation_rates=(1, 2, 4), kv_heads=4)
    streaming = Streaming("cpu", memory_budget=BIG, chunk=300)
    query, key, value, grad_out, _ = case.tensors()
    out, lse = attend(case, streaming, query.requires_grad_(), key, value)
    assert (streaming.moved.chunks, streaming.moved.tiles) == (4, 0)  # 256, 256, 256, 232
    assert streaming.moved.bytes_in == query.nbytes + key.nbytes + value.nbytes
    assert streaming.moved.bytes_out == out.nbytes + lse.nbytes
    out.backward(grad_out)
    assert (streaming.moved.chunks, streaming.moved.tiles) == (8, 0)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("group", [1, 2])
def test_across_chunks_active_rows_alone_are_read_and_once_a_chunk(is_causal, group):
    case = Case(
        seed=3, key_rows=90, segment_lengths=(10, 37, 200), dilation_rates=(1, 3, 7), kv_heads=2, group=group,
        is_causal=is_causal,
    )  # fmt: skip
    query, key, value, *_ = case.tensors()
    streaming = Streaming("cpu", memory_budget=BIG, chunk=20)
    attend(case, streaming, query, key, value)
    pattern = DilatedPattern(case.segment_lengths, case.dilation_rates)
    met = multiplicity(pattern, 2 * group, torch.arange(90), torch.zeros(90), 90, is_causal=is_causal)
    rows = 0
    for first in (0, 20, 40, 60, 80):  # 10-row segments end there
        own = slice(first, first + 20)
        outside = met[:, :, own].any(2)
        outside[..., own] = False
        rows += int(outside.unflatten(1, (2, group)).any(2).sum())
    whole = query.nbytes + key.nbytes + value.nbytes
    assert streaming.moved.bytes_in == whole + rows * 2 * case.head_dim * 4


@pytest.mark.parametrize("is_causal", [False, True])
def test_every_pair_is_there_once(is_causal):
    rows, heads, lengths, rates = 1501, 4, (60, 77, 500, 7000), (1, 3, 7, 32)
    streaming = Streaming("cpu", memory_budget=BIG, chunk=217)
    pattern = DilatedPattern(lengths, rates)
    count = multiplicity(pattern, heads, torch.arange(rows), torch.zeros(rows), rows, is_causal=is_causal).sum(0)
    query, key = torch.zeros(1, rows, heads, 8), torch.randn(1, rows, heads, 8)
    value = torch.zeros(1, rows, heads, 8)
    value[:, 500:540] = 1
    value.requires_grad_()
    out, lse = dilated_attention_with_lse(query, key, value, lengths, rates, is_causal=is_causal, parallel=streaming)
    total = count.sum(-1)
    assert torch.equal(lse.detach()[0].double().exp().round().long(), total)
    inside = count[..., 500:540].sum(-1) / total.clamp(min=1)
    assert float((out.detach()[0, ..., 0].T - inside).abs().max()) < 1e-6
    (dv,) = torch.autograd.grad(out, value, total.T[None, :, :, None].float().expand_as(out))
    seen = count.sum(1)
    assert float(((dv[0, ..., 0].T - seen).abs() / seen.clamp(min=1)).max()) < 1e-5


def files(folder: Path, rows: int) -> list[torch.Tensor]:
    """query, key, value (1, rows, 2, 16) float32 in memory-mapped files."""
    found = []
    for name in ("query", "key", "value"):
        path = folder / name
        torch.randn(rows, 32).numpy().tofile(path)
        found.append(torch.from_file(str(path), shared=False, size=rows * 32).view(1, rows, 2, 16))
    return found


def test_files_are_read_in_pieces_and_never_as_a_whole(tmp_path):
    tensors = files(tmp_path, 8000)
    streaming = Streaming("cpu", memory_budget=tensors[0].nbytes // 2)
    pattern = ((128, 1024, 32768), (1, 8, 256))
    peak, (out, lse) = counted(lambda: dilated_attention_with_lse(*tensors, *pattern, parallel=streaming))
    assert peak - out.nbytes - lse.nbytes <= tensors[0].nbytes // 2
    assert streaming.moved.chunks > 3
    inside = [t.clone() for t in tensors]
    expected, expected_lse = dilated_attention_with_lse(*(t.double() for t in inside), *pattern)
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, atol=2e-6, rtol=1e-6)


def test_tensors_of_a_safetensors_file(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    case = make("straddling", batch=1, dtype=torch.float64)
    query, key, value, *_ = case.tensors()
    save_file({"query": query, "key": key, "value": value}, tmp_path / "qkv.safetensors")
    with safe_open(tmp_path / "qkv.safetensors", framework="pt") as opened:
        tensors = [opened.get_tensor(name) for name in ("query", "key", "value")]
        out, _ = attend(case, Streaming("cpu", memory_budget=BIG, chunk=13), *tensors)
    expected, _ = dilated_attention_with_lse(query, key, value, **case.options())
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("backward", [False, True])
def test_leases_come_back_also_after_an_error(monkeypatch, backward):
    case, pool = make("straddling"), SimplePool()
    streaming = Streaming("cpu", memory_budget=BIG, chunk=13, pool=pool)
    assert violations_of(case, streaming) == []
    held = pool.stats()
    assert (held.leased, held.requests > 0) == (0, True)
    with monkeypatch.context() as patched:
        name = "dense_backward" if backward else "dense_forward"
        real, calls = getattr(streaming_attention, name), []

        def broken(*args, **kwargs):
            calls.append(pool.stats().leased)
            if len(calls) == 3:
                raise RuntimeError("broken")
            return real(*args, **kwargs)

        patched.setattr(streaming_attention, name, broken)
        query, key, value, grad_out, _ = case.tensors()
        with pytest.raises(RuntimeError, match="broken"):
            attend(case, streaming, query.requires_grad_(), key, value).out.backward(grad_out)
        assert min(calls) > 0
    assert pool.stats().leased == 0
    requests, hits = pool.stats().requests, pool.stats().hits
    assert violations_of(case, streaming) == []
    assert pool.stats().requests - requests == pool.stats().hits - hits  # the same sizes: nothing new is allocated


def test_buffers_are_gone_with_the_call_not_with_the_garbage_collector(monkeypatch):
    case, streaming, seen = make("straddling", batch=1), Streaming("cpu", memory_budget=BIG, chunk=13), []
    real = SimplePool.acquire

    def acquire(*args, **options):
        lease = real(*args, **options)
        seen.append(weakref.ref(lease.tensor.untyped_storage()))
        return lease

    monkeypatch.setattr(SimplePool, "acquire", acquire)
    gc.collect()
    gc.disable()
    try:
        query, key, value, grad_out, _ = case.tensors()
        out, _ = attend(case, streaming, query.requires_grad_(), key, value)
        assert len(seen) == 2  # chunks and tiles
        assert [one() for one in seen] == [None, None]
        out.backward(grad_out)
        assert len(seen) == 4
        assert [one() for one in seen] == [None] * 4
    finally:
        gc.enable()


def test_a_pool_with_too_small_a_budget_says_so_and_gets_everything_back():
    case, pool = make("straddling"), SimplePool(budget=5000)
    query, key, value, *_ = case.tensors()
    with pytest.raises(RuntimeError, match="budget"):
        attend(case, Streaming("cpu", memory_budget=BIG, chunk=20, pool=pool), query, key, value)
    assert pool.stats().leased == 0


def test_modules_take_it():
    streaming = Streaming("cpu", memory_budget=BIG, chunk=30)
    query, key, value = torch.randn(3, 2, 100, 4, 8).unbind()
    attention = DilatedAttention((16, 128), (1, 4), is_causal=True)
    torch.testing.assert_close(
        attention(query, key, value, parallel=streaming), attention(query, key, value), atol=1e-6, rtol=1e-5
    )
    layer = MultiheadDilatedAttention(32, 4, segment_lengths=(16, 128), dilation_rates=(1, 4))
    x = torch.randn(2, 100, 32)
    got, expected = (layer(x, x, x, parallel=parallel)[0] for parallel in (streaming, None))
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
    grads = [torch.autograd.grad(t.square().sum(), list(layer.parameters())) for t in (got, expected)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    assert streaming.moved.tiles > 0


def test_a_language_model_takes_it():
    model = LongNetLM(LongNetLMConfig.preset("demo"))  # n-grams and a short convolution, which no neighbour holds here
    tokens = torch.randint(256, (2, 301))
    streaming = Streaming("cpu", memory_budget=BIG, chunk=70)
    got, expected = (model.loss(tokens[:, :-1], tokens[:, 1:], parallel=parallel) for parallel in (streaming, None))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    grads = [torch.autograd.grad(loss, list(model.parameters())) for loss in (got, expected)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-3)
    assert streaming.moved.tiles > 0


def test_a_second_derivative_raises():
    case = make("straddling")
    query, key, value, *_ = case.tensors()
    out, _ = attend(case, Streaming("cpu", memory_budget=BIG, chunk=20), query.requires_grad_(), key, value)
    (grad,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


def test_what_cannot_be_is_refused_by_name():
    for options, word in (
        ({"device": "meta", "memory_budget": 1}, "device is 'meta'"),
        ({"device": "cpu", "memory_budget": 0}, "memory_budget is 0"),
        ({"device": "cpu", "memory_budget": 1e9}, "memory_budget is 1000000000.0"),
        ({"device": "cpu", "memory_budget": 1, "chunk": True}, "chunk is True"),
    ):
        with pytest.raises(ValueError, match=word):
            Streaming(**options)
    streaming = Streaming("cpu", memory_budget=BIG)
    with pytest.raises(FrozenInstanceError):
        streaming.chunk = 3
    away = torch.empty(1, 10, 2, 8, device="meta")
    with pytest.raises(ValueError, match="query is on meta; Streaming takes tensors in host memory"):
        dilated_attention_with_lse(away, away, away, (4,), (1,), parallel=streaming)
    here = torch.randn(1, 10, 2, 8)
    with pytest.raises(ValueError, match="backend 'gluon' cannot compute this"):
        dilated_attention_with_lse(here, here, here, (4,), (1,), parallel=streaming, backend="gluon")
