"""Ulysses (DeepSpeed-Ulysses, arXiv 2309.14509): ranks trade rows of all heads for all rows of some heads, and back.

Heads keep their offsets in the pattern: those of their index among all query heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..memory import MemoryPool
from ..patterns import DilatedPattern
from .comm import Traffic, exchange
from .shard import split


@dataclass(frozen=True)
class HeadSlice(DilatedPattern):
    """The pattern for ``count`` query heads from ``first`` on, of ``total``."""

    first: int = 0
    total: int = 1

    def head_offset(self, head: int, rate: int, num_heads: int) -> int:
        """The offset of the slice's ``head``, which is that of its index among all heads."""
        return super().head_offset(self.first + head, rate, self.total)


@dataclass(frozen=True, slots=True)
class Share:
    """The heads of one rank: query heads ``head`` to ``head + heads``, and the key heads that they need."""

    head: int
    heads: int
    kv_head: int
    kv_heads: int


def share_heads(heads: int, kv_heads: int, ranks: int) -> tuple[Share, ...]:
    """Divide ``heads`` query heads among ``ranks``, as evenly as key heads allow.

    Whole key heads with their query heads where there are as many as ranks; else every key head goes to several
    ranks, which divide its query heads.

    Raises:
        ValueError: fewer query heads than ranks.

    >>> share_heads(8, 2, 4)[1]
    Share(head=2, heads=2, kv_head=0, kv_heads=1)
    """
    if heads < ranks:
        raise ValueError(
            f"strategy 'ulysses' divides heads among ranks, and there are {heads} query heads for {ranks} ranks; use "
            "'ring' or 'gather', or a 2-D mesh (ring x heads) with at most that many ranks for heads"
        )
    group = heads // kv_heads
    if kv_heads >= ranks:
        return tuple(Share(a * group, (b - a) * group, a, b - a) for a, b in split(kv_heads, ranks))
    found = []
    for kv_head, (first, last) in enumerate(split(ranks, kv_heads)):
        for low, high in split(group, last - first):
            found.append(Share(kv_head * group + low, high - low, kv_head, 1))
    return tuple(found)


