"""One call of the operator with everything but the tensors' values: what a backend is asked to compute."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from ..patterns import DilatedPattern
from ..patterns.plan import branch_only, plan
from ..types import Document, Options, Plan, Shape


@dataclass(frozen=True, slots=True)
class Part:
    """Where a problem's heads, rows and branches lie in a larger problem: dropout masks count from its first ones."""

    heads: int
    """Query heads of the larger problem."""
    head: int
    ranges: tuple[tuple[int, int], ...]
    """Rows of the larger problem, in the order in which they lie here."""
    branch: int = 0

    def rows(self, device: torch.device) -> torch.Tensor:
        """The row in the larger problem of each row: int64."""
        return torch.cat([torch.arange(start, stop, device=device) for start, stop in self.ranges])


@dataclass(frozen=True)
class Problem:
    """Pattern, sizes, options and where documents lie; hashable, so that plans and choices are cached by it."""

    pattern: DilatedPattern
    shape: Shape
    options: Options
    documents: tuple[Document, ...]
    dtype: torch.dtype
    device: str
    has_mask: bool = False
    fold: bool = True
    """Whether batch and rows are one affine axis of every tensor."""
    part: Part | None = None
    """Set where it is part of a larger one and heads or dropout have to know."""

    @cached_property
    def plan(self) -> Plan:
        """The fused calls of this problem (cached)."""
        options = self.options
        return plan(
            self.pattern,
            self.shape,
            self.documents,
            is_causal=options.is_causal,
            zeros=options.padding == "zeros",
            fold=self.fold,
        )

    def branch(self, index: int) -> Problem:
        """The same problem with one branch alone."""
        return replace(self, pattern=branch_only(self.pattern, index))
