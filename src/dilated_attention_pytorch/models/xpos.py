"""xPos (arXiv 2212.10554): relative positions by rotation, with a decay that queries and keys share out.

With c_i = (2 i + 0.4 D) / (1.4 D) for pair i of a head D wide, a query at position n has its pairs (dimensions 2i and
2i + 1) turned by n * theta_i and scaled by c_i ** (n / scale_base), a key at m by the inverse scale; so their product
depends on n - m alone. That also holds where m > n: in an encoder, keys behind a row are scaled *up*, the more the
further they are, as in torchscale. Too far and float32 overflows, which is refused.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

_MARGIN = 5.0  # of the exponent, for queries, keys and scores that are larger than 1 to begin with


class XPosTables(NamedTuple):
    """Cosines, sines and the query's scale, ``(1, N, 1, D/2)`` or ``(B, N, 1, D/2)``."""

    cos: Tensor
    sin: Tensor
    scale: Tensor


class XPos(nn.Module):
    """The decay of each pair, kept as a buffer because torchscale's state dicts hold it; no parameters.

    Args:
        head_dim: width of a head, even.
        scale_base: rows over which the decay acts once.
        device: of the buffer.
    """

    scale: Tensor

    def __init__(self, head_dim: int, scale_base: float, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.head_dim, self.scale_base = head_dim, scale_base
        self.register_buffer("scale", torch.empty(head_dim // 2, device=device, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Compute the buffer anew."""
        pair = torch.arange(0, self.head_dim, 2, device=self.scale.device, dtype=torch.float32)
        self.scale.copy_((pair + 0.4 * self.head_dim) / (1.4 * self.head_dim))

    def check_span(self, rows: int, reach: int, dtype: torch.dtype) -> None:
        """Refuse documents of ``rows`` rows whose queries see ``reach`` rows far, where that overflows.

        Raises:
            ValueError: the scale of a query or key leaves ``dtype``, or that of a score float32.
        """
        rate = math.log(1.4 / 0.4) / self.scale_base
        scores = torch.promote_types(dtype, torch.float32)
        for what, steps, limit in (("a query or key", rows / 2, dtype), ("a score", min(rows, reach), scores)):
            most = (math.log(torch.finfo(limit).max) - _MARGIN) / rate
            if steps > most:
                raise ValueError(
                    f"xpos scales {what} beyond {limit} in a document of {rows} rows that sees {reach} rows far; "
                    f"give a larger xpos_scale_base than {self.scale_base}, or shorter documents or segments"
                )

    def tables(self, positions: Tensor, dtype: torch.dtype) -> XPosTables:
        """Tables for int64 positions ``(1, N)`` or ``(B, N)`` in the document, best centred at 0: small scales."""
        # In float32 the angle at position 10**6 is off by up to 0.03; float64 keeps it right.
        exact = torch.float32 if positions.device.type == "mps" else torch.float64
        at = positions.to(exact)[:, :, None, None]
        pair = torch.arange(self.head_dim // 2, device=positions.device, dtype=exact)
        angles = at * 10000.0 ** (-2 * pair / self.head_dim)
        scale = self.scale.to(exact) ** (at / self.scale_base)
        return XPosTables(angles.cos().to(dtype), angles.sin().to(dtype), scale.to(dtype))


def apply_xpos(query_BNHD: Tensor, key_BNHD: Tensor, tables: XPosTables) -> tuple[Tensor, Tensor]:
    """Turn and scale queries and keys, in the tables' dtype; returned in theirs."""
    scale = tables.scale.repeat_interleave(2, dim=-1)
    query = (_turn(query_BNHD, tables) * scale).to(query_BNHD.dtype)
    return query, (_turn(key_BNHD, tables) / scale).to(key_BNHD.dtype)


def _turn(x_BNHD: Tensor, tables: XPosTables) -> Tensor:
    a, b = x_BNHD[..., ::2], x_BNHD[..., 1::2]
    return torch.stack((a * tables.cos - b * tables.sin, b * tables.cos + a * tables.sin), dim=-1).flatten(-2)


def centred_positions(
    length: int, cu_seqlens: Tensor | None, device: torch.device, *, rows: Tensor | None = None
) -> Tensor:
    """Position of each row in its document less half of the document's length: int64 ``(1, length)``.

    ``rows (n,)`` are those of the ``length`` rows that are here, where the sequence is sharded: then ``(1, n)``.
    """
    positions = (torch.arange(length, device=device) if rows is None else rows)[None]
    if cu_seqlens is None:
        return positions - length // 2
    bounds = cu_seqlens.to(positions)
    document = torch.bucketize(positions, bounds[1:-1], right=True)
    return positions - ((bounds[1:] + bounds[:-1]) // 2)[document]
