"""Full rectangles of attention, forward and backward from the final (out, lse): vendor kernels or plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..backends.vendor import Kernel, find_kernel
from ..merge import accumulator_dtype

_BLOCK = 1024

Keep = Callable[[int, int], Tensor]
"""From query row and query row (of the rectangle) to the factors of dropout, 0 or 1 / (1 - p): (B, H, rows, keys)."""


def _kernel(query: Tensor, value: Tensor, *, many_shapes: bool) -> Kernel | None:
    device, dtype, dim = str(query.device), query.dtype, query.shape[3]
    found = find_kernel(device, dtype, dim, name="flash") if many_shapes else "not asked for"
    if isinstance(found, str):
        found = find_kernel(device, dtype, dim)
    same = query.shape[3] == value.shape[3]
    fits = isinstance(found, Kernel) and same and query.shape[3] % found.dim_multiple == 0
    return found if fits and isinstance(found, Kernel) else None


def _scores(q: Tensor, k: Tensor, scale: float, hidden: Tensor | None) -> Tensor:
    scores = q @ k.transpose(-1, -2) * scale
    return scores if hidden is None else scores.masked_fill_(hidden.unsqueeze(-2), -torch.inf)


def dense_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    *,
    hidden: Tensor | None = None,
    keep: Keep | None = None,
    many_shapes: bool = False,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of query (B, H, Nq, D) against all of key and value (B, H, Nk, D), as a partial result.

    ``hidden`` (B, H, Nk) bool are keys that nobody may see; ``keep`` drops pairs. Rows that see none give (0, -inf).
    ``many_shapes``: hardly two calls have equal sizes, so no kernel that is prepared for each (cuDNN's).
    """
    kernel = _kernel(query, value, many_shapes=many_shapes) if hidden is None and keep is None else None
    if kernel is not None:
        return kernel.forward(query, key, value, False, scale)
    acc = accumulator_dtype(query.dtype)
    k, v = key.to(acc), value.to(acc)
    outs, lses = [], []
    for first in range(0, query.shape[2], _BLOCK):
        q = query[:, :, first : first + _BLOCK].to(acc)
        scores = _scores(q, k, scale, hidden)
        lses.append(torch.logsumexp(scores, -1))
        p = torch.exp(scores - lses[-1].masked_fill(lses[-1] == -torch.inf, 0).unsqueeze(-1))
        outs.append((p if keep is None else p * keep(first, first + q.shape[2])) @ v)
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
    *,
    hidden: Tensor | None = None,
    keep: Keep | None = None,
    many_shapes: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients from the final out (B, H, Nq, Dv) and lse (B, H, Nq); options as in the forward pass.

    ``delta`` is rowsum(dO * O) - dLSE where the log-sum-exp has a gradient, which no vendor kernel takes.
    """
    whole = delta is None and hidden is None and keep is None
    kernel = _kernel(query, value, many_shapes=many_shapes) if whole else None
    if kernel is not None:
        return kernel.backward(grad_out, query, key, value, out, lse, False, scale)
    acc = accumulator_dtype(query.dtype)
    k, v = key.to(acc), value.to(acc)
    if delta is None:
        delta = (grad_out.to(acc) * out.to(acc)).sum(-1)
    # A row without any key: exp(s - inf) is 0 where exp(s + inf) is not.
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    dk, dv, dq = torch.zeros_like(k), torch.zeros_like(v), []
    for first in range(0, query.shape[2], _BLOCK):
        part = slice(first, first + _BLOCK)
        q, g = query[:, :, part].to(acc), grad_out[:, :, part].to(acc)
        p = torch.exp(_scores(q, k, scale, hidden) - lse[:, :, part].unsqueeze(-1))
        dp, dropped = g @ v.transpose(-1, -2), p
        if keep is not None:
            factor = keep(first, first + q.shape[2])
            dp, dropped = dp * factor, p * factor
        ds = p * (dp - delta[:, :, part].unsqueeze(-1)) * scale
        dv += dropped.transpose(-1, -2) @ g
        dk += ds.transpose(-1, -2) @ q
        dq.append(ds @ k)
    return torch.cat(dq, 2), dk, dv
