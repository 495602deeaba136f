"""Bits per byte: against a model whose loss is known, overall, by position and with less context."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dilated_attention_pytorch.training.evaluate import (
    bits_by_position,
    context_table,
    curve_positions,
    position_curve,
    token_losses,
    unseen_corpus,
)
from dilated_attention_pytorch.training.sources import find_sources
from dilated_attention_pytorch.training.windows import held_out_windows

CPU = torch.device("cpu")


class Bigram(nn.Module):
    """Logits that depend on the last byte alone."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(256, 256, generator=torch.Generator().manual_seed(0)))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table[tokens]


class Counting(nn.Module):
    """Byte 0 gets a logit of n/100 where n bytes are visible, the others 0: the loss tells n."""

    def forward(self, tokens: Tensor) -> Tensor:
        logits = torch.zeros(*tokens.shape, 256)
        logits[..., 0] = torch.arange(1, tokens.shape[1] + 1) / 100
        return logits


def visible(bits: Tensor) -> Tensor:
    """How many bytes `Counting` saw: loss = log(1 + 255 exp(-n/100))."""
    return -100 * ((bits.double() * math.log(2)).expm1() / 255).log()


def windows(count: int, size: int) -> Tensor:
    return torch.randint(256, (count, size), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


@pytest.mark.parametrize("context", [None, 1, 2, 7, 32, 100])
def test_bits_are_those_of_the_model_at_any_context(context: int | None):
    model, text = Bigram(), windows(5, 41)
    probabilities = model.table.detach().double().softmax(dim=-1)
    expected = -probabilities[text[:, :-1].long(), text[:, 1:].long()].log2()
    bits = bits_by_position(model, text, context=context, device=CPU, tokens_at_once=64)
    torch.testing.assert_close(bits.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("context", [None, 2, 7, 32])
@pytest.mark.parametrize("first", [1, 13, 39])
def test_bytes_left_out_change_nothing_else(first: int, context: int | None):
    text = windows(5, 41)
    bits = bits_by_position(Bigram(), text, context=context, first=first, device=CPU, tokens_at_once=64)
    torch.testing.assert_close(bits, bits_by_position(Bigram(), text, device=CPU)[:, first:])


@pytest.mark.parametrize("first", [0, 5, 32])
@pytest.mark.parametrize("context", [1, 2, 5, 8, 16, 63, 64, 200])
def test_a_limited_context_is_what_the_model_sees(context: int, first: int):
    text = torch.zeros(3, 65, dtype=torch.uint8)
    seen = visible(bits_by_position(Counting(), text, context=context, first=first, device=CPU))
    position = torch.arange(1.0 + first, 65.0, dtype=torch.float64)
    assert (seen <= context + 1e-2).all()
    assert (seen >= torch.minimum(position, torch.tensor(max(1, context // 2))) - 1e-2).all()
    few = max(0, context - first)
    torch.testing.assert_close(seen[:, :few], position[:few].expand(3, -1), rtol=0, atol=1e-2)


def test_behind_as_many_bytes_more_than_half_of_the_context_is_seen():
    text = torch.zeros(1, 129, dtype=torch.uint8)
    for context in (8, 16, 64, 128):
        seen = visible(bits_by_position(Counting(), text, context=context, first=64, device=CPU)).round()
        assert (seen.min(), seen.max()) == (context // 2 + 1, context)


def test_without_a_limit_everything_before_is_seen():
    seen = visible(bits_by_position(Counting(), torch.zeros(2, 33, dtype=torch.uint8), device=CPU))
    torch.testing.assert_close(seen, torch.arange(1.0, 33.0).double().expand(2, -1), rtol=0, atol=1e-2)


def test_evaluation_leaves_the_model_as_it_was():
    model = nn.Sequential(Bigram(), nn.Dropout(0.5)).train()
    text = windows(2, 9)
    first = bits_by_position(model, text, device=CPU)
    assert model.training
    assert first.equal(bits_by_position(model, text, device=CPU))  # dropout was off


def test_token_losses_are_cross_entropy_in_nats():
    model, text = Bigram(), windows(2, 6).long()
    expected = nn.functional.cross_entropy(model(text[:, :-1]).transpose(1, 2), text[:, 1:], reduction="none")
    torch.testing.assert_close(token_losses(model, text), expected)


@pytest.mark.parametrize("length", [1, 2, 31, 32, 63, 100, 128, 4096, 32768])
def test_positions_halve_from_the_whole_context(length: int):
    positions = curve_positions(length)
    assert positions[-1] == length
    assert positions == [length >> n for n in reversed(range(len(positions)))]
    assert 64 <= positions[0] < 128 or (length < 64 and positions == [length])


def test_a_curve_compares_the_same_bytes():
    bits = [torch.tensor([[5.0, 7.0], [1.0, 3.0]]), torch.tensor([[2.0, 4.0], [0.0, 2.0]])]
    curve = position_curve([4, 8], bits)
    assert curve.positions == (4, 8)
    assert curve.bits == pytest.approx((4.0, 2.0))
    # Windows lose 3 and 1 bits at the shorter context: a deviation of sqrt(2), over sqrt(2) windows.
    assert curve.error == pytest.approx((1.0, 0.0))
    assert position_curve([8], [bits[0][:1]]).error == (0.0,)  # a single window has no spread


def test_a_table_holds_the_mean_of_the_same_bytes_for_each_context():
    text = windows(3, 129)
    text[:, ::3] = 0  # what the loss depends on
    table = context_table(Counting(), text, [16, 128, 64], device=CPU)
    assert table.contexts == (16, 64, 128)
    assert table.edges == (0, 64, 128)
    for n, context in enumerate(table.contexts):
        bits = bits_by_position(Counting(), text, context=context if context < 128 else None, device=CPU).double()
        expected = [float(bits[:, :64].mean()), float(bits[:, 64:].mean())]
        assert [row[n] for row in table.bits] == pytest.approx(expected, rel=1e-6)
        assert table.curve.bits[n] == pytest.approx(expected[1], rel=1e-6)
    assert table.bits[0][1] == pytest.approx(table.bits[0][2])  # where all fits, nothing is restricted
    assert table.bits[1][0] != pytest.approx(table.bits[1][2], rel=1e-3)
    assert (table.windows, table.curve.error[-1]) == (3, 0.0)
    for wrong in ([0], [129]):
        with pytest.raises(ValueError, match="from 1 to the 128 of a window"):
            context_table(Counting(), text, wrong, device=CPU)


def test_texts_to_measure_on_are_laid_out_as_held_out_ones(tmp_path: Path):
    for name, text in (("b.txt", b"second"), ("a.txt", b"the first text")):
        (tmp_path / name).write_bytes(text)
    corpus = unseen_corpus(find_sources([tmp_path]))
    assert bytes(corpus.held_out.tolist()) == b"\0the first text\0second"
    found = held_out_windows(corpus, context_length=6, count=10)
    assert [bytes(row.tolist()) for row in found] == [b"\0the fi", b"irst te", b"\0second"]
