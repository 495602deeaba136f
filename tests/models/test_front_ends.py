"""Embeddings of tiles and of patches: what they compute and what they refuse."""

from __future__ import annotations

import pytest
import torch

from dilated_attention_pytorch.models import ImageEmbedding, TileEmbedding
from dilated_attention_pytorch.models.positions import plane_positions


def test_tiles_are_projected_and_placed() -> None:
    embed = TileEmbedding(5, 8, slide_ngrids=10, tile_size=100)
    x, coords = torch.randn(2, 3, 5), torch.tensor([[[0, 0], [150, 999], [100, 0]]]).expand(2, 3, 2)
    expected = embed.proj(x) + plane_positions(torch.tensor([[0, 0], [1, 9], [1, 0]]), 10, 8, torch.float32)
    torch.testing.assert_close(embed(x, coords), expected)


def test_what_padding_holds_reaches_neither_output_nor_gradient() -> None:
    embed = TileEmbedding(5, 8)
    x, coords = torch.randn(1, 4, 5), torch.zeros(1, 4, 2)
    x[0, 3], coords[0, 2:] = torch.nan, torch.nan
    padding = torch.tensor([[False, False, True, True]])
    out = embed(x, coords, padding)
    out[:, :2].sum().backward()
    assert torch.isfinite(out).all()
    for parameter in embed.parameters():
        assert parameter.grad is not None
        assert torch.isfinite(parameter.grad).all()


def test_positions_are_in_the_parameters_dtype() -> None:
    x, coords = torch.randn(1, 4, 5), torch.zeros(1, 4, 2)
    assert TileEmbedding(5, 8, dtype=torch.bfloat16)(x.bfloat16(), coords).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert TileEmbedding(5, 8)(x, coords).dtype == torch.float32


def test_tiles_that_are_refused() -> None:
    embed = TileEmbedding(5, 8)
    for x in (torch.zeros(4, 5), torch.zeros(1, 4, 6), torch.zeros(1, 4, 5, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"give features \(batch, tiles, 5\)"):
            embed(x, torch.zeros(1, 4, 2))
    with pytest.raises(ValueError, match=r"coords has shape \(1, 3, 2\) for features \(1, 4, 5\).*\(1, 4, 2\)"):
        embed(torch.zeros(1, 4, 5), torch.zeros(1, 3, 2))
    for dtype in (torch.float16, torch.float64):
        with pytest.raises(ValueError, match=rf"x is {dtype}, the weights are torch.float32; convert one"):
            embed(torch.zeros(1, 4, 5, dtype=dtype), torch.zeros(1, 4, 2))
    with pytest.raises(ValueError, match="embed_dim is 6"):
        TileEmbedding(5, 6)
    with pytest.raises(ValueError, match="tile_size is 0"):
        TileEmbedding(5, 8, tile_size=0)


def test_patches_come_row_by_row() -> None:
    embed = ImageEmbedding(8, 2, in_chans=1, embed_dim=4)
    image, positions = torch.randn(2, 1, 8, 8), torch.randn(1, 16, 4)
    out = embed(image, positions)
    patch = image[:, :, 2:4, 6:8].flatten(1)
    expected = patch @ embed.proj.weight.flatten(1).T + embed.proj.bias + positions[:, 1 * 4 + 3]
    torch.testing.assert_close(out[:, 1 * 4 + 3], expected)
    assert embed(image[..., :4], positions).shape == (2, 8, 4)


def test_images_that_are_refused() -> None:
    embed, positions = ImageEmbedding(8, 2, in_chans=3, embed_dim=4), torch.zeros(1, 16, 4)
    for shape in ((3, 8, 8), (1, 1, 8, 8), (1, 3, 7, 8), (1, 3, 8, 1), (1, 3, 0, 8)):
        with pytest.raises(ValueError, match=r"floating \(batch, 3, height, width\), both multiples of patch_size 2"):
            embed(torch.zeros(shape), positions)
    with pytest.raises(ValueError, match=r"image is torch.float16, the weights are torch.float32; convert one"):
        embed(torch.zeros(1, 3, 8, 8, dtype=torch.float16), positions)
    with pytest.raises(ValueError, match="img_size is 9, patch_size is 2"):
        ImageEmbedding(9, 2, embed_dim=4)
