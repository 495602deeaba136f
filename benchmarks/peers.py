"""What other people's packages need of packages that are hard to install, so that theirs can be timed beside ours."""

from __future__ import annotations

import sys
import types
from typing import Any

import torch
from torch import Tensor


def stand_in(name: str, **content: Any) -> types.ModuleType:
    """A module of this name with this content, for whoever imports it from now on."""
    module = types.ModuleType(name)
    module.__dict__.update(content)
    sys.modules[name] = module
    return module


def stand_in_for_flash_attn() -> None:
    """``flash_attn`` with `flash_attn_func` alone, put together from PyTorch's flash kernel (the same algorithm)."""
    stand_in("flash_attn")
    stand_in("flash_attn.flash_attn_interface", flash_attn_func=_flash_attn_func)


def _flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    return_attn_probs: bool = False,
) -> tuple[Tensor, Tensor, None]:  # fmt: skip
    """(B, N, H, D) by PyTorch's kernel."""
    views = (x.transpose(1, 2) for x in (q, k, v))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        *views, dropout_p, causal, False, scale=softmax_scale
    )
    return out.transpose(1, 2), lse, None
