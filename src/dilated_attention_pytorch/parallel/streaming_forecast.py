"""What a streamed call moves and takes, from its shapes alone: as `Moved` counts it, before anything is moved."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from ..memory.base import bytes_of
from ..merge import accumulator_dtype
from .streaming_budget import Pass, Schedule, chunk_specs
from .streaming_plan import tiles
from .streaming_run import branch_alone


@dataclass(frozen=True)
class Direction:
    """The forward or the backward pass of a call; the latter without a gradient of the log-sum-exp."""

    chunks: int = 0
    tiles: int = 0
    rows: int = 0
    """Of the longest chunk."""
    bytes_in: int = 0
    """From host memory to the device. Masked keys count, which tiles leave out."""
    bytes_out: int = 0
    peak_bytes: int = 0
    """Predicted, on the device."""

    def __str__(self) -> str:
        mib = [f"{count / 2**20:,.1f} MiB" for count in (self.bytes_in, self.bytes_out, self.peak_bytes)]
        return (
            f"{self.chunks} chunks of at most {self.rows:,} rows, {self.tiles} tiles; in {mib[0]}, out {mib[1]}; "
            f"peak {mib[2]} (predicted)"
        )


@dataclass(frozen=True)
class Forecast:
    """Both directions of a streamed call."""

    device: str
    memory_budget: int
    forward: Direction
    backward: Direction

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"streamed through {self.device} within {self.memory_budget / 2**20:,.1f} MiB",
            f"         forward  {self.forward}",
            f"         backward {self.backward}",
        ]


def forecast(one: Pass, schedule: Callable[[Pass], Schedule], budget: int) -> Forecast:
    """What the call whose forward pass is ``one`` does."""
    if one.problem.options.mixing_grad == "exact":
        back = [replace(one, backward=True)]
    else:  # each branch is computed once more, and differentiated with its own output
        alone = [replace(one, problem=branch_alone(one.problem, i)) for i in range(len(one.problem.pattern.branches))]
        back = [direction for forward in alone for direction in (forward, replace(forward, backward=True))]
    sums = [_sum(_direction(step, schedule(step)) for step in steps) for steps in ([one], back)]
    return Forecast(one.problem.device, budget, *sums)


def _sum(parts: Iterable[Direction]) -> Direction:
    found = Direction()
    for part in parts:
        found = Direction(
            found.chunks + part.chunks,
            found.tiles + part.tiles,
            max(found.rows, part.rows),
            found.bytes_in + part.bytes_in,
            found.bytes_out + part.bytes_out,
            max(found.peak_bytes, part.peak_bytes),
        )
    return found


def _direction(one: Pass, schedule: Schedule) -> Direction:
    problem = one.problem
    shape, size, acc = problem.shape, problem.dtype.itemsize, accumulator_dtype(problem.dtype).itemsize
    both = shape.head_dim + shape.value_dim
    bytes_in = bytes_out = met = 0
    for index, chunk in enumerate(schedule.chunks):
        rows = chunk.batches * chunk.rows
        specs = chunk_specs(one, chunk.batches, chunk.rows, masked=problem.has_mask)
        bytes_in += sum(bytes_of(*spec) for spec in specs)
        if one.backward:
            bytes_out += rows * size * (shape.heads * shape.head_dim + shape.kv_heads * both)
        else:
            bytes_out += rows * shape.heads * (shape.value_dim * size + acc)
        if not schedule.tile_rows:
            continue
        for tile in tiles(
            index, chunk, problem.pattern, shape, problem.documents, schedule.tile_rows,
            is_causal=problem.options.is_causal,
        ):  # fmt: skip
            met += 1
            bytes_in += tile.rows * both * size
            bytes_out += tile.rows * both * acc * one.backward
    longest = max((chunk.batches * chunk.rows for chunk in schedule.chunks), default=0)
    return Direction(len(schedule.chunks), met, longest, bytes_in, bytes_out, schedule.peak_bytes)
