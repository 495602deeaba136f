"""Masks of ``nn.Transformer`` as what dilated attention takes: whether it is causal, and which keys are padding."""

from __future__ import annotations

import torch
from torch import Tensor


def read_causal(name: str, mask: Tensor | None, is_causal: bool | None, rows: int) -> bool:
    """Whether attention of ``rows`` is causal: as ``is_causal`` says, or because ``mask`` is the causal one.

    Raises:
        ValueError: a mask that is not causal, or one of another number of rows.
    """
    if mask is None:
        return bool(is_causal)
    if mask.shape[-1] != rows:
        raise ValueError(f"{name} is no causal mask of {rows} rows: it has shape {tuple(mask.shape)}; or use is_causal")
    if is_causal:
        return True
    hidden = mask if mask.dtype == torch.bool else mask == -torch.inf
    future = torch.ones(rows, rows, dtype=torch.bool, device=mask.device).triu(1)
    plain = mask.dtype == torch.bool or bool((mask.masked_fill(hidden, 0) == 0).all())
    if mask.shape != (rows, rows) or not plain or not torch.equal(hidden, future):
        raise ValueError(f"{name} is no causal mask; dense masks are not supported, use is_causal or a padding mask")
    return True


def count_rows(x: Tensor, *, batch_first: bool) -> int:
    """Rows of embeddings ``(B, N, E)``, ``(N, B, E)`` without ``batch_first``, or ``(N, E)``."""
    return x.shape[-2] if batch_first or x.dim() == 2 else x.shape[0]


def read_padding(name: str, mask: Tensor | None) -> Tensor | None:
    """A padding mask as bool, True = ignore; PyTorch's containers hand it on as 0 and -inf."""
    if mask is None or mask.dtype == torch.bool:
        return mask
    hidden = mask == -torch.inf
    if not mask.is_floating_point() or bool((mask.masked_fill(hidden, 0) != 0).any()):
        raise ValueError(f"{name} is {mask.dtype} with other values than 0 and -inf; give bool, True = ignore")
    return hidden
