"""Attention over a sharded sequence: a rank's own pairs in one call, the other ranks' active rows as rectangles.

The backward pass fetches keys and values again, computes every rectangle's share from the final (out, lse), and sends
the gradients of keys and values home in the accumulators' dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..backends import Problem, choose
from ..memory import MemoryPool
from ..merge import accumulator_dtype, merge_
from .comm import Pending, Traffic, exchange
from .dense import dense_backward, dense_forward
from .shard import Block, Pairing, Rectangle


@dataclass(frozen=True)
class Round:
    """What this rank sends to peers and computes with what it gets from peers, in one exchange."""

    outgoing: dict[int, Pairing]
    incoming: dict[int, Pairing]


@dataclass(frozen=True)
class Job:
    """One attention over all ranks, as this rank sees it."""

    problem: Problem
    backend: str
    own: Pairing
    """Pairs of different pieces that this very rank holds."""
    rounds: tuple[Round, ...]
    group: dist.ProcessGroup
    traffic: Traffic
    pool: MemoryPool


def _rows(tensor: Tensor, rectangle: Rectangle) -> Tensor:
    """The query rows of a rectangle of a (B, N, H, D) tensor, as (B, heads, rows, D)."""
    sb, sn, sh, sd = tensor.stride()
    r = rectangle
    return tensor.as_strided(
        (tensor.shape[0], r.heads, r.rows, tensor.shape[3]),
        (sb, r.row_step * sn + r.head_step * sh, r.rate * sn, sd),
        tensor.storage_offset() + r.row * sn + r.head * sh,
    )


def _keys(buffer: Tensor, rectangle: Rectangle, batch: int, dim: int) -> Tensor:
    """The blocks of a rectangle in a buffer of received rows, as (B, heads, keys, D)."""
    r, wide = rectangle, batch * dim
    return buffer.as_strided(
        (batch, r.heads, r.keys, dim),
        (r.keys * dim, r.start_step * wide, dim, 1),
        buffer.storage_offset() + r.start * wide,
    )


def _block(tensor: Tensor, block: Block) -> Tensor:
    """The rows of a block of a (B, N, G, D) tensor, as (B, rows, D)."""
    return tensor[:, block.row : block.row + block.rate * (block.rows - 1) + 1 : block.rate, block.kv_head]


def _pack(pairing: Pairing, key: Tensor, value: Tensor) -> Tensor:
    """The active rows that a peer needs: all blocks of keys, then all of values, each (B, rows, D)."""
    parts = [_block(tensor, block).reshape(-1) for tensor in (key, value) for block in pairing.blocks]
    return torch.cat(parts)


def _halves(buffer: Tensor, pairing: Pairing, batch: int, dim: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a buffer that `_pack` made."""
    middle = pairing.rows * batch * dim
    return buffer[:middle], buffer[middle:]


class _Exchanges:
    """Keys and values of the peers, round by round, the next round on its way while one is used."""

    def __init__(self, job: Job, key: Tensor, value: Tensor) -> None:
        self.job, self.key, self.value = job, key, value
        self.pending = self._start(0)

    def _start(self, number: int) -> Pending | None:
        if number >= len(self.job.rounds):
            return None
        moved, wide = self.job.rounds[number], (self.key.shape[3] + self.value.shape[3]) * self.key.element_size()
        outgoing = {peer: _pack(pairing, self.key, self.value) for peer, pairing in moved.outgoing.items()}
        incoming = {peer: pairing.rows * self.key.shape[0] * wide for peer, pairing in moved.incoming.items()}
        job = self.job
        return exchange(job.group, outgoing, incoming, self.key.device, job.traffic, job.pool)

    def __iter__(self) -> Iterator[list[tuple[int, Pairing, Tensor]]]:
        if self.job.own.blocks:
            yield [(-1, self.job.own, _pack(self.job.own, self.key, self.value))]
        for number, moved in enumerate(self.job.rounds):
            arrived = self.pending
            assert arrived is not None
            received = arrived.wait()
            self.pending = self._start(number + 1)
            yield [(peer, pairing, received[peer].view(self.key.dtype)) for peer, pairing in moved.incoming.items()]
            arrived.release()


