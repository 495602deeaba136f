"""Context parallelism, measured: times, what communication costs beyond computing, bytes against the formula."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..explanation import explain
from ..functional import dilated_attention
from ..memory import MemoryPool, SimplePool
from ..parallel import ContextParallel, Rates, rounds, ulysses
from ..parallel.comm import Pending, Traffic, exchange
from ..parallel.hybrid import PAIR, Ranks, Strategy, mesh_shape
from ..parallel.shard import Layout
from ..patterns import DilatedPattern


@dataclass(frozen=True, kw_only=True)
class ParallelSetting:
    """What is computed at every point."""

    pattern: DilatedPattern
    batch: int = 1
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: str
    is_causal: bool = False
    layout: Layout = "contiguous"
    repeats: int = 5


@dataclass(frozen=True)
class Timing:
    """One pass, in milliseconds of the slowest rank, medians of runs."""

    total: float
    compute: float
    """With exchanges that move nothing."""
    exchange: float
    """The exchanges without the rest, one after the other."""

    @property
    def exposed(self) -> float | None:
        """The share of the exchanges that computing does not hide; None where nothing travels."""
        return max(0.0, self.total - self.compute) / self.exchange if self.exchange else None


@dataclass(frozen=True)
class ParallelMeasurement:
    """One strategy at one number of ranks and tokens; the backward pass is that of "both" without the forward."""

    strategy: str
    world: int
    tokens: int
    scaling: str
    forward: Timing
    both: Timing
    tokens_per_second: float
    """Of the whole sequence, forward and backward."""
    tflops_per_rank: float
    """Useful operations of the forward pass."""
    bytes_forward: int
    """Most that a rank sends."""
    bytes_both: int
    formula: bool
    """Whether bytes and messages of every rank are what the formula says."""
    full_gather_ms: float
    """An all-gather of all rows of keys and values, alone: what other implementations move forward."""
    full_gather_bytes: int
    """What a rank sends for it."""
    receive_bytes: int
    """Largest sum of receive buffers of a rank."""
    peak_bytes: int | None
    """Most device memory of a rank, inputs included; None on the CPU."""
    busiest_pairs: int
    """Most (query, key) pairs of a rank."""

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        found = asdict(self)
        for name in ("forward", "both"):
            found[name]["exposed"] = getattr(self, name).exposed
        return found


@contextmanager
def _exchanging(function: Callable[..., Pending]) -> Iterator[None]:
    """Strategies exchange by ``function``."""
    with mock.patch.object(rounds, "exchange", function), mock.patch.object(ulysses, "exchange", function):
        yield


def _nothing(
    group: dist.ProcessGroup, outgoing: dict[int, Tensor], incoming: dict[int, int], device: torch.device,
    traffic: Traffic, pool: MemoryPool,
) -> Pending:  # fmt: skip
    """An exchange of which nothing is sent: what arrives is whatever the buffer holds."""
    lease = pool.acquire((sum(incoming.values()),), torch.uint8, device)
    parts = lease.tensor.split(list(incoming.values())) if incoming else ()
    return Pending(dict(zip(incoming, parts, strict=True)), None, None, lease)


@dataclass
class _Recorder:
    """Exchanges as they pass, to be repeated without what is computed between them."""

    device: torch.device
    seen: list[tuple[dist.ProcessGroup, dict[int, int], dict[int, int]]] = field(default_factory=list)
    pool: SimplePool = field(default_factory=SimplePool)

    def exchange(
        self, group: dist.ProcessGroup, outgoing: dict[int, Tensor], incoming: dict[int, int], *rest: Any
    ) -> Pending:
        """An exchange, noted down."""
        self.seen.append((group, {peer: t.numel() * t.element_size() for peer, t in outgoing.items()}, incoming))
        return exchange(group, outgoing, incoming, *rest)

    def repeat(self, count: int) -> None:
        """The first ``count`` of them, one after the other."""
        largest = max((size for _, sizes, _ in self.seen for size in sizes.values()), default=0)
        with self.pool.acquire((largest,), torch.uint8, self.device) as lease:
            for group, sizes, incoming in self.seen[:count]:
                outgoing = {peer: lease.tensor[:size] for peer, size in sizes.items()}
                pending = exchange(group, outgoing, incoming, self.device, Traffic(), self.pool)
                pending.wait()
                pending.release()


def slowest(value: float, mesh: DeviceMesh) -> float:
    """The largest of all ranks' values; ranks that ask leave together."""
    found = torch.tensor([value], dtype=torch.float64, device=mesh.device_type)
    for dim in range(mesh.ndim):
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=mesh.get_group(dim))
    return float(found)


