"""What one rank does in one attention: from shapes and places of rows to its problem, its rounds, its rectangles."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from ..backends import Part, Problem
from ..patterns import DilatedPattern
from ..patterns.plan import branch_only
from ..types import Document, Options, Shape
from .attention import Job
from .hybrid import Ranges, total
from .rounds import Lines, Round
from .shard import Pairing, Piece, pairing, pieces
from .ulysses import HeadSlice, Share
from .volume import volumes


@dataclass(frozen=True, kw_only=True)
class Call:
    """One attention over the whole sequence: what all ranks have to be asked for alike."""

    pattern: DilatedPattern
    shape: Shape
    options: Options
    documents: tuple[Document, ...]
    dtype: torch.dtype
    has_mask: bool
    backend: str


@dataclass(frozen=True)
class RingCall:
    """The part of a call that a ring computes: some heads of all rows."""

    pattern: DilatedPattern
    heads: int
    kv_heads: int
    first_head: int
    held: tuple[tuple[Piece, ...], ...]
    """The pieces of every rank of the ring."""
    ranges: tuple[Ranges, ...]

    @classmethod
    def of(cls, call: Call, share: Share | None, rows: Iterable[Ranges]) -> RingCall:
        """``share`` are its heads (None: all), ``rows`` the ranges of every rank of the ring."""
        ranges = tuple(rows)
        held = tuple(pieces(call.documents, part) for part in ranges)
        pattern, heads, kv_heads, first = call.pattern, call.shape.heads, call.shape.kv_heads, 0
        if share is not None:
            pattern = HeadSlice(
                pattern.segment_lengths, pattern.dilation_rates, pattern.head_offsets, share.head, heads
            )
            heads, kv_heads, first = share.heads, share.kv_heads, share.head
        return cls(pattern, heads, kv_heads, first, held, ranges)

    def problem(self, call: Call, rank: int, device: str, *, fold: bool) -> Problem:
        """What ``rank`` computes without any other rank: its own rows against its own rows, piece by piece."""
        documents = tuple(
            Document(p.batch, p.batches, p.row, p.rows, p.position, call.documents[p.document].length)
            for p in self.held[rank]
        )
        rows, shape = total(self.ranges[rank]), call.shape
        own = Shape(shape.batch, rows, rows, self.heads, self.kv_heads, shape.head_dim, shape.value_dim)
        sliced = isinstance(self.pattern, HeadSlice)
        part = Part(shape.heads, self.first_head, self.ranges[rank]) if sliced or call.options.dropout_p else None
        return Problem(
            self.pattern, own, call.options, documents, call.dtype, device, call.has_mask, fold, part
        )  # fmt: skip


def make_job(
    call: Call,
    ring: RingCall,
    across: str,
    rank: int,
    problem: Problem,
    lines: Lines,
) -> Job:
    """Rank ``rank``'s job in a ring, whose problem is ``problem``."""
    world, causal, apart = len(ring.held), call.options.is_causal, call.options.dropout_p > 0

    def between(target: int, source: int) -> Pairing:
        held = ring.held[target], ring.held[source]
        return pairing(ring.pattern, ring.heads, ring.kv_heads, *held, is_causal=causal, apart=apart)

    # A round in which no rank needs anything of another is no round, and all ranks know that.
    targets = [0] * world
    for volume in volumes(ring.pattern, ring.heads, ring.kv_heads, ring.held, causal):
        targets = [one | other for one, other in zip(targets, volume.targets, strict=True)]
    distances = [d for d in range(1, world) if any(targets[s] >> (s + d) % world & 1 for s in range(world))]
    groups = [[d] for d in distances] if across == "ring" else [distances] if distances else []
    rounds = []
    for group_of in groups:
        outgoing = {(rank + d) % world: between((rank + d) % world, rank) for d in group_of}
        incoming = {(rank - d) % world: between(rank, (rank - d) % world) for d in group_of}
        rounds.append(Round(*({r: p for r, p in found.items() if p.blocks} for found in (outgoing, incoming))))
    own = between(rank, rank)
    branches: tuple[Job, ...] = ()
    if call.options.mixing_grad == "detached" and (rounds or own.blocks):
        alone = replace(call, options=replace(call.options, mixing_grad="exact"))
        branches = tuple(
            make_job(
                alone, replace(ring, pattern=branch_only(ring.pattern, i)), across, rank, _alone(problem, i),
                lines,
            )
            for i in range(len(call.pattern.branches))
        )  # fmt: skip
    return Job(problem, call.backend, own, tuple(rounds), branches, lines)


def _alone(problem: Problem, branch: int) -> Problem:
    """One branch as a problem of its own, differentiated as it is."""
    return replace(
        problem,
        pattern=branch_only(problem.pattern, branch),
        options=replace(problem.options, mixing_grad="exact"),
        part=None if problem.part is None else replace(problem.part, branch=branch),
    )
