"""`ContextParallel`: a sequence sharded over the ranks of a device mesh."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import KW_ONLY, dataclass, field, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..backends import Problem, choose
from ..backends.documents import documents_of, read_documents
from ..backends.ops import no_autocast
from ..backends.views import foldable
from ..memory import MemoryPool, SimplePool
from ..patterns import DilatedPattern
from ..types import AttentionOutput, Document, MixingGrad, Options, Padding, Shape
from .attention import Job, ShardedAttention
from .collective import Sum, Whole, cut
from .comm import Traffic
from .cost import Estimate, Rates, candidates, estimate
from .hybrid import Across, Placement, Ranges, Ranks, Strategy, check_strategy, rows_of_ranks, total
from .peers import Peers
from .rounds import Lines
from .schedule import Call, RingCall, make_job
from .shard import Layout, joined
from .sparse_attention import ShardedSparseAttention
from .sparse_schedule import SparseCall, SparsePlan, digest
from .ulysses import HeadExchange, Share, ToHeads, ToRows, share_heads

_KEPT = 256
"""Calls whose jobs are kept, so that a step plans nothing that the one before planned."""


@dataclass(frozen=True)
class _Planned:
    """What a rank does for one call."""

    job: Job
    heads: HeadExchange | None


@dataclass(eq=False)
class ContextParallel:
    """Attention over a sequence of which every rank of a mesh holds a part.

    Args:
        mesh: DeviceMesh whose ranks share the sequence, 1-D, or 2-D (ring x heads) for "hybrid"; every rank calls the
            same functions in the same order.
        strategy: "gather" exchanges all rows that the ranks need of each other at once (as LongNet's all-gather,
            arXiv 2307.02486 section 3.3, but only active rows, and only between ranks that share a segment); "ring"
            in world - 1 rounds, each under way while the one before is computed, so that a rank holds the rows of
            two peers at most; "ulysses" trades rows of all heads for all rows of some heads and back (arXiv
            2309.14509), with at least one query head a rank; "hybrid" does so within each row of a 2-D mesh, and
            exchanges rows ``across`` them. "auto" takes what `estimate` says is fastest at the given ``rates``.
        layout: "contiguous", or "zigzag", which gives every rank as much causal work.
        length: rows of the whole sequence; `shard` sets it.
        across: "ring" or "gather", between the rows of a 2-D mesh.
        rates: what "auto" reckons with.
        timeout: seconds after which a rank that gives no sign of life, or does not take part, counts as failed: every
            other rank then raises `PeerFailed`. Longer than a rank may ever compute while another waits for it.
        pool: where receive buffers come from; they recur from step to step, so a step allocates none after the first.

    The rows of a sequence need not divide by the number of ranks. `shard` cuts a tensor and remembers its length;
    set `length` instead where every rank loads its own rows. Which rows a rank holds depends on mesh, length and
    layout alone.

    Raises:
        ValueError: a mesh of more dimensions, an unknown strategy or layout, a strategy that the mesh cannot serve.
    """

    mesh: DeviceMesh
    _: KW_ONLY
    strategy: Strategy = "auto"
    layout: Layout = "contiguous"
    length: int | None = None
    across: Across = "ring"
    rates: Rates = field(default_factory=Rates)
    timeout: float = 30.0
    pool: MemoryPool = field(default_factory=SimplePool)
    traffic: Traffic = field(default_factory=Traffic)
    _planned: OrderedDict[Any, Any] = field(default_factory=OrderedDict, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.mesh, DeviceMesh):
            raise ValueError(f"mesh is {self.mesh!r}; give a DeviceMesh, as torch.distributed's init_device_mesh makes")
        check_strategy(self.strategy, self.layout, self.across, self.mesh.ndim)
        self.ranks = Ranks(self.mesh)
        self.rank, self.world = self.ranks.rank, self.mesh.size()
        self.peers = Peers(self.mesh, self.timeout)

    @property
    def group(self) -> dist.ProcessGroup:
        """The ranks of a 1-D mesh."""
        if self.mesh.ndim != 1:
            raise ValueError("a 2-D mesh has a group for each dimension; use mesh.get_group(0) and mesh.get_group(1)")
        return self.ranks.groups[0]

    def _rows(self) -> list[Ranges]:
        """The ranges of rows that every rank holds."""
        if self.length is None:
            raise ValueError("the length of the sequence is not known; call shard() first, or set `length`")
        if self.length < self.world:
            raise ValueError(f"the sequence has {self.length} rows for {self.world} ranks; give each one at least")
        return rows_of_ranks(self.length, self.ranks.shape, self.layout)

    def shard(self, x: Tensor, dim: int) -> Tensor:
        """This rank's rows of ``x`` along ``dim``, a copy; remembers the length of ``dim``."""
        self.length = x.shape[dim]
        return cut(x, self._rows()[self.rank], dim)

    def unshard(self, x: Tensor, dim: int, *, differentiable: bool = False) -> Tensor:
        """The whole tensor of which every rank gives its rows, on every rank.

        No gradient flows back, unless ``differentiable``: then a row gets those of what all ranks make of the whole.
        """
        self.check_rows("x", x.shape[dim])
        given = x if differentiable else x.detach()
        return Whole.apply(given.movedim(dim, 0), self.ranks, self._rows()).movedim(0, dim)

    def add_up(self, x: Tensor) -> Tensor:
        """The sum of every rank's ``x``, all of one shape, on every rank; gradients are summed over the ranks alike."""
        return Sum.apply(x, self.ranks)

    def check_rows(self, name: str, rows: int) -> None:
        """Raise ValueError unless this rank holds as many rows."""
        held = total(self._rows()[self.rank])
        if rows != held:
            raise ValueError(
                f"{name} has {rows} rows; rank {self.rank} of {self.world} holds {held} of {self.length}: cut it with "
                "shard(), or set `length`"
            )

    def positions(self, device: torch.device | str = "cpu") -> Tensor:
        """The row in the whole sequence of each of this rank's rows: int64."""
        return torch.cat([torch.arange(start, stop, device=device) for start, stop in self._rows()[self.rank]])

    def step(self, number: int) -> AbstractContextManager[None]:
        """Declare that what follows is step ``number``, on every rank: one that skips a step, or raises, is named.

        Raises:
            PeerFailed: in the step, when another rank fails.
        """
        return self.peers.step(number)

    def check(self) -> None:
        """Raise `PeerFailed` if a rank has failed; on a GPU, ask this before results of a step are used."""
        self.peers.check()

    def attend(self, arguments: dict[str, Any], backend: str) -> AttentionOutput:
        """out (B, n, H, Dv) and lse (B, n, H) of this rank's rows, for the checked arguments of the operator."""
        query, key, value = (arguments[name] for name in ("query", "key", "value"))
        call = self.call(arguments, backend)
        fold = all(map(foldable, (query, key, value)))
        name = (call, str(query.device), fold, self.length, self.strategy, self.layout, self.across, self.rates)
        planned = self._planned.get(name)
        if planned is None:
            planned, refused = self._plan(call, str(query.device), fold)
            self._agree(call, refused)
            assert planned is not None  # or else all ranks have raised
            self._keep(name, planned)
        seed = None
        if call.options.dropout_p:  # rank 0's, so that all drop what one device with its generator would
            drawn = torch.randint(2**62, (1,), device=query.device)
            seed = int(self.ranks.first(drawn).item())
        mask = arguments["key_padding_mask"]
        with torch.cuda.device_of(query), no_autocast(query.device.type), self.peers.reporting():
            # The device and the dtypes are chosen as the operators on one device do.
            if planned.heads is not None:
                query, key, value, mask = ToHeads.apply(query, key, value, mask, planned.heads)
            out, lse = ShardedAttention.apply(query, key, value, mask, seed, planned.job)
            if planned.heads is not None:
                out, lse = ToRows.apply(out, lse, planned.heads)
        return AttentionOutput(out, lse)

    def estimates(self, call: Call) -> tuple[tuple[Estimate, ...], tuple[tuple[str, str], ...]]:
        """What each strategy costs for a call, the fastest first, and which are passed over and why: no communication.

        With a strategy other than "auto" only that one.
        """
        rows, shape = self._rows(), self.ranks.shape
        if self.strategy != "auto":
            return (estimate(call, self.strategy, shape, self.across, rows, self.rates),), ()
        return candidates(call, shape, self.across, rows, self.rates)

    def call(self, arguments: dict[str, Any], backend: str) -> Call:
        """The whole sequence's attention, from checked arguments with this rank's rows of it."""
        shape = self._whole(arguments)
        mask = arguments["key_padding_mask"]
        if mask is not None and arguments["padding"] == "zeros":
            where = {name: arguments[name] for name in ("key_start", "key_starts", "cu_seqlens")}
            documents = self._documents_of_suffix(shape, mask, **where)
        else:
            documents = self._documents(shape, arguments)
        return Call(
            pattern=DilatedPattern(*(arguments[n] for n in ("segment_lengths", "dilation_rates", "head_offsets"))),
            shape=shape,
            options=_options(arguments, arguments["padding"], arguments["mixing_grad"]),
            documents=documents,
            dtype=arguments["query"].dtype,
            has_mask=mask is not None,
            backend=backend,
        )

    def _whole(self, arguments: dict[str, Any]) -> Shape:
        """The shape of the whole sequence's attention."""
        query, key, value = (arguments[name] for name in ("query", "key", "value"))
        rows = total(self._rows()[self.rank])
        if query.shape[1] != rows or key.shape[1] != rows:
            raise ValueError(
                f"query has {query.shape[1]} rows, key {key.shape[1]}; rank {self.rank} of {self.world} holds {rows} "
                f"of {self.length}: cut them with shard(), or set `length`"
            )
        length = self.length
        assert length is not None
        heads, kv_heads = query.shape[2], key.shape[2]
        return Shape(query.shape[0], length, length, heads, kv_heads, query.shape[3], value.shape[3])

    def _documents(self, shape: Shape, arguments: dict[str, Any]) -> tuple[Document, ...]:
        where = {name: arguments[name] for name in ("key_start", "key_starts", "cu_seqlens")}
        return read_documents(shape, **where, suffix_mask=None)

    def attend_sparse(self, arguments: dict[str, Any], pattern: Any, backend: str) -> AttentionOutput:
        """Block-sparse attention: out (B, n, H, Dv) and lse (B, n, H) of this rank's rows.

        What each rank sends is the key blocks that some query block of the receiver lists; `ContentTopK` exchanges
        summaries of blocks before. Strategies "ring" and "gather", of which "auto" takes "gather".
        """
        query, key, value = (arguments[name] for name in ("query", "key", "value"))
        call = SparseCall(
            pattern=pattern.code,
            lists=digest(pattern),
            shape=self._whole(arguments),
            options=_options(arguments, "mask", "exact"),
            documents=self._documents(self._whole(arguments), arguments),
            dtype=query.dtype,
            has_mask=arguments["key_padding_mask"] is not None,
            backend=backend,
        )
        device, mask = query.device, arguments["key_padding_mask"]
        lines = Lines(self.ranks.groups[0], self.traffic, self.pool)
        name = (call, str(device), self.length, self.strategy, self.layout)
        planned: SparsePlan | None = self._planned.get(name)
        if planned is None:
            refused = None
            try:
                strategy = self.strategy if self.mesh.ndim == 1 else "hybrid"
                planned = SparsePlan.of(call, pattern, strategy, self._rows(), self.rank, device, lines)
            except ValueError as error:
                refused = str(error)
            self._agree(call, refused)
            assert planned is not None  # or else all ranks have raised
            self._keep(name, planned)
        with torch.cuda.device_of(query), no_autocast(query.device.type), self.peers.reporting():
            job = planned.job(pattern, query.detach(), key.detach(), mask, lines)
            out, lse = ShardedSparseAttention.apply(query, key, value, mask, job)
        return AttentionOutput(out, lse)

    def _keep(self, name: Any, planned: Any) -> None:
        self._planned[name] = planned
        if len(self._planned) > _KEPT:
            self._planned.popitem(last=False)

    def _documents_of_suffix(
        self, shape: Shape, mask: Tensor, *, cu_seqlens: Tensor | None, key_start: int, key_starts: Tensor | None
    ) -> tuple[Document, ...]:
        """Documents whose lengths are those of the mask, which all ranks learn: a few integers a batch row."""
        if cu_seqlens is not None:
            raise ValueError('padding="zeros" with cu_seqlens takes no key_padding_mask; pack only real tokens')
        positions = self.positions(mask.device)
        first = torch.where(mask, positions, shape.key_rows).amin(1)
        counts = self.ranks.gather(torch.stack([mask.sum(1), first]))
        masked = counts[:, 0].sum(0).tolist()
        for row, (count, start) in enumerate(zip(masked, counts[:, 1].amin(0).tolist(), strict=True)):
            if start + count != shape.key_rows:
                raise ValueError(
                    f'padding="zeros" needs a key_padding_mask that hides a suffix of each row, and row {row} has an '
                    'unmasked key after a masked one; use padding="mask"'
                )
        starts = [key_start] * shape.batch if key_starts is None else key_starts.tolist()
        return documents_of(shape, starts, masked)

    def _agree(self, call: Call | SparseCall, refused: str | None) -> None:
        """Make sure, once for every call, that all ranks were asked for the same and can; else raise on all of them."""
        mine = {one.name: getattr(call, one.name) for one in fields(call)}
        mine |= {"strategy": self.strategy, "layout": self.layout, "across": self.across, "rates": self.rates}
        for rank, reason in enumerate(self.peers.agree(mine, refused)):
            if reason is not None:
                raise ValueError(reason if reason == refused else f"rank {rank}: {reason}")

    def _plan(self, call: Call, device: str, fold: bool) -> tuple[_Planned | None, str | None]:
        """This rank's job, or why there is none."""
        try:
            return self._planned_for(call, device, fold), None
        except ValueError as error:
            return None, str(error)

    def problem(self, call: Call, device: str) -> Problem:
        """What this rank computes without any other, of contiguous tensors: no communication."""
        return self._place(call, device, True)[2]

    def _place(self, call: Call, device: str, fold: bool) -> tuple[Placement, RingCall, Problem, tuple[Share, ...]]:
        """Where this rank stands, what its ring computes, and what it computes alone."""
        strategy = self.estimates(call)[0][0].strategy if self.strategy == "auto" else self.strategy
        placement = Placement.of(strategy, self.ranks.shape, self.across)
        shares: tuple[Share, ...] = ()
        around, along = divmod(self.rank, placement.heads)
        if placement.heads > 1:
            shares = share_heads(call.shape.heads, call.shape.kv_heads, placement.heads)
        ring = RingCall.of(call, shares[along] if shares else None, placement.held(self._rows()))
        return placement, ring, ring.problem(call, around, device, fold=fold or bool(shares)), shares

    def _planned_for(self, call: Call, device: str, fold: bool) -> _Planned:
        placement, ring, problem, shares = self._place(call, device, fold)
        around, along = divmod(self.rank, placement.heads)
        for backward in (False, True):  # what the backend cannot compute is said before anything is sent
            choose(call.backend, problem, backward=backward)
        heads: HeadExchange | None = None
        if shares:
            mates = self._rows()[around * placement.heads : (around + 1) * placement.heads]
            places = tuple(_places(joined(mates), held) for held in mates)
            heads = HeadExchange(shares, places, along, self.ranks.groups[-1], self.traffic, self.pool)
        lines = Lines(self.ranks.groups[0], self.traffic, self.pool)
        return _Planned(make_job(call, ring, placement.across, around, problem, lines), heads)


def _options(arguments: dict[str, Any], padding: Padding, mixing_grad: MixingGrad) -> Options:
    scale = arguments["scale"]
    scale = 1 / math.sqrt(arguments["query"].shape[3]) if scale is None else scale
    return Options(arguments["is_causal"], scale, arguments["dropout_p"], padding, mixing_grad)


def _places(order: Sequence[tuple[int, int]], held: Ranges) -> Ranges:
    """Where ranges of rows lie in a tensor that has the rows of the ranges ``order`` one after the other."""
    found = []
    for start, stop in held:
        before = 0
        for low, high in order:
            if low <= start and stop <= high and start < stop:
                found.append((before + start - low, before + stop - low))
            before += high - low
    return tuple(found)
