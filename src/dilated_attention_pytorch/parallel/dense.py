"""Full rectangles of attention, forward and backward from the final (out, lse): vendor kernels or plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.vendor import Kernel, find_kernel
from ..merge import accumulator_dtype

_BLOCK = 1024


def _kernel(query: Tensor, value: Tensor) -> Kernel | None:
    found = find_kernel(str(query.device), query.dtype, query.shape[3])
    same = query.shape[3] == value.shape[3]
    fits = isinstance(found, Kernel) and same and query.shape[3] % found.dim_multiple == 0
    return found if fits and isinstance(found, Kernel) else None


def dense_forward(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(out, lse) of query (B, H, Nq, D) against all of key and value (B, H, Nk, D), as a partial result."""
    kernel = _kernel(query, value)
    if kernel is not None:
        return kernel.forward(query, key, value, False, scale)
    acc = accumulator_dtype(query.dtype)
    k, v = key.to(acc), value.to(acc)
    outs, lses = [], []
    for q in query.to(acc).split(_BLOCK, dim=2):
        scores = q @ k.transpose(-1, -2) * scale
        lses.append(torch.logsumexp(scores, -1))
        outs.append(torch.exp(scores - lses[-1].unsqueeze(-1)) @ v)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def dense_backward(
    grad_out: Tensor,
    delta: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients from the final out (B, H, Nq, Dv) and lse (B, H, Nq).

    ``delta`` is rowsum(dO * O) - dLSE where the log-sum-exp has a gradient, which no vendor kernel takes.
    """
    kernel = None if delta is not None else _kernel(query, value)
    if kernel is not None:
        return kernel.backward(grad_out, query, key, value, out, lse, False, scale)
    acc = accumulator_dtype(query.dtype)
    k, v = key.to(acc), value.to(acc)
    if delta is None:
        delta = (grad_out.to(acc) * out.to(acc)).sum(-1)
    dk, dv, dq = torch.zeros_like(k), torch.zeros_like(v), []
    for i in range(0, query.shape[2], _BLOCK):
        part = slice(i, i + _BLOCK)
        q, g = query[:, :, part].to(acc), grad_out[:, :, part].to(acc)
        p = torch.exp(q @ k.transpose(-1, -2) * scale - lse[:, :, part].unsqueeze(-1))
        ds = p * (g @ v.transpose(-1, -2) - delta[:, :, part].unsqueeze(-1)) * scale
        dv += p.transpose(-1, -2) @ g
        dk += ds.transpose(-1, -2) @ q
        dq.append(ds @ k)
    return torch.cat(dq, 2), dk, dv
