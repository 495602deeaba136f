"""The adapter to PyTorch's private operators: what each kernel is handed, and what auto is told."""

from __future__ import annotations

import math

import pytest
import torch

from dilated_attention_pytorch.backends.vendor import KERNELS, find_kernel

CPU = next(kernel for kernel in KERNELS if kernel.device == "cpu")


def draw(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(q, k, v, causal, scale):
    scores = q @ k.mT * scale
    if causal:  # aligned at the top left
        later = torch.arange(k.shape[2]) > torch.arange(q.shape[2])[:, None]
        scores = scores.masked_fill(later, -torch.inf)
    lse = torch.logsumexp(scores, -1)
    return torch.exp(scores - lse.unsqueeze(-1)) @ v, lse


@pytest.mark.parametrize("causal", [False, True])
def test_the_cpu_kernel_takes_strided_views_and_returns_the_lse(causal):
    q, k, v = (draw(2, 3, 40, 16, seed=i)[:, :, 1::3] for i in range(3))
    out, lse = CPU.forward(q, k, v, causal, 0.3)
    expected = dense(q, k, v, causal, 0.3)
    torch.testing.assert_close(out, expected[0], atol=1e-14, rtol=0)
    torch.testing.assert_close(lse, expected[1], atol=1e-14, rtol=0)


@pytest.mark.parametrize("causal", [False, True])
def test_its_backward_takes_an_out_and_lse_that_are_not_its_own(causal):
    q, k, v, do = (draw(2, 3, 20, 16, seed=i) for i in range(4))
    # More keys elsewhere: final out and lse of the rows over both parts.
    k_more, v_more = draw(2, 3, 33, 16, seed=5), draw(2, 3, 33, 16, seed=6)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    (out, lse), (more_out, more_lse) = dense(q, k, v, causal, 0.25), dense(q, k_more, v_more, False, 0.25)
    whole_lse = torch.logaddexp(lse, more_lse)
    whole = torch.exp(lse - whole_lse).unsqueeze(-1) * out + torch.exp(more_lse - whole_lse).unsqueeze(-1) * more_out
    expected = torch.autograd.grad(whole, leaves, do)
    with torch.no_grad():
        ours = CPU.backward(do, q, k, v, whole.detach(), whole_lse.detach(), causal, 0.25)
        theirs = CPU.backward(do, q, k_more, v_more, whole.detach(), whole_lse.detach(), False, 0.25)
    for a, b in zip((ours[0] + theirs[0], *ours[1:]), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-14, rtol=0)


def test_a_row_at_plus_infinity_has_no_gradient():
    q, k, v, do = (draw(1, 1, 8, 16, seed=i) for i in range(4))
    out, lse = CPU.forward(q, k, v, False, 0.25)
    lse[..., 3] = math.inf
    dq, dk, dv = CPU.backward(do, q, k, v, out, lse, False, 0.25)
    assert (dq[0, 0, 3] == 0).all()
    rest = [t[:, :, [0, 1, 2, 4, 5, 6, 7]] for t in (do, q, out)]
    other = CPU.backward(rest[0], rest[1], k, v, rest[2], lse[..., [0, 1, 2, 4, 5, 6, 7]], False, 0.25)
    for a, b in zip((dk, dv), other[1:], strict=True):
        torch.testing.assert_close(a, b, atol=1e-15, rtol=0)


def test_names_are_unique_and_cudnn_comes_before_flash():
    names = [kernel.name for kernel in KERNELS]
    assert len(set(names)) == len(names)
    assert names.index("cudnn") < names.index("flash") < names.index("efficient")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 8, 17, 256, 1000])
def test_the_cpu_kernel_takes_everything(dtype, width):
    assert find_kernel("cpu", dtype, width) is CPU


def test_a_device_without_kernels_is_named():
    assert find_kernel("meta", torch.float32, 8) == "PyTorch has no fused attention kernel for device 'meta'"


def test_every_kernel_that_refuses_is_named():
    reason = find_kernel("cuda", torch.float64, 64)
    assert isinstance(reason, str)
    for name in ("cudnn", "flash", "efficient"):
        assert f"{name} does not take torch.float64" in reason
    wide = find_kernel("cuda", torch.bfloat16, 257, name="flash")
    assert wide == "flash takes head dims up to 256, not 264"
