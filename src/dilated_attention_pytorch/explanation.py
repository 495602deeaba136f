"""What a call will do, before it is done: the backend and why, the fused calls, work, memory, coverage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .backends import sdpa
from .backends.arguments import checked_tensors
from .backends.dispatch import choose
from .backends.ops import make_problem
from .backends.problem import Problem
from .backends.sparse.dispatch import check_sparse_backend
from .backends.sparse.explanation import SparseExplanation, explain_problem
from .backends.sparse.ops import sparse_problem
from .backends.vendor import Kernel
from .functional import checked_arguments
from .merge import accumulator_dtype
from .parallel import ContextParallel, Streaming, check_parallel
from .parallel.schedule import Call as ParallelCall
from .parallel.streaming_forecast import Forecast
from .patterns import ContentTopK, Union
from .patterns.union import members_of
from .sparse import check_pattern, pattern_tensors
from .types import Call


@dataclass(frozen=True)
class Exchange:
    """What the ranks of a `ContextParallel` exchange for a call; backward without a gradient of the log-sum-exp."""

    strategy: str
    rank: int
    world: int
    bytes_forward: int
    """Bytes that this rank sends."""
    bytes_backward: int
    messages_forward: int
    messages_backward: int
    receive_bytes: int
    """Largest receive buffers of a rank at one time, forward."""
    busiest_pairs: int
    """Most (query, key) pairs of a rank."""
    seconds: tuple[tuple[str, float, float], ...]
    """(strategy, forward, backward) by the model of `cost.Rates`, the fastest first."""
    passed: tuple[tuple[str, str], ...]
    """(strategy, reason) for each that "auto" passed over."""

    def lines(self) -> list[str]:
        """For people."""
        found = [
            f"ranks    {self.strategy}, rank {self.rank} of {self.world}",
            f"sent     forward {_mib(self.bytes_forward)} in {self.messages_forward} messages, backward "
            f"{_mib(self.bytes_backward)} in {self.messages_backward}; receive buffers {_mib(self.receive_bytes)}",
        ]
        for name, forward, backward in self.seconds:
            found.append(f"         {name}: {1e3 * forward:,.3f} ms forward, {1e3 * backward:,.3f} ms backward (model)")
        return [*found, *(f"         not {name}: {reason}" for name, reason in self.passed)]


@dataclass(frozen=True)
class Explanation:
    """What `explain` found. Bytes are bytes, operations are floating-point operations; ``str()`` is readable."""

    backend: str
    kernel: str
    """The fused kernel under the backend."""
    backend_backward: str
    """The backend of the backward pass, which "auto" chooses by itself."""
    skipped: tuple[tuple[str, str], ...]
    """(backend, reason) for each backend that "auto" passed over."""
    calls: tuple[Call, ...]
    """The fused calls, branch by branch (empty for backends that need none)."""
    pairs: int
    """Attended (query, key) pairs over all branches, heads and batch rows."""
    dense_pairs: int
    """Pairs of dense attention on the same shape."""
    flops_forward: int
    flops_backward: int
    bytes_forward: int
    """Bytes read and written by the forward pass, caches disregarded."""
    bytes_backward: int
    peak_bytes_forward: int
    """Predicted bytes allocated beyond the inputs at the peak of the forward pass, the result included."""
    peak_bytes_backward: int
    """The same for the backward pass, gradients included, saved tensors and incoming gradients not."""
    rows: int
    """(batch, query row, head) triples."""
    rows_without_branch: int
    """Those that no branch keeps: their out is 0 and their lse -inf."""
    exchange: Exchange | None = None
    """What ranks exchange, under ``parallel``; all other numbers are then those of what this rank computes alone."""
    streamed: Forecast | None = None
    """What goes through the device of a `Streaming`; backends are those of a chunk's own pairs, peaks the device's,
    and all other numbers those of the whole call."""

    def to_dict(self) -> dict[str, Any]:
        """Everything as numbers, strings and lists, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        counts: dict[tuple[int, int], int] = {}
        for call in self.calls:
            counts[call.branch, call.dilation_rate] = counts.get((call.branch, call.dilation_rate), 0) + 1
        lines = [f"backend  {self.backend} ({self.kernel})"]
        lines += [f"         not {name}: {reason}" for name, reason in self.skipped]
        if self.backend_backward != self.backend:
            lines.append(f"backward {self.backend_backward}")
        if counts:
            each = ", ".join(f"{n} for branch {b} (rate {r})" for (b, r), n in sorted(counts.items()))
            lines.append(f"calls    {len(self.calls)}: {each}")
        lines += [
            f"pairs    {self.pairs:,}, {self.pairs / self.dense_pairs:.2%} of dense attention",
            f"work     forward {self.flops_forward / 1e9:,.3f} GFLOP, backward {self.flops_backward / 1e9:,.3f} GFLOP",
            f"moved    forward {_mib(self.bytes_forward)}, backward {_mib(self.bytes_backward)}",
            f"peak     forward {_mib(self.peak_bytes_forward)}, backward {_mib(self.peak_bytes_backward)} (predicted)",
            f"coverage {self.rows - self.rows_without_branch:,} of {self.rows:,} (row, head) pairs have a branch",
        ]
        lines += self.exchange.lines() if self.exchange else []
        return "\n".join(lines + (self.streamed.lines() if self.streamed else []))


