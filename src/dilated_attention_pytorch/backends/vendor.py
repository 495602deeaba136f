"""The one place that knows signatures of PyTorch's private fused-attention operators.

Every kernel takes (batch, heads, rows, D) views with any strides (D contiguous), returns out and the log-sum-exp
(batch, heads, rows), aligns a causal mask at the top left, and has a backward that takes an out and a log-sum-exp
that need not be its own: P = exp(s - lse), delta = rowsum(dO * O).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

aten = torch.ops.aten

Forward = Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor]]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Kernel:
    """A fused attention kernel and what it accepts."""

    name: str
    device: str
    dtypes: tuple[torch.dtype, ...]
    dim_multiple: int
    """Head dims must be a multiple of this; others are padded with columns of zeros."""
    max_dim: int
    capability: tuple[int, int]
    """Smallest CUDA compute capability."""
    max_problems: int
    """Largest batch or head axis of one call (grid limits)."""
    forward: Forward
    backward: Backward


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return out, lse


def _cpu_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        do, q, k, v, out, lse, 0.0, causal, scale=scale
    )
    return dq, dk, dv


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    if q.shape[2] == k.shape[2] == 1:  # cuDNN refuses a single pair
        return _flash_forward(q, k, v, causal, scale)
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
    return out, lse.view(out.shape[:3])


def _cudnn_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    if q.shape[2] == k.shape[2] == 1:
        return _flash_backward(do, q, k, v, out, lse, causal, scale)
    philox = torch.zeros((), dtype=torch.int64, device=q.device)  # unused without dropout, but read from the GPU
    lse = lse.contiguous().unsqueeze(-1)
    dq, dk, dv = aten._scaled_dot_product_cudnn_attention_backward(
        do,
        q,
        k,
        v,
        out,
        lse,
        philox,
        philox,
        None,
        None,
        None,
        q.shape[2],
        k.shape[2],
        0.0,
        causal,
        scale=scale,
    )
    return dq, dk, dv


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return out, lse


def _flash_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    philox = torch.zeros((2,), dtype=torch.uint64, device=q.device)
    unused = torch.zeros((), dtype=torch.uint64, device=q.device)
    dq, dk, dv = aten._scaled_dot_product_flash_attention_backward(
        do,
        q,
        k,
        v,
        out,
        lse.contiguous(),
        None,
        None,
        q.shape[2],
        k.shape[2],
        0.0,
        causal,
        philox,
        unused,
        scale=scale,
    )
    return dq, dk, dv


def _efficient_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)
    return out, lse[..., : q.shape[2]]


def _efficient_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    philox = torch.zeros((), dtype=torch.int64, device=q.device)
    rows = lse.shape[2]
    aligned = lse.new_full((*lse.shape[:2], -(-rows // 32) * 32), torch.inf)  # the kernel reads whole groups of 32
    aligned[..., :rows] = lse
    wanted = [True, True, True, False]
    dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
        do, q, k, v, None, out, aligned, philox, philox, 0.0, wanted, causal, scale=scale
    )
    return dq, dk, dv


_HALF = (torch.bfloat16, torch.float16)
_ANY = 1 << 30

KERNELS = (
    Kernel(
        "cpu_flash",
        "cpu",
        (torch.float64, torch.float32, *_HALF),
        1,
        _ANY,
        (0, 0),
        _ANY,
        _cpu_forward,
        _cpu_backward,
    ),
    Kernel("cudnn", "cuda", _HALF, 8, 128, (9, 0), 65535, _cudnn_forward, _cudnn_backward),
    Kernel("flash", "cuda", _HALF, 8, 256, (8, 0), 65535, _flash_forward, _flash_backward),
    # Half precision is left to the two above: this kernel's backward gave wrong dQ for bfloat16 on an H200.
    Kernel("efficient", "cuda", (torch.float32,), 8, _ANY, (5, 0), 65535, _efficient_forward, _efficient_backward),
)


def find_kernel(device: str, dtype: torch.dtype, width: int, *, name: str | None = None) -> Kernel | str:
    """The first kernel that takes head dim ``width`` on this device, or the reason why none does."""
    reasons = []
    for kernel in KERNELS:
        if kernel.device != torch.device(device).type or name not in (None, kernel.name):
            continue
        padded = -(-width // kernel.dim_multiple) * kernel.dim_multiple
        if dtype not in kernel.dtypes:
            reasons.append(f"{kernel.name} does not take {dtype}")
        elif padded > kernel.max_dim:
            reasons.append(f"{kernel.name} takes head dims up to {kernel.max_dim}, not {padded}")
        elif kernel.device == "cuda" and torch.cuda.get_device_capability(torch.device(device)) < kernel.capability:
            reasons.append(f"{kernel.name} needs compute capability {kernel.capability[0]}.{kernel.capability[1]}")
        else:
            return kernel
    return "; ".join(reasons) or f"PyTorch has no fused attention kernel for device {device!r}"
