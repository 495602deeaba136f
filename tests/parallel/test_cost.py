"""What "auto" picks and what the model of a cluster says: pure functions of integers and rates."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dilated_attention_pytorch.parallel import Rates
from dilated_attention_pytorch.parallel.cluster import check, predict, whole_call
from dilated_attention_pytorch.parallel.cost import candidates, estimate
from dilated_attention_pytorch.parallel.hybrid import rows_of_ranks
from dilated_attention_pytorch.parallel.schedule import RingCall
from dilated_attention_pytorch.parallel.volume import volumes
from dilated_attention_pytorch.patterns import DilatedPattern
from dilated_attention_pytorch.patterns.plan import plan

ACROSS = DilatedPattern((256, 4096), (1, 4))


def call_of(pattern=ACROSS, tokens=4096, heads=4, kv_heads=4, is_causal=False):
    return whole_call(
        pattern, tokens=tokens, heads=heads, kv_heads=kv_heads, head_dim=8, dtype=torch.float32, is_causal=is_causal
    )


def picked(call, world, rates, mesh=None):
    mesh = mesh or (world,)
    found, passed = candidates(call, mesh, "ring", rows_of_ranks(call.shape.key_rows, mesh, "contiguous"), rates)
    assert [one.seconds for one in found] == sorted(one.seconds for one in found)
    return found[0].strategy, dict(passed)


def test_auto_follows_the_rates():
    call, slow_links = call_of(), Rates(bandwidth=1e9, forward_flops=1e12, backward_flops=1e12, latency=0.0)
    assert picked(call, 4, Rates(latency=1e-2))[0] == "gather"  # one exchange where each of them is dear
    assert picked(call, 4, slow_links)[0] == "ring"  # which hides most
    assert picked(call, 4, replace(slow_links, latency=1e-2, receive_limit=1))[0] == "ulysses"
    assert "receive_limit" in picked(call, 4, replace(slow_links, receive_limit=1))[1]["gather"]
    assert "4 query heads for 8 ranks" in picked(call, 8, slow_links)[1]["ulysses"]
    assert picked(call, 4, slow_links, mesh=(2, 2))[0] == "hybrid"


def test_segments_inside_shards_cost_nothing_but_compute():
    call = call_of(DilatedPattern((256, 1024), (1, 4)))
    for strategy in ("ring", "gather"):
        found = estimate(call, strategy, (4,), "ring", rows_of_ranks(4096, (4,), "contiguous"), Rates())
        assert {(one.bytes_sent, one.messages) for one in (*found.forward, *found.backward)} == {(0, 0)}
        assert found.seconds == found.forward_compute_seconds + found.backward_compute_seconds


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_volume_of_a_segment_over_all_ranks_is_that_of_its_active_rows(is_causal):
    call = call_of(DilatedPattern((4096,), (4,)), is_causal=is_causal)
    found = estimate(call, "gather", (4,), "ring", rows_of_ranks(4096, (4,), "contiguous"), Rates())
    # 1024 rows a rank, a quarter of them active, 4 key heads, keys and values of 8 numbers of 4 bytes.
    once = 1024 // 4 * 4 * 2 * 8 * 4
    peers = [3, 2, 1, 0] if is_causal else [3] * 4
    assert [(one.bytes_sent, one.messages) for one in found.forward] == [(once * n, n) for n in peers]
    returned = [0, 1, 2, 3] if is_causal else [3] * 4
    assert [one.bytes_sent for one in found.backward] == [once * (n + m) for n, m in zip(peers, returned, strict=True)]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_pairs_of_all_ranks_are_those_of_one_device(layout, is_causal):
    call = call_of(DilatedPattern((100, 3000), (1, 3)), tokens=4001, heads=6, kv_heads=2, is_causal=is_causal)
    alone = plan(call.pattern, call.shape, call.documents, is_causal=is_causal, zeros=False).pairs
    ring = RingCall.of(call, None, rows_of_ranks(4001, (5,), layout))
    own = sum(ring.problem(call, rank, "cpu", fold=True).plan.pairs for rank in range(5))
    shared = volumes(ring.pattern, 6, 2, ring.held, is_causal)
    assert own + sum(sum(one.pairs) for one in shared) == alone


@pytest.mark.parametrize("values", [{"bandwidth": 0}, {"forward_flops": -1.0}, {"latency": -1e-9}])
def test_rates_that_are_none_are_refused(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        Rates(**values)


def test_a_billion_tokens_on_many_devices():
    pattern = DilatedPattern.geometric(10**9, ratio=8)
    call = whole_call(
        pattern, tokens=10**9, heads=8, kv_heads=8, head_dim=64, dtype=torch.bfloat16, is_causal=True
    )  # fmt: skip
    found = predict(call, 200, strategy="gather", layout="zigzag")
    half = predict(call, 100, strategy="gather", layout="zigzag")
    # q, k, v, out, its gradient in two bytes, three gradients in four and in two, for 5 x 10^6 rows.
    assert found.memory_bytes >= 8 * 64 * 5 * 10**6 * (5 * 2 + 3 * 6)
    assert found.compute_seconds == pytest.approx(half.compute_seconds / 2, rel=0.05)
    assert 0 < found.bytes_sent < 2 * half.bytes_sent
    with pytest.raises(ValueError, match="fewer than 2000000000 devices"):
        predict(call, 2 * 10**9)


def test_a_report_checks_the_model():
    pattern = DilatedPattern((64, 512), (1, 4))
    call = whole_call(pattern, tokens=512, heads=4, kv_heads=2, head_dim=8, dtype=torch.float32, is_causal=True)
    rates = {"forward_flops": 1e9, "backward_flops": 2e9, "bandwidth": 1e8, "latency": 1e-4, "receive_limit": 1e9}
    right = predict(call, 2, strategy="ring", layout="zigzag", rates=Rates(**rates)).seconds
    point = {"tokens": 512, "world": 2, "strategy": "ring", "both": {"total": 2e3 * right}}
    run = {
        "segment_lengths": [64, 512], "dilation_rates": [1, 4], "batch": 1, "heads": 4, "kv_heads": 2, "head_dim": 8,
        "dtype": "float32", "is_causal": True, "layout": "zigzag",
    }  # fmt: skip
    used, (found,) = check({"run": run, "rates": rates, "measurements": [point]})
    assert used == Rates(**rates)
    assert found.error == pytest.approx(-0.5)
    with pytest.raises(ValueError, match="no report"):
        check({"run": run})