_TILE_ROWS = 128
_KERNELS = {
    "gluon": "Gluon for Hopper, one persistent kernel",
    "triton": "Triton, one kernel",
    "reference": "PyTorch operations, block by block",
}


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"


def explain(
    query: Tensor | Sequence[int],
    key: Tensor | Sequence[int],
    value: Tensor | Sequence[int],
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
    parallel: ContextParallel | Streaming | None = None,
    **options: Any,
) -> Explanation:
    """Say what `dilated_attention` would do with these shapes and options, without doing it.

    Args:
        query, key, value: tensors, or shapes (B, N_q, H, D), (B, N, H_kv, D), (B, N, H_kv, D_v) for contiguous
            tensors of ``dtype`` on ``device`` (default "cpu").
        segment_lengths, dilation_rates, backend: as for `dilated_attention`.
        device, dtype: what to assume where shapes are given; tensors bring their own.
        parallel: a `ContextParallel`; the shapes are those of this rank's rows, and nothing is sent (but the lengths
            of rows that a key_padding_mask ends, for padding="zeros"). Or a `Streaming`, whose device is the one that
            computes.
        **options: every other option of `dilated_attention`.

    Returns:
        An `Explanation`; print it.

    Raises:
        ValueError: whatever `dilated_attention` would raise for the same arguments.

    >>> shape = (1, 4096, 8, 64)
    >>> plan = explain(shape, shape, shape, [1024, 4096], [1, 4], is_causal=True)
    >>> plan.backend, len(plan.calls), plan.rows_without_branch
    ('sdpa', 3, 0)
    """
    given = {"query": query, "key": key, "value": value}
    q, k, v = (
        t if isinstance(t, Tensor) else torch.empty(as_shape(name, t), dtype=dtype, device="meta")
        for name, t in given.items()
    )
    check_parallel(parallel)
    exchange = streamed = None
    arguments = checked_arguments(q, k, v, segment_lengths, dilation_rates, **options)
    if isinstance(parallel, Streaming):
        problem, alone, streamed = parallel.forecast(arguments, backend)
    elif parallel is not None:
        call = parallel.call(arguments, backend)
        alone = problem = parallel.problem(call, _device(q, device))
        exchange = _exchange(parallel, call)
    else:
        alone = problem = make_problem(**arguments, device=_device(q, device))
    choice, backwards = choose(backend, alone), choose(backend, alone, backward=True)
    shape, plan = problem.shape, problem.plan
    kernel = sdpa.kernel_for(alone) if choice.name == "sdpa" else _KERNELS[choice.name]
    last, first = shape.key_rows, shape.key_rows - shape.query_rows
    causal_pairs = (last * (last + 1) - first * (first + 1)) // 2
    dense = causal_pairs if problem.options.is_causal else shape.query_rows * shape.key_rows
    forward, backward = _bytes_moved(problem) if choice.name in ("sdpa", "reference") else _bytes_of_tiles(problem)
    return Explanation(
        backend=choice.name,
        kernel=kernel.name if isinstance(kernel, Kernel) else kernel,
        backend_backward=backwards.name,
        skipped=choice.skipped,
        calls=plan.calls if choice.name == "sdpa" and streamed is None else (),
        pairs=plan.pairs,
        dense_pairs=dense * shape.batch * shape.heads,
        flops_forward=2 * plan.pairs * (shape.head_dim + shape.value_dim),
        flops_backward=2 * plan.pairs * (3 * shape.head_dim + 2 * shape.value_dim),
        bytes_forward=forward,
        bytes_backward=backward,
        peak_bytes_forward=streamed.forward.peak_bytes if streamed else choice.backend.peak_bytes(problem),
        peak_bytes_backward=(
            streamed.backward.peak_bytes if streamed else backwards.backend.peak_bytes(problem, backward=True)
        ),
        rows=shape.batch * shape.query_rows * shape.heads,
        rows_without_branch=_rows_without_branch(problem),
        exchange=exchange,
        streamed=streamed,
    )


