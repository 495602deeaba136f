"""What both directions of streaming share: the call, its leases, and the feeds of chunks and tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..backends import Problem
from ..backends.philox import keep_mask
from ..backends.problem import Part
from ..memory import MemoryPool
from ..merge import accumulator_dtype
from .dense import Keep
from .streaming_budget import PLAIN_ROWS, Pass, Schedule, chunk_specs, fused, tile_specs
from .streaming_plan import (
    Chunk,
    Rectangle,
    Tile,
    block_runs,
    own_documents,
    part_of_run,
    rows_of_run,
    split,
    tiles,
    without_hidden,
)
from .streaming_session import Session, slots_of_a_feed
from .streaming_transfer import Copy, Feed, Loaded, Moved, carve


@dataclass(frozen=True, slots=True)
class Bundle:
    """Tiles of one chunk that are uploaded together: many small copies would each wait behind a chunk's."""

    tiles: tuple[Tile, ...]

    @property
    def chunk(self) -> int:
        """The index of the chunk."""
        return self.tiles[0].chunk

    @property
    def rows(self) -> int:
        """Rows of all tiles, of one key head each."""
        return sum(tile.rows for tile in self.tiles)

    def parts(self, tensor: Tensor) -> Iterator[tuple[Tile, Tensor]]:
        """Each tile and its rows of a tensor (rows, D) of the bundle."""
        start = 0
        for tile in self.tiles:
            yield tile, tensor[start : start + tile.rows]
            start += tile.rows


@dataclass(frozen=True)
class Job:
    """One call of the operator, as a device computes it in chunks."""

    problem: Problem
    """The whole sequence, on the device that computes."""
    backend: str
    device: torch.device
    pool: MemoryPool
    staging: MemoryPool
    moved: Moved
    seed: int | None
    """Of the dropout mask."""
    schedule: Callable[[Pass], Schedule]
    after: Callable[[], None]
    """Called when a pass has returned its leases."""

    def session(self) -> Session:
        """The leases and copies of a pass."""
        return Session(self.device, self.pool, self.staging, self.moved)

    def one(self, problem: Problem | None = None, *, backward: bool = False, grad_lse: bool = False) -> Pass:
        """The pass in one direction."""
        return Pass(problem or self.problem, self.backend, slots_of_a_feed(self.device), backward, grad_lse)


def host_tensor(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype, *, zero: bool = False) -> Tensor:
    """A result in host memory, page-locked where the input that it belongs to is."""
    make = torch.zeros if zero else torch.empty
    return make(shape, dtype=dtype, pin_memory=like.is_pinned())


def branch_alone(problem: Problem, index: int) -> Problem:
    """A branch of the whole call, which draws its part of the dropout mask."""
    part = Part(problem.shape.heads, 0, ((0, problem.shape.key_rows),), index)
    return replace(problem.branch(index), part=part)


def chunk_alone(problem: Problem, chunk: Chunk, *, masked: bool, part: Part | None = None) -> Problem:
    """A chunk's own pairs."""
    shape = replace(problem.shape, batch=chunk.batches, query_rows=chunk.rows, key_rows=chunk.rows)
    documents = own_documents(problem.documents, chunk, problem.pattern, zeros=problem.options.padding == "zeros")
    options = replace(problem.options, mixing_grad="exact")
    return replace(problem, shape=shape, options=options, documents=documents, has_mask=masked, fold=True, part=part)


