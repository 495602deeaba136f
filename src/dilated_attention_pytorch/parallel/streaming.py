"""`Streaming`: one device attends over a sequence that lies in host memory or in a memory-mapped file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ..backends import Problem
from ..backends.ops import make_problem
from ..memory import MemoryPool, SimplePool
from ..types import AttentionOutput
from .streaming_attention import StreamedAttention
from .streaming_budget import Pass, Schedule, least_budget, schedule
from .streaming_forecast import Forecast, forecast
from .streaming_run import Job, chunk_alone
from .streaming_session import slots_of_a_feed
from .streaming_transfer import Moved


@dataclass(frozen=True, eq=False)
class Streaming:
    """Attention on one device over query, key and value that lie in host memory: the same function, chunk by chunk.

    Chunks of consecutive rows go through the device, each while the one before is computed. Branches whose segments
    lie inside a chunk need nothing else. For a segment that a chunk cuts, the chunk meets the segment's other active
    rows (one row in r, LongNet, arXiv 2307.02486, section 3.1) in tiles, and partial results join by their
    log-sum-exp in float32. out, lse and all gradients are tensors in host memory.

    Args:
        device: what computes: "cuda", or "cpu" for tensors in memory-mapped files (``torch.from_file``, safetensors).
        memory_budget: most bytes that a call may take on the device; on the CPU besides inputs and results.
        chunk: most rows of a chunk, of all batch rows together; by default what the budget allows.
        pool: where buffers on the device come from; by default one of its own, which keeps nothing between calls.

    A GPU copies page-locked, contiguous tensors (``tensor.pin_memory()``) directly and at full speed, and results are
    then page-locked too; everything else goes through page-locked staging of some 256 MiB. What chunks have for keys
    of other chunks is summed in host memory in float32: one row in r of the segments that chunks cut.

    ``backend`` is what computes a chunk's own pairs; pairs across chunks are left to PyTorch's fused kernels, or to
    plain PyTorch where none takes the dtype, the head dims, dropout or a gradient of lse.

    Raises:
        ValueError: a device that is neither the CPU nor CUDA, a budget or a chunk that is no positive integer; in a
            call a budget that is too small (with the least that works), inputs that are not in host memory.

    >>> import torch
    >>> from dilated_attention_pytorch import dilated_attention
    >>> query = key = value = torch.randn(1, 1000, 4, 16)
    >>> streaming = Streaming("cpu", memory_budget=1 << 20, chunk=300)
    >>> out = dilated_attention(query, key, value, [64, 1024], [1, 4], parallel=streaming)
    >>> torch.allclose(out, dilated_attention(query, key, value, [64, 1024], [1, 4]), atol=1e-5)
    True
    """

    device: torch.device | str
    memory_budget: int = field(kw_only=True)
    chunk: int | None = field(default=None, kw_only=True)
    pool: MemoryPool | None = field(default=None, kw_only=True)
    moved: Moved = field(default_factory=Moved, init=False, repr=False)
    """Bytes copied, chunks and tiles so far."""
    _own_pool: SimplePool = field(init=False, repr=False)
    _staging: SimplePool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        try:
            device = torch.device(self.device)
        except (RuntimeError, TypeError):
            raise ValueError(f"device is {self.device!r}; streaming computes on 'cpu' or 'cuda'") from None
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"device is {str(device)!r}; streaming computes on 'cpu' or 'cuda'")
        for name, value in (("memory_budget", self.memory_budget), ("chunk", self.chunk)):
            if value is None and name == "chunk":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                what = "a number of bytes" if name == "memory_budget" else "a number of rows, or None"
                raise ValueError(f"{name} is {value!r}; give {what}")
        object.__setattr__(self, "device", device)
        object.__setattr__(self, "_own_pool", SimplePool(budget=self.memory_budget))
        object.__setattr__(self, "_staging", SimplePool(pinned=device.type == "cuda"))

    def attend(self, arguments: dict[str, Any], backend: str) -> AttentionOutput:
        """out (B, Nq, H, Dv) and lse (B, Nq, H) in host memory, for the checked arguments of the operator."""
        device = self._place()
        problem = self._problem(arguments, device, ("cpu",))
        query, key, value = (arguments[name] for name in ("query", "key", "value"))
        seed = int(torch.randint(2**62, (1,))) if arguments["dropout_p"] else None
        job = self._job(problem, backend, device, seed)
        passes = [job.one()]
        if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)):
            passes.append(job.one(backward=True))
        self._check(passes)
        out, lse = StreamedAttention.apply(query, key, value, arguments["key_padding_mask"], job)
        return AttentionOutput(out, lse if problem.options.mixing_grad == "exact" else lse.detach())

    def forecast(self, arguments: dict[str, Any], backend: str) -> tuple[Problem, Problem, Forecast]:
        """The whole call, the first chunk's own part of it, and what is moved: for tensors, or meta tensors."""
        problem = self._problem(arguments, self._place(), ("cpu", "meta"))
        one = Pass(problem, backend, slots_of_a_feed(torch.device(problem.device)))
        first = self._schedule(one).chunks[0]
        own = chunk_alone(problem, first, masked=problem.has_mask)
        return problem, own, forecast(one, self._schedule, self.memory_budget)

    def _place(self) -> torch.device:
        device = torch.device(self.device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        return device

    def _problem(self, arguments: dict[str, Any], device: torch.device, allowed: tuple[str, ...]) -> Problem:
        """The whole call on the device that computes, of inputs that lie on devices of these types."""
        for name in ("query", "key", "value"):
            if arguments[name].device.type not in allowed:
                raise ValueError(
                    f"{name} is on {arguments[name].device}; Streaming takes tensors in host memory (in a model, one "
                    "whose parameters are there), and without parallel= the device that holds them attends over them"
                )
        return make_problem(**arguments, device=str(device))

    def _job(self, problem: Problem, backend: str, device: torch.device, seed: int | None) -> Job:
        def after() -> None:
            self._own_pool.trim()  # PyTorch's allocator keeps it; the budget has room for the next call's sizes

        pool = self._own_pool if self.pool is None else self.pool
        return Job(problem, backend, device, pool, self._staging, self.moved, seed, self._schedule, after)

    def _schedule(self, one: Pass) -> Schedule:
        self._check([one])
        found = schedule(one, self.memory_budget, self.chunk)
        assert found is not None
        return found

    def _check(self, passes: list[Pass]) -> None:
        """Say before the forward pass that the budget is too small for it or for the backward pass."""
        if all(schedule(one, self.memory_budget, self.chunk) for one in passes):
            return
        needed = max(least_budget(one, self.chunk) for one in passes)
        rows = "chunks of a single row" if self.chunk is None else f"chunks of {self.chunk} rows"
        raise ValueError(
            f"memory_budget is {self.memory_budget:,} bytes, and this call needs {needed:,} even in {rows}; give at "
            "least that much" + ("" if self.chunk is None else ", or a smaller chunk")
        )
