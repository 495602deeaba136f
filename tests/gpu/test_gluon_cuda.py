"""The Hopper kernels, against the dense oracle in float64 on the CPU."""

from __future__ import annotations

import threading

import pytest
import torch

from dilated_attention_pytorch import dilated_attention, dilated_attention_with_lse
from dilated_attention_pytorch.backends import gluon
from dilated_attention_pytorch.testing import Case, violations

pytestmark = pytest.mark.gpu

CASES = {
    "even": {"key_rows": 1024, "segment_lengths": (256, 512, 1024), "dilation_rates": (1, 2, 4)},
    "ragged": {"key_rows": 1151, "segment_lengths": (256, 700, 2000), "dilation_rates": (1, 2, 4)},
    "interleaved": {
        "key_rows": 1151, "segment_lengths": (256, 700), "dilation_rates": (1, 3), "head_offsets": "interleaved",
    },
    "grouped": {
        "key_rows": 900, "segment_lengths": (200, 900), "dilation_rates": (1, 3), "kv_heads": 2, "group": 3,
    },
    "packed": {"key_rows": 1100, "segment_lengths": (256, 512), "dilation_rates": (1, 4), "cuts": (5, 300, 1000)},
    "chunk": {
        "key_rows": 1200, "query_rows": 500, "segment_lengths": (256, 1000), "dilation_rates": (1, 3), "key_start": 77,
    },
    "left_padding": {
        "key_rows": 1024, "segment_lengths": (256, 1000), "dilation_rates": (1, 2), "key_start": (-300, -2), "batch": 2,
    },
    "short_and_sparse": {"key_rows": 1024, "segment_lengths": (48, 512), "dilation_rates": (1, 8)},
    "no_branch_of_rate_1": {
        "key_rows": 1024, "segment_lengths": (512, 512, 600), "dilation_rates": (2, 2, 3), "kv_heads": 5,
    },
    "projection": {
        "key_rows": 1024, "segment_lengths": (256, 1024), "dilation_rates": (1, 2),
        "layouts": ("packed", "packed", "packed", "heads_first"),
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def available() -> None:
    if reason := gluon.unavailable():
        pytest.skip(reason)


SIZES = (("bfloat16", 64), ("float16", 48), ("bfloat16", 128), ("float16", 96))


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("name", CASES)
def test_bound_b(name, is_causal):
    """Two sizes a case, in turn, one of them with a gradient of the lse: a kernel takes ten seconds to compile."""
    turn = list(CASES).index(name) + 2 * is_causal
    found = []
    for number in range(2):
        dtype, head_dim = SIZES[(turn + number) % len(SIZES)]
        case = Case(
            **{"seed": 5, "kv_heads": 4, **CASES[name]}, head_dim=head_dim, dtype=getattr(torch, dtype),
            is_causal=is_causal, grad_lse=bool(number),
        )  # fmt: skip
        found += violations(case, ("gluon",), device="cuda")
    assert not found, "\n".join(found)


@pytest.mark.usefixtures("branch_by_branch")
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("name", "head_dim"), [("ragged", 64), ("packed", 48), ("even", 128), ("interleaved", 96)])
def test_several_launches_add_to_each_other(name, head_dim, is_causal):
    case = Case(
        **{"seed": 7, "kv_heads": 4, **CASES[name]}, head_dim=head_dim, dtype=torch.bfloat16, is_causal=is_causal,
        grad_lse=is_causal,
    )  # fmt: skip
    assert not violations(case, ("gluon",), device="cuda")


def test_rows_outside_documents_are_empty_whatever_memory_held():
    key = torch.randn(2, 1024, 4, 64, device="cuda", dtype=torch.bfloat16)
    poison = [torch.full((2, 1024, 4, 64), torch.nan, device="cuda", dtype=torch.bfloat16) for _ in range(8)]
    del poison
    start = torch.tensor([-300, -2])
    out, lse = dilated_attention_with_lse(key, key, key, (256, 1000), (1, 2), key_start=start, backend="gluon")
    for b, rows in enumerate((300, 2)):
        assert (out[b, :rows] == 0).all()
        assert (lse[b, :, :rows] == -torch.inf).all()
    assert torch.isfinite(out).all()


PATTERN = (512, 1024, 4096), (1, 2, 4)


def both_passes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = dilated_attention(*leaves, *PATTERN, padding="zeros", backend="gluon")
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def drawn(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    return [
        torch.randn(1, 2001, 4, 64, device="cuda", generator=generator).to(torch.bfloat16) for _ in range(4)
    ]  # fmt: skip


def test_repeated_launches_at_other_addresses_and_of_other_values():
    """The first launch of a signature goes through Triton; those after it do not."""
    for seed in range(3):
        given = drawn(seed)
        found = both_passes(*given)
        kept = [torch.empty(1 << 20, device="cuda") for _ in range(seed)]  # moves what is allocated next
        oracle = [t.float() for t in given]
        leaves = [t.requires_grad_() for t in oracle[:3]]
        out = dilated_attention(*leaves, *PATTERN, padding="zeros", backend="reference")
        expected = [out, *torch.autograd.grad(out, leaves, oracle[3])]
        for one, other in zip(found, expected, strict=True):
            assert float((one.float() - other).norm() / other.norm()) < 0.01
        del kept


def test_streams_and_threads_compute_at_once():
    given = drawn(0)
    expected, equal = both_passes(*given)[0], []

    def work() -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            outs = [both_passes(*given)[0] for _ in range(50)]
        stream.synchronize()
        equal.extend(torch.equal(out, expected) for out in outs)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert equal == [True] * 200


def test_both_passes_in_a_graph():
    static, fresh = drawn(0), drawn(1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        both_passes(*static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = both_passes(*static)
    for tensor, value in zip(static, fresh, strict=True):
        tensor.copy_(value)
    expected = both_passes(*fresh)
    for _ in range(3):
        graph.replay()
        assert torch.equal(found[0], expected[0])
        for one, other in zip(found[1:], expected[1:], strict=True):
            torch.testing.assert_close(one, other, atol=0.01, rtol=0.02)