class ShardedAttention(torch.autograd.Function):
    """(out (B, n, H, Dv), lse (B, n, H)) of this rank's rows."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, job: Job) -> tuple[Tensor, Tensor]:
        """Own pairs while the first rows travel, then a round of rectangles while the next travel."""
        exchanges = _Exchanges(job, key, value)
        out, lse = choose(job.backend, job.problem).backend.forward(query, key, value, job.problem)
        batch, dim, scale = key.shape[0], key.shape[3], job.problem.options.scale
        total = out.to(accumulator_dtype(query.dtype))
        for items in exchanges:
            for _, pairing, buffer in items:
                k, v = _halves(buffer, pairing, batch, dim)
                for r in pairing.rectangles:
                    k_r, v_r = _keys(k, r, batch, dim), _keys(v, r, batch, value.shape[3])
                    part, part_lse = dense_forward(_rows(query, r), k_r, v_r, scale)
                    merge_(_rows(total, r), _rows(lse.unsqueeze(-1), r)[..., 0], part, part_lse)
        out = total.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.job = job
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of query, key and value."""
        query, key, value, out, lse = ctx.saved_tensors
        grad_out, grad_lse = grads
        job: Job = ctx.job
        exchanges = _Exchanges(job, key, value)
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        grad_out = grad_out.contiguous()
        delta = None
        if grad_lse is not None:
            grad_lse = grad_lse.masked_fill(lse == -torch.inf, 0)
            acc = accumulator_dtype(query.dtype)
            delta = ((grad_out.to(acc) * out.to(acc)).sum(-1) - grad_lse).unsqueeze(-1)
        chosen = choose(job.backend, job.problem, backward=True, grad_lse=grad_lse is not None)
        own = chosen.backend.backward(grad_out, grad_lse, query, key, value, out, lse, job.problem)
        acc = accumulator_dtype(query.dtype)
        dq, dk, dv = (t.to(acc) for t in own)
        homeward: list[tuple[Pending, Round]] = []
        rounds = iter(job.rounds)
        for items in exchanges:
            back: dict[int, Tensor] = {}
            for peer, pairing, buffer in items:
                back[peer] = _rectangle_gradients(
                    pairing, buffer, grad_out, delta, query, value, out, lse, dq, job.problem.options.scale
                )
            if -1 in back:
                _add_home(job.own, back[-1], dk, dv)
                continue
            moved = next(rounds)
            wide = (key.shape[3] + value.shape[3]) * dk.element_size() * key.shape[0]
            expected = {peer: pairing.rows * wide for peer, pairing in moved.outgoing.items()}
            homeward.append((exchange(job.group, back, expected, key.device, job.traffic, job.pool), moved))
        for pending, moved in homeward:
            for peer, buffer in pending.wait().items():
                _add_home(moved.outgoing[peer], buffer.view(acc), dk, dv)
            pending.release()
        return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype), None


def _rectangle_gradients(
    pairing: Pairing,
    buffer: Tensor,
    grad_out: Tensor,
    delta: Tensor | None,
    query: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    scale: float,
) -> Tensor:
    """Add to dQ; returns dK and dV of the received rows, laid out like them, in the accumulators' dtype."""
    batch, dim, value_dim = query.shape[0], query.shape[3], value.shape[3]
    k, v = _halves(buffer, pairing, batch, dim)
    result = torch.zeros(buffer.numel(), dtype=dq.dtype, device=dq.device)
    dk, dv = _halves(result, pairing, batch, dim)
    for r in pairing.rectangles:
        lse_r = _rows(lse.unsqueeze(-1), r)[..., 0]
        delta_r = None if delta is None else _rows(delta, r)[..., 0]
        dq_r, dk_r, dv_r = dense_backward(
            _rows(grad_out, r), delta_r, _rows(query, r), _keys(k, r, batch, dim), _keys(v, r, batch, value_dim),
            _rows(out, r), lse_r, scale,
        )  # fmt: skip
        _rows(dq, r).add_(dq_r)
        for total, part, width in ((dk, dk_r, dim), (dv, dv_r, value_dim)):
            if r.start_step == 0 and r.heads > 1:  # query heads that share a block: no view is written through twice
                _keys(total, r, batch, width)[:, :1].add_(part.sum(1, keepdim=True, dtype=total.dtype))
            else:
                _keys(total, r, batch, width).add_(part)
    return result


def _add_home(pairing: Pairing, buffer: Tensor, dk: Tensor, dv: Tensor) -> None:
    """Add the gradients of rows that were sent away to where they belong."""
    batch = dk.shape[0]
    for total, part in zip((dk, dv), _halves(buffer, pairing, batch, dk.shape[3]), strict=True):
        dim = total.shape[3]
        for block in pairing.blocks:
            size = block.rows * batch * dim
            _block(total, block).add_(part[block.start * batch * dim :][:size].view(batch, block.rows, dim))
