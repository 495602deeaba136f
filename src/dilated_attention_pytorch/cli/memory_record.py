"""Traces of what this library does with memory: a ring of processes, streaming, training."""

from __future__ import annotations

import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.spawn import spawn

from ..memory import RecordingPool, SimplePool
from ..memory.trace import TraceWriter
from ..patterns import DilatedPattern
from .memory_watch import TensorWatch


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is run while the trace is written."""

    lengths: tuple[int, ...]
    """Rows of the sequence, of each step."""
    batch: int
    heads: int
    head_dim: int
    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    ranks: int = 2
    device: str = "cpu"
    memory_budget: int = 1 << 30

    def describe(self, name: str) -> str:
        """In words, for the head of the trace."""
        rows = ", ".join(map(str, sorted(set(self.lengths))[:4])) + (", ..." if len(set(self.lengths)) > 4 else "")
        over = f" over {self.ranks} ranks" if name == "ring" else ""
        return (
            f"{name}{over}: {len(self.lengths)} steps of {rows} rows, batch {self.batch}, {self.heads} heads of "
            f"{self.head_dim}, segments {self.segment_lengths}, rates {self.dilation_rates}"
        )


def lengths(low: int, high: int, steps: int) -> tuple[int, ...]:
    """Rows of each step: the same, or drawn between two bounds, always the same ones."""
    draw = random.Random(0)
    return tuple(draw.randint(low, high) for _ in range(steps))


def _attend(work: Workload, rows: int, parallel: Any) -> None:
    """One step, forward and backward."""
    from ..functional import dilated_attention

    pattern = DilatedPattern(work.segment_lengths, work.dilation_rates)
    query, key, value = (torch.randn(work.batch, rows, work.heads, work.head_dim) for _ in range(3))
    if hasattr(parallel, "shard"):
        query, key, value = (parallel.shard(t, 1).to(work.device) for t in (query, key, value))
    for tensor in (query, key, value):
        tensor.requires_grad_()
    out = dilated_attention(query, key, value, pattern.segment_lengths, pattern.dilation_rates, parallel=parallel)
    out.sum().backward()


def record_ring(work: Workload, path: Path) -> None:
    """A step of `ContextParallel` over ranks that are processes of this machine; the trace is rank 0's."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (work, str(path), str(Path(folder) / "store"))
        spawn(_ring_rank, arguments, nprocs=work.ranks)


def _ring_rank(rank: int, work: Workload, path: str, store: str) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from ..parallel import ContextParallel

    torch.set_num_threads(1)
    kind = torch.device(work.device).type
    if kind == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=work.ranks)
    try:
        pool: Any = SimplePool()
        if rank == 0:
            pool = RecordingPool(pool, Path(path), what=work.describe("ring"))
        parallel = ContextParallel(init_device_mesh(kind, (work.ranks,)), strategy="ring", timeout=300.0, pool=pool)
        for rows in work.lengths:
            torch.manual_seed(0)
            _attend(work, rows, parallel)
            if rank == 0:
                pool.step()
        pool.close()
    finally:
        dist.destroy_process_group()


def record_streaming(work: Workload, path: Path) -> None:
    """Steps of `Streaming`: the buffers on its device."""
    from ..parallel import Streaming

    pool = RecordingPool(SimplePool(), path, what=work.describe("streaming"))
    parallel = Streaming(work.device, memory_budget=work.memory_budget, pool=pool)
    for rows in work.lengths:
        _attend(work, rows, parallel)
        pool.step()
    pool.close()


class _Lines:
    """Writes what `TensorWatch` tells as a trace."""

    def __init__(self, writer: TraceWriter) -> None:
        self.writer = writer
        self._leases: dict[int, int] = {}

    def taken(self, key: int, size: int, device: str) -> None:
        self._leases[key] = self.writer.acquire(size, device)

    def gone(self, key: int) -> None:
        self.writer.give_back(self._leases.pop(key))


def record_training(work: Workload, path: Path, *, layers: int = 2, least: int = 1024) -> None:
    """Steps of a `LongNetLM` with AdamW: the tensors of at least ``least`` bytes that a pool would have to serve."""
    from ..models import LongNetLM, LongNetLMConfig

    torch.manual_seed(0)
    config = LongNetLMConfig(
        vocab_size=256, context_length=max(work.lengths), embed_dim=work.heads * work.head_dim, num_layers=layers,
        num_heads=work.heads, segment_lengths=work.segment_lengths, dilation_rates=work.dilation_rates,
    )  # fmt: skip
    model = LongNetLM(config).to(work.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    writer = TraceWriter(path, what=work.describe("training"))
    with TensorWatch(_Lines(writer), least=least):
        for rows in work.lengths:
            tokens = torch.randint(256, (work.batch, rows + 1), device=work.device)
            loss = model.loss(tokens[:, :-1], tokens[:, 1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            del loss, tokens
            writer.step()
    writer.close()


RECORDERS = {"ring": record_ring, "streaming": record_streaming, "training": record_training}
