"""Dropout masks as a function of a seed and of global indices, so that every backend can draw the same ones.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): key = the 64-bit seed, counter
= (key row, query row, batch * H + head, branch), first word of the result. Rows count from key row 0 of the batch row.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(seed: int, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox on int64 tensors that hold 32-bit words and broadcast together."""
    a, b, c, d = torch.broadcast_tensors(*counter)
    key0, key1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        # The product of two words needs 64 bits without a sign; int64 wraps to the same bits, the mask drops the sign.
        p, q = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (q >> 32) & _WORD ^ b ^ key0, q & _WORD, (p >> 32) & _WORD ^ d ^ key1, p & _WORD
        key0, key1 = (key0 + _WEYL[0]) & _WORD, (key1 + _WEYL[1]) & _WORD
    return a, b, c, d


def keep_mask(
    seed: int, dropout_p: float, *, branch: int, batch_heads: Tensor, query_rows: Tensor, key_rows: Tensor
) -> Tensor:
    """Which (batch_heads..., query row, key row) survive dropout: bool, each dropped with probability dropout_p."""
    branches = torch.full((), branch, dtype=torch.int64, device=key_rows.device)
    word = philox(seed, (key_rows, query_rows[:, None], batch_heads[..., None, None], branches))[0]
    return word >= round(dropout_p * 2**32)
