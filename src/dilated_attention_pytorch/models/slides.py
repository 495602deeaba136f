"""Slides in a batch: where a class token goes before each, and what is taken from each afterwards."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..merge import accumulator_dtype
from ..parallel import ContextParallel


@dataclass(frozen=True)
class Slides:
    """Slides as rows of a batch, whole or padded at their end, or packed in one row; class tokens included.

    Attributes:
        key_padding_mask: ``(B, n)`` of the n rows that are here, or None.
        cu_seqlens: boundaries of packed slides, ``(slides + 1,)``, or None.
        ranks: what shards the rows, or None.
        slide: ``(n,)`` the packed slide that each row is of, and
        first: ``(n,)`` bool, whether it is the class token; both None for whole slides, whose first row is.
    """

    key_padding_mask: Tensor | None
    cu_seqlens: Tensor | None
    ranks: ContextParallel | None = None
    slide: Tensor | None = None
    first: Tensor | None = None

    @classmethod
    def of(
        cls,
        x_BLC: Tensor,
        key_padding_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        ranks: ContextParallel | None = None,
    ) -> Slides:
        """From arguments that count tiles alone; of sharded slides, the tiles that this rank holds.

        Raises:
            ValueError: arguments that do not fit ``x (B, L, C)``.
        """
        if x_BLC.dim() != 3 or (0 in x_BLC.shape and (ranks is None or 0 in (x_BLC.shape[0], x_BLC.shape[2]))):
            raise ValueError(
                f"x has shape {tuple(x_BLC.shape)}; give features (batch, tiles, channels), none of them 0"
            )
        batch, tiles = x_BLC.shape[:2]
        if key_padding_mask is not None and (
            key_padding_mask.dtype != torch.bool or tuple(key_padding_mask.shape) != (batch, tiles)
        ):
            raise ValueError(
                f"key_padding_mask is {key_padding_mask.dtype} of shape {tuple(key_padding_mask.shape)}; give bool "
                f"of shape ({batch}, {tiles}), True where there is no tile"
            )
        if cu_seqlens is not None:
            if batch != 1:
                raise ValueError(f"cu_seqlens packs slides in one row, and the batch has {batch}; give batch 1")
            if key_padding_mask is not None:
                raise ValueError("cu_seqlens and key_padding_mask are both given; packed slides have no padding")
        if ranks is not None:
            return cls._sharded(tiles, x_BLC.device, key_padding_mask, cu_seqlens, ranks)
        if cu_seqlens is None:
            return cls(None if key_padding_mask is None else F.pad(key_padding_mask, (1, 0), value=False), None)
        _check_bounds(cu_seqlens, tiles)
        bounds = _with_class_tokens(cu_seqlens)
        rows = torch.arange(tiles + bounds.shape[0] - 1, device=bounds.device)
        return cls(None, bounds, None, *_places(rows, bounds))

    @classmethod
    def _sharded(
        cls,
        tiles: int,
        device: torch.device,
        key_padding_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        ranks: ContextParallel,
    ) -> Slides:
        rows = ranks.positions(device)
        assert ranks.length is not None
        if cu_seqlens is None:
            bounds, slide, first = None, torch.zeros_like(rows), rows == 0
        else:
            _check_bounds(cu_seqlens, ranks.length - cu_seqlens.shape[0] + 1)
            bounds = _with_class_tokens(cu_seqlens)
            slide, first = _places(rows, bounds.to(device))
        held = int((~first).sum())
        if tiles != held:
            raise ValueError(
                f"x has {tiles} tiles; rank {ranks.rank} of {ranks.world} holds {held} of the {ranks.length} rows, "
                "class tokens included: take those of LongNetViT.tiles_of_rank"
            )
        mask = None
        if key_padding_mask is not None:
            mask = key_padding_mask.new_zeros(key_padding_mask.shape[0], rows.shape[0])
            mask[:, ~first] = key_padding_mask
        return cls(mask, bounds, ranks, slide, first)

    def insert(self, cls_token: Tensor, tiles_BLE: Tensor) -> Tensor:
        """A class token ``(1, 1, E)`` before the tiles of each slide: ``(B, n, E)``, those of this rank where sharded.

        The class token's own position is 0 in all dimensions: nothing to add.
        """
        if self.first is None:
            return torch.cat((cls_token.expand(tiles_BLE.shape[0], -1, -1), tiles_BLE), dim=1)
        count = self.first.shape[0] - tiles_BLE.shape[1]
        order = torch.where(self.first, self.first.cumsum(0) - 1, count + (~self.first).cumsum(0) - 1)
        return torch.cat((cls_token.expand(tiles_BLE.shape[0], count, -1), tiles_BLE), dim=1)[:, order]

    def class_tokens(self, x_BNE: Tensor) -> Tensor:
        """The class token of each slide, ``(slides, E)``; on every rank where they are sharded."""
        if self.ranks is None:
            return x_BNE[:, 0] if self.cu_seqlens is None else x_BNE[0, self.cu_seqlens[:-1].long()]
        assert self.first is not None
        return self.ranks.add_up(self._added(x_BNE[:, self.first], self.first))  # the others' are 0

    def mean_of_tiles(self, x_BNE: Tensor) -> Tensor:
        """The mean over the tiles of each slide, ``(slides, E)``, 0 for a slide without; on every rank if sharded."""
        x = x_BNE.to(accumulator_dtype(x_BNE.dtype))
        if self.first is None and self.key_padding_mask is None:
            return x[:, 1:].mean(1).to(x_BNE.dtype)
        first = torch.arange(x.shape[1], device=x.device) == 0 if self.first is None else self.first
        left_out = first[None] if self.key_padding_mask is None else first | self.key_padding_mask
        totals = self._added(x.masked_fill(left_out[..., None], 0.0))
        counts = self._added((~left_out).expand(x.shape[:2])[..., None].to(x.dtype))
        if self.ranks is not None:
            totals, counts = self.ranks.add_up(totals), self.ranks.add_up(counts)
        return (totals / counts.clamp(min=1)).to(x_BNE.dtype)

    def _added(self, x_BnE: Tensor, which: Tensor | None = None) -> Tensor:
        """The sum over the rows of each slide, ``(slides, E)``, of all rows or of these."""
        if self.cu_seqlens is None or self.slide is None:
            return x_BnE.sum(1)
        slide = self.slide if which is None else self.slide[which]
        return x_BnE.new_zeros(self.cu_seqlens.shape[0] - 1, x_BnE.shape[2]).index_add(0, slide, x_BnE[0])


def tiles_of_rank(ranks: ContextParallel, tiles: int, cu_seqlens: Tensor | None = None) -> Tensor:
    """Which of ``tiles`` a rank holds when slides are sharded with their class tokens; sets the length of ``ranks``."""
    bounds = torch.tensor([0, tiles]) if cu_seqlens is None else cu_seqlens.cpu()
    _check_bounds(bounds, tiles)
    bounds = _with_class_tokens(bounds)
    ranks.length = tiles + bounds.shape[0] - 1
    rows = ranks.positions()
    slide, first = _places(rows, bounds)
    return (rows - slide - 1)[~first]


def _with_class_tokens(cu_seqlens: Tensor) -> Tensor:
    """Boundaries of slides in rows, from those in tiles."""
    return cu_seqlens + torch.arange(cu_seqlens.shape[0], device=cu_seqlens.device, dtype=cu_seqlens.dtype)


def _places(rows: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """The slide of each row, and whether the row is its class token."""
    bounds = bounds.long()
    slide = torch.bucketize(rows, bounds[1:], right=True)
    return slide, rows == bounds[slide]


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
