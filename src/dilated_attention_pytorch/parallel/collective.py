"""Tensors of all ranks on every rank, with gradients: a result that every rank has counts once for each of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .hybrid import Ranges, Ranks, total


class Sum(torch.autograd.Function):
    """The sum of all ranks' tensors of one shape; the gradient is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        """On every rank."""
        ctx.ranks = ranks
        return ranks.add_up(x.detach().clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Every rank's share."""
        return Sum.apply(grads[0], ctx.ranks), None


class Whole(torch.autograd.Function):
    """The whole tensor (N, ...) of which every rank gives the rows that it holds, ``held`` by rank."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks, held: list[Ranges]) -> Tensor:
        """On every rank."""
        ctx.ranks, ctx.held = ranks, held
        rows = [total(part) for part in held]
        padded = x.new_zeros(max(rows), *x.shape[1:])
        padded[: len(x)] = x
        whole = x.new_empty(sum(rows), *x.shape[1:])
        for part, ranges in zip(ranks.gather(padded), held, strict=True):
            row = 0
            for start, stop in ranges:
                whole[start:stop] = part[row : row + stop - start]
                row += stop - start
        return whole

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """All ranks' gradients of the rows that this rank holds."""
        summed = Sum.apply(grads[0], ctx.ranks)
        return cut(summed, ctx.held[ctx.ranks.rank], 0), None, None


def cut(x: Tensor, ranges: Ranges, dim: int) -> Tensor:
    """The rows in these ranges of ``dim``, a copy."""
    return torch.cat([x.narrow(dim, start, stop - start) for start, stop in ranges], dim)
