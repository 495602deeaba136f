"""Size classes: requests of nearly the same size share buffers, for a bounded share of wasted bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Bucketing:
    """Rounds sizes up to classes that divide every power of two into equal steps.

    Args:
        max_waste: most bytes that a block may have beyond those asked for, as a share of those asked for, above 0 and
            at most 0.25. Smaller is more classes, and so fewer requests that find a block.

    Raises:
        ValueError: a share outside these bounds.

    The spacing is that of size-segregated allocators such as jemalloc (Evans, BSDCan 2006), which has four classes to
    a power of two.

    >>> [Bucketing().size(n) for n in (7, 9, 100, 1000, 1025)]
    [7, 10, 112, 1024, 1280]
    """

    max_waste: float = 0.25

    def __post_init__(self) -> None:
        if not 0 < self.max_waste <= 0.25:
            raise ValueError(f"max_waste is {self.max_waste}; give a share above 0 and at most 0.25")

    @property
    def steps(self) -> int:
        """Classes of a power of two: a power of two too, so that every power of two is a class."""
        return 1 << (math.ceil(1 / self.max_waste) - 1).bit_length()

    def size(self, asked: int) -> int:
        """The smallest class of at least ``asked`` bytes."""
        # From 2^n up to 2^(n + 1) classes are 2^n / steps apart, rounded down: a byte apart where that is less.
        step = max((1 << max(asked - 1, 1).bit_length() - 1) // self.steps, 1)
        return -(-asked // step) * step
