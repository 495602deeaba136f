"""Integers that the fused kernels read, on their device: where tiles lie, which branches there are."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from ..kernels.schedule import KEPT, Cells, Group
from ..patterns import DilatedPattern
from ..patterns.tiles import branch_groups, cells, class_stride, part_of
from ..types import Document, Shape
from .problem import Problem

LONGEST = 1 << 30
"""Positions and lengths up to here leave sums of two of them in 32 bits."""


def longest_position(problem: Problem) -> int:
    """The position behind the last row of the longest document, at least 1."""
    return max((document.position + document.rows for document in problem.documents), default=1)


_read_by_graphs: list[object] = []


def hold_for_replays(*objects: object) -> None:
    """Never let go of what a CUDA graph that is being captured will read by address: caches may forget it."""
    if torch.cuda.is_current_stream_capturing():
        _read_by_graphs.append(objects)


@lru_cache(maxsize=16)
def capability(device: str) -> tuple[int, int]:
    """Compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device)


def pairs(pattern: DilatedPattern) -> list[tuple[int, int]]:
    """(segment length, dilation rate) of every branch."""
    return list(zip(pattern.segment_lengths, pattern.dilation_rates, strict=True))


@lru_cache(maxsize=KEPT)
def cell_table(
    pattern: DilatedPattern,
    shape: Shape,
    documents: tuple[Document, ...],
    span: int,
    side: Literal["query", "key"],
    device: str,
) -> Cells:
    """`patterns.tiles.cells`, here and on the device."""
    table = cells(pattern, shape, documents, span, side)
    return Cells(table, torch.from_numpy(table).to(device))


@lru_cache(maxsize=64)
def branch_table(pattern: DilatedPattern, device: str) -> Tensor:
    """(branches, 2) int32: segment lengths and dilation rates."""
    # A segment, or a rate, beyond every position is one of any such length.
    clamped = [(min(w, LONGEST), min(r, LONGEST)) for w, r in pairs(pattern)]
    return torch.tensor(clamped, dtype=torch.int32).to(device)


@lru_cache(maxsize=KEPT)
def tiles(problem: Problem, block: int, side: Literal["query", "key"]) -> tuple[Cells, int]:
    """The cell table, and the class stride."""
    stride = class_stride(problem.pattern, block, longest_position(problem))
    table = cell_table(problem.pattern, problem.shape, problem.documents, block * stride, side, problem.device)
    return table, stride


@lru_cache(maxsize=KEPT)
def groups(problem: Problem, block: int, side: Literal["query", "key"]) -> tuple[Group, ...]:
    """Groups of branches that have tiles of their own; all rows lie in cells of each."""
    longest = longest_position(problem)
    found = []
    for group in branch_groups(problem.pattern, block, longest, is_causal=problem.options.is_causal):
        part = part_of(problem.pattern, group)
        stride = class_stride(part, block, longest)
        table = cell_table(part, problem.shape, problem.documents, block * stride, side, problem.device)
        found.append(Group(part.segment_lengths, part.dilation_rates, stride, table))
    return tuple(found)


@lru_cache(maxsize=256)
def covered(problem: Problem, side: Literal["query", "key"]) -> bool:
    """Whether a tile writes every row: rows outside documents (left padding) and keys without a query have none."""
    shape = problem.shape
    first = shape.key_rows - shape.query_rows
    asked = [d for d in problem.documents if d.row + d.rows > first]
    if side == "key":
        return sum(d.batches * d.rows for d in asked) == shape.batch * shape.key_rows
    return sum(d.batches * (d.row + d.rows - max(d.row, first)) for d in asked) == shape.batch * shape.query_rows


def outside(problem: Problem, device: torch.device) -> Tensor:
    """Which query rows lie in no document: (B, Nq) bool."""
    shape = problem.shape
    absent = torch.ones(shape.batch, shape.key_rows, dtype=torch.bool)
    for d in problem.documents:
        absent[d.batch : d.batch + d.batches, d.row : d.row + d.rows] = False
    return absent[:, shape.key_rows - shape.query_rows :].to(device)