def milliseconds(run: Callable[[], object], mesh: DeviceMesh, repeats: int) -> float:
    """Median over runs of the slowest rank's time, after one run that does not count."""
    times = []
    for number in range(repeats + 1):
        slowest(0.0, mesh)
        start = time.perf_counter()
        run()
        if mesh.device_type == "cuda":
            torch.cuda.synchronize()
        took = slowest(time.perf_counter() - start, mesh)
        if number:
            times.append(took)
    return 1e3 * statistics.median(times)


def measure(
    mesh: DeviceMesh, setting: ParallelSetting, *, tokens: int, strategy: Strategy, scaling: str = "weak"
) -> ParallelMeasurement:
    """Time ``strategy`` on ``tokens`` rows over all ranks of the mesh, every one of which has to call this."""
    parallel = ContextParallel(mesh, strategy=strategy, layout=setting.layout, length=tokens)
    pattern, device, rows = setting.pattern, torch.device(mesh.device_type), len(parallel.positions())
    sizes = [(setting.batch, rows, heads, setting.head_dim) for heads in (setting.heads, *[setting.kv_heads] * 2)]
    leaves = [torch.randn(size, device=device).to(setting.dtype).requires_grad_() for size in sizes]
    query, key, value = leaves
    grad_out = torch.randn(sizes[0], device=device).to(setting.dtype)
    options: dict[str, Any] = {
        "segment_lengths": pattern.segment_lengths, "dilation_rates": pattern.dilation_rates,
        "is_causal": setting.is_causal, "head_offsets": pattern.head_offsets,
    }  # fmt: skip
    expected = explain(query, key, value, parallel=parallel, **options).exchange
    assert expected is not None

    def forward() -> Tensor:
        return dilated_attention(query, key, value, parallel=parallel, **options)

    def both() -> object:
        return torch.autograd.grad(forward(), leaves, grad_out)

    recorder = _Recorder(device)
    with _exchanging(recorder.exchange):
        out = forward()
        first, sent = len(recorder.seen), asdict(parallel.traffic)
        torch.autograd.grad(out, leaves, grad_out)
        del out
    counts = (
        (sent["bytes_sent"], expected.bytes_forward),
        (sent["messages_sent"], expected.messages_forward),
        (parallel.traffic.bytes_sent, expected.bytes_forward + expected.bytes_backward),
        (parallel.traffic.messages_sent, expected.messages_forward + expected.messages_backward),
    )
    wrong = any(counted != formula for counted, formula in counts)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    totals = [milliseconds(run, mesh, setting.repeats) for run in (forward, both)]
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    with _exchanging(_nothing):
        alone = [milliseconds(run, mesh, setting.repeats) for run in (forward, both)]
    moved = slowest(float(counts[2][0]), mesh) > 0
    travel = [
        milliseconds(partial(recorder.repeat, count), mesh, setting.repeats) if moved else 0.0
        for count in (first, len(recorder.seen))
    ]
    gathered = [partial(_gather, parallel.ranks, tokens, tensor.detach()) for tensor in leaves[1:]]
    full = milliseconds(lambda: [gather() for gather in gathered], mesh, setting.repeats)
    one, others = ((size[0], tokens, *size[2:]) for size in sizes[:2])
    whole = explain(one, others, others, dtype=setting.dtype, **options)
    return ParallelMeasurement(
        strategy=strategy, world=parallel.world, tokens=tokens, scaling=scaling,
        forward=Timing(totals[0], alone[0], travel[0]), both=Timing(totals[1], alone[1], travel[1]),
        tokens_per_second=1e3 * tokens * setting.batch / totals[1],
        tflops_per_rank=whole.flops_forward / totals[0] / 1e9 / parallel.world,
        bytes_forward=int(slowest(counts[0][0], mesh)), bytes_both=int(slowest(counts[2][0], mesh)),
        formula=slowest(float(wrong), mesh) == 0, full_gather_ms=full,
        full_gather_bytes=2 * (parallel.world - 1) * leaves[1].numel() * setting.dtype.itemsize,
        receive_bytes=int(slowest(parallel.pool.stats().peak, mesh)),
        peak_bytes=None if peak is None else int(slowest(peak, mesh)), busiest_pairs=expected.busiest_pairs,
    )  # fmt: skip


