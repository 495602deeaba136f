"""Class tokens go before the tiles of each slide, and what is taken from a slide is its own."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from dilated_attention_pytorch.models.slides import Slides

TOKEN = torch.full((1, 1, 2), -1.0)


def test_rows_of_a_batch() -> None:
    x = torch.arange(12.0).view(2, 3, 2)
    slides = Slides.of(x, None, None)
    tokens = slides.insert(TOKEN, x)
    assert torch.equal(tokens[:, 1:], x)
    assert torch.equal(slides.class_tokens(tokens), TOKEN[0].expand(2, 2))
    torch.testing.assert_close(slides.mean_of_tiles(tokens), x.mean(1))


def test_padding_takes_no_part_in_the_mean() -> None:
    x = torch.arange(18.0).view(3, 3, 2)
    mask = torch.tensor([[False, False, False], [False, True, True], [True, True, True]])
    slides = Slides.of(x, mask, None)
    assert slides.key_padding_mask is not None
    assert slides.key_padding_mask.tolist()[1] == [False, False, True, True]
    expected = torch.stack((x[0].mean(0), x[1, 0], torch.zeros(2)))
    x[1, 1:] = torch.nan
    torch.testing.assert_close(slides.mean_of_tiles(slides.insert(TOKEN, x)), expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_slides(dtype: torch.dtype) -> None:
    bounds = [0, 3, 3, 4, 9]
    x = torch.randn(1, 9, 2)
    slides = Slides.of(x, None, torch.tensor(bounds, dtype=dtype))
    tokens = slides.insert(TOKEN, x)
    parts = [x[:, a:b] for a, b in pairwise(bounds)]
    assert torch.equal(tokens, torch.cat([part for tiles in parts for part in (TOKEN, tiles)], dim=1))
    assert slides.cu_seqlens is not None
    assert slides.cu_seqlens.tolist() == [0, 4, 5, 7, 13]
    assert torch.equal(slides.class_tokens(tokens), TOKEN[0].expand(4, 2))
    means = [tiles[0].mean(0) if tiles.shape[1] else torch.zeros(2) for tiles in parts]
    torch.testing.assert_close(slides.mean_of_tiles(tokens), torch.stack(means))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(1, 0, 2), None, None), r"x has shape \(1, 0, 2\)"),
        ((torch.zeros(2, 3, 2), torch.zeros(2, 4, dtype=torch.bool), None), r"give bool of shape \(2, 3\)"),
        ((torch.zeros(2, 3, 2), torch.zeros(2, 3), None), "key_padding_mask is torch.float32"),
        ((torch.zeros(2, 3, 2), None, torch.tensor([0, 3])), "the batch has 2; give batch 1"),
        ((torch.zeros(1, 3, 2), torch.zeros(1, 3, dtype=torch.bool), torch.tensor([0, 3])), "both given"),
        ((torch.zeros(1, 3, 2), None, torch.tensor([0.0, 3.0])), "cu_seqlens is torch.float32"),
        ((torch.zeros(1, 3, 2), None, torch.tensor([0, 2])), "grow from 0 to 3"),
        ((torch.zeros(1, 3, 2), None, torch.tensor([0, 2, 1, 3])), "grow from 0 to 3"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Slides.of(*arguments)
