"""Slides in a batch: where a class token goes before each, and what is taken from each afterwards."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..merge import accumulator_dtype


@dataclass(frozen=True)
class Slides:
    """Slides as rows of a batch, whole or padded at their end, or packed in one row; class tokens included.

    Attributes:
        key_padding_mask: ``(B, 1 + L)``, or None.
        cu_seqlens: boundaries of packed slides, ``(slides + 1,)``, or None.
    """

    key_padding_mask: Tensor | None
    cu_seqlens: Tensor | None

    @classmethod
    def of(cls, x_BLC: Tensor, key_padding_mask: Tensor | None, cu_seqlens: Tensor | None) -> Slides:
        """From arguments that count tiles alone.

        Raises:
            ValueError: arguments that do not fit ``x (B, L, C)``.
        """
        if x_BLC.dim() != 3 or 0 in x_BLC.shape:
            raise ValueError(
                f"x has shape {tuple(x_BLC.shape)}; give features (batch, tiles, channels), none of them 0"
            )
        batch, tiles = x_BLC.shape[:2]
        if key_padding_mask is not None:
            if key_padding_mask.dtype != torch.bool or tuple(key_padding_mask.shape) != (batch, tiles):
                raise ValueError(
                    f"key_padding_mask is {key_padding_mask.dtype} of shape {tuple(key_padding_mask.shape)}; give bool "
                    f"of shape ({batch}, {tiles}), True where there is no tile"
                )
            key_padding_mask = F.pad(key_padding_mask, (1, 0), value=False)
        if cu_seqlens is None:
            return cls(key_padding_mask, None)
        if batch != 1:
            raise ValueError(f"cu_seqlens packs slides in one row, and the batch has {batch}; give batch 1")
        if key_padding_mask is not None:
            raise ValueError("cu_seqlens and key_padding_mask are both given; packed slides have no padding")
        _check_bounds(cu_seqlens, tiles)
        slides = torch.arange(cu_seqlens.shape[0], device=cu_seqlens.device, dtype=cu_seqlens.dtype)
        return cls(None, cu_seqlens + slides)

    def insert(self, cls_token: Tensor, tiles_BLE: Tensor) -> Tensor:
        """A class token ``(1, 1, E)`` before the tiles of each slide: ``(B, 1 + L, E)``, packed ``(1, slides + L, E)``.

        The class token's own position is 0 in all dimensions: nothing to add.
        """
        if self.cu_seqlens is None:
            return torch.cat((cls_token.expand(tiles_BLE.shape[0], -1, -1), tiles_BLE), dim=1)
        starts, slide = self._starts(), self._slide_of_tile(tiles_BLE.shape[1])
        count = starts.shape[0]
        source = torch.empty(count + slide.shape[0], device=starts.device, dtype=torch.int64)
        source[starts] = torch.arange(count, device=starts.device)
        tile = torch.arange(slide.shape[0], device=starts.device)
        source[tile + slide + 1] = tile + count
        return torch.cat((cls_token.expand(1, count, -1), tiles_BLE), dim=1)[:, source]

    def class_tokens(self, x_BNE: Tensor) -> Tensor:
        """The class token of each slide, ``(slides, E)``."""
        return x_BNE[:, 0] if self.cu_seqlens is None else x_BNE[0, self._starts()]

    def mean_of_tiles(self, x_BNE: Tensor) -> Tensor:
        """The mean over the tiles of each slide, ``(slides, E)``; 0 for a slide without tiles."""
        x = x_BNE.to(accumulator_dtype(x_BNE.dtype))
        if self.cu_seqlens is not None:
            starts = self._starts()
            slide = self._slide_of_tile(x.shape[1] - starts.shape[0])
            tile = torch.arange(slide.shape[0], device=x.device)
            totals = x.new_zeros(starts.shape[0], x.shape[2]).index_add(0, slide, x[0, tile + slide + 1])
            counts = self.cu_seqlens.diff() - 1
        elif self.key_padding_mask is not None:
            hidden = self.key_padding_mask[:, 1:]
            totals, counts = x[:, 1:].masked_fill(hidden[..., None], 0.0).sum(1), (~hidden).sum(1)
        else:
            return x[:, 1:].mean(1).to(x_BNE.dtype)
        return (totals / counts.clamp(min=1)[:, None]).to(x_BNE.dtype)

    def _starts(self) -> Tensor:
        assert self.cu_seqlens is not None
        return self.cu_seqlens[:-1].long()

    def _slide_of_tile(self, tiles: int) -> Tensor:
        """Which slide each of the packed tiles belongs to, ``(L,)``."""
        starts = self._starts()
        ends = starts[1:] - torch.arange(1, starts.shape[0], device=starts.device)  # in tiles alone
        return torch.bucketize(torch.arange(tiles, device=starts.device), ends, right=True)


def _check_bounds(cu_seqlens: Tensor, tiles: int) -> None:
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens is {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}; give int32 or int64 (slides + 1,)"
        )
    if torch.compiler.is_compiling() or cu_seqlens.is_meta:
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != tiles or bounds != sorted(bounds):
        raise ValueError(f"cu_seqlens is {bounds[:8]} for {tiles} tiles; give boundaries that grow from 0 to {tiles}")