def _gather(ranks: Ranks, tokens: int, tensor: Tensor) -> Tensor:
    """Every rank's rows; ranks hold as many, but one."""
    most = -(-tokens // ranks.mesh.size())
    return ranks.gather(torch.nn.functional.pad(tensor, (0, 0, 0, 0, 0, max(0, most - tensor.shape[1]))))


def measure_rates(mesh: DeviceMesh, found: Sequence[ParallelMeasurement], setting: ParallelSetting) -> Rates:
    """What the model of `Rates` needs, from measurements and from exchanges with the next rank; on every rank."""
    dims, forward, backward = 2 * setting.head_dim, [], []
    for one in found:
        forward.append(2 * dims * one.busiest_pairs / one.forward.compute * 1e3)
        again = max(1e-6, one.both.compute - one.forward.compute)
        backward.append(5 * dims * one.busiest_pairs / again * 1e3)
    small, large = (1, 1 << 25 if mesh.device_type == "cuda" else 1 << 23)
    seconds = {}
    if mesh.size() > 1:
        after, before = (mesh.get_local_rank() + 1) % mesh.size(), (mesh.get_local_rank() - 1) % mesh.size()
        for size in (small, large):
            recorder = _Recorder(torch.device(mesh.device_type), [(mesh.get_group(), {after: size}, {before: size})])
            seconds[size] = milliseconds(partial(recorder.repeat, 1), mesh, 2 * setting.repeats) / 1e3
        return Rates(
            forward_flops=statistics.median(forward), backward_flops=statistics.median(backward),
            bandwidth=large / seconds[large], latency=seconds[small],
        )  # fmt: skip
    return Rates(forward_flops=statistics.median(forward), backward_flops=statistics.median(backward))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run measures: at each number of ranks, each strategy, on as many tokens a rank and as many in all."""

    setting: ParallelSetting
    worlds: tuple[int, ...]
    tokens_per_rank: int
    strategies: tuple[Strategy, ...]

    def runs(self, strategy: Strategy, world: int) -> bool:
        """Whether a strategy makes sense on so many ranks: each has a head to itself, "hybrid" has pairs of ranks."""
        if strategy == "hybrid":
            return world >= 2 * PAIR and world % PAIR == 0 and self.setting.heads >= PAIR
        return strategy != "ulysses" or self.setting.heads >= world

    @property
    def points(self) -> list[tuple[int, int, str]]:
        """(ranks, tokens, scaling): weak scaling keeps the tokens of a rank, strong scaling those of all ranks."""
        weak = [(world, world * self.tokens_per_rank, "weak") for world in self.worlds]
        total = max(self.worlds) * self.tokens_per_rank
        return weak + [(world, total, "strong") for world in self.worlds if world * self.tokens_per_rank != total]


def run_ranks(plan: Plan, said: Callable[[ParallelMeasurement], None] = lambda one: None) -> dict[str, Any]:
    """Measure everything, as one rank of the default process group; the report is the same on all ranks.

    ``said`` is told every measurement as it is done, on the first rank.
    """
    device, found = plan.setting.device, list[ParallelMeasurement]()
    meshes: dict[tuple[str, int], DeviceMesh] = {}
    for world in plan.worlds:  # every rank takes part in making every group
        for strategy in plan.strategies:
            if plan.runs(strategy, world):
                shape = mesh_shape(strategy, world)
                meshes[strategy, world] = DeviceMesh(device, torch.arange(world).view(shape))
    for world, tokens, scaling in plan.points:
        for strategy in plan.strategies:
            if (strategy, world) in meshes and dist.get_rank() < world:
                one = measure(meshes[strategy, world], plan.setting, tokens=tokens, strategy=strategy, scaling=scaling)
                found.append(one)
                if dist.get_rank() == 0:
                    said(one)
        dist.barrier()
    rates = measure_rates(DeviceMesh(device, torch.arange(max(plan.worlds))), found, plan.setting)
    dist.barrier()
    return {"measurements": [one.to_dict() for one in found], "rates": asdict(rates)}
