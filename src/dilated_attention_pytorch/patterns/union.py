"""A union of patterns: a pair that several of them show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .blocks import BlockPattern, Entries, QueryBlocks, Run, entries_of_runs
from .codes import attach, register
from .dilated import DilatedPattern


@register
@dataclass(frozen=True)
class Union:
    """Who attends to whom in any of several patterns.

    A pair counts once, however many patterns show it; with ``multiplicity=True`` as often as patterns (and branches
    of a `DilatedPattern`) show it, as LongNet's equation 10 mixes branches. Block sizes must be multiples of the
    smallest. A `DilatedPattern` works pair by pair: counted once, every block that its segments touch is visited.

    Args:
        patterns: at least one block-sparse pattern, and any `DilatedPattern`.
        multiplicity: whether pairs that several patterns show count several times.

    >>> from dilated_attention_pytorch.patterns import LocalWindow, RandomBlocks
    >>> Union((LocalWindow(128, block_size=64), RandomBlocks(3, block_size=64))).block_size
    64
    """

    patterns: tuple[Any, ...]
    multiplicity: bool = False
    code: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.patterns, (list, tuple)) or not self.patterns:
            raise ValueError(f"patterns is {self.patterns!r}; give a tuple of patterns")
        flat: list[Any] = []
        for pattern in self.patterns:
            if isinstance(pattern, Union):
                if pattern.multiplicity != self.multiplicity:
                    raise ValueError("a Union inside a Union has another multiplicity; give both the same")
                flat += pattern.patterns
            elif isinstance(pattern, DilatedPattern) or hasattr(pattern, "entries"):
                flat.append(pattern)
            else:
                raise ValueError(f"patterns has {pattern!r}; give block-sparse patterns or a DilatedPattern")
        object.__setattr__(self, "patterns", tuple(flat))
        blocks = self.block_patterns
        if not blocks:
            raise ValueError("the union has no block-sparse pattern; use dilated_attention for a DilatedPattern alone")
        for pattern in blocks:
            if pattern.block_size % self.block_size:
                raise ValueError(
                    f"block sizes are {[pattern.block_size for pattern in blocks]}; give multiples of the smallest"
                )
        if not self.multiplicity and sum(hasattr(pattern, "select") for pattern in blocks) > 1:
            raise ValueError("the union selects by content twice; give one ContentTopK with a larger keep")
        if not self.multiplicity and any(
            hasattr(pattern, "select") and pattern.block_size != self.block_size for pattern in blocks
        ):
            raise ValueError("ContentTopK in a union needs the smallest block_size of all; give all the same")
        attach(self)

    @property
    def block_patterns(self) -> tuple[BlockPattern, ...]:
        """The members that work on blocks."""
        return tuple(pattern for pattern in self.patterns if not isinstance(pattern, DilatedPattern))

    @property
    def dilated(self) -> tuple[DilatedPattern, ...]:
        """The members that work on pairs."""
        return tuple(pattern for pattern in self.patterns if isinstance(pattern, DilatedPattern))

    @property
    def block_size(self) -> int:
        """The smallest block size of a member."""
        return min(pattern.block_size for pattern in self.block_patterns)

    @property
    def per_head(self) -> bool:
        """Whether heads have lists of their own; the pairs of dilated members differ by head in shared lists too."""
        return any(pattern.per_head for pattern in self.block_patterns)

    def entries(self, query: QueryBlocks) -> Entries:
        """See `blocks.BlockPattern`."""
        heads, count = query.heads if self.per_head else 1, len(query.block)
        parts = [_refined(pattern, query, self.block_size) for pattern in self.block_patterns]
        shared = [not pattern.per_head for pattern in self.block_patterns]
        if self.dilated:
            runs = [run for pattern in self.dilated for run in _covering(pattern, query, self.block_size)]
            row, column = entries_of_runs(query, runs)[:2]
            parts.append(Entries(row, column, torch.zeros_like(row, dtype=torch.bool)))
            shared.append(True)
        parts = [
            _for_heads(part, heads, count) if alike and heads > 1 else part
            for part, alike in zip(parts, shared, strict=True)
        ]
        row, column = torch.cat([part.row for part in parts]), torch.cat([part.column for part in parts])
        if all(part.whole is None for part in parts):
            return Entries(row, column)
        whole = torch.cat(
            [torch.ones_like(part.row, dtype=torch.bool) if part.whole is None else part.whole for part in parts]
        )
        words = next((part.bits.shape[1] for part in parts if part.bits is not None), None)
        bits = None
        if words is not None:
            bits = torch.cat(
                [row.new_zeros(len(part.row), words).int() if part.bits is None else part.bits for part in parts]
            )
        return Entries(row, column, whole, bits, self.dilated)


def _for_heads(entries: Entries, heads: int, tiles: int) -> Entries:
    """Entries of shared lists, once for every head."""
    head = torch.arange(heads, device=entries.row.device)[:, None]
    row = (entries.row + head * tiles).reshape(-1)
    whole = None if entries.whole is None else entries.whole.repeat(heads)
    return Entries(row, entries.column.repeat(heads), whole)


def _refined(pattern: BlockPattern, query: QueryBlocks, block_size: int) -> Entries:
    """Entries of a pattern in blocks of ``block_size``, of which its own are a multiple."""
    factor = pattern.block_size // block_size
    if factor == 1:
        return pattern.entries(query)
    count = (query.total + factor - 1).div(factor, rounding_mode="floor")
    coarse = query._replace(block=query.block.div(factor, rounding_mode="floor"), total=count)
    row, column = pattern.entries(coarse)[:2]
    part = torch.arange(factor, device=row.device)
    return Entries(row.repeat_interleave(factor), (column[:, None] * factor + part).reshape(-1))


def _covering(pattern: DilatedPattern, query: QueryBlocks, block_size: int) -> list[Run]:
    """The blocks that hold a key of the segments that a query block has rows in."""
    runs = []
    first = query.block * block_size
    for branch in pattern.branches:
        length = branch.segment_length
        low = first.div(length, rounding_mode="floor") * length
        high = ((first + block_size - 1).div(length, rounding_mode="floor") + 1) * length
        start = low.div(block_size, rounding_mode="floor")
        runs.append(Run(start, 1, (high + block_size - 1).div(block_size, rounding_mode="floor") - start))
    return runs


def members_of(pattern: Any) -> tuple[Any, ...]:
    """The patterns of a union, or the one pattern."""
    return pattern.patterns if isinstance(pattern, Union) else (pattern,)


def without_choices(pattern: Any) -> Any:
    """``pattern`` with only those blocks of its bound `ContentTopK` that are seen without a choice."""
    members = tuple(getattr(member, "always", member) for member in members_of(pattern))
    return Union(members, pattern.multiplicity) if isinstance(pattern, Union) else members[0]


def bind(pattern: Any, tensors: Sequence[Tensor]) -> Any:
    """``pattern``, as `codes.decode` made it, with the tensors that it needs."""
    if not tensors:
        return pattern
    if not isinstance(pattern, Union):
        return pattern.bound(tensors)
    members, rest = [], list(tensors)
    for member in pattern.patterns:
        if hasattr(member, "bound"):
            taken = member.num_tensors
            members.append(member.bound(rest[:taken]))
            rest = rest[taken:]
        else:
            members.append(member)
    return Union(tuple(members), pattern.multiplicity)


register(DilatedPattern)
