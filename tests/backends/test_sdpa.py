"""What the fused kernels cannot say by themselves: carried columns, equal branches, cut calls."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from dilated_attention_pytorch import dilated_attention, dilated_attention_with_lse
from dilated_attention_pytorch.backends import sdpa
from dilated_attention_pytorch.testing import Case, oracle, results, violations

EXPLICIT = {"backend": "sdpa"}


def draw(*size: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def agree(case: Case) -> None:
    """The sdpa backend gives what the dense oracle gives, in float64."""
    options = case.options()
    found = results(partial(dilated_attention_with_lse, **options, **EXPLICIT), case.tensors(), grad_lse=case.grad_lse)
    gold = results(partial(oracle, **options), case.tensors(), grad_lse=case.grad_lse)
    for name, expected in gold.items():
        torch.testing.assert_close(found[name], expected, atol=1e-12, rtol=0, msg=lambda m: f"{name}: {m}")  # noqa: B023


@pytest.mark.parametrize("mixing_grad", ["exact", "detached"])
@pytest.mark.parametrize(
    ("lengths", "rates"), [((4, 4), (1, 1)), ((8, 4, 8), (1, 1, 1)), ((9, 9, 9), (3, 3, 3)), ((20, 4, 20), (1, 2, 1))]
)
def test_equal_branches_count_each_time(mixing_grad, lengths, rates):
    base = {"seed": 1, "key_rows": 24, "kv_heads": 3, "dtype": torch.float64, "mixing_grad": mixing_grad}
    agree(Case(segment_lengths=lengths, dilation_rates=rates, **base))


@pytest.mark.parametrize("limit", [1, 5, 16, 40])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"padding": "zeros"}, {"hidden": "random"}], ids=str)
def test_calls_cut_into_chunks_give_the_same(monkeypatch, limit, options):
    monkeypatch.setattr(sdpa, "_limit", lambda problem: limit)
    base = {"segment_lengths": (8, 21, 64), "dilation_rates": (1, 3, 4), "kv_heads": 2, "group": 2, "batch": 2}
    agree(Case(seed=2, key_rows=48, dtype=torch.float64, grad_lse=True, **base, **options))


def test_chunks_respect_the_limits_of_a_grid():
    case = Case(seed=3, key_rows=64, segment_lengths=(8, 16), dilation_rates=(1, 2), kv_heads=6, batch=2)
    q, k, v, *_ = case.tensors()
    seen = []
    kernel = next(kernel for kernel in sdpa.find_kernel.__globals__["KERNELS"] if kernel.device == "cpu")

    def forward(q, k, v, causal, scale):
        seen.append(q.shape[:2])
        return kernel.forward(q, k, v, causal, scale)

    class Small:
        max_problems, dim_multiple = 4, 1

    Small.forward = staticmethod(forward)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sdpa, "kernel_for", lambda problem, grad_lse=False: Small)
        patch.setattr(sdpa, "Kernel", type(Small))
        out = dilated_attention(q, k, v, (8, 16), (1, 2), **EXPLICIT)
    assert max(max(size) for size in seen) == 4
    torch.testing.assert_close(out, dilated_attention(q, k, v, (8, 16), (1, 2), **EXPLICIT))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_gradient_of_lse_keeps_24_bits(dtype):
    # Three columns of 8 or 11 bits carry a float32 gradient; one alone would be off by 2^-9 of it.
    q, k, v = (draw(1, 32, 2, 16, dtype=dtype, seed=i).requires_grad_() for i in range(3))
    lse = dilated_attention_with_lse(q, k, v, (8, 32), (1, 2), **EXPLICIT).lse
    grad = draw(1, 2, 32, dtype=torch.float32, seed=4) * 1000
    dq, dk, dv = torch.autograd.grad(lse, (q, k, v), grad)
    exact = [t.detach().double().requires_grad_() for t in (q, k)]
    gold = torch.autograd.grad(oracle(*exact, v.double(), (8, 32), (1, 2)).lse, exact, grad.double())
    for a, b in zip((dq, dk), gold, strict=True):
        assert float((a.double() - b).abs().max()) <= 4 * torch.finfo(dtype).eps * float(b.abs().max())
    assert (dv == 0).all()


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("size", [1e3, 7e4, 1e6])
def test_a_large_gradient_of_lse_in_float16(backend, size):
    # Loss scaling makes gradients that float16 cannot hold, in the float32 lse, of results that it can.
    q, k, v = (draw(1, 32, 2, 16, dtype=torch.float16, seed=i).requires_grad_() for i in range(3))
    lse = dilated_attention_with_lse(q, k, v, (32,), (1,), scale=1e-3, backend=backend).lse
    dq, dk, _ = torch.autograd.grad(lse, (q, k, v), torch.full_like(lse, size))
    exact = [t.detach().double().requires_grad_() for t in (q, k)]
    gold = torch.autograd.grad(oracle(*exact, v.double(), (32,), (1,), scale=1e-3).lse.sum() * size, exact)
    for a, b in zip((dq, dk), gold, strict=True):
        assert torch.isfinite(a).all()
        assert float((a.double() - b).abs().max()) <= 4 * torch.finfo(torch.float16).eps * float(b.abs().max())


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("options", [{}, {"key_padding_mask": torch.arange(24)[None] < 8}], ids=["no_branch", "mask"])
def test_whatever_reaches_the_lse_of_a_row_without_keys_stays_there(backend, value, options):
    # The gradient of a merge such as logaddexp is NaN where both parts are empty.
    tensors = [draw(1, 24, 2, 8, seed=i).requires_grad_() for i in range(3)]
    out, lse = dilated_attention_with_lse(*tensors, (8,), (4,), backend=backend, **options)
    empty = lse == -torch.inf
    assert empty.any()
    assert not empty.all()
    grads = (torch.ones_like(out), torch.ones_like(lse))
    clean = torch.autograd.grad((out, lse), tensors, grads, retain_graph=True)
    dirty = torch.autograd.grad((out, lse), tensors, (grads[0], grads[1].masked_fill(empty, value)))
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("scale", [1e-25, 1e-3, 1.0, 1e8, 1e9, 1e30, 0.0, -0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_masked_row_is_empty_at_every_scale_that_auto_takes(scale, dtype):
    q, k, v = (draw(1, 8, 2, 8, dtype=dtype, seed=i) for i in range(3))
    hidden = torch.tensor([[False, True, False, False, True, True, True, True]])
    out, lse = dilated_attention_with_lse(q, k, v, (4,), (1,), scale=scale, key_padding_mask=hidden)
    assert (lse[..., 4:] == -torch.inf).all()
    assert (out[:, 4:] == 0).all()
    assert torch.isfinite(lse[..., :4]).all()
    shown = [0, 2, 3]
    alone = dilated_attention_with_lse(
        q[:, shown], k[:, shown], v[:, shown], (4,), (1,), scale=scale, backend="reference"
    )
    torch.testing.assert_close(lse[..., shown], alone.lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [100.0, 500.0, 800.0, 1100.0])
def test_very_negative_scores_are_not_taken_for_masked_ones(size):
    q = torch.full((1, 4, 1, 256), size, dtype=torch.float16)
    hidden = torch.tensor([[False, False, False, True]])
    v = torch.tensor([1.0, 1.0, 1.0, -7.0], dtype=torch.float16)[None, :, None, None].expand(1, 4, 1, 256)
    out, lse = dilated_attention_with_lse(q, -q, v, (4,), (1,), key_padding_mask=hidden)
    torch.testing.assert_close(out, torch.ones_like(out))
    assert torch.isfinite(lse).all()


def test_dtypes_of_results():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        case = Case(seed=5, key_rows=20, segment_lengths=(8, 32), dilation_rates=(1, 3), kv_heads=3, dtype=dtype)
        assert not (found := violations(case, ("sdpa", "reference"))), "\n".join(found)
