"""Bits per byte on held-out text: overall, and of the same bytes with more or less context before them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .corpus import SEPARATOR, Corpus, Document
from .sources import Source, iter_chunks

BITS = 1 / math.log(2)
"""Nats times this are bits."""


def token_losses(model: nn.Module, windows: Tensor) -> Tensor:
    """Loss of every byte but the first, ``(B, N)`` float32 in nats, for int64 windows ``(B, N + 1)``."""
    logits: Tensor = model(windows[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten(), reduction="none").view(
        windows.shape[0], -1
    )


def _pieces(first: int, end: int, context: int) -> list[tuple[int, int, int]]:
    """(low, high, kept) such that rows kept..high of the pieces low..high cover first..end once, in order.

    Every row sees at most ``context`` rows, itself included, and at least half as many or all there are.
    """
    pieces = []
    half = max(1, context // 2)
    while first < end:
        # At the beginning there is no more to see: one piece takes all rows that fit.
        high = min(end, context if first < context else first + half)
        pieces.append((max(0, high - context), high, first))
        first = high
    return pieces


@torch.no_grad()
def bits_by_position(
    model: nn.Module,
    windows: Tensor,
    *,
    context: int | None = None,
    first: int = 0,
    device: torch.device,
    autocast: torch.dtype | None = None,
    tokens_at_once: int = 16384,
) -> Tensor:
    """Bits that the model needs for the bytes of the windows after the first: ``(W, N - first)`` float32 on the CPU.

    Args:
        windows: uint8 ``(W, N + 1)``.
        context: let the model see at most this many bytes: half of them at least, wherever the window has
            them. None shows it everything from the start of the window.
        first: leave out as many bytes, which then are context only.
        autocast: dtype to compute in, None for the model's own.
        tokens_at_once: bytes per forward pass, a bound on memory.
    """
    was_training = model.training
    model.eval()
    count, length = windows.shape[0], windows.shape[1] - 1
    result = torch.empty(count, length - first)
    shapes: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    for low, high, kept in _pieces(first, length, context or length):
        shapes.setdefault((high - low, kept - low), []).append((low, high, kept))
    for (size, skipped), pieces in shapes.items():  # pieces of one shape go through the model together
        parts = torch.stack([windows[:, low : high + 1] for low, high, _ in pieces]).flatten(0, 1)
        losses = []
        for part in parts.split(max(1, tokens_at_once // size)):
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                losses.append(token_losses(model, part.to(device, torch.int64))[:, skipped:].cpu() * BITS)
        for (_, high, kept), bits in zip(pieces, torch.cat(losses).split(count), strict=True):
            result[:, kept - first : high - first] = bits
    model.train(was_training)
    return result


@dataclass(frozen=True)
class PositionCurve:
    """Bits per byte of the same bytes at different positions in the context.

    At ``positions[i]`` = n every byte is predicted from more than n / 2 and at most n bytes. ``error`` is the standard
    error over windows of the distance to the last value; of the last itself, whose bytes are the same, it is 0.
    """

    positions: tuple[int, ...]
    bits: tuple[float, ...]
    error: tuple[float, ...]


def curve_positions(length: int, *, least: int = 64) -> list[int]:
    """``length`` and its halves down to about ``least``, rising.

    >>> curve_positions(512)
    [64, 128, 256, 512]
    """
    halvings = max(0, math.floor(math.log2(max(1.0, length / least)) + 1e-9))
    return [length >> n for n in range(halvings, -1, -1)]


def position_curve(positions: Sequence[int], bits: Sequence[Tensor]) -> PositionCurve:
    """The curve from bits ``(W, n)`` of the same bytes at every position; the last is what errors refer to."""
    means = torch.stack([values.double().mean(dim=1) for values in bits])
    errors = (means - means[-1]).std(dim=1) / math.sqrt(means.shape[1]) if means.shape[1] > 1 else means[:, 0] * 0
    return PositionCurve(tuple(positions), tuple(means.mean(dim=1).tolist()), tuple(errors.tolist()))


def unseen_corpus(sources: Sequence[Source]) -> Corpus:
    """Texts that a model is measured on, in memory, all held out and laid out as a packed corpus is."""
    content, documents = bytearray(), []
    for source in sources:
        content.append(SEPARATOR)
        first = len(content)
        for chunk in iter_chunks(source.path):
            content += chunk
        documents.append(Document(source.name, first, len(content) - first, True))
    return Corpus(torch.frombuffer(content, dtype=torch.uint8), tuple(documents), 0, "")


@dataclass(frozen=True)
class ContextTable:
    """Bits per byte by position and by how far back the model may look; the same bytes along a row.

    ``bits[i][j]`` is the mean over the bytes with ``edges[i]`` to ``edges[i + 1] - 1`` bytes before them in the window,
    for a model that sees at most the last ``contexts[j]`` of these (see `bits_by_position`); the last context is the
    whole window. ``curve`` compares the contexts on the second half of the windows.
    """

    contexts: tuple[int, ...]
    edges: tuple[int, ...]
    bits: tuple[tuple[float, ...], ...]
    curve: PositionCurve
    windows: int
    bits_per_byte: float


def context_table(
    model: nn.Module,
    windows: Tensor,
    contexts: Sequence[int],
    *,
    device: torch.device,
    autocast: torch.dtype | None = None,
) -> ContextTable:
    """Measure a model on ``windows (W, N + 1)`` uint8, restricted to each of ``contexts`` and not at all.

    Raises:
        ValueError: contexts that are not between 1 and N.
    """
    length = windows.shape[1] - 1
    if wrong := [context for context in contexts if not 1 <= context <= length]:
        raise ValueError(f"contexts has {wrong}; give numbers of bytes from 1 to the {length} of a window")
    rising = sorted({*contexts, length})
    bits = [
        bits_by_position(model, windows, context=None if c == length else c, device=device, autocast=autocast).double()
        for c in rising
    ]
    edges = (0, *curve_positions(length))
    rows = tuple(tuple(float(part[:, low:high].mean()) for part in bits) for low, high in pairwise(edges))
    curve = position_curve(rising, [part[:, length // 2 :] for part in bits])
    return ContextTable(tuple(rising), edges, rows, curve, len(windows), float(bits[-1].mean()))
