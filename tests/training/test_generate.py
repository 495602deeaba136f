"""Generated text: the bytes that the model draws after a separator and the prompt, and that showing it is safe."""

from __future__ import annotations

import random

import pytest
import torch

from dilated_attention_pytorch.models import LongNetLM, LongNetLMConfig
from dilated_attention_pytorch.training.corpus import SEPARATOR
from dilated_attention_pytorch.training.generate import PrintableText, printable, stream_bytes


@pytest.fixture(scope="module")
def model() -> LongNetLM:
    torch.manual_seed(0)
    config = LongNetLMConfig(
        context_length=32,
        embed_dim=16,
        num_layers=1,
        num_heads=2,
        segment_lengths=(8, 16),
        dilation_rates=(1, 2),
        ngram_sizes=(2,),
        ngram_buckets=16,
    )
    return LongNetLM(config, dtype=torch.float64)


def test_documents_begin_with_the_separator_and_end_before_the_next(model: LongNetLM):
    prompts = [b"", b"ab\xff", b"def f(x):"]
    steps = list(stream_bytes(model, prompts, max_bytes=700, temperature=1.0, generator=3))
    tokens = [[SEPARATOR, *prompt] for prompt in prompts]
    texts = model.generate(tokens, max_new_tokens=700, generator=3)
    ended = 0
    for number, text in enumerate(texts):
        expected = bytes(text.tolist())
        if SEPARATOR in expected:
            ended, expected = ended + 1, expected[: expected.index(SEPARATOR)]
        assert b"".join(step[number] for step in steps) == expected
        assert all(len(step[number]) == (n < len(expected)) for n, step in enumerate(steps))
    assert ended  # by chance of the seed: the case was there


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (b"a\tb\r\nc\x1b[31m\x07\xc3\xa9\xff\0", "a\tb\nc\ufffd[31m\ufffdé\ufffd\ufffd"),
        (b"a\r", "a\n"),
        (b"\r\r\n\n", "\n\n\n"),
        (b"\xe2\x82\xac\xe2\x82", "€\ufffd"),
        ("\u202e\u2028\x85".encode(), "\ufffd" * 3),
    ],
)
def test_shown_text_holds_no_control_characters(text: bytes, shown: str):
    assert printable(text) == shown


def test_text_shown_in_parts_is_the_text_shown_at_once():
    generator = random.Random(0)
    pieces = [b"\r", b"\n", b"a", "é".encode(), "€".encode(), b"\xe2", b"\x1b", b"\xff"]
    for _ in range(200):
        text = b"".join(generator.choices(pieces, k=12))
        shower = PrintableText()
        shown = "".join(shower.add(text[n : n + 1]) for n in range(len(text))) + shower.end()
        assert shown == printable(text)
