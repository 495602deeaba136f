"""Attention chunk by chunk, forward and backward: tensors in host memory, one chunk at a time on the device.

A chunk's queries stay on the device until their result is whole: its own pairs in one call of a backend, then every
tile of keys from outside joins by its log-sum-exp. So out and lse go to the host once, and a key is read once with its
own chunk and once for each other chunk of a segment. The backward pass goes the same way from the final (out, lse);
what chunks have for keys of other chunks adds up in host memory (`KeySums`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..backends import Problem, choose
from ..backends.ops import no_autocast
from ..merge import accumulator_dtype, merge_
from .dense import dense_backward, dense_forward
from .streaming_plan import Tile, block_runs, key_rows, part_of_run, query_rows, rows_of_run
from .streaming_run import Bundle, Job, Run, branch_alone, host_tensor
from .streaming_sums import KeySums
from .streaming_transfer import Copy, Loaded


def stream_forward(
    job: Job, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, problem: Problem | None = None
) -> tuple[Tensor, Tensor]:
    """(out (B, Nq, H, Dv), lse (B, Nq, H)) in host memory."""
    one = job.one(problem)
    problem, acc = one.problem, accumulator_dtype(query.dtype)
    rows = tuple(query.shape[:3])
    out_host = host_tensor(query, (*rows, value.shape[3]), query.dtype)
    lse_host = host_tensor(query, rows, acc)
    schedule = job.schedule(one)
    with job.session() as session, no_autocast(job.device.type):
        run = Run(job, one, schedule, session, (query, key, value), mask)
        finish: Callable[[], None] = _nothing
        while run.chunks.peek() is not None:
            loaded = run.chunks.take()
            index, chunk = loaded.item
            q, k, v, *hidden = loaded.tensors
            own = run.own(chunk, masked=bool(hidden))
            chosen = choose(job.backend, own).backend
            out, lse = chosen.forward(q, k, v, own, mask=hidden[0] if hidden else None, seed=job.seed)
            run.chunks.ahead()  # its copy takes longest: it begins before the host gathers rows
            run.bundles.ahead()
            total: Tensor | None = None
            for bundle in run.bundles_of(index):
                if total is None:
                    total = out.to(acc)
                    out = total
                _join(run, bundle, q, total, lse)
            finish()  # the host waits when the device has work
            copies = [Copy(run.host(out_host, chunk, key=False), out.to(query.dtype))]
            copies.append(Copy(run.host(lse_host, chunk, key=False), lse))
            del out, total, lse, q, k, v, hidden
            run.chunks.done(loaded)
            finish = run.mover.download(copies)
            del copies
        finish()
    job.after()
    return out_host, lse_host


def _nothing() -> None:
    """No download is under way."""


def _join(run: Run, loaded: Loaded[Bundle], q: Tensor, total: Tensor, lse: Tensor) -> None:
    """Join tiles into the chunk's sums."""
    keys, values = map(loaded.item.parts, loaded.tensors)
    for (tile, k), (_, v) in zip(keys, values, strict=True):
        for r in run.rectangles(tile):
            part, part_lse = dense_forward(
                query_rows(q, r), key_rows(k, r), key_rows(v, r), run.problem.options.scale, keep=run.keep(tile, r),
                many_shapes=True,
            )  # fmt: skip
            merge_(query_rows(total, r), query_rows(lse.unsqueeze(-1), r)[..., 0], part, part_lse)


def stream_backward(
    job: Job,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    sums: list[Tensor] | None = None,
    problem: Problem | None = None,
) -> list[Tensor]:
    """Gradients of query, key and value in host memory, from the final (out, lse); added to ``sums`` if given."""
    one = job.one(problem, backward=True, grad_lse=grad_lse is not None)
    problem, acc = one.problem, accumulator_dtype(query.dtype)
    schedule = job.schedule(one)
    add, others = sums is not None, KeySums((key.shape[3], value.shape[3]), acc)
    if sums is None:
        fewer = query.shape[1] < key.shape[1]  # keys before the first query are of no chunk
        sums = [host_tensor(t, tuple(t.shape), t.dtype, zero=fewer) for t in (query, key, value)]
    tensors = (query, key, value, grad_out, out, lse, *([] if grad_lse is None else [grad_lse]))
    with job.session() as session, no_autocast(job.device.type):
        run = Run(job, one, schedule, session, tensors, mask)
        finish: Callable[[], None] = _nothing
        while run.chunks.peek() is not None:
            loaded = run.chunks.take()
            index, chunk = loaded.item
            side = _Side(run, loaded.tensors)
            grads = list(side.own(run.own(chunk, masked=side.hidden is not None), job.backend))
            run.chunks.ahead()  # its copy takes longest: it begins before the host gathers rows
            run.bundles.ahead()
            shares: Callable[[], None] | None = None
            for bundle in run.bundles_of(index):
                grads[0] = grads[0].to(acc)
                copies = side.bundle(bundle, grads[0], sums if add else others)
                finish() if shares is None else shares()  # the host waits when the device has work
                shares = run.mover.download(copies)
                del copies
            if shares is None:
                finish()
            grads[0] = grads[0].to(sums[0].dtype)
            copies = [
                Copy(run.host(total, chunk, key=i > 0), grad, add=add)
                for i, (total, grad) in enumerate(zip(sums, grads, strict=True))
            ]
            del side, grads
            run.chunks.done(loaded)
            end = chunk.batch + chunk.batches - 1, chunk.row + chunk.rows
            join = partial(others.join, sums[1:], end)  # of segments that no later chunk has a share in
            finish = _in_turn(shares or _nothing, run.mover.download(copies), join)  # while the next chunk is computed
            del copies
        finish()
    job.after()
    others.join(sums[1:])
    return sums


