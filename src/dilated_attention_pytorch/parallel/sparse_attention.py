"""Block-sparse attention over a sharded sequence: a rank's own blocks in one problem, those of other ranks in rounds.

Every round is a block-sparse problem of its own over the blocks that have arrived; partial results join by their
log-sum-exps. The backward pass fetches the blocks again, differentiates every problem with the final (out, lse), and
sends the gradients of keys and values home in their dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.reference import without_masked
from ..backends.sparse import SPARSE_BACKENDS, SparseProblem, choose_sparse
from ..backends.sparse.ops import without_empty_rows
from ..merge import accumulator_dtype, merge_
from .fragments import Flat, Shipped
from .retry import retrying
from .rounds import Exchanges, Homeward, Lines, Round


@dataclass(frozen=True, eq=False)
class SparseJob:
    """One block-sparse attention over all ranks, as this rank sees it."""

    own: SparseProblem
    rounds: tuple[Round[Shipped], ...]
    problems: tuple[SparseProblem | None, ...]
    """What is computed with the blocks of each round; None where none come."""
    flat: Flat
    backend: str
    lines: Lines


class _Keys(NamedTuple):
    key: Tensor
    value: Tensor
    hidden: Tensor | None


def pack(shipped: Shipped, flat: Flat, *tensors: Tensor) -> Tensor:
    """The rows of each (B, n, G, D) tensor that travel, one tensor after the other."""
    return torch.cat([_picked(shipped, flat, tensor).reshape(-1) for tensor in tensors])


def _picked(shipped: Shipped, flat: Flat, tensor: Tensor) -> Tensor:
    rows = tensor.flatten(0, 1)
    return rows[shipped.source] if flat.owners == 1 else rows[shipped.source, shipped.source_owner]


def _add(shipped: Shipped, flat: Flat, total: Tensor, rows: Tensor) -> None:
    """Add (rows of the shipment, ...) to a (B, n, G, D) tensor; no row of a shipment comes twice."""
    place = (shipped.source,) if flat.owners == 1 else (shipped.source, shipped.source_owner)
    flat_total = total.view(-1, *total.shape[2:])
    flat_total[place] += rows.view(-1, *flat_total[place].shape[1:]).to(total.dtype)


def _widths(key: Tensor, value: Tensor, flat: Flat) -> tuple[int, int, int]:
    """Key heads of one row that travels, and its columns of keys and of values."""
    heads = key.shape[2] if flat.owners == 1 else 1
    return heads, heads * key.shape[3], heads * value.shape[3]


@contextmanager
def _rounds(
    job: SparseJob, key: Tensor, value: Tensor, mask: Tensor | None
) -> Iterator[Iterator[tuple[Round[Shipped], SparseProblem | None, _Keys]]]:
    """Blocks of the peers, round by round; the first round is under way as soon as this returns."""
    heads, wide, value_wide = _widths(key, value, job.flat)
    tensors, widths = [key, value], [wide, value_wide]
    if mask is not None:  # one number a row, for whichever heads
        columns = 1 if job.flat.owners == 1 else key.shape[2]
        tensors.append(mask[:, :, None].to(key.dtype).expand(-1, -1, columns))
        widths.append(1)
    size = sum(widths) * key.element_size()

    def unpacked(moved: Round[Shipped], received: dict[int, Tensor]) -> _Keys:
        parts: list[list[Tensor]] = [[] for _ in widths]
        for peer, shipped in moved.incoming.items():
            flat = received[peer].view(key.dtype).split([shipped.rows * width for width in widths])
            for found, part in zip(parts, flat, strict=True):
                found.append(part)
        joined = [found[0] if len(found) == 1 else torch.cat(found) for found in parts]
        hidden = joined[2].view(1, -1) != 0 if mask is not None else None
        return _Keys(joined[0].view(1, -1, heads, key.shape[3]), joined[1].view(1, -1, heads, value.shape[3]), hidden)

    def items(started: Exchanges[Shipped]) -> Iterator[tuple[Round[Shipped], SparseProblem | None, _Keys]]:
        nothing = _Keys(key[:0], value[:0], None)
        for (moved, received), problem in zip(started, job.problems, strict=True):
            found = (moved, problem, unpacked(moved, received) if problem is not None else nothing)
            del received
            yield found
            del found  # views of a buffer that goes back to the pool

    with Exchanges(
        job.lines, job.rounds, size, key.device, lambda shipped: pack(shipped, job.flat, *tensors)
    ) as started:  # fmt: skip
        yield items(started)


def _own(job: SparseJob, key: Tensor, value: Tensor, mask: Tensor | None) -> _Keys:
    hidden = None if mask is None else mask.reshape(1, -1).repeat(1, job.flat.owners)
    return _Keys(job.flat.of(key), job.flat.of(value), hidden)


def _backend(job: SparseJob, parts: int) -> str:
    """At a second attempt, after memory ran out, the reference, one query tile at a time, unless another is named."""
    return "reference" if parts > 1 and job.backend == "auto" else job.backend


def _forward(job: SparseJob, problem: SparseProblem, query: Tensor, keys: _Keys) -> tuple[Tensor, Tensor]:
    def compute(parts: int) -> tuple[Tensor, Tensor]:
        chosen = SPARSE_BACKENDS[choose_sparse(_backend(job, parts), problem)[0]]
        return chosen.forward(query, keys.key, keys.value, problem, mask=keys.hidden)

    return retrying(compute, job.lines.pool, job.lines.traffic)


class ShardedSparseAttention(torch.autograd.Function):
    """(out (B, n, H, Dv), lse (B, n, H)) of this rank's rows; ``mask`` (B, n) hides keys."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, job: SparseJob
    ) -> tuple[Tensor, Tensor]:
        """All pairs of this rank's rows."""
        key, value = without_masked(mask, key, value)
        flat = job.flat.of(query)
        with _rounds(job, key, value, mask) as rounds:
            total, lse = _forward(job, job.own, flat, _own(job, key, value, mask))
            if job.rounds:
                total = total.to(accumulator_dtype(query.dtype))
            for _, problem, keys in rounds:
                if problem is not None:
                    merge_(total, lse, *_forward(job, problem, flat, keys))
                del keys
        out, lse = (job.flat.back(t).contiguous() for t in (total.to(query.dtype), lse.unsqueeze(-1)))
        lse = lse.squeeze(-1)
        ctx.save_for_backward(query, key, value, mask, out, lse)
        ctx.job = job
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of query, key and value."""
        query, key, value, mask, out, lse = ctx.saved_tensors
        job: SparseJob = ctx.job
        grad_out = torch.zeros_like(out) if grads[0] is None else grads[0]
        grad_out, grad_lse = without_empty_rows(grad_out, grads[1], lse)
        flat, acc = job.flat, accumulator_dtype(query.dtype)
        q, o, do = (flat.of(t) for t in (query, out, grad_out))
        final, d_lse = (None if t is None else flat.of(t.unsqueeze(-1))[..., 0] for t in (lse, grad_lse))

        def differentiate(problem: SparseProblem, keys: _Keys) -> tuple[Tensor, Tensor, Tensor]:
            def compute(parts: int) -> tuple[Tensor, Tensor, Tensor]:
                name = choose_sparse(_backend(job, parts), problem, backward=True, grad_lse=d_lse is not None)[0]
                assert final is not None
                return SPARSE_BACKENDS[name].backward(
                    do, d_lse, q, keys.key, keys.value, o, final, problem, mask=keys.hidden
                )  # fmt: skip

            return retrying(compute, job.lines.pool, job.lines.traffic)

        _, wide, value_wide = _widths(key, value, flat)

        def add(shipped: Shipped, received: Tensor) -> None:
            parts = received.view(key.dtype).split([shipped.rows * wide, shipped.rows * value_wide])
            for total, part in zip((dk, dv), parts, strict=True):
                _add(shipped, flat, total, part)

        size = (wide + value_wide) * key.element_size()
        with (
            _rounds(job, key, value, mask) as rounds,
            Homeward[Shipped](job.lines, size, key.device, add) as homeward,
        ):
            dq, own_dk, own_dv = differentiate(job.own, _own(job, key, value, mask))
            dk, dv = (flat.back(t).contiguous() for t in (own_dk, own_dv))
            if job.rounds:
                dq, dk, dv = dq.to(acc), dk.to(acc), dv.to(acc)
            for moved, problem, keys in rounds:
                back: dict[int, Tensor] = {}
                if problem is not None:
                    part_dq, *found = differentiate(problem, keys)
                    dq += part_dq
                    lengths = [shipped.rows for shipped in moved.incoming.values()]
                    cut = [t[0].split(lengths) for t in found]
                    back = {peer: torch.cat([t[i].reshape(-1) for t in cut]) for i, peer in enumerate(moved.incoming)}
                del keys
                homeward.send(moved, back)
            homeward.arrive()
        return flat.back(dq).to(query.dtype), dk.to(key.dtype), dv.to(value.dtype), None, None
