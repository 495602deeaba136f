"""When memory runs out in the middle of a step: free what can be freed, and compute the same in smaller parts, once.

Only this rank's own computing is repeated; what has travelled is kept, so the other ranks notice nothing but the time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from ..memory import MemoryPool
from .comm import Traffic, free_idle
from .dense import Keep, dense_backward, dense_forward
from .errors import is_out_of_memory

_LOG = logging.getLogger(__name__)
PARTS = 8
"""Into how many parts the second attempt cuts the query rows."""

T = TypeVar("T")


def retrying(compute: Callable[[int], T], pool: MemoryPool, traffic: Traffic) -> T:
    """``compute(1)``, or after an out-of-memory error ``compute(PARTS)``, counted in ``traffic.retries`` and logged.

    Raises:
        torch.OutOfMemoryError, MemoryError, RuntimeError: memory runs out again.
    """
    try:
        return compute(1)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        text = str(error).partition("\n")[0] or type(error).__name__
    # Outside of the handler: the traceback, which holds the tensors of the first attempt, is gone.
    freed = free_idle(pool)
    traffic.retries += 1
    _LOG.warning("%s; freed %d bytes of idle buffers, trying again in %d parts", text, freed, PARTS)
    return compute(PARTS)


def _cuts(rows: int, parts: int) -> list[slice]:
    size = -(-rows // min(parts, rows))
    return [slice(first, first + size) for first in range(0, rows, size)]


def _shifted(keep: Keep | None, by: int) -> Keep | None:
    return None if keep is None else lambda first, last: keep(first + by, last + by)


def forward_in_parts(
    parts: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    *,
    hidden: Tensor | None = None,
    keep: Keep | None = None,
) -> tuple[Tensor, Tensor]:
    """`dense_forward`, some query rows after the others."""
    if parts == 1:
        return dense_forward(query, key, value, scale, hidden=hidden, keep=keep)
    found = [
        dense_forward(query[:, :, cut], key, value, scale, hidden=hidden, keep=_shifted(keep, cut.start))
        for cut in _cuts(query.shape[2], parts)
    ]
    return torch.cat([out for out, _ in found], 2), torch.cat([lse for _, lse in found], 2)


def backward_in_parts(
    parts: int,
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
) -> tuple[Tensor, Tensor, Tensor]:
    """`dense_backward`, some query rows after the others."""
    if parts == 1:
        return dense_backward(grad_out, delta, query, key, value, out, lse, scale, hidden=hidden, keep=keep)
    dqs: list[Tensor] = []
    dk = dv = None
    for cut in _cuts(query.shape[2], parts):
        dq, dk_part, dv_part = dense_backward(
            grad_out[:, :, cut], None if delta is None else delta[:, :, cut], query[:, :, cut], key, value,
            out[:, :, cut], lse[:, :, cut], scale, hidden=hidden, keep=_shifted(keep, cut.start),
        )  # fmt: skip
        dqs.append(dq)
        # Sums over parts in the accumulators' dtype, as over branches.
        dk = _sum(dk, dk_part)
        dv = _sum(dv, dv_part)
    assert dk is not None
    assert dv is not None
    return torch.cat(dqs, 2), dk, dv


def _sum(total: Tensor | None, part: Tensor) -> Tensor:
    wide = part.to(torch.promote_types(part.dtype, torch.float32))
    return wide if total is None else total.add_(wide)
