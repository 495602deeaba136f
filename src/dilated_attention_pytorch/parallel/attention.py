"""Attention over a sharded sequence: a rank's own pairs in one call, the other ranks' active rows as rectangles.

The backward pass fetches keys and values again, computes every rectangle's share from the final (out, lse), and sends
the gradients of keys and values home in the accumulators' dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..backends import Problem, choose
from ..backends.philox import keep_mask
from ..backends.reference import without_masked
from ..merge import accumulator_dtype, merge_
from .dense import Keep
from .retry import backward_in_parts, forward_in_parts, retrying
from .rounds import Exchanges, Homeward, Lines, Round
from .rows import Rows, add_home, key_rows, pack, query_rows, unpack
from .shard import Pairing, Rectangle


@dataclass(frozen=True)
class Job:
    """One attention over all ranks, as this rank sees it."""

    problem: Problem
    backend: str
    own: Pairing
    """Pairs of different pieces that this very rank holds."""
    rounds: tuple[Round[Pairing], ...]
    branches: tuple[Job, ...]
    """One for each branch, where each is differentiated with its own output and ranks have pairs together."""
    lines: Lines

    @property
    def joins(self) -> bool:
        """Whether anything is added to what the rank computes in one call: then that needs an accumulator."""
        return bool(self.rounds or self.own.blocks)


@contextmanager
def _exchanges(
    job: Job, key: Tensor, value: Tensor, mask: Tensor | None
) -> Iterator[Iterator[list[tuple[int, Pairing, Rows]]]]:
    """Rows of this rank's own other pieces as those of peer -1, then rounds of keys and values of the peers.

    The first round is under way as soon as this returns.
    """
    dim, value_dim = key.shape[3], value.shape[3]
    size = (dim + value_dim + (mask is not None)) * key.element_size()

    def packed(pairing: Pairing) -> Tensor:
        return pack(pairing, key, value, mask)

    def items(started: Exchanges[Pairing]) -> Iterator[list[tuple[int, Pairing, Rows]]]:
        if job.own.blocks:
            yield [(-1, job.own, unpack(packed(job.own), job.own, dim, value_dim))]
        for moved, received in started:
            found = [
                (peer, pairing, unpack(received[peer].view(key.dtype), pairing, dim, value_dim))
                for peer, pairing in moved.incoming.items()
            ]
            del received
            yield found
            del found  # views of a buffer that goes back to the pool

    with Exchanges(job.lines, job.rounds, size, key.device, packed) as started:
        yield items(started)


def _keep(job: Job, rectangle: Rectangle, seed: int | None, device: torch.device) -> Keep | None:
    """Dropout of a rectangle of one head, from the places of its rows in the whole sequence."""
    part = job.problem.part
    if seed is None or part is None:
        return None
    r, drop, acc = rectangle, job.problem.options.dropout_p, accumulator_dtype(job.problem.dtype)
    entries = torch.arange(r.batch, r.batch + r.batches, device=device)[:, None]
    keys = torch.arange(r.keys, device=device) * r.rate + r.whole_key

    def factors(first: int, last: int) -> Tensor:
        kept = keep_mask(
            seed, drop, branch=part.branch + r.branch, batch_heads=entries * part.heads + part.head + r.head,
            query_rows=torch.arange(first, min(last, r.rows), device=device) * r.rate + r.whole_row, key_rows=keys,
        )  # fmt: skip
        return kept.to(acc) / (1 - drop)

    return factors


def _backend(job: Job, parts: int) -> str:
    """What computes a rank's own pairs: at a second attempt the reference, a block of rows at a time, unless named."""
    return "reference" if parts > 1 and job.backend == "auto" else job.backend


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, seed: int | None, job: Job
) -> tuple[Tensor, Tensor]:
    """(out, before it is rounded, lse): own pairs while the first rows travel, then rounds of rectangles."""
    with _exchanges(job, key, value, mask) as exchanges:
        out, lse = retrying(
            lambda parts: choose(_backend(job, parts), job.problem).backend.forward(
                query, key, value, job.problem, mask=mask, seed=seed
            ),
            job.lines.pool, job.lines.traffic,
        )  # fmt: skip
        total = out.to(accumulator_dtype(query.dtype)) if job.joins else out
        for items in exchanges:
            for _, pairing, rows in items:
                for r in pairing.rectangles:
                    compute = partial(
                        forward_in_parts, query=query_rows(query, r), key=key_rows(rows.key, r, key.shape[3]),
                        value=key_rows(rows.value, r, value.shape[3]), scale=job.problem.options.scale,
                        hidden=rows.hidden_keys(r), keep=_keep(job, r, seed, query.device),
                    )  # fmt: skip
                    part, part_lse = retrying(compute, job.lines.pool, job.lines.traffic)
                    del compute
                    merge_(query_rows(total, r), query_rows(lse.unsqueeze(-1), r)[..., 0], part, part_lse)
            del items  # views of a buffer that goes back to the pool
    return total, lse


