"""`explain`: numbers that can be counted or measured another way."""

from __future__ import annotations

import json

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from dilated_attention_pytorch import DilatedPattern, dilated_attention_with_lse, explain
from dilated_attention_pytorch.testing import multiplicity


def peak_bytes(function):
    """(largest sum of live allocations of the CPU allocator during the call, the call's result)."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = function()
    live = peak = 0
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak, result


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    ("length", "queries", "start", "segments", "rates"),
    [(64, 64, 0, (16, 64), (1, 4)), (75, 75, 0, (20, 51, 128), (1, 3, 4)), (40, 7, 11, (32,), (3,))],
)
def test_pairs_and_work_equal_a_count(is_causal, length, queries, start, segments, rates):
    heads, dim, value_dim = 6, 8, 16
    found = explain(
        (2, queries, heads, dim), (2, length, heads, dim), (2, length, heads, value_dim), segments, rates,
        is_causal=is_causal, key_start=start,
    )  # fmt: skip
    position = torch.arange(length) + start
    pairs = multiplicity(
        DilatedPattern(segments, rates), heads, position, torch.zeros_like(position), queries, is_causal=is_causal
    )
    assert found.pairs == 2 * int(pairs.sum())
    assert found.flops_forward == found.pairs * 2 * (dim + value_dim)
    assert found.flops_backward == found.pairs * 2 * (3 * dim + 2 * value_dim)
    assert found.rows == 2 * queries * heads
    alone = multiplicity(DilatedPattern(segments, rates), heads, position, torch.zeros_like(position), queries)
    assert found.rows_without_branch == 2 * int((~alone.any(0).any(-1)).sum())


def test_rows_before_the_document_have_no_branch():
    found = explain((1, 10, 2, 8), (1, 10, 2, 8), (1, 10, 2, 8), [4], [1], key_start=-3)
    assert found.rows_without_branch == 3 * 2


def test_causal_dense_pairs_of_last_rows():
    found = explain((1, 3, 1, 8), (1, 10, 1, 8), (1, 10, 1, 8), [16], [1], is_causal=True)
    assert found.pairs == found.dense_pairs == 8 + 9 + 10


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("dtype", "backend"), [(torch.float32, "sdpa"), (torch.bfloat16, "sdpa"), (torch.float32, "reference")]
)
def test_predicted_peak_is_what_a_run_takes(dtype, backend, masked):
    torch.manual_seed(0)
    segments, rates = (256, 1024, 4096), (1, 2, 4)
    q, k, v = (torch.randn(1, 4096, 4, 32, dtype=dtype).requires_grad_() for _ in range(3))
    options = {"backend": backend}
    if masked:
        options["key_padding_mask"] = torch.rand(1, 4096) < 0.3
    found = explain(q, k, v, segments, rates, **options)
    grad = torch.randn_like(q)
    forward, (out, _) = peak_bytes(lambda: dilated_attention_with_lse(q, k, v, segments, rates, **options))
    backward, _ = peak_bytes(lambda: torch.autograd.grad(out, (q, k, v), grad))
    assert found.peak_bytes_forward == pytest.approx(forward, rel=0.25)
    assert found.peak_bytes_backward == pytest.approx(backward, rel=0.25)


def test_auto_says_why_it_passes_a_backend_over():
    shape = (1, 32, 2, 8)
    found = explain(shape, shape, shape, [16], [1], dropout_p=0.1)
    assert found.backend == "reference"
    assert found.calls == ()
    [(name, reason)] = found.skipped
    assert name == "sdpa"
    assert "dropout" in reason
    assert "not sdpa: " in str(found)


def test_an_explicit_backend_that_cannot_raises():
    shape = (1, 32, 2, 8)
    with pytest.raises(ValueError, match=r"backend 'sdpa' cannot compute this: .*dropout"):
        explain(shape, shape, shape, [16], [1], dropout_p=0.1, backend="sdpa")


def test_shapes_and_tensors_give_the_same():
    shape = (2, 96, 4, 8)
    x = torch.randn(shape)
    assert explain(x, x, x, [32, 64], [1, 4]) == explain(shape, shape, shape, [32, 64], [1, 4])
    strided = torch.randn(2, 4, 96, 8).transpose(1, 2)  # batch and rows are not one axis: more calls
    assert len(explain(strided, strided, strided, [32], [1]).calls) > len(explain(x, x, x, [32], [1]).calls)


def test_to_dict_is_json():
    shape = (1, 96, 4, 8)
    found = explain(shape, shape, shape, [32, 64], [1, 4])
    again = json.loads(json.dumps(found.to_dict()))
    assert again["pairs"] == found.pairs
    assert len(again["calls"]) == len(found.calls)


def test_a_million_tokens_are_explained_at_once():
    shape = (1, 1 << 20, 16, 128)
    pattern = DilatedPattern.geometric(1 << 20, max_rate=16)
    found = explain(shape, shape, shape, pattern.segment_lengths, pattern.dilation_rates, dtype=torch.bfloat16)
    assert found.rows_without_branch == 0
    assert len(found.calls) < 64
