"""`ContextParallel`: a sequence sharded over the ranks of a device mesh."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..backends import Problem
from ..backends.documents import read_documents
from ..backends.ops import no_autocast
from ..backends.views import foldable
from ..memory import MemoryPool, SimplePool
from ..patterns import DilatedPattern
from ..types import AttentionOutput, Document, Options, Shape
from .attention import Job, Round, ShardedAttention
from .comm import Traffic
from .shard import Layout, Pairing, pairing, pieces, ranges

Strategy = Literal["auto", "ring", "gather"]


@dataclass(eq=False)
class ContextParallel:
    """Attention over a sequence of which every rank of a 1-D mesh holds a part.

    Args:
        mesh: 1-D DeviceMesh whose ranks share the sequence; every rank calls the same functions in the same order.
        strategy: "gather" exchanges all rows that the ranks need of each other at once (as LongNet's all-gather,
            arXiv 2307.02486 section 3.3, but only active rows, and only between ranks that share a segment); "ring"
            in world - 1 rounds, each under way while the one before is computed, so that a rank holds the rows of
            two peers at most; "auto" is "ring".
        layout: "contiguous", or "zigzag", which gives every rank as much causal work.
        length: rows of the whole sequence; `shard` sets it.
        pool: where receive buffers come from; they recur from step to step, so a step allocates none after the first.

    The rows of a sequence need not divide by the number of ranks. `shard` cuts a tensor and remembers its length;
    set `length` instead where every rank loads its own rows.

    Raises:
        ValueError: a mesh that is not 1-D, an unknown strategy or layout.
    """

    mesh: DeviceMesh
    strategy: Strategy = "auto"
    layout: Layout = "contiguous"
    length: int | None = None
    pool: MemoryPool = field(default_factory=SimplePool)
    traffic: Traffic = field(default_factory=Traffic)
    _agreed: set[Any] = field(default_factory=set, repr=False)

    def __post_init__(self) -> None:
        if self.mesh.ndim != 1:
            raise ValueError(
                f"mesh has {self.mesh.ndim} dimensions; give a 1-D DeviceMesh, mesh['name'] of a larger one"
            )
        for name, value, allowed in (
            ("strategy", self.strategy, get_args(Strategy)),
            ("layout", self.layout, get_args(Layout)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; choose one of {', '.join(map(repr, allowed))}")
        self.group: dist.ProcessGroup = self.mesh.get_group()
        self.rank, self.world = self.mesh.get_local_rank(), self.mesh.size()

    def _held(self, rank: int | None = None) -> tuple[tuple[int, int], ...]:
        if self.length is None:
            raise ValueError("the length of the sequence is not known; call shard() first, or set `length`")
        if self.length < self.world:
            raise ValueError(f"the sequence has {self.length} rows for {self.world} ranks; give each one at least")
        return ranges(self.length, self.world, self.layout)[self.rank if rank is None else rank]

    def shard(self, x: Tensor, dim: int) -> Tensor:
        """This rank's rows of ``x`` along ``dim``, a copy; remembers the length of ``dim``."""
        self.length = x.shape[dim]
        return torch.cat([x.narrow(dim, start, stop - start) for start, stop in self._held()], dim)

    def unshard(self, x: Tensor, dim: int) -> Tensor:
        """The whole tensor of which every rank gives its rows, on every rank; no gradient flows back."""
        rows = [sum(stop - start for start, stop in self._held(rank)) for rank in range(self.world)]
        if x.shape[dim] != rows[self.rank]:
            raise ValueError(f"x has {x.shape[dim]} rows in dim {dim}; rank {self.rank} holds {rows[self.rank]}")
        moved = x.detach().movedim(dim, 0)
        padded = moved.new_zeros(max(rows), *moved.shape[1:])
        padded[: len(moved)] = moved
        gathered = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(gathered, padded, group=self.group)
        whole = moved.new_empty(sum(rows), *moved.shape[1:])
        for rank, part in enumerate(gathered):
            row = 0
            for start, stop in self._held(rank):
                whole[start:stop] = part[row : row + stop - start]
                row += stop - start
        return whole.movedim(0, dim)

    def positions(self, device: torch.device | str = "cpu") -> Tensor:
        """The row in the whole sequence of each of this rank's rows: int64."""
        return torch.cat([torch.arange(start, stop, device=device) for start, stop in self._held()])

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pattern: DilatedPattern,
        options: Options,
        *,
        cu_seqlens: Tensor | None,
        key_start: int,
        backend: str,
    ) -> AttentionOutput:
        """out (B, n, H, Dv) and lse (B, n, H) of this rank's rows; see `dilated_attention`."""
        rows = sum(stop - start for start, stop in self._held())
        if query.shape[1] != rows or key.shape[1] != rows:
            raise ValueError(
                f"query has {query.shape[1]} rows, key {key.shape[1]}; rank {self.rank} of {self.world} holds {rows} "
                f"of {self.length}: cut them with shard(), or set `length`"
            )
        batch, heads, kv_heads = query.shape[0], query.shape[2], key.shape[2]
        length = self.length
        assert length is not None
        whole = Shape(batch, length, length, heads, kv_heads, query.shape[3], value.shape[3])
        documents = read_documents(whole, key_start=key_start, key_starts=None, cu_seqlens=cu_seqlens, suffix_mask=None)
        self._agree((pattern, whole, options, documents, query.dtype, backend, self.strategy, self.layout))
        job = self._job(query, key, value, pattern, options, whole, documents, backend)
        with torch.cuda.device_of(query), no_autocast(query.device.type):  # as the operators on one device
            out, lse = ShardedAttention.apply(query, key, value, job)
        return AttentionOutput(out, lse)

    def _agree(self, config: tuple[Any, ...]) -> None:
        """Make sure, once for every configuration, that all ranks were asked for the same; raises on all of them."""
        if config in self._agreed:
            return
        theirs: list[Any] = [None] * self.world
        dist.all_gather_object(theirs, config, group=self.group)
        names = ("pattern", "shape", "options", "documents", "dtype", "backend", "strategy", "layout")
        for rank, other in enumerate(theirs):
            for name, mine, value in zip(names, theirs[0], other, strict=True):
                if mine != value:
                    raise ValueError(f"rank {rank} has {name} {value}, rank 0 has {mine}; give all ranks the same")
        self._agreed.add(config)

    def _job(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pattern: DilatedPattern,
        options: Options,
        whole: Shape,
        documents: tuple[Document, ...],
        backend: str,
    ) -> Job:
        held = [pieces(documents, self._held(rank)) for rank in range(self.world)]
        mine = held[self.rank]
        own_documents = tuple(
            Document(0, whole.batch, p.row, p.rows, p.position, documents[p.document].length) for p in mine
        )
        rows = query.shape[1]
        shape = Shape(whole.batch, rows, rows, whole.heads, whole.kv_heads, whole.head_dim, whole.value_dim)
        fold = all(map(foldable, (query, key, value)))
        problem = Problem(pattern, shape, options, own_documents, query.dtype, str(query.device), fold=fold)

        def between(target: int, source: int) -> Pairing:
            heads = whole.heads, whole.kv_heads
            return pairing(pattern, *heads, held[target], held[source], is_causal=options.is_causal)

        distances = range(1, self.world)
        groups = [distances] if self.strategy == "gather" else [(d,) for d in distances]
        # A round in which no rank needs anything of another is no round, and all ranks know that.
        active = [
            group
            for group in groups
            if any(between((s + d) % self.world, s).blocks for d in group for s in range(self.world))
        ]
        rounds = []
        for group in active:
            targets = {(self.rank + d) % self.world: between((self.rank + d) % self.world, self.rank) for d in group}
            sources = {(self.rank - d) % self.world: between(self.rank, (self.rank - d) % self.world) for d in group}
            rounds.append(Round(*({r: p for r, p in found.items() if p.blocks} for found in (targets, sources))))
        return Job(problem, backend, between(self.rank, self.rank), tuple(rounds), self.group, self.traffic, self.pool)