def explain_sparse(
    query: Tensor | Sequence[int],
    key: Tensor | Sequence[int],
    value: Tensor | Sequence[int],
    pattern: Any,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
    **options: Any,
) -> SparseExplanation:
    """Say what `sparse_attention` would do with these shapes and options; only its lists are made.

    Args:
        query, key, value: tensors, or shapes (B, N_q, H, D), (B, N, H_kv, D), (B, N, H_kv, D_v) for contiguous
            tensors of ``dtype`` on ``device`` (default "cpu"); `ContentTopK` needs tensors to select from.
        pattern, backend: as for `sparse_attention`, but no union with ``multiplicity=True``, whose members are
            computed one by one.
        device, dtype: what to assume where shapes are given; tensors bring their own.
        **options: every other option of `sparse_attention` but ``gate``.

    Raises:
        ValueError: whatever `sparse_attention` would raise for the same arguments.

    >>> from dilated_attention_pytorch import LocalWindow
    >>> shape = (1, 4096, 8, 64)
    >>> plan = explain_sparse(shape, shape, shape, LocalWindow(512, block_size=64), is_causal=True)
    >>> plan.backend, plan.blocks, plan.rows_without_keys
    ('sdpa', 4320, 0)
    """
    given = {"query": query, "key": key, "value": value}
    q, k, v = (
        t if isinstance(t, Tensor) else torch.empty(as_shape(name, t), dtype=dtype, device="meta")
        for name, t in given.items()
    )
    check_pattern(pattern)
    if isinstance(pattern, Union) and pattern.multiplicity:
        raise ValueError("the union counts pairs several times, member by member; explain each of pattern.patterns")
    if q.device.type == "meta" and any(isinstance(member, ContentTopK) for member in members_of(pattern)):
        raise ValueError("ContentTopK selects from the content of query and key; give tensors instead of shapes")
    check_sparse_backend(backend)
    defaults = {"is_causal": False, "scale": None, "dropout_p": 0.0}
    found = checked_tensors(
        q, k, v, **{**defaults, **dict.fromkeys(("key_padding_mask", "cu_seqlens")), "key_start": 0, **options}
    )  # fmt: skip
    selecting = {name: option for name, option in found.items() if name not in ("value", "dropout_p")}
    lists = pattern_tensors(**selecting, pattern=pattern)
    return explain_problem(
        sparse_problem(**found, lists=lists, pattern=pattern.code, device=_device(q, device)), backend
    )  # fmt: skip