class Run:
    """What the two directions share: the feeds of a pass over the tensors on the host."""

    def __init__(
        self,
        job: Job,
        one: Pass,
        schedule: Schedule,
        session: Session,
        tensors: tuple[Tensor, ...],
        mask: Tensor | None,
    ) -> None:
        self.job, self.one, self.schedule, self.mask = job, one, schedule, mask
        self.problem, self.tensors = one.problem, tensors
        self.first = self.problem.shape.key_rows - self.problem.shape.query_rows
        sizes = [schedule.chunk_bytes, *([schedule.tile_bytes] if schedule.tile_bytes else [])]
        slots = session.start(*sizes, largest=max(sizes))
        self.mover = session.mover
        self.chunks = Feed(self.mover, slots[0], iter(enumerate(schedule.chunks)), self._load_chunk)
        self.bundles = Feed(self.mover, slots[1] if len(slots) > 1 else [], self._bundles(), self._load_bundle)

    def host(self, tensor: Tensor, chunk: Chunk, *, key: bool) -> Tensor:
        """A chunk's rows of a tensor of query rows or of key rows."""
        row = chunk.row if key else chunk.row - self.first
        return tensor[chunk.batch : chunk.batch + chunk.batches, row : row + chunk.rows]

    def _hidden(self, chunk: Chunk) -> Tensor | None:
        hidden = None if self.mask is None else self.host(self.mask, chunk, key=True)
        return hidden if hidden is not None and bool(hidden.any()) else None

    def _load_chunk(self, item: tuple[int, Chunk], memory: Tensor) -> tuple[list[Tensor], list[Copy]]:
        chunk, hidden = item[1], self._hidden(item[1])
        places = carve(memory, chunk_specs(self.one, chunk.batches, chunk.rows, masked=hidden is not None))
        rows = [self.host(t, chunk, key=i in (1, 2)) for i, t in enumerate(self.tensors)]
        rows += [] if hidden is None else [hidden]
        self.job.moved.chunks += 1
        return places, [Copy(host, near) for host, near in zip(rows, places, strict=True)]

    def _tiles(self) -> Iterator[Tile]:
        if not self.schedule.tile_rows:
            return
        for index, chunk in enumerate(self.schedule.chunks):
            for tile in tiles(
                index, chunk, self.problem.pattern, self.problem.shape, self.problem.documents,
                self.schedule.tile_rows, is_causal=self.problem.options.is_causal,
            ):  # fmt: skip
                shown = tile if self.mask is None else without_hidden(tile, self.mask[tile.batch])
                if shown.rectangles:
                    yield shown

    def _bundles(self) -> Iterator[Bundle]:
        """Tiles in order, as many at a time as a slot holds."""
        kept: list[Tile] = []
        for tile in self._tiles():
            rows = sum(one.rows for one in kept) + tile.rows
            if kept and (tile.chunk != kept[0].chunk or rows > self.schedule.tile_rows):
                yield Bundle(tuple(kept))
                kept = []
            kept.append(tile)
        if kept:
            yield Bundle(tuple(kept))

    def _load_bundle(self, bundle: Bundle, memory: Tensor) -> tuple[list[Tensor], list[Copy]]:
        places = carve(memory, tile_specs(self.one, bundle.rows))
        copies = [
            Copy(rows_of_run(host, tile.batch, blocks), part_of_run(part, blocks), blocks.first.shown)
            for host, near in zip(self.tensors[1:3], places, strict=True)
            for tile, part in bundle.parts(near)
            for blocks in block_runs(tile)
        ]
        self.job.moved.tiles += len(bundle.tiles)
        return places, copies

    def own(self, chunk: Chunk, *, masked: bool) -> Problem:
        """A chunk alone."""
        part = None
        if self.job.seed is not None:  # batch rows count as heads: entry 0 of the chunk is not that of the whole
            rows, heads = ((chunk.row, chunk.row + chunk.rows),), self.problem.shape.heads
            part = Part(heads, chunk.batch * heads, rows, self.first_branch)
        return chunk_alone(self.problem, chunk, masked=masked, part=part)

    def bundles_of(self, index: int) -> Iterator[Loaded[Bundle]]:
        """The tiles of a chunk, each bundle while the next one is on its way."""
        while (bundle := self.bundles.peek()) is not None and bundle.chunk == index:
            loaded = self.bundles.take()
            yield loaded
            self.bundles.done(loaded)
            self.bundles.ahead()

    @property
    def first_branch(self) -> int:
        """The branch of the whole call that is this pass's first."""
        return self.problem.part.branch if self.problem.part else 0

    def keep(self, tile: Tile, r: Rectangle) -> Keep | None:
        """Dropout of a rectangle of one head, from the places of its rows in the whole sequence."""
        if self.job.seed is None:
            return None
        seed, drop, chunk = self.job.seed, self.problem.options.dropout_p, self.schedule.chunks[tile.chunk]
        (block,) = (block for block in tile.blocks if block.start == r.start)
        shown = torch.arange(block.rows) if block.shown is None else block.shown
        keys = (block.row + block.rate * shown).to(self.job.device)
        head = torch.tensor([[tile.batch * self.problem.shape.heads + r.head]], device=self.job.device)

        def factors(first: int, last: int) -> Tensor:
            rows = torch.arange(first, min(last, r.rows), device=self.job.device) * r.rate + r.row + chunk.row
            branch = self.first_branch + tile.branch
            kept = keep_mask(seed, drop, branch=branch, batch_heads=head, query_rows=rows, key_rows=keys)
            return kept.to(accumulator_dtype(self.problem.dtype)) / (1 - drop)

        return factors

    def rectangles(self, tile: Tile) -> Iterator[Rectangle]:
        """The rectangles of a tile, as large as the schedule allows."""
        plain = not fused(self.problem, grad_lse=self.one.grad_lse)
        for r in tile.rectangles:
            yield from split(
                r,
                min(PLAIN_ROWS, self.schedule.part_rows) if plain else self.schedule.part_rows,
                heads=1 if plain else None,
            )
