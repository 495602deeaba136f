"""The encoder-decoder: nn.Transformer where one segment covers all, and what its pattern may not see."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dilated_attention_pytorch import LongNet
from dilated_attention_pytorch.testing import max_error

SIZES: dict[str, Any] = {"d_model": 24, "nhead": 4, "num_encoder_layers": 2, "num_decoder_layers": 3}
SIZES |= {"dim_feedforward": 40}


def draw(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.mark.parametrize(("norm_first", "batch_first"), [(False, True), (True, False)])
def test_it_is_nn_transformer_where_one_segment_covers_all(norm_first: bool, batch_first: bool):
    options: dict[str, Any] = {"dropout": 0.0, "activation": "gelu", "norm_first": norm_first, "dtype": torch.float64}
    dense = nn.Transformer(**SIZES, **options, batch_first=batch_first)
    draw(dense)
    model = LongNet(**SIZES, **options, batch_first=batch_first, segment_lengths=(64,), dilation_rates=(1,))
    model.load_state_dict(dense.state_dict())
    assert model.state_dict().keys() == dense.state_dict().keys()
    src, tgt = torch.randn(2, 17, 24).double(), torch.randn(2, 11, 24).double()
    if not batch_first:
        src, tgt = src.transpose(0, 1), tgt.transpose(0, 1)
    hidden = torch.zeros(2, 17, dtype=torch.bool)
    hidden[1, 12:] = True
    causal = nn.Transformer.generate_square_subsequent_mask(11, dtype=torch.float64)
    masks = {"src_key_padding_mask": hidden, "memory_key_padding_mask": hidden}
    gold = dense(src, tgt, tgt_mask=causal, **masks)
    out = model(src, tgt, tgt_is_causal=True, **masks)
    assert max_error(out, gold) < 1e-12
    assert max_error(model(src, tgt, tgt_mask=causal, **masks), gold) < 1e-12
    weight = torch.randn_like(gold)
    found, expected = (
        torch.autograd.grad(result, list(module.parameters()), weight)
        for result, module in ((out, model), (gold, dense))
    )
    assert all(max_error(a, b) < 1e-9 for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("cross_attention", ["dense", "dilated"])
def test_rows_see_what_the_pattern_lets_them_see(cross_attention: Any):
    """Which source and target rows move an output row, from its gradient; with three segments of 8 rows."""
    model = LongNet(
        **SIZES, segment_lengths=(8,), dilation_rates=(1,), cross_attention=cross_attention, dtype=torch.float64
    )
    src, tgt = (torch.randn(1, 24, 24, dtype=torch.float64, requires_grad=True) for _ in range(2))
    out = model(src, tgt, tgt_is_causal=True)
    row = 13
    by_src, by_tgt = torch.autograd.grad(out[0, row].square().sum(), (src, tgt))
    seen = (by_src[0].abs().sum(-1) > 0).nonzero()[:, 0].tolist()
    assert seen == (list(range(24)) if cross_attention == "dense" else list(range(8, 16)))
    assert (by_tgt[0].abs().sum(-1) > 0).nonzero()[:, 0].tolist() == list(range(8, row + 1))


def test_encode_and_decode_are_its_halves_and_the_defaults_are_the_papers():
    model = LongNet(**SIZES, segment_lengths=(8, 16), dilation_rates=(1, 2), xpos_scale_base=64.0).eval()
    src, tgt = torch.randn(30, 24), torch.randn(20, 24)  # without a batch
    halves = model.decode(tgt, model.encode(src), tgt_is_causal=True)
    assert torch.equal(model(src, tgt, tgt_is_causal=True), halves)
    assert halves.shape == (20, 24)
    paper = LongNet(device="meta")
    layer = paper.decoder.layers[11]
    assert (paper.d_model, paper.nhead, layer.linear1.out_features) == (768, 12, 3072)
    assert layer.self_attn.attention.pattern.dilation_rates == (1, 2, 4, 6, 12)


def test_a_mask_that_is_not_causal_is_refused():
    model = LongNet(**SIZES, segment_lengths=(8,), dilation_rates=(1,))
    with pytest.raises(ValueError, match="tgt_mask is no causal mask"):
        model(torch.randn(1, 9, 24), torch.randn(1, 9, 24), tgt_mask=torch.ones(9, 9).bool())
    mask = nn.Transformer.generate_square_subsequent_mask(8)
    for causal in (None, True):
        with pytest.raises(ValueError, match=r"tgt_mask is no causal mask of 9 rows: it has shape \(8, 8\)"):
            model(torch.randn(1, 9, 24), torch.randn(1, 9, 24), tgt_mask=mask, tgt_is_causal=causal)


@pytest.mark.parametrize("count", [-1, 1.5, True])
@pytest.mark.parametrize("name", ["num_encoder_layers", "num_decoder_layers"])
def test_numbers_of_layers_that_are_none_are_refused(name: str, count: object):
    with pytest.raises(ValueError, match=rf"{name} is {count}; give an integer of at least 0"):
        LongNet(**{**SIZES, name: count}, segment_lengths=(8,), dilation_rates=(1,))
