"""A GPU over tensors in host memory: bound B, peak memory, page-locked and pageable inputs, streams that race."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from dilated_attention_pytorch import Streaming, dilated_attention_with_lse
from dilated_attention_pytorch.testing import Case, error_bound, largest_summands, max_error, oracle, results

pytestmark = pytest.mark.gpu


def violations(case: Case, streaming: Streaming, *, pinned: bool) -> list[str]:
    """Where streamed results leave bound B of the dense oracle in float64."""
    tensors, options = case.tensors(), case.options()
    seed = None
    if case.dropout_p:
        torch.default_generator.manual_seed(case.seed)
        seed = int(torch.randint(2**62, (1,)))
        torch.default_generator.manual_seed(case.seed)
    # Rows that share their memory cannot be written to: PyTorch page-locks a copy in the same layout.
    given = [(t.contiguous() if 0 in t.stride() else t).pin_memory() for t in tensors] if pinned else tensors
    attend = partial(dilated_attention_with_lse, parallel=streaming, **options)
    got = results(attend, given, grad_lse=case.grad_lse)
    exact, dense = [t.double() for t in tensors], partial(oracle, seed=seed, **options)
    gold, eager = (results(dense, inputs, grad_lse=case.grad_lse) for inputs in (exact, tensors))
    found = []
    for index, (name, actual) in enumerate(got.items()):
        dtype = torch.promote_types(case.dtype, torch.float32) if name == "lse" else case.dtype
        error, bound = max_error(actual, gold[name]), error_bound(gold[name], eager[name], dtype)
        if not error <= bound:
            summand = largest_summands(exact, grad_lse=case.grad_lse, seed=seed, **options)[index]
            bound = error_bound(gold[name], eager[name], dtype, summand=summand)
        if not (error <= bound < float("inf") and actual.device.type == "cpu"):
            found.append(f"{name}: error {error:.3g}, bound {bound:.3g}, {case}")
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("grad_lse", [False, True], ids=["out", "out_and_lse"])
def test_bound_b_of_every_option(shape, options, dtype, grad_lse):
    case = Case(**{"seed": 3, "head_dim": 16, "grad_lse": grad_lse, **shape, **options, "dtype": getattr(torch, dtype)})
    for pinned in (False, True):
        assert violations(case, Streaming("cuda", memory_budget=1 << 30, chunk=17), pinned=pinned) == []


def test_dropout_draws_the_mask_of_one_device(shape):
    case = Case(**{"seed": 3, "dropout_p": 0.3, **shape})
    assert violations(case, Streaming("cuda", memory_budget=1 << 30, chunk=17), pinned=False) == []


LONGNET = ((2048, 8192, 32768, 1 << 20), (1, 4, 16, 64))
UNALIGNED = ((1000, 5792, 40_000, 185_363), (1, 3, 7, 16))


@pytest.mark.parametrize("pattern", [LONGNET, UNALIGNED], ids=["longnet", "unaligned"])
@pytest.mark.parametrize("pinned", [False, True], ids=["pageable", "pinned"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_long_sequences_equal_the_resident_result_within_the_budget(pattern, pinned, is_causal):
    rows, budget = 200_003, 256 << 20
    generator = torch.Generator("cuda").manual_seed(0)
    on_device = [
        torch.randn(1, rows, 8, 64, generator=generator, device="cuda", dtype=torch.bfloat16) for _ in range(4)
    ]
    host = [t.cpu().pin_memory() if pinned else t.cpu() for t in on_device]
    leaves = [t.requires_grad_() for t in on_device[:3]]
    out, lse = dilated_attention_with_lse(*leaves, *pattern, is_causal=is_causal)
    expected = [t.cpu() for t in (out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, on_device[3]))]
    del on_device, leaves, out, lse
    torch.cuda.empty_cache()

    streaming, leaves = Streaming("cuda", memory_budget=budget), [t.requires_grad_() for t in host[:3]]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for repeat in range(3):  # again: what raced once need not race the second time
        torch.cuda.reset_peak_memory_stats()
        out, lse = dilated_attention_with_lse(*leaves, *pattern, is_causal=is_causal, parallel=streaming)
        got = [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, host[3])]
        assert torch.cuda.max_memory_allocated() - before <= budget
        for name, mine, theirs in zip(("out", "lse", "dq", "dk", "dv"), got, expected, strict=True):
            # Both round to bfloat16 a few times on the way: each within B of the exact result, so twice that apart.
            scale = float(theirs.double().abs().max())
            limit = 2e-5 * scale if name == "lse" else 16 * torch.finfo(torch.bfloat16).eps * scale
            assert max_error(mine, theirs.double()) <= limit, (repeat, name)
    assert streaming.moved.chunks > 3 * 4
    assert all(t.is_pinned() == pinned for t in got[:1])


def test_leases_come_back_after_an_error(monkeypatch):
    from dilated_attention_pytorch.memory import SimplePool
    from dilated_attention_pytorch.parallel import streaming_attention

    pool = SimplePool(budget=64 << 20)
    streaming = Streaming("cuda", memory_budget=64 << 20, chunk=500, pool=pool)
    tensors = [torch.randn(1, 3000, 4, 64, dtype=torch.bfloat16) for _ in range(3)]

    def broken(*args, **kwargs):
        raise RuntimeError("broken")

    with monkeypatch.context() as patched:
        patched.setattr(streaming_attention, "dense_forward", broken)
        with pytest.raises(RuntimeError, match="broken"):
            dilated_attention_with_lse(*tensors, *LONGNET, parallel=streaming)
    assert pool.stats().leased == 0
    out, _ = dilated_attention_with_lse(*tensors, *LONGNET, parallel=streaming)
    assert bool(out.isfinite().all())
