"""Ranks on a mesh: which of them form a ring, which divide heads, which rows each holds.

Every strategy is one placement: a ring of all ranks ("ring", "gather"), heads over all ranks ("ulysses"), or rows of
the mesh that divide heads, with rings across ("hybrid").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .comm import add_up, broadcast, gather
from .shard import Layout, joined, nested_ranges, ranges

Strategy = Literal["auto", "ring", "gather", "ulysses", "hybrid"]
Across = Literal["ring", "gather"]
Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Placement:
    """``ring`` x ``heads`` ranks, and what they do: ``across`` says how the rows of different rings meet."""

    ring: int
    heads: int
    across: Across

    @classmethod
    def of(cls, strategy: str, mesh: tuple[int, ...], across: Across) -> Placement:
        """The placement of a strategy (not "auto") on a mesh of this shape."""
        if strategy == "hybrid":
            return cls(mesh[0], mesh[1], across)
        if strategy == "ulysses":
            return cls(1, mesh[0], across)
        return cls(mesh[0], 1, "gather" if strategy == "gather" else "ring")

    def held(self, rows: list[Ranges]) -> list[Ranges]:
        """The rows that each ring rank works on, from what each rank of the mesh holds."""
        return [joined(rows[i : i + self.heads]) for i in range(0, len(rows), self.heads)]


def check_strategy(strategy: str, layout: str, across: str, dimensions: int) -> None:
    """Raise ValueError for a name that does not exist, or a mesh that the strategy cannot use."""
    for name, value, allowed in (
        ("strategy", strategy, get_args(Strategy)),
        ("layout", layout, get_args(Layout)),
        ("across", across, get_args(Across)),
    ):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; choose one of {', '.join(map(repr, allowed))}")
    if dimensions not in (1, 2):
        raise ValueError(
            f"mesh has {dimensions} dimensions; give one for the ranks, or two: (ring, heads) for 'hybrid'; "
            "mesh['name'] takes one out of a larger mesh"
        )
    if dimensions == 2 and strategy not in ("hybrid", "auto"):
        raise ValueError(f"strategy {strategy!r} takes a 1-D mesh, and this one has 2 dimensions; use 'hybrid'")
    if dimensions == 1 and strategy == "hybrid":
        raise ValueError("strategy 'hybrid' takes a 2-D mesh (ring x heads), and this one has 1 dimension")


PAIR = 2
"""Ranks that divide heads in the mesh that "hybrid" is measured and predicted on."""


def mesh_shape(strategy: str, ranks: int) -> tuple[int, ...]:
    """The shape of a mesh of so many ranks that a strategy is measured on: for "hybrid" pairs of ranks divide heads.

    Raises:
        ValueError: "hybrid" and a number of ranks that has no two pairs.
    """
    if strategy != "hybrid":
        return (ranks,)
    if ranks % PAIR or ranks < 2 * PAIR:
        raise ValueError(f"strategy 'hybrid' needs an even number of ranks, 4 at least, not {ranks}")
    return ranks // PAIR, PAIR


def rows_of_ranks(length: int, mesh: tuple[int, ...], layout: Layout) -> list[Ranges]:
    """The ranges of rows that every rank of the mesh holds, the last dimension of the mesh fastest."""
    return list(ranges(length, mesh[0], layout) if len(mesh) == 1 else nested_ranges(length, *mesh, layout))


@dataclass(frozen=True)
class Ranks:
    """The ranks of a mesh of one or two dimensions, with one group for each dimension."""

    mesh: DeviceMesh

    @property
    def shape(self) -> tuple[int, ...]:
        """Ranks in each dimension."""
        return tuple(self.mesh.shape)

    @property
    def groups(self) -> tuple[dist.ProcessGroup, ...]:
        """The group of each dimension that this rank is in."""
        return tuple(self.mesh.get_group(dim) for dim in range(self.mesh.ndim))

    @property
    def coordinates(self) -> tuple[int, ...]:
        """This rank's place in each dimension."""
        return tuple(self.mesh.get_local_rank(dim) for dim in range(self.mesh.ndim))

    @property
    def rank(self) -> int:
        """This rank's number in the mesh, the last dimension fastest."""
        number = 0
        for place, size in zip(self.coordinates, self.shape, strict=True):
            number = number * size + place
        return number

    def gather(self, mine: Tensor) -> Tensor:
        """Tensors of one shape of all ranks, stacked in their order."""
        found = mine.unsqueeze(0)
        for group in reversed(self.groups):
            parts = [torch.empty_like(found) for _ in range(dist.get_world_size(group))]
            gather(parts, found.contiguous(), group)
            found = torch.cat(parts)
        return found

    def add_up(self, mine: Tensor) -> Tensor:
        """The sum of all ranks' tensors, in place."""
        for group in self.groups:
            add_up(mine, group)
        return mine

    def first(self, mine: Tensor) -> Tensor:
        """The tensor of rank 0, in place."""
        for group in reversed(self.groups):
            broadcast(mine, group)
        return mine


def total(held: Sequence[tuple[int, int]]) -> int:
    """Rows in ranges."""
    return sum(stop - start for start, stop in held)
