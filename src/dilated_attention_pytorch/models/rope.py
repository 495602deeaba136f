"""Rotary position embedding (RoFormer, arXiv 2104.09864) by the position in the document.

The pairs that turn together are dimensions d and d + D/2 of a head. Tables are computed for the positions at
hand, never stored: casting the model to bfloat16 cannot round them, and no length is too long.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RotaryTables(NamedTuple):
    """Cosines and sines ``(1 or B, N, 1, D/2)``, float32, or float64 for a float64 model."""

    cos: Tensor
    sin: Tensor


def document_positions(
    tokens: Tensor, *, cu_seqlens: Tensor | None = None, key_start: int | Tensor = 0, rows: Tensor | None = None
) -> Tensor:
    """Position of each of ``tokens (B, N)`` in its document: int64 ``(1, N)``, or ``(B, N)`` by row.

    Row n is at ``n + key_start``, a number or one for each row of the batch; with ``cu_seqlens`` positions
    count from the first row of each packed document. ``rows (N,)`` are the rows of the whole sequence that the
    tokens are, where it is sharded. Shapes that do not fit are a ValueError.

    >>> document_positions(torch.zeros(1, 5), cu_seqlens=torch.tensor([0, 2, 5]))
    tensor([[0, 1, 0, 1, 2]])
    >>> document_positions(torch.zeros(2, 3), key_start=torch.tensor([0, -2]))
    tensor([[ 0,  1,  2],
            [-2, -1,  0]])
    """
    if rows is None:
        rows = torch.arange(tokens.shape[1], device=tokens.device)
    positions = rows[None]
    if cu_seqlens is not None:
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
            raise ValueError(f"cu_seqlens has shape {tuple(cu_seqlens.shape)}; give (documents + 1,), at least 2")
        starts = cu_seqlens.to(positions)
        positions = positions - starts[torch.bucketize(positions, starts[1:], right=True)]
    if not isinstance(key_start, Tensor):
        return positions + key_start
    if tuple(key_start.shape) != (tokens.shape[0],):
        raise ValueError(f"key_start has shape {tuple(key_start.shape)}; give an int or shape ({tokens.shape[0]},)")
    return positions + key_start.to(positions)[:, None]


def rotary_tables(positions: Tensor, head_dim: int, *, base: float, dtype: torch.dtype) -> RotaryTables:
    """Tables for int64 positions ``(B, N)``: position p turns pair i by ``p * base**(-2 i / head_dim)``."""
    # In float32 the angle at position 10**6 is off by up to 0.03; float64 keeps it right.
    exact = torch.float32 if positions.device.type == "mps" else torch.float64
    pair = torch.arange(0, head_dim, 2, device=positions.device, dtype=exact)
    angles = positions.to(exact)[:, :, None, None] * base ** (-pair / head_dim)
    return RotaryTables(angles.cos().to(dtype), angles.sin().to(dtype))


def rotate(x_BNHD: Tensor, tables: RotaryTables) -> Tensor:
    """Turn every pair of every head by the angle of its row, in the tables' dtype; returned in x's."""
    cos, sin = tables
    a, b = x_BNHD.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x_BNHD.dtype)
