"""What one rank does in one block-sparse attention: from a pattern and places of rows to its problems and rounds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backends.sparse import SparseProblem, choose_sparse
from ..backends.sparse.selection import pattern_tensors
from ..patterns.blocks import BlockPattern
from ..patterns.content import ContentTopK
from ..patterns.union import bind, members_of
from ..types import Document, Options, Shape
from .fragments import Flat, Layout, Listed
from .hybrid import Ranges
from .rounds import Lines, Round
from .sparse_attention import SparseJob
from .sparse_selection import ask_ranks, select_over_ranks


@dataclass(frozen=True, kw_only=True)
class SparseCall:
    """One block-sparse attention over the whole sequence: what all ranks have to be asked for alike."""

    pattern: str
    """Its code."""
    lists: str
    """A digest of its tensors."""
    shape: Shape
    options: Options
    documents: tuple[Document, ...]
    dtype: torch.dtype
    has_mask: bool
    backend: str


def digest(pattern: Any) -> str:
    """What tells lists that were given block by block from others; "" for patterns of integers alone."""
    tensors = [t for member in members_of(pattern) for t in getattr(member, "tensors", ())]
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(repr(tuple(tensor.shape)).encode())
        found.update(tensor.cpu().contiguous().numpy().tobytes())
    return found.hexdigest() if tensors else ""


def sparse_job(
    call: SparseCall,
    pattern: BlockPattern,
    layout: Layout,
    across: str,
    lines: Lines,
    ask: Callable[[Listed], dict[int, Tensor]] | None = None,
) -> SparseJob:
    """This rank's job.

    ``ask`` finds out what other ranks want, (owners, fragments) each, where that depends on what only they know; then
    every round takes place. Else each rank works it out for all.
    """
    rank, world, shape = layout.rank, len(layout.held), call.shape
    mine = layout.listed(pattern, rank, shape.kv_heads)
    wanted = {rank: mine.wanted}
    if ask is not None:
        wanted |= ask(mine)
        distances = list(range(1, world))
    else:
        wanted |= {r: layout.listed(pattern, r, shape.kv_heads).wanted for r in range(world) if r != rank}
        crossing = {
            (target - source) % world
            for target, want in wanted.items()
            for source in layout.fragments.rank[want.any(0)].unique().tolist()
        }
        distances = sorted(crossing - {0})
    rounds = []
    for group in [[d] for d in distances] if across == "ring" else [distances] if distances else []:
        outgoing = {(rank + d) % world: layout.shipped(wanted[(rank + d) % world], rank) for d in group}
        incoming = {(rank - d) % world: layout.shipped(mine.wanted, (rank - d) % world) for d in group}
        rounds.append(Round(*({r: s for r, s in found.items() if s.rows} for found in (outgoing, incoming))))
    flat = Flat(shape.batch, layout.rows(rank), mine.owners)
    rows = flat.owners * flat.batch * flat.rows

    def problem(place: Tensor, keys: int) -> SparseProblem:
        own = Shape(
            1, rows, keys, shape.heads // flat.owners, shape.kv_heads // flat.owners, shape.head_dim, shape.value_dim
        )  # fmt: skip
        return SparseProblem(
            pattern, own, call.options, (), call.dtype, str(place.device), call.has_mask, mine.plan(place, flat)
        )  # fmt: skip

    problems = [
        problem(mine.sent(moved.incoming.values()), sum(s.rows for s in moved.incoming.values()))
        if moved.incoming
        else None
        for moved in rounds
    ]
    return SparseJob(
        problem(mine.own(rank, flat), rows), tuple(rounds), tuple(problems), flat, call.backend, lines
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class SparsePlan:
    """What a rank knows of a call before it sees the tensors."""

    call: SparseCall
    layout: Layout
    across: str
    fixed: SparseJob | None
    """The job, unless content selects blocks."""

    @classmethod
    def of(
        cls,
        call: SparseCall,
        pattern: Any,
        strategy: str,
        held: Sequence[Ranges],
        rank: int,
        device: torch.device,
        lines: Lines,
    ) -> SparsePlan:
        """The plan of one rank.

        Raises:
            ValueError: a strategy or an option that block-sparse attention over ranks does not serve.
        """
        if strategy not in ("auto", "gather", "ring"):
            raise ValueError(
                f"strategy {strategy!r} divides heads, which block-sparse patterns do not; use 'gather' or 'ring'"
            )
        if call.options.dropout_p:
            raise ValueError("block-sparse attention over ranks takes no dropout_p; give 0, or use one device")
        if getattr(pattern, "dilated", ()):
            raise ValueError(
                "a union with a DilatedPattern counts pairs on one device only; give multiplicity=True, or no parallel"
            )
        across = "ring" if strategy == "ring" else "gather"
        where = call.shape, call.documents
        layout = Layout.of(*where, pattern.block_size, held, rank, is_causal=call.options.is_causal, device=device)
        if selects(pattern):  # as if nothing were selected, which all backends can tell as well
            size = (call.shape.batch, call.shape.heads, layout.rows(rank))
            nothing = pattern_tensors(pattern, lambda content: torch.full((*size, content.keep), -1, device=device))
            bound = bind(pattern, nothing)
            job = sparse_job(
                call, bound, layout, across, lines,
                lambda mine: {r: torch.zeros_like(mine.wanted) for r in range(len(held)) if r != rank},
            )  # fmt: skip
        else:
            job = sparse_job(call, pattern, layout, across, lines)
        for problem in (job.own, *job.problems):
            for backward in (False, True):  # what the backend cannot compute is said before anything is sent
                if problem is not None:
                    choose_sparse(call.backend, problem, backward=backward)
        return cls(call, layout, across, None if selects(pattern) else job)

    def job(self, pattern: Any, query: Tensor, key: Tensor, mask: Tensor | None, lines: Lines) -> SparseJob:
        """The job of one call; where content selects, every rank has to ask for it at the same point."""
        if self.fixed is not None:
            return self.fixed
        world, scale = len(self.layout.held), self.call.options.scale

        def select(content: ContentTopK) -> Tensor:
            return select_over_ranks(content, query, key, mask, self.layout, lines, scale)

        bound = bind(pattern, pattern_tensors(pattern, select))
        rank = self.layout.rank
        return sparse_job(
            self.call, bound, self.layout, self.across, lines, lambda mine: ask_ranks(lines, rank, world, mine)
        )  # fmt: skip


def selects(pattern: Any) -> bool:
    """Whether the content of the tensors selects blocks."""
    return any(isinstance(member, ContentTopK) for member in members_of(pattern))
