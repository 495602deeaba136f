"""Rows of rectangles and blocks as views of tensors and buffers, and the packing of rows that travel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .shard import Block, Pairing, Rectangle


def query_rows(tensor: Tensor, rectangle: Rectangle) -> Tensor:
    """The query rows of a rectangle of a (B, N, H, D) tensor, as (b, heads, rows, D)."""
    sb, sn, sh, sd = tensor.stride()
    r = rectangle
    return tensor.as_strided(
        (r.batches, r.heads, r.rows, tensor.shape[3]),
        (sb, r.row_step * sn + r.head_step * sh, r.rate * sn, sd),
        tensor.storage_offset() + r.batch * sb + r.row * sn + r.head * sh,
    )


def key_rows(buffer: Tensor, rectangle: Rectangle, dim: int) -> Tensor:
    """The blocks of a rectangle in a buffer of received rows, as (b, heads, keys, D)."""
    r = rectangle
    return buffer.as_strided(
        (r.batches, r.heads, r.keys, dim),
        (r.keys * dim, r.start_step * dim, dim, 1),
        buffer.storage_offset() + r.start * dim,
    )


def _block(tensor: Tensor, block: Block) -> Tensor:
    """The rows of a block of a (B, N, G, D) tensor, as (b, rows, D)."""
    rows = slice(block.row, block.row + block.rate * (block.rows - 1) + 1, block.rate)
    return tensor[block.batch : block.batch + block.batches, rows, block.kv_head]


class Rows(NamedTuple):
    """Rows that travelled: flat keys and values, and which rows nobody may see (0 or 1), where there is a mask."""

    key: Tensor
    value: Tensor
    hidden: Tensor | None

    def hidden_keys(self, rectangle: Rectangle) -> Tensor | None:
        """(b, heads, keys) bool."""
        return None if self.hidden is None else key_rows(self.hidden, rectangle, 1)[..., 0] != 0


def pack(pairing: Pairing, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """The active rows that a peer needs: all blocks of keys, then all of values, then of the mask, as one row each."""
    tensors = [key, value]
    if mask is not None:
        tensors.append(mask[:, :, None, None].to(key.dtype).expand(-1, -1, key.shape[2], -1))
    return torch.cat([_block(tensor, block).reshape(-1) for tensor in tensors for block in pairing.blocks])


def unpack(buffer: Tensor, pairing: Pairing, dim: int, value_dim: int) -> Rows:
    """The parts of a buffer that `pack` made, or of one of gradients, which has no mask."""
    key, value, rest = buffer.tensor_split((pairing.rows * dim, pairing.rows * (dim + value_dim)))
    return Rows(key, value, rest if rest.numel() else None)


def add_home(pairing: Pairing, buffer: Tensor, dk: Tensor, dv: Tensor) -> None:
    """Add the gradients of rows that were sent away to where they belong."""
    parts = unpack(buffer, pairing, dk.shape[3], dv.shape[3])
    for total, part in ((dk, parts.key), (dv, parts.value)):
        dim = total.shape[3]
        for block in pairing.blocks:
            rows = part[block.start * dim : block.end * dim].view(block.batches, block.rows, dim)
            _block(total, block).add_(rows)