def _exchange(parallel: ContextParallel, call: ParallelCall) -> Exchange:
    """The numbers of this rank."""
    found, passed = parallel.estimates(call)
    first, rank = found[0], parallel.rank
    forward, backward = first.forward[rank], first.backward[rank]
    return Exchange(
        first.strategy, rank, parallel.world, forward.bytes_sent, backward.bytes_sent, forward.messages,
        backward.messages, first.receive_bytes, first.pairs,
        tuple((one.strategy, one.forward_seconds, one.backward_seconds) for one in found), passed,
    )  # fmt: skip


def _device(query: Tensor, device: str | torch.device | None) -> str:
    """The device that is meant: meta tensors stand for tensors on ``device``."""
    if device is None:
        device = "cpu" if query.device.type == "meta" else query.device
    return str(torch.device(device))


def as_shape(name: str, given: object) -> tuple[int, ...]:
    """``given`` as the shape of a tensor, or a ValueError."""
    if not isinstance(given, (tuple, list, torch.Size)) or not all(isinstance(n, int) and n >= 0 for n in given):
        raise ValueError(
            f"{name} is of type {type(given).__name__}; give a torch.Tensor, or a shape of integers "
            "(batch, rows, heads, head dim)"
        )
    return tuple(given)


def describe(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    device: str | torch.device | None = None,
    **options: Any,
) -> Problem:
    """The Problem behind arguments of `dilated_attention`; meta tensors stand for tensors on ``device``."""
    arguments = checked_arguments(query, key, value, segment_lengths, dilation_rates, **options)
    return make_problem(**arguments, device=_device(query, device))


def _bytes_moved(problem: Problem) -> tuple[int, int]:
    """Bytes of the forward and the backward pass: inputs and results of every call, and the joins."""
    shape, size, acc = problem.shape, problem.dtype.itemsize, accumulator_dtype(problem.dtype).itemsize
    forward = backward = 0
    for n, call in enumerate(problem.plan.calls):
        queries, keys = call.rows, call.outer * call.inner * call.key_len
        joins = 1 if n < problem.plan.covers_first else 2  # a join reads and writes what a first result only writes
        inputs = queries * shape.head_dim + keys * (shape.head_dim + shape.value_dim)
        forward += size * (inputs + 2 * queries * shape.value_dim) + joins * acc * queries * (shape.value_dim + 1)
        backward += size * (2 * inputs + inputs + 2 * queries * shape.value_dim) + joins * acc * inputs
    return forward, backward


def _bytes_of_tiles(problem: Problem) -> tuple[int, int]:
    """The same for kernels that keep a tile of rows in registers while the keys of all its branches pass by."""
    shape, size = problem.shape, problem.dtype.itemsize
    rows = shape.batch * shape.query_rows * shape.heads
    met = problem.plan.pairs // _TILE_ROWS
    forward = size * (rows + met) * (shape.head_dim + shape.value_dim) + 4 * rows
    return forward, 2 * forward + size * (rows + met) * (shape.head_dim + shape.value_dim)


def _rows_without_branch(problem: Problem) -> int:
    """(batch, query row, head) triples that no branch of the pattern keeps."""
    shape, pattern = problem.shape, problem.pattern
    covered = 0
    for document in problem.documents:
        first = max(document.row, shape.key_rows - shape.query_rows)
        rows = max(0, document.row + document.rows - first)
        if 1 in pattern.dilation_rates:
            covered += document.batches * rows * shape.heads
            continue
        position = torch.arange(rows) + (document.position + first - document.row)
        for head in range(shape.heads):
            active = torch.zeros(rows, dtype=torch.bool)
            for w, r in zip(pattern.segment_lengths, pattern.dilation_rates, strict=True):
                active |= position % w % r == pattern.head_offset(head, r, shape.heads)
            covered += document.batches * int(active.sum())
    return shape.batch * shape.query_rows * shape.heads - covered
