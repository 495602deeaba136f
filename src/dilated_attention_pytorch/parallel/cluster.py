"""What attention costs on a cluster that is not there: a pure model of compute, communication and memory per rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..merge import accumulator_dtype
from ..patterns import DilatedPattern
from ..types import Document, Options, Shape
from .cost import Estimate, Rates, candidates, estimate
from .hybrid import mesh_shape, rows_of_ranks, total
from .schedule import Call
from .shard import Layout


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One layer's attention, forward and backward, on ``devices`` ranks. Bytes, and seconds of the slowest rank."""

    tokens: int
    devices: int
    strategy: str
    compute_seconds: float
    exposed_seconds: float
    """Communication that computing does not hide."""
    bytes_sent: int
    """Most that a rank sends."""
    messages: int
    """Most that a rank sends."""
    memory_bytes: int
    """Most of a rank: inputs, results, their gradients, sums, receive buffers."""

    @property
    def seconds(self) -> float:
        """Forward and backward."""
        return self.compute_seconds + self.exposed_seconds

    @property
    def tokens_per_second(self) -> float:
        """Of the whole sequence."""
        return self.tokens / self.seconds if self.seconds else 0.0


def whole_call(
    pattern: DilatedPattern,
    *,
    tokens: int,
    batch: int = 1,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    is_causal: bool,
) -> Call:
    """Attention over one document of ``tokens`` rows."""
    return Call(
        pattern=pattern,
        shape=Shape(batch, tokens, tokens, heads, kv_heads, head_dim, head_dim),
        options=Options(is_causal, head_dim**-0.5, 0.0, "mask", "exact"),
        documents=(Document(0, batch, 0, tokens, 0, tokens),),
        dtype=dtype,
        has_mask=False,
        backend="auto",
    )


def predict(
    call: Call, devices: int, *, strategy: str = "auto", layout: Layout = "contiguous", rates: Rates | None = None
) -> Prediction:
    """The costs of ``call`` on a 1-D mesh of ``devices`` ranks ("hybrid": 2-D, pairs divide heads); a pure function.

    >>> pattern = DilatedPattern.geometric(1 << 20, ratio=4)
    >>> call = whole_call(pattern, tokens=1 << 20, heads=16, kv_heads=16, head_dim=64, dtype=torch.bfloat16,
    ...     is_causal=True)
    >>> found = predict(call, 8, layout="zigzag")
    >>> found.strategy, found.messages
    ('gather', 21)
    """
    found = _estimate(call, devices, strategy, layout, rates or Rates())
    forward, backward = (max(found.forward, key=_sent), max(found.backward, key=_sent))
    compute = found.forward_compute_seconds + found.backward_compute_seconds
    return Prediction(
        tokens=call.shape.key_rows,
        devices=devices,
        strategy=found.strategy,
        compute_seconds=compute,
        exposed_seconds=max(0.0, found.seconds - compute),
        bytes_sent=forward.bytes_sent + backward.bytes_sent,
        messages=forward.messages + backward.messages,
        memory_bytes=_memory(call, devices, found),
    )


def _estimate(call: Call, devices: int, strategy: str, layout: Layout, rates: Rates) -> Estimate:
    if call.shape.key_rows < devices:
        raise ValueError(f"{call.shape.key_rows} tokens are fewer than {devices} devices; give each one at least")
    mesh = mesh_shape(strategy, devices)
    rows = rows_of_ranks(call.shape.key_rows, mesh, layout)
    if strategy != "auto":
        return estimate(call, strategy, mesh, "ring", rows, rates)
    return candidates(call, (devices,), "ring", rows, rates)[0][0]


def _sent(one: Any) -> int:
    return int(one.bytes_sent)


def _memory(call: Call, devices: int, found: Estimate) -> int:
    """Of the backward pass, which holds more than the forward pass."""
    shape, size, acc = call.shape, call.dtype.itemsize, accumulator_dtype(call.dtype).itemsize
    rows = shape.batch * max(total(part) for part in rows_of_ranks(shape.key_rows, (devices,), "contiguous"))
    query, out = rows * shape.heads * shape.head_dim, rows * shape.heads * shape.value_dim
    keys = rows * shape.kv_heads * (shape.head_dim + shape.value_dim)
    held = size * (query + keys + 2 * out) + acc * rows * shape.heads  # q, k, v, out, its gradient, the log-sum-exp
    gradients = (acc + size) * (query + keys)  # sums, and a backend's share of them
    if found.strategy in (
        "ulysses",
        "hybrid",
    ):  # inputs and results once more, by heads, and what one exchange sends and receives
        return 2 * held + gradients + 2 * found.receive_bytes
    # Rows fetched, and gradients in the accumulators' dtype: those sent home and those that arrive.
    return held + gradients + found.receive_bytes * (1 + 2 * acc // size)


@dataclass(frozen=True, kw_only=True)
class Check:
    """A measured point and what the model says about it."""

    tokens: int
    devices: int
    strategy: str
    measured_seconds: float
    predicted_seconds: float

    @property
    def error(self) -> float:
        """Of the prediction, relative to the measurement."""
        return self.predicted_seconds / self.measured_seconds - 1


def check(report: dict[str, Any]) -> tuple[Rates, list[Check]]:
    """The rates in a report of ``dilated-attention bench parallel``, and the model with them at every point of it.

    Raises:
        ValueError: something else than such a report.
    """
    try:
        run, rates = report["run"], Rates(**report["rates"])
        pattern = DilatedPattern(tuple(run["segment_lengths"]), tuple(run["dilation_rates"]))
        found = []
        for one in report["measurements"]:
            call = whole_call(
                pattern, tokens=one["tokens"], batch=run["batch"], heads=run["heads"], kv_heads=run["kv_heads"],
                head_dim=run["head_dim"], dtype=getattr(torch, run["dtype"]), is_causal=run["is_causal"],
            )  # fmt: skip
            guess = predict(call, one["world"], strategy=one["strategy"], layout=run["layout"], rates=rates)
            found.append(
                Check(
                    tokens=one["tokens"], devices=one["world"], strategy=one["strategy"],
                    measured_seconds=one["both"]["total"] / 1e3, predicted_seconds=guess.seconds,
                )
            )  # fmt: skip
    except (KeyError, TypeError) as error:
        raise ValueError(f"this is no report of `dilated-attention bench parallel`: {error!r}") from None
    return rates, found
