"""Generated text: which bytes, how many, from what distribution, and that showing it is safe."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from dilated_attention_pytorch.training.generate import generate, printable


class Next(nn.Module):
    """The byte after byte b is b + 1; remembers how long its inputs were."""

    def __init__(self) -> None:
        super().__init__()
        self.lengths: list[int] = []

    def forward(self, tokens: Tensor) -> Tensor:
        self.lengths.append(tokens.shape[1])
        return 50.0 * nn.functional.one_hot((tokens + 1) % 256, 256)


class Coin(nn.Module):
    """Byte 1 with a logit log(3) above byte 2; nothing else."""

    def forward(self, tokens: Tensor) -> Tensor:
        logits = torch.full((*tokens.shape, 256), -torch.inf)
        logits[..., 1] = torch.tensor(3.0).log()
        logits[..., 2] = 0.0
        return logits


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bytes_follow_the_model_within_its_context(temperature: float):
    model = Next()
    text = generate(model, b"ab", max_bytes=6, context_length=4, temperature=temperature)
    assert text == b"cdefgh"
    assert model.lengths == [2, 3, 4, 4, 4, 4]


def test_generation_ends_before_the_next_document():
    assert generate(Next(), bytes([253]), max_bytes=10, context_length=8) == bytes([254, 255])


@pytest.mark.parametrize(("temperature", "share"), [(1.0, 0.75), (0.5, 0.9), (0.0, 1.0)])
def test_bytes_have_the_distribution_of_the_model(temperature: float, share: float):
    text = generate(Coin(), b"x", max_bytes=2000, context_length=1, temperature=temperature, seed=3)
    counts = Counter(text)
    assert set(counts) <= {1, 2}
    assert counts[1] / 2000 == pytest.approx(share, abs=0.04)  # four standard deviations at 0.75


def test_the_seed_decides():
    texts = [generate(Coin(), b"x", max_bytes=50, context_length=1, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_the_mode_of_the_model_is_kept():
    model = Next().train()
    generate(model, b"a", max_bytes=1, context_length=4)
    assert model.training


@pytest.mark.parametrize(
    ("prompt", "temperature", "message"),
    [
        (b"", 1.0, "prompt is empty"),
        (b"a", -1.0, "temperature is -1.0"),
        (b"a", float("nan"), "temperature is nan"),
    ],
)
def test_wrong_arguments_are_refused(prompt: bytes, temperature: float, message: str):
    with pytest.raises(ValueError, match=message):
        generate(Next(), prompt, max_bytes=1, context_length=4, temperature=temperature)


def test_printable_text_holds_no_control_characters():
    assert printable(b"a\tb\r\nc\x1b[31m\x07\xc3\xa9\xff\0") == "a\tb\nc\ufffd[31m\ufffdé\ufffd\ufffd"
