"""How large chunks may be: a prediction of what a pass takes on the device, and the largest chunk that fits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from ..backends import Problem, choose
from ..backends.vendor import Kernel, find_kernel
from ..merge import accumulator_dtype
from ..types import Document
from .streaming_plan import Chunk, blocks_of_branch, cut
from .streaming_transfer import Spec, slot_bytes

PLAIN_ROWS = 64
"""Query rows of a rectangle that no fused kernel computes: its scores are written out."""

_SLACK = 1 << 14
_DROPOUT_FACTOR = 6


@dataclass(frozen=True)
class Pass:
    """One direction of one call: everything its memory depends on."""

    problem: Problem
    """The whole sequence, on the device that computes."""
    backend: str
    depth: int
    """Slots of a feed."""
    backward: bool = False
    grad_lse: bool = False


@dataclass(frozen=True)
class Schedule:
    """How a pass goes: its chunks, and the sizes of its slots."""

    chunks: tuple[Chunk, ...]
    chunk_bytes: int
    tile_rows: int
    tile_bytes: int
    part_rows: int
    """(query row, head) pairs that a rectangle computes at a time."""
    peak_bytes: int


def fused(problem: Problem, *, grad_lse: bool) -> bool:
    """Whether rectangles run on a fused kernel of PyTorch (`parallel.dense` decides alike)."""
    shape = problem.shape
    kernel = find_kernel(problem.device, problem.dtype, shape.head_dim)
    fits = isinstance(kernel, Kernel) and shape.head_dim % kernel.dim_multiple == 0
    same = shape.head_dim == shape.value_dim
    return fits and same and not grad_lse and not problem.options.dropout_p


def chunk_specs(one: Pass, batches: int, rows: int, *, masked: bool) -> list[Spec]:
    """Tensors of a chunk: query, key, value; backward the gradient of out, out, lse and its gradient; the mask."""
    shape, dtype = one.problem.shape, one.problem.dtype
    here = (batches, rows)
    specs: list[Spec] = [
        ((*here, shape.heads, shape.head_dim), dtype),
        ((*here, shape.kv_heads, shape.head_dim), dtype),
        ((*here, shape.kv_heads, shape.value_dim), dtype),
    ]
    if one.backward:
        acc = accumulator_dtype(dtype)
        specs += [((*here, shape.heads, shape.value_dim), dtype)] * 2 + [((*here, shape.heads), acc)]
        specs += [((*here, shape.heads), acc)] * one.grad_lse
    return specs + [(here, torch.bool)] * masked


def tile_specs(one: Pass, rows: int) -> list[Spec]:
    """Keys and values of a tile."""
    shape, dtype = one.problem.shape, one.problem.dtype
    return [((rows, shape.head_dim), dtype), ((rows, shape.value_dim), dtype)]


@lru_cache(maxsize=1024)
def _own_peak(one: Pass, batches: int, rows: int) -> int:
    """Bytes of a backend on a chunk alone, wherever the chunk lies in its segments."""
    problem, lengths = one.problem, one.problem.pattern.segment_lengths
    shape = replace(problem.shape, batch=batches, query_rows=rows, key_rows=rows)
    options = replace(problem.options, mixing_grad="exact")
    size, acc = problem.dtype.itemsize, accumulator_dtype(problem.dtype).itemsize
    peak = 0
    for position in {0, 1, max(0, max(lengths) - rows // 2), max(0, min(lengths) - rows // 2)}:
        documents = (Document(0, batches, 0, rows, position, position + rows),)
        own = replace(problem, shape=shape, options=options, documents=documents, fold=True)
        chosen = choose(one.backend, own, backward=one.backward, grad_lse=one.grad_lse)
        peak = max(peak, chosen.backend.peak_bytes(own, backward=one.backward))
    peak += peak // 3  # predictions of backends are true to a quarter
    queries, keys = batches * rows * shape.heads, batches * rows * shape.kv_heads
    if one.grad_lse:  # copies with columns that carry it
        width = max(shape.head_dim, shape.value_dim) + 8
        peak += (3 * queries + 2 * keys) * width * size + 4 * queries * acc
    if problem.options.dropout_p:  # the reference backend draws masks from 64-bit counters
        peak *= _DROPOUT_FACTOR
    if one.backward and problem.has_mask:
        peak += queries * (shape.value_dim * size + 2 * acc)
    return peak


def _rectangle_peak(one: Pass, rows: int, tile_rows: int, part_rows: int) -> int:
    """Bytes of one rectangle's results and of what its computation takes besides."""
    shape, dtype = one.problem.shape, one.problem.dtype
    size, acc = dtype.itemsize, accumulator_dtype(dtype).itemsize
    both, group = shape.head_dim + shape.value_dim, shape.heads // shape.kv_heads
    grads = tile_rows * both * acc * one.depth if one.backward else 0
    if not fused(one.problem, grad_lse=one.grad_lse):
        rows = min(PLAIN_ROWS, rows)
        pairs = rows * tile_rows * (4 + (24 if one.problem.options.dropout_p else 0))
        return grads + (pairs + 4 * tile_rows * both + 8 * rows * both) * acc
    tiles = 0
    if torch.device(one.problem.device).type == "cpu":  # what each thread of the CPU kernel works in
        tall = 256 if rows >= 768 else 64 if rows >= 192 else 32
        tiles = torch.get_num_threads() * tall * (2 * 512 + 2 + both) * acc
    if not one.backward:
        return tiles + part_rows * (both * (size + acc) + 6 * acc)
    keys = tile_rows * group * both
    return grads + tiles + part_rows * (4 * both * size + both * acc + 4 * acc) + keys * (2 * size + acc)


