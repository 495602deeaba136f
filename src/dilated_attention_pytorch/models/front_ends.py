"""What turns a slide or an image into embeddings: tile features at coordinates, or patches of pixels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .config import check_count
from .positions import grid_cells, plane_positions, resize_positions


def _check_dtype(name: str, given: Tensor, weight: Tensor) -> None:
    """Raise ValueError for another dtype than the weights', where autocast does not see to it."""
    if given.dtype != weight.dtype and not (given.is_meta or torch.is_autocast_enabled(given.device.type)):
        raise ValueError(
            f"{name} is {given.dtype}, the weights are {weight.dtype}; convert one of them with .to(dtype), or use "
            "torch.autocast"
        )


class TileEmbedding(nn.Module):
    """Features of tiles, projected, with sine-cosine positions in the plane added; for GigaPath's slide encoder.

    Positions are computed from the coordinates for each call: there is no table of all cells of the grid.

    Args:
        in_chans: features of a tile.
        embed_dim: width of the embedding, a multiple of 4.
        slide_ngrids: cells of the grid along each axis.
        tile_size: pixels along a side of a tile.
        device, dtype: of the parameters.

    >>> embed = TileEmbedding(1536, 768)
    >>> embed(torch.randn(1, 3, 1536), torch.tensor([[[0, 0], [0, 256], [512, 256]]])).shape
    torch.Size([1, 3, 768])
    """

    def __init__(
        self,
        in_chans: int,
        embed_dim: int,
        *,
        slide_ngrids: int = 1000,
        tile_size: int = 256,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("in_chans", in_chans), ("slide_ngrids", slide_ngrids), ("tile_size", tile_size)):
            check_count(name, value)
        check_count("embed_dim", embed_dim)
        if embed_dim % 4:
            raise ValueError(f"embed_dim is {embed_dim}; sine-cosine positions of two axes need a multiple of 4")
        self.in_chans, self.embed_dim = in_chans, embed_dim
        self.slide_ngrids, self.tile_size = slide_ngrids, tile_size
        self.proj = nn.Linear(in_chans, embed_dim, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw the projection anew, Xavier's."""
        nn.init.xavier_uniform_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor, coords: Tensor, padding: Tensor | None = None) -> Tensor:
        """Features ``(B, L, in_chans)`` at pixels ``coords (B, L, 2)`` to ``(B, L, embed_dim)``.

        ``padding (B, L)`` bool, True = no tile: what it holds has no effect.

        Raises:
            ValueError: shapes or dtypes that do not fit, or coordinates outside the grid; the message names the tile.
        """
        if x.dim() != 3 or x.shape[2] != self.in_chans or not x.is_floating_point():
            raise ValueError(
                f"x has shape {tuple(x.shape)} and dtype {x.dtype}; give features (batch, tiles, {self.in_chans})"
            )
        if coords.dim() != 3 or coords.shape[:2] != x.shape[:2]:
            raise ValueError(
                f"coords has shape {tuple(coords.shape)} for features {tuple(x.shape)}; give two coordinates a tile, "
                f"{(*x.shape[:2], 2)}"
            )
        _check_dtype("x", x, self.proj.weight)
        if padding is not None:  # NaN there would reach the gradient of the projection
            x = x.masked_fill(padding[..., None], 0.0)
        cells = grid_cells(coords, tile_size=self.tile_size, grid=self.slide_ngrids, padding=padding)
        # In the parameters' dtype, so that under autocast the residual stream keeps it, as in the original.
        positions = plane_positions(cells, self.slide_ngrids, self.embed_dim, self.proj.weight.dtype)
        return self.proj(x) + positions


class ImageEmbedding(nn.Module):
    """Patches of an image by convolution; their positions are learned, and held by the model. For LongViT.

    Args:
        img_size: pixels along a side of the images whose positions are learned.
        patch_size: pixels along a side of a patch, a divisor of ``img_size``.
        in_chans: channels of the image.
        embed_dim: width of the embedding.
        device, dtype: of the parameters.

    >>> embed = ImageEmbedding(64, 16, in_chans=3, embed_dim=32)
    >>> embed(torch.randn(1, 3, 64, 32), torch.zeros(1, 16, 32)).shape
    torch.Size([1, 8, 32])
    """

    def __init__(
        self,
        img_size: int,
        patch_size: int,
        *,
        in_chans: int = 3,
        embed_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("img_size", img_size), ("patch_size", patch_size), ("in_chans", in_chans)):
            check_count(name, value)
        check_count("embed_dim", embed_dim)
        if img_size % patch_size:
            raise ValueError(f"img_size is {img_size}, patch_size is {patch_size}; give a multiple of patch_size")
        self.img_size, self.patch_size = img_size, patch_size
        self.in_chans, self.embed_dim = in_chans, embed_dim
        self.num_patches = (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw the projection anew, Xavier's."""
        nn.init.xavier_uniform_(self.proj.weight.view(self.embed_dim, -1))
        if self.proj.bias is not None:
            nn.init.zeros_(self.proj.bias)

    def forward(self, image: Tensor, positions: Tensor) -> Tensor:
        """Image ``(B, in_chans, height, width)`` to ``(B, patches, embed_dim)``, row by row of patches.

        ``positions (1, num_patches, embed_dim)`` are resized where the image has another size.

        Raises:
            ValueError: channels, or a height or width that are no multiple of a patch's.
        """
        size = self.patch_size
        fits = image.dim() == 4 and image.shape[1] == self.in_chans and image.is_floating_point()
        if not fits or 0 in image.shape or image.shape[2] % size or image.shape[3] % size:
            raise ValueError(
                f"image has shape {tuple(image.shape)} and dtype {image.dtype}; give floating (batch, {self.in_chans}, "
                f"height, width), both multiples of patch_size {size}"
            )
        _check_dtype("image", image, self.proj.weight)
        patches = self.proj(image).flatten(2).transpose(1, 2)
        return patches + resize_positions(positions, image.shape[2] // size, image.shape[3] // size)
