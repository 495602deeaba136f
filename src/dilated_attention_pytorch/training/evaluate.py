"""Bits per byte on held-out text: overall, and of the same bytes with more or less context before them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