def _in_turn(*functions: Callable[[], None]) -> Callable[[], None]:
    def finish() -> None:
        for function in functions:
            function()

    return finish


class _Side:
    """A chunk's tensors on the device, backward."""

    def __init__(self, run: Run, tensors: list[Tensor]) -> None:
        self.run = run
        self.q, self.k, self.v, grad_out, self.out, self.lse, *rest = tensors
        self.grad_lse = rest.pop(0) if run.one.grad_lse else None
        self.hidden = rest.pop(0) if rest else None
        # A row without keys is constant: what reaches it goes no further. The slot is ours to write to.
        empty = self.lse == -torch.inf
        if self.grad_lse is not None:
            self.grad_lse.masked_fill_(empty, 0)
        if run.mask is not None:
            grad_out.masked_fill_(empty.unsqueeze(-1), 0)
        self.grad_out = grad_out

    def own(self, problem: Problem, backend: str) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the chunk's own pairs."""
        chosen = choose(backend, problem, backward=True, grad_lse=self.grad_lse is not None).backend
        return chosen.backward(
            self.grad_out,
            self.grad_lse,
            self.q,
            self.k,
            self.v,
            self.out,
            self.lse,
            problem,
            mask=self.hidden,
            seed=self.run.job.seed,
        )

    def bundle(self, loaded: Loaded[Bundle], dq: Tensor, home: list[Tensor] | KeySums) -> list[Copy]:
        """Add tiles' share to dQ; the copies that bring their dK and dV home: to sums of all rows, or of these."""
        bundle, found = loaded.item, []
        sums = [torch.zeros_like(t, dtype=dq.dtype) for t in loaded.tensors]
        parts = zip(*map(bundle.parts, (*loaded.tensors, *sums)), strict=True)
        for (tile, k), (_, v), *totals in parts:
            homes = [total for _, total in totals]
            self._tile(tile, k, v, homes, dq)
            for blocks in block_runs(tile):
                if isinstance(home, KeySums):
                    places = home.rows(tile, blocks)
                else:
                    places = [rows_of_run(total, tile.batch, blocks) for total in home[1:]]
                found += [
                    Copy(place, part_of_run(total, blocks), blocks.first.shown, add=True)
                    for place, total in zip(places, homes, strict=True)
                ]
        return found

    def _tile(self, tile: Tile, k: Tensor, v: Tensor, totals: list[Tensor], dq: Tensor) -> None:
        """Add a tile's share to dQ, dK and dV."""
        scale = self.run.problem.options.scale
        for r in self.run.rectangles(tile):
            grad_out, out = query_rows(self.grad_out, r), query_rows(self.out, r)
            delta = None
            if self.grad_lse is not None:
                delta = (grad_out.to(dq.dtype) * out.to(dq.dtype)).sum(-1)
                delta -= query_rows(self.grad_lse.unsqueeze(-1), r)[..., 0]
            dq_r, *parts = dense_backward(
                grad_out, delta, query_rows(self.q, r), key_rows(k, r), key_rows(v, r), out,
                query_rows(self.lse.unsqueeze(-1), r)[..., 0], scale,
                keep=self.run.keep(tile, r), many_shapes=True,
            )  # fmt: skip
            query_rows(dq, r).add_(dq_r)
            for total, part in zip(totals, parts, strict=True):
                if r.start_step == 0 and r.heads > 1:  # heads that share a block: no view is written through twice
                    key_rows(total, r)[:, :1].add_(part.sum(1, keepdim=True, dtype=total.dtype))
                else:
                    key_rows(total, r).add_(part)


class StreamedAttention(torch.autograd.Function):
    """(out (B, Nq, H, Dv), lse (B, Nq, H)) in host memory."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, job: Job
    ) -> tuple[Tensor, Tensor]:
        """Chunk by chunk."""
        out, lse = stream_forward(job, query, key, value, mask)
        ctx.save_for_backward(query, key, value, out, lse, mask)
        ctx.job = job
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of query, key and value."""
        with torch.no_grad():
            found = _differentiate(ctx, *grads)
        if torch.is_grad_enabled():  # for a second derivative
            found = _Final.apply(*ctx.saved_tensors[:3], *found)
        return *found, None, None


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor, ...]:
    query, key, value, out, lse, mask = ctx.saved_tensors
    job: Job = ctx.job
    if grad_out is None:
        grad_out = out.new_zeros(()).expand_as(out)
    if job.problem.options.mixing_grad == "exact":
        sums = stream_backward(job, grad_out, grad_lse, query, key, value, out, lse, mask)
    else:
        sums = _detached(job, grad_out, query, key, value, lse, mask)
    return tuple(total.to(t.dtype) for total, t in zip(sums, (query, key, value), strict=True))


class _Final(torch.autograd.Function):
    """Gradients as functions of what they depend on, with a derivative that raises."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.clone() for t in tensors[3:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError("dilated attention is differentiable once; its gradients have no derivative")


def _detached(
    job: Job, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, lse: Tensor, mask: Tensor | None
) -> list[Tensor]:
    """Each branch is differentiated with its own output; the weights exp(branch lse - lse) are constants."""
    acc = accumulator_dtype(query.dtype)
    sums = [host_tensor(t, tuple(t.shape), acc, zero=True) for t in (query, key, value)]
    for index in range(len(job.problem.pattern.branches)):
        alone = branch_alone(job.problem, index)
        out, _ = stream_forward(job, query, key, value, mask, alone)
        stream_backward(job, grad_out, None, query, key, value, out, lse, mask, sums, alone)
    return sums
