"""The kernel of LayerNorm and GELU against PyTorch in float64, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dilated_attention_pytorch.testing import error_bound, max_error

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, 24), (7, 100), (1, 1), (9, 768)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_forward_and_backward(
    shape: tuple[int, ...], dtype: torch.dtype, gelu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dilated_attention_pytorch.kernels import norm

    monkeypatch.setattr(norm, "_PROGRAMS", 4)  # so that a program takes several rows, and not all the same number

    def layer(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(F.gelu(x) if gelu else x, shape[-1:], weight, bias, 1e-5)

    x = (2 * torch.randn(shape, dtype=torch.float64) + 0.5).to(dtype)
    weight, bias = torch.randn(2, shape[-1], dtype=torch.float64).to(torch.float32)
    grad = torch.randn(shape, dtype=torch.float64).to(dtype)
    results = []
    for kind in (torch.float64, None):  # gold, and what eager code computes
        leaves = [t.to(kind or torch.float32).requires_grad_() for t in (x, weight, bias)]
        out = layer(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))])
    arguments = [t.to(DEVICE) for t in (x, weight, bias)]
    total, found = norm.norm_forward(*arguments, 1e-5, gelu=gelu, dtype=dtype)
    assert total is arguments[0]
    grad_x, grad_weight, grad_bias, again, update = norm.norm_backward(
        grad.to(DEVICE), *arguments, 1e-5, gelu=gelu
    )  # fmt: skip
    assert update is None
    assert torch.equal(found, again)
    for actual, gold, eager in zip((found, grad_x, grad_weight, grad_bias), *results, strict=True):
        assert actual.shape == gold.shape
        eager_error = eager.to(actual.dtype)
        assert max_error(actual.cpu(), gold) <= error_bound(gold, eager_error, actual.dtype, summand=4.0)


@pytest.mark.parametrize("factors", [None, 1, 3, 15])
@pytest.mark.parametrize("update_dtype", [torch.float32, torch.float16], ids=str)
def test_sum_of_a_stream(factors: int | None, update_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from dilated_attention_pytorch.kernels import norm

    monkeypatch.setattr(norm, "_PROGRAMS", 4)

    def layer(
        x: torch.Tensor, update: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if factor is not None:
            update = (update.view(len(factor), -1, 24) * factor.to(x.dtype)[:, None, None]).view_as(x)
        total = x + update
        return total, F.layer_norm(total, (24,), weight, bias, 1e-5)

    x, grad, grad_total = torch.randn(3, 3, 5, 24, dtype=torch.float64).float()
    update = torch.randn(3, 5, 24, dtype=torch.float64).to(update_dtype)
    weight, bias = torch.randn(2, 24)
    factor = None if factors is None else torch.rand(factors) + 0.5
    results = []
    for kind in (torch.float64, torch.float32):
        leaves = [t.to(kind).requires_grad_() for t in (x, update, weight, bias)]
        outs = layer(*leaves)
        results.append([*outs, *torch.autograd.grad(outs, leaves, (grad_total.to(kind), grad.to(kind)))])
    x, update, weight, bias, grad, grad_total = (t.to(DEVICE) for t in (x, update, weight, bias, grad, grad_total))
    options = {"gelu": False, "factor": None if factor is None else factor.to(DEVICE)}
    total, out = norm.norm_forward(x, weight, bias, 1e-5, dtype=torch.float32, update=update, **options)
    grad_x, grad_weight, grad_bias, again, grad_update = norm.norm_backward(
        grad, total, weight, bias, 1e-5, grad_total=grad_total, update_dtype=update_dtype, **options
    )
    assert torch.equal(out, again)
    assert grad_update.dtype == update_dtype
    for actual, gold, eager in zip((total, out, grad_x, grad_update, grad_weight, grad_bias), *results, strict=True):
        rounded = eager.to(actual.dtype)
        assert max_error(actual.cpu(), gold) <= error_bound(gold, rounded, actual.dtype, summand=4.0)


def test_no_rows_and_strided_rows() -> None:
    from dilated_attention_pytorch.kernels import norm

    weight, bias = torch.ones(6, device=DEVICE), torch.zeros(6, device=DEVICE)
    empty = torch.empty(0, 6, device=DEVICE)
    assert norm.norm_forward(empty, weight, bias, 1e-5, gelu=True, dtype=torch.float32)[1].shape == (0, 6)
    _, grad_weight, grad_bias, _, _ = norm.norm_backward(empty, empty, weight, bias, 1e-5, gelu=False)
    assert not grad_weight.any()
    assert not grad_bias.any()
    x = torch.randn(6, 8, device=DEVICE).T
    torch.testing.assert_close(
        norm.norm_forward(x, weight, bias, 1e-5, gelu=False, dtype=torch.float32)[1],
        F.layer_norm(x, (6,), weight, bias),
    )
