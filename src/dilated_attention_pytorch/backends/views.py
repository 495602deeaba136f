"""Tensors as the affine views that a Call describes. No copies."""

from __future__ import annotations

from torch import Tensor

from ..types import Call


def call_view(tensor: Tensor, call: Call, *, rows: int, row: int, head: int, inner_head: int) -> Tensor:
    """View of a (B, N, heads, D) tensor as (outer, inner, rows, D)."""
    sb, sn, sh, sd = tensor.stride()
    size = (call.outer, call.inner, rows, tensor.shape[3])
    stride = (
        call.outer_batch * sb + call.outer_row * sn,
        call.inner_row * sn + inner_head * sh,
        call.dilation_rate * sn,
        sd,
    )
    return tensor.as_strided(size, stride, tensor.storage_offset() + call.batch * sb + row * sn + head * sh)


def query_view(tensor: Tensor, call: Call) -> Tensor:
    """The query rows of a call, of a tensor (B, Nq, H, D): query, out, their gradients, lse with D = 1."""
    return call_view(tensor, call, rows=call.query_len, row=call.query_row, head=call.head, inner_head=call.inner_head)


def key_view(tensor: Tensor, call: Call) -> Tensor:
    """The key rows of a call, of a tensor (B, Nk, G, D): key, value and their gradients."""
    return call_view(
        tensor, call, rows=call.key_len, row=call.key_row, head=call.kv_head, inner_head=call.inner_kv_head
    )


def foldable(tensor: Tensor) -> bool:
    """Whether rows of consecutive batch entries are one affine axis."""
    return tensor.shape[0] == 1 or tensor.stride(0) == tensor.shape[1] * tensor.stride(1)
