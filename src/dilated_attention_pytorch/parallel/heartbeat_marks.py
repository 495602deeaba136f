"""How far a rank is in a sequence of exchanges that all ranks have to make alike, in a form that can be compared.

Ranks read each other's entries at different times, so a rank keeps marks of old exchanges too: the newest whose
number is a multiple of 1, of 2, of 4, and so on. Two ranks that are about as far then share marks.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

_CLASSES = 24


class Marks:
    """The number of exchanges begun, and checksums of what they were."""

    def __init__(self) -> None:
        self.count = 0
        self._chain = 0
        self._kept: dict[int, tuple[int, int, int, str]] = {}

    def add(self, step: int, phase: str) -> int:
        """Begin an exchange in a phase of a step; its number, from 1."""
        self._chain = zlib.crc32(f"{step}/{phase}".encode(), self._chain)
        self.count += 1
        mark = (self.count, self._chain, step, phase)
        for power in range(_CLASSES):
            if self.count % (1 << power):
                break
            self._kept[power] = mark
        return self.count

    def last(self) -> list[int]:
        """The newest mark as integers: number, checksum, step, and 1 for a forward pass."""
        number, chain, step, phase = self._kept[0]
        return [number, chain, step, int(phase == "forward")]

    def entries(self) -> dict[str, list[Any]]:
        """[checksum, step, phase] by number of the exchange."""
        return {str(number): [*rest] for number, *rest in self._kept.values()}


def describe(mark: Sequence[int]) -> dict[str, list[Any]]:
    """What `Marks.last` gave on another rank, as one of its entries."""
    number, chain, step, forward = mark
    return {str(number): [chain, step, "forward" if forward else "backward"]}


def odd_one_out(entries: Mapping[int, Mapping[str, list[Any]]]) -> tuple[int, str] | None:
    """The rank whose checksum differs from most ranks' at the first exchange where any do, and how it differs.

    Of as many against as many, it is the rank that is further ahead: in a later step, or in a forward pass where the
    others are still in the backward.

    >>> marks = {rank: Marks() for rank in range(3)}
    >>> for rank in marks:
    ...     for step in (1, 2, 3):
    ...         _ = None if (rank, step) == (1, 2) else marks[rank].add(step, "forward")
    >>> odd_one_out({rank: mark.entries() for rank, mark in marks.items()})
    (1, 'its exchange 2 is forward of step 3, rank 0 has forward of step 2')
    """
    for number in sorted({int(number) for marks in entries.values() for number in marks}):
        present = {rank: marks[str(number)] for rank, marks in entries.items() if str(number) in marks}
        votes = Counter(mark[0] for mark in present.values())
        if len(votes) < 2:
            continue

        def ahead(rank: int, present: Mapping[int, list[Any]] = present, votes: Counter[int] = votes) -> Any:
            checksum, step, phase = present[rank]
            return -votes[checksum], step, phase == "forward", -rank

        odd = max(present, key=ahead)
        other = min(rank for rank in present if present[rank][0] != present[odd][0])
        mine, theirs = (f"{phase} of step {step}" for _, step, phase in (present[odd], present[other]))
        return odd, f"its exchange {number} is {mine}, rank {other} has {theirs}"
    return None