class ShardedAttention(torch.autograd.Function):
    """(out (B, n, H, Dv), lse (B, n, H)) of this rank's rows; ``mask`` (B, n) hides keys, ``seed`` is dropout's."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, seed: int | None, job: Job
    ) -> tuple[Tensor, Tensor]:
        """All pairs of this rank's rows."""
        key, value = without_masked(mask, key, value)
        total, lse = _attend(query, key, value, mask, seed, job)
        out = total.to(query.dtype)
        ctx.save_for_backward(query, key, value, mask, out, lse)
        ctx.job, ctx.seed = job, seed
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of query, key and value."""
        query, key, value, mask, out, lse = ctx.saved_tensors
        grad_out, grad_lse = grads
        job: Job = ctx.job
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        grad_out = grad_out.contiguous()
        # A row without keys is constant: what reaches it (NaN from a logaddexp of two -inf, say) goes no further.
        if grad_lse is not None:
            grad_lse = grad_lse.masked_fill(lse == -torch.inf, 0)
        if mask is not None:
            grad_out = grad_out.masked_fill((lse == -torch.inf).unsqueeze(-1), 0)
        sums: tuple[Tensor, ...] = ()
        for alone in job.branches or (job,):
            part = out
            if job.branches:  # each with its own output; the weights exp(branch lse - lse) are constants
                part = _attend(query, key, value, mask, ctx.seed, alone)[0].to(query.dtype)
            found = _differentiate(query, key, value, mask, part, lse, grad_out, grad_lse, ctx.seed, alone)
            acc = accumulator_dtype(query.dtype)
            sums = tuple(a.to(acc).add_(b) for a, b in zip(sums, found, strict=True)) if sums else found
        dq, dk, dv = (total.to(query.dtype) for total in sums)
        return dq, dk, dv, None, None, None


def _differentiate(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    seed: int | None,
    job: Job,
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK and dV of all pairs, before they are rounded."""
    acc, delta = accumulator_dtype(query.dtype), None
    if grad_lse is not None:
        delta = ((grad_out.to(acc) * out.to(acc)).sum(-1) - grad_lse).unsqueeze(-1)

    def own_gradients(parts: int) -> tuple[Tensor, Tensor, Tensor]:
        chosen = choose(_backend(job, parts), job.problem, backward=True, grad_lse=grad_lse is not None)
        return chosen.backend.backward(
            grad_out, grad_lse, query, key, value, out, lse, job.problem, mask=mask, seed=seed
        )  # fmt: skip

    with _exchanges(job, key, value, mask) as exchanges:
        dq, dk, dv = retrying(own_gradients, job.lines.pool, job.lines.traffic)
        if not job.joins:
            return dq, dk, dv
        dq, dk, dv = dq.to(acc), dk.to(acc), dv.to(acc)
        gradients = partial(_rectangle_gradients, job, grad_out, delta, query, value, out, lse, dq, seed)
        rounds = iter(job.rounds)
        with Homeward[Pairing](
            job.lines, (key.shape[3] + value.shape[3]) * dk.element_size(), key.device,
            lambda pairing, buffer: add_home(pairing, buffer.view(acc), dk, dv),
        ) as homeward:  # fmt: skip
            for items in exchanges:
                back = {peer: gradients(pairing, rows) for peer, pairing, rows in items}
                del items
                if -1 in back:
                    add_home(job.own, back[-1], dk, dv)
                else:
                    homeward.send(next(rounds), back)
            homeward.arrive()
    return dq, dk, dv


def _rectangle_gradients(
    job: Job,
    grad_out: Tensor,
    delta: Tensor | None,
    query: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    seed: int | None,
    pairing: Pairing,
    rows: Rows,
) -> Tensor:
    """Add to dQ; returns dK and dV of the received rows, laid out like them, in the accumulators' dtype."""
    dim, value_dim = query.shape[3], value.shape[3]
    result = dq.new_zeros(pairing.rows * (dim + value_dim))
    home = unpack(result, pairing, dim, value_dim)
    for r in pairing.rectangles:
        lse_r = query_rows(lse.unsqueeze(-1), r)[..., 0]
        delta_r = None if delta is None else query_rows(delta, r)[..., 0]
        compute = partial(
            backward_in_parts, grad_out=query_rows(grad_out, r), delta=delta_r, query=query_rows(query, r),
            key=key_rows(rows.key, r, dim), value=key_rows(rows.value, r, value_dim), out=query_rows(out, r), lse=lse_r,
            scale=job.problem.options.scale, hidden=rows.hidden_keys(r), keep=_keep(job, r, seed, query.device),
        )  # fmt: skip
        dq_r, dk_r, dv_r = retrying(compute, job.lines.pool, job.lines.traffic)
        del compute
        query_rows(dq, r).add_(dq_r)
        for total, part, width in ((home.key, dk_r, dim), (home.value, dv_r, value_dim)):
            if r.start_step == 0 and r.heads > 1:  # query heads that share a block: no view is written through twice
                key_rows(total, r, width)[:, :1].add_(part.sum(1, keepdim=True, dtype=total.dtype))
            else:
                key_rows(total, r, width).add_(part)
    return result