@dataclass(frozen=True)
class HeadExchange:
    """How the ranks of a group trade rows for heads.

    ``places[p]`` are the ranges of rows, of all rows of the group in ascending order, that rank p holds.
    """

    shares: tuple[Share, ...]
    places: tuple[tuple[tuple[int, int], ...], ...]
    rank: int
    group: dist.ProcessGroup
    traffic: Traffic
    pool: MemoryPool

    @property
    def rows(self) -> list[int]:
        """Rows of each rank."""
        return [sum(stop - start for start, stop in places) for places in self.places]

    def to_heads(self, tensors: Sequence[Tensor], cuts: Sequence[Sequence[tuple[int, int]]]) -> list[Tensor]:
        """Rows of all heads, (B, n, heads, D) each, to all rows of some.

        Rank p gets the heads ``cuts[i][p]``, first and last + 1, of ``tensors[i]``.
        """
        outgoing = [
            _pack(tensor[:, :, a:b] for tensor, (a, b) in zip(tensors, cut, strict=True))
            for cut in zip(*cuts, strict=True)
        ]
        widths = [cut[self.rank][1] - cut[self.rank][0] for cut in cuts]
        shapes: list[list[tuple[int, ...]]] = [
            [(t.shape[0], rows, width, t.shape[3]) for t, width in zip(tensors, widths, strict=True)]
            for rows in self.rows
        ]
        wholes = [t.new_empty(t.shape[0], sum(self.rows), s[2], s[3]) for t, s in zip(tensors, shapes[0], strict=True)]
        for places, parts in zip(self.places, self._trade(outgoing, shapes, tensors), strict=True):
            for whole, part in zip(wholes, parts, strict=True):
                for (start, stop), rows in zip(places, part.split([b - a for a, b in places], dim=1), strict=True):
                    whole[:, start:stop] = rows
        return wholes

    def to_rows(self, tensors: Sequence[Tensor], cuts: Sequence[Sequence[tuple[int, int]]]) -> list[Tensor]:
        """The way back; heads that several ranks hold are added up, in the accumulators' dtype."""
        outgoing = [
            _pack(torch.cat([tensor[:, a:b] for a, b in places], dim=1) for tensor in tensors) for places in self.places
        ]
        rows = self.rows[self.rank]
        shapes: list[list[tuple[int, ...]]] = [
            [(t.shape[0], rows, b - a, t.shape[3]) for t, (a, b) in zip(tensors, cut, strict=True)]
            for cut in zip(*cuts, strict=True)
        ]
        wholes = []
        for tensor, cut in zip(tensors, cuts, strict=True):
            shared = any(a[1] > b[0] for a, b in pairwise(cut))
            dtype = torch.promote_types(tensor.dtype, torch.float32) if shared else tensor.dtype
            wholes.append(tensor.new_zeros(tensor.shape[0], rows, cut[-1][1], tensor.shape[3], dtype=dtype))
        for peer, parts in enumerate(self._trade(outgoing, shapes, tensors)):
            for whole, part, cut in zip(wholes, parts, cuts, strict=True):
                whole[:, :, slice(*cut[peer])] += part
        return [whole.to(tensor.dtype) for whole, tensor in zip(wholes, tensors, strict=True)]

    def _trade(
        self, packed: list[Tensor], shapes: list[list[tuple[int, ...]]], like: Sequence[Tensor]
    ) -> list[list[Tensor]]:
        """Send ``packed[p]`` to rank p; what every rank sent here, as tensors of these shapes and dtypes."""
        sizes = [
            [torch.Size(shape).numel() * t.element_size() for shape, t in zip(shape_row, like, strict=True)]
            for shape_row in shapes
        ]
        peers = [peer for peer in range(len(packed)) if peer != self.rank]
        pending = exchange(
            self.group,
            {peer: packed[peer] for peer in peers},
            {peer: sum(sizes[peer]) for peer in peers},
            like[0].device, self.traffic, self.pool,
        )  # fmt: skip
        try:
            received = pending.wait() | {self.rank: packed[self.rank]}
            found = []
            for peer in range(len(packed)):
                # A copy lies where its dtype needs it, and outlives the buffer.
                parts = zip(received[peer].split(sizes[peer]), shapes[peer], like, strict=True)
                found.append([part.clone().view(t.dtype).view(shape) for part, shape, t in parts])
            return found
        finally:
            pending.drop()

    def queries(self) -> list[tuple[int, int]]:
        """First and last + 1 query head of every rank."""
        return [(share.head, share.head + share.heads) for share in self.shares]

    def keys(self) -> list[tuple[int, int]]:
        """First and last + 1 key head of every rank."""
        return [(share.kv_head, share.kv_head + share.kv_heads) for share in self.shares]


def _pack(tensors: Any) -> Tensor:
    """Tensors as the bytes of one."""
    return torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors])


class ToHeads(torch.autograd.Function):
    """query, key, value and mask of this rank's rows to those of all rows of the group, for this rank's heads."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, heads: HeadExchange
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """One exchange of all four."""
        ctx.heads = heads
        tensors, cuts = [query, key, value], [heads.queries(), heads.keys(), heads.keys()]
        if mask is not None:
            tensors.append(mask[:, :, None, None])
            cuts.append([(0, 1)] * len(heads.shares))
        found = heads.to_heads(tensors, cuts)
        whole_mask = None
        if mask is not None:
            whole_mask = found[3][:, :, 0, 0]
            ctx.mark_non_differentiable(whole_mask)
        return found[0], found[1], found[2], whole_mask

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients to the ranks that hold the rows."""
        heads: HeadExchange = ctx.heads
        dq, dk, dv = heads.to_rows(grads[:3], [heads.queries(), heads.keys(), heads.keys()])
        return dq, dk, dv, None, None


class ToRows(torch.autograd.Function):
    """(out, lse) of all rows of the group for this rank's heads to those of this rank's rows."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, lse: Tensor, heads: HeadExchange) -> tuple[Tensor, Tensor]:
        """One exchange of both."""
        ctx.heads = heads
        ctx.set_materialize_grads(False)
        own_out, own_lse = heads.to_rows([out, lse.unsqueeze(-1)], [heads.queries()] * 2)
        return own_out, own_lse.squeeze(-1)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients to the ranks that hold the heads; of what has none, nothing travels."""
        heads: HeadExchange = ctx.heads
        given = [grad for grad in (grad_out, None if grad_lse is None else grad_lse.unsqueeze(-1)) if grad is not None]
        if not given:
            return None, None, None
        found = heads.to_heads(given, [heads.queries()] * len(given))
        return (
            None if grad_out is None else found[0],
            None if grad_lse is None else found[-1].squeeze(-1),
            None,
        )
