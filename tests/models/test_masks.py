"""Masks of ``nn.Transformer``, read: the causal one of the right size, and padding in both of its forms."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dilated_attention_pytorch.models.masks import count_rows, read_causal, read_padding

CAUSAL = nn.Transformer.generate_square_subsequent_mask(5)


@pytest.mark.parametrize("mask", [CAUSAL, CAUSAL.isinf()], ids=["float", "bool"])
def test_the_causal_mask_is_known(mask: torch.Tensor):
    assert read_causal("mask", mask, None, 5)
    assert read_causal("mask", mask, True, 5)
    assert not read_causal("mask", None, None, 5)
    for hint in (None, True):
        with pytest.raises(ValueError, match=r"mask is no causal mask of 6 rows: it has shape \(5, 5\)"):
            read_causal("mask", mask, hint, 6)
    with pytest.raises(ValueError, match="mask is no causal mask; dense masks"):
        read_causal("mask", mask.flip(0), None, 5)


def test_padding_is_bool_or_infinite():
    hidden = torch.tensor([[False, True]])
    assert torch.equal(read_padding("mask", torch.tensor([[0.0, -torch.inf]])), hidden)
    assert read_padding("mask", hidden) is hidden
    with pytest.raises(ValueError, match="other values than 0 and -inf"):
        read_padding("mask", torch.tensor([[0.0, 1.0]]))


def test_rows_are_counted_along_the_right_axis():
    assert count_rows(torch.zeros(2, 3, 4), batch_first=True) == 3
    assert count_rows(torch.zeros(2, 3, 4), batch_first=False) == 2
    assert count_rows(torch.zeros(3, 4), batch_first=False) == 3
