"""Windows of bytes: random ones to train on, fixed ones to evaluate on."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from .corpus import Corpus


def step_generator(seed: int, step: int) -> torch.Generator:
    """A generator that depends on (seed, step) alone, so that a resumed run draws what the whole run drew."""
    key = hashlib.sha256(f"{seed}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)


def training_batch(corpus: Corpus, *, context_length: int, batch_size: int, seed: int, step: int) -> Tensor:
    """Windows of training text, ``(batch_size, context_length + 1)`` uint8, drawn uniformly for this step.

    A window may cross from one document into the next; the separator byte marks where.
    """
    train = corpus.train
    starts = torch.randint(len(train) - context_length, (batch_size,), generator=step_generator(seed, step)).tolist()
    return torch.stack([train[start : start + context_length + 1] for start in starts])


def held_out_windows(corpus: Corpus, *, context_length: int, count: int) -> Tensor:
    """Up to ``count`` windows of held-out text, ``(windows, context_length + 1)`` uint8, always the same.

    The windows lie inside one document each, one behind the other from its separator on, and are spread
    evenly over the held-out documents; so what comes earlier in the window is what a longer context really
    offers. Where no held-out document is that long, windows are cut from the whole held-out text instead.
    """
    size = context_length + 1
    starts = [
        start
        for document in corpus.held_out_documents
        for start in range(document.offset - 1, document.offset + document.length - size + 1, context_length)
    ]
    if not starts:
        starts = list(range(corpus.boundary, len(corpus.tokens) - size + 1, context_length))
    count = min(count, len(starts))
    chosen = [starts[(2 * i + 1) * len(starts) // (2 * count)] for i in range(count)]
    return torch.stack([corpus.tokens[start : start + size] for start in chosen])
