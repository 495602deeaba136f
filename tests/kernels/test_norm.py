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
    found = norm.norm_forward(*arguments, 1e-5, gelu=gelu, dtype=dtype)
    grad_x, grad_weight, grad_bias, again = norm.norm_backward(grad.to(DEVICE), *arguments, 1e-5, gelu=gelu)
    assert torch.equal(found, again)
    for actual, gold, eager in zip((found, grad_x, grad_weight, grad_bias), *results, strict=True):
        assert actual.shape == gold.shape
        eager_error = eager.to(actual.dtype)
        assert max_error(actual.cpu(), gold) <= error_bound(gold, eager_error, actual.dtype, summand=4.0)


def test_no_rows_and_strided_rows() -> None:
    from dilated_attention_pytorch.kernels import norm

    weight, bias = torch.ones(6, device=DEVICE), torch.zeros(6, device=DEVICE)
    empty = torch.empty(0, 6, device=DEVICE)
    assert norm.norm_forward(empty, weight, bias, 1e-5, gelu=True, dtype=torch.float32).shape == (0, 6)
    _, grad_weight, grad_bias, _ = norm.norm_backward(empty, empty, weight, bias, 1e-5, gelu=False)
    assert not grad_weight.any()
    assert not grad_bias.any()
    x = torch.randn(6, 8, device=DEVICE).T
    torch.testing.assert_close(
        norm.norm_forward(x, weight, bias, 1e-5, gelu=False, dtype=torch.float32), F.layer_norm(x, (6,), weight, bias)
    )
