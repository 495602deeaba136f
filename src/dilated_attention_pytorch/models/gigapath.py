"""What a checkpoint of GigaPath's slide encoder says about the model, and the rule for its segment lengths."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .config import check_count
from .positions import plane_positions
from .weights import EncoderSizes, WeightsError, WeightsSource, describe, encoder_sizes, read_weights, size_of

_PUBLISHED = {(768, 12), (1024, 24), (1536, 12)}  # width and depth


def gigapath_segment_lengths(max_wsi_size: int = 262144, tile_size: int = 256) -> tuple[int, ...]:
    """GigaPath's five segment lengths: a geometric row from 1024 to the power of two that the largest slide holds.

    Truncated to integers, most are no multiple of their dilation rate.

    Args:
        max_wsi_size: pixels along a side of the largest slide.
        tile_size: pixels along a side of a tile, at most ``max_wsi_size``.

    >>> gigapath_segment_lengths()
    (1024, 5792, 32768, 185363, 1048576)
    """
    check_count("max_wsi_size", max_wsi_size)
    check_count("tile_size", tile_size)
    if max_wsi_size < tile_size:
        raise ValueError(f"max_wsi_size is {max_wsi_size}, tile_size is {tile_size}; a slide holds at least one tile")
    last = int(math.log2((max_wsi_size // tile_size) ** 2))
    return tuple(int(2.0 ** (10 + i * (last - 10) / 4)) for i in range(5))


class GigaPathSizes(NamedTuple):
    """What the weights say about the model."""

    in_chans: int
    encoder: EncoderSizes

    @property
    def norm_eps(self) -> float:
        """Of the norm behind the encoder: 1e-6 in the three published sizes, 1e-5 where the class is used as it is."""
        return 1e-6 if (self.encoder["embed_dim"], self.encoder["num_layers"]) in _PUBLISHED else 1e-5


def gigapath_sizes(weights: Mapping[str, Tensor], source: WeightsSource) -> GigaPathSizes:
    """Sizes of the model, read off its weights.

    Raises:
        WeightsError: the tensors that tell them are not there.
    """
    what = "slide encoder of GigaPath"
    embed_dim, in_chans = size_of(weights, "patch_embed.proj.weight", 2, source, what)
    size_of(weights, "cls_token", 3, source, what)
    return GigaPathSizes(in_chans, encoder_sizes(weights, embed_dim, source, what))


def read_gigapath(source: WeightsSource, *, slide_ngrids: int) -> tuple[dict[str, Tensor], GigaPathSizes]:
    """The weights and their sizes, without the table of positions that some hold, once it has been checked.

    Raises:
        WeightsError: unreadable or foreign weights, or a table of other positions than those of the grid.
    """
    weights = read_weights(source)
    sizes = gigapath_sizes(weights, source)
    table = weights.pop("pos_embed", None)
    if table is not None:
        _check_table(table, slide_ngrids, source)
    return weights, sizes


def _check_table(table: Tensor, grid: int, source: WeightsSource) -> None:
    """Compare the buffer ``(1, 1 + grid * grid, E)`` with the positions that are computed in its place."""
    shape = tuple(table.shape)
    if len(shape) != 3 or shape[:2] != (1, 1 + grid * grid) or shape[2] % 4:
        raise WeightsError(
            f"{describe(source)} has pos_embed of shape {shape}; for slide_ngrids {grid} it would be "
            f"(1, {1 + grid * grid}, width): give the slide_ngrids of the checkpoint"
        )
    other = table[0, 0].abs().max().double()
    cells = torch.arange(grid)
    for first in range(grid):  # a row of cells at a time: the whole table takes gigabytes
        row = torch.stack((torch.full_like(cells, first), cells), dim=-1)
        rows = table[0, 1 + first * grid : 1 + (first + 1) * grid].float()
        other = torch.maximum(other, (rows - plane_positions(row, grid, shape[2], torch.float32)).abs().max().double())
    # What half precision leaves; `not` also catches NaN.
    if not float(other) <= 4e-3:
        raise WeightsError(
            f"{describe(source)} has a pos_embed that is not GigaPath's sine-cosine positions: it is off by up to "
            f"{float(other):.3g}"
        )
