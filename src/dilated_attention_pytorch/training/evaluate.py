"""Bits per byte on held-out text: overall, by position in the window, and with less context than there is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

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


def _pieces(length: int, context: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, first) such that rows first..end of every piece cover 0..length once.

    Every row but the first ``context`` ones sees at least half of ``context`` rows before it, and at most
    ``context``.
    """
    yield 0, min(context, length), 0
    half = max(1, context // 2)
    done = min(context, length)
    while done < length:
        end = min(done + half, length)
        yield end - context, end, done
        done = end


@torch.no_grad()
def bits_by_position(
    model: nn.Module,
    windows: Tensor,
    *,
    context: int | None = None,
    device: torch.device,
    autocast: torch.dtype | None = None,
    tokens_at_once: int = 16384,
) -> Tensor:
    """Bits that the model needs for every byte of the windows after the first: ``(W, N)`` float32 on the CPU.

    Args:
        windows: uint8 ``(W, N + 1)``.
        context: let the model see at most this many bytes: half of them at least, wherever the window has
        them. None
            shows it everything from the start of the window.
        autocast: dtype to compute in, None for the model's own.
        tokens_at_once: bytes per forward pass, a bound on memory.
    """
    was_training = model.training
    model.eval()
    count, length = windows.shape[0], windows.shape[1] - 1
    result = torch.empty(count, length)
    for start, end, first in _pieces(length, context or length):
        rows = max(1, tokens_at_once // (end - start))
        for low in range(0, count, rows):
            part = windows[low : low + rows, start : end + 1].to(device, torch.int64)
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                losses = token_losses(model, part)
            result[low : low + rows, first:end] = losses[:, first - start :].cpu() * BITS
    model.train(was_training)
    return result


@dataclass(frozen=True)
class PositionCurve:
    """Bits per byte by position: the bins' limits (one more than values), the mean and an error of each bin.

    ``context`` is the number of bytes the model was allowed to see, None for all of the window. ``error`` is the
    standard error over windows: of the mean, or with a limited context of the distance to the whole one's.
    """

    context: int | None
    edges: list[int]
    bits: list[float]
    error: list[float]


def position_edges(length: int, *, first: int = 16) -> list[int]:
    """Limits of bins of positions, each reaching sqrt(2) times as far as the one before, from ``first`` on.

    >>> position_edges(256)
    [0, 16, 23, 32, 45, 64, 91, 128, 181, 256]
    """
    steps = math.floor(2 * math.log2(max(1.0, length / first)) + 1e-9)
    edges = [0] + [round(length / 2 ** (i / 2)) for i in range(steps, -1, -1)]
    return edges if len(edges) > 1 else [0, length]


def position_curve(bits: Tensor, *, context: int | None = None, whole: Tensor | None = None) -> PositionCurve:
    """Average the ``(W, N)`` bits of `bits_by_position` in bins; ``whole`` are those with all of the context."""
    edges = position_edges(bits.shape[1])

    def average(values: Tensor) -> Tensor:
        return torch.stack([values[:, a:b].double().mean(dim=1) for a, b in pairwise(edges)])

    count = bits.shape[0]
    spread = average(bits if whole is None else bits - whole)
    error = spread.std(dim=1) / math.sqrt(count) if count > 1 else torch.zeros(len(spread))
    return PositionCurve(context, edges, average(bits).mean(dim=1).tolist(), error.tolist())