def _needs_tiles(one: Pass, rows: int) -> bool:
    shape = one.problem.shape
    return rows < shape.key_rows or shape.query_rows < shape.key_rows


def _part_rows(one: Pass, rows: int) -> int:
    return max(64, rows * one.problem.shape.heads // 8)


def peak_bytes(one: Pass, rows: int, tile_rows: int) -> int:
    """Predicted bytes on the device at the peak of a pass in chunks of ``rows`` rows."""
    shape, dtype = one.problem.shape, one.problem.dtype
    batches, rows = _sizes(one, rows)
    size, acc = dtype.itemsize, accumulator_dtype(dtype).itemsize
    queries, keys = batches * rows * shape.heads, batches * rows * shape.kv_heads
    slots = slot_bytes(chunk_specs(one, batches, rows, masked=one.problem.has_mask))
    if one.backward:
        results = (queries * shape.head_dim + keys * (shape.head_dim + shape.value_dim)) * size
        summed = queries * shape.head_dim
    else:
        results = queries * (shape.value_dim * size + acc)
        summed = queries * shape.value_dim
    peak = _own_peak(one, batches, rows)
    if _needs_tiles(one, batches * rows):
        slots += slot_bytes(tile_specs(one, tile_rows))
        peak = max(peak, results + summed * acc + _rectangle_peak(one, rows, tile_rows, _part_rows(one, rows)))
    before = 0
    if one.depth > 1:  # results of the chunk before, and of its last tile, are on their way to the host
        before = results + (tile_rows * (shape.head_dim + shape.value_dim) * acc if one.backward else 0)
    return one.depth * slots + before + peak + _SLACK


def _sizes(one: Pass, rows: int) -> tuple[int, int]:
    """Batch rows and rows of the largest chunk when it may have this many rows."""
    shape = one.problem.shape
    if rows >= shape.key_rows == shape.query_rows:
        return min(shape.batch, rows // shape.key_rows), shape.key_rows
    return 1, min(rows, shape.query_rows)


def _least_tile_rows(one: Pass) -> int:
    """Rows of the smallest tile: one of every head and offset."""
    problem = one.problem
    return max(blocks_of_branch(problem.pattern, i, problem.shape) for i in range(len(problem.pattern.branches)))


def _tile_rows(one: Pass, budget: int, rows: int) -> int:
    """Rows of a slot for tiles: a sixteenth of the budget at most, and no more than chunks of ``rows`` rows need.

    That is the active rows of a segment, where one tile is copied after the other; where copies go ahead, all tiles
    of a chunk are best copied at once: those before and behind it in every segment that is longer than a chunk.
    """
    problem, pattern = one.problem, one.problem.pattern
    active = [
        blocks_of_branch(pattern, i, problem.shape) * -(-min(w, problem.shape.key_rows) // r)
        for i, (w, r) in enumerate(zip(pattern.segment_lengths, pattern.dilation_rates, strict=True))
    ]
    needed = max(active)
    if one.depth > 1:
        longer = zip(active, pattern.segment_lengths, strict=True)
        needed = max(needed, 2 * sum(count for count, w in longer if w > rows))
    row, least = slot_bytes(tile_specs(one, 256)) // 256, _least_tile_rows(one)
    wanted = budget // (16 * one.depth * row)
    if not fused(problem, grad_lse=one.grad_lse):  # scores of a tile are written out
        wanted = min(wanted, least * 4096)
    return max(least, min(wanted, needed))


def least_budget(one: Pass, chunk: int | None) -> int:
    """The least budget that a pass works with, in chunks of one row or of the size given."""
    return peak_bytes(one, chunk or 1, _least_tile_rows(one))


@lru_cache(maxsize=64)
def schedule(one: Pass, budget: int, chunk: int | None) -> Schedule | None:
    """The schedule with the largest chunks within the budget, or with chunks of the size given; None: it is too small.

    A pure function: the same call is cut alike every time.
    """
    shape = one.problem.shape
    most = shape.batch * shape.key_rows if shape.query_rows == shape.key_rows else shape.query_rows
    least, tile_rows = _least_tile_rows(one), _tile_rows(one, budget, 0)
    while True:
        low, high = (1, most) if chunk is None else (min(chunk, most), min(chunk, most))
        fits = peak_bytes(one, low, tile_rows) <= budget
        while fits and low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if peak_bytes(one, middle, tile_rows) <= budget else (low, middle - 1)
        if fits and (chunk or low == most or low * shape.kv_heads >= tile_rows or tile_rows == least):
            enough = _tile_rows(one, budget, low)
            if tile_rows <= enough:
                return _schedule(one, low, tile_rows)
            tile_rows = enough  # the rest is for the chunks
            continue
        if tile_rows == least:
            return None
        tile_rows = max(least, tile_rows // 2)  # it did not fit, or left less to the chunk than to itself


def _schedule(one: Pass, rows: int, tile_rows: int) -> Schedule:
    problem = one.problem
    batches, most = _sizes(one, rows)
    tiled = _needs_tiles(one, batches * most)
    specs = chunk_specs(one, batches, most, masked=problem.has_mask)
    return Schedule(
        cut(problem.pattern, problem.shape, problem.documents, rows),
        slot_bytes(specs),
        tile_rows if tiled else 0,
        slot_bytes(tile_specs(one, tile_rows)) if tiled else 0,
        _part_rows(one, most),
        peak_bytes(one, rows, tile_rows),
    )
