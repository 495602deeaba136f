"""One call of block-sparse attention with everything but the tensors' values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from ...patterns import DilatedPattern
from ...patterns.blocks import BlockPattern, BlockPlan, Tiles, block_plan, tiles_of
from ...patterns.codes import decode
from ...patterns.content import SelectedBlocks
from ...patterns.union import Union, bind, members_of, without_choices
from ...types import Document, Options, Shape
from ..problem import Problem
from ..tables import covered
from . import content_lists
from .packing import Packed, pack
from .rectangles import TILE, BackwardLists, ForwardLists, backward_lists, forward_lists


@dataclass(frozen=True, eq=False)
class SparseProblem:
    """Pattern, sizes, options and where documents lie."""

    pattern: BlockPattern
    shape: Shape
    options: Options
    documents: tuple[Document, ...]
    dtype: torch.dtype
    device: str
    has_mask: bool = False
    given: BlockPlan | None = None
    """The lists, where they are no pattern's on ``documents``."""

    @cached_property
    def plan(self) -> BlockPlan:
        """The lists of key blocks of this problem, on its device."""
        if self.given is not None:
            return self.given
        return block_plan(
            self.pattern, self.shape, self.documents, is_causal=self.options.is_causal, device=self.device
        )

    @cached_property
    def selection(self) -> Tensor | None:
        """(B, H, Nq, keep) blocks that rows have chosen for themselves; None where they see what their tiles list."""
        by_pairs = isinstance(self.pattern, Union) and self.pattern.dilated
        if self.given is not None or not self.options.is_causal or by_pairs:
            return None
        return next((m.selection for m in members_of(self.pattern) if isinstance(m, SelectedBlocks)), None)

    @cached_property
    def listed(self) -> SparseProblem:
        """The problem of those blocks that all rows of a tile see: this one, unless rows choose for themselves."""
        if self.selection is None:
            return self
        rest = self.shape, self.options, self.documents, self.dtype, self.device, self.has_mask
        if isinstance(self.pattern, SelectedBlocks):
            return _always_seen(self.pattern.always, *rest)
        return SparseProblem(without_choices(self.pattern), *rest)

    @cached_property
    def packed(self) -> Packed:
        """Where rows choose for themselves: what they chose, by key tile."""
        assert self.selection is not None
        overlapping = None if isinstance(self.pattern, SelectedBlocks) else self.listed.plan
        return pack(self.selection, self.shape, self.tiles, overlapping)

    @property
    def tiles(self) -> Tiles:
        """The tiles of query and key."""
        return tiles_of(
            self.shape, self.documents, self.pattern.block_size, is_causal=self.options.is_causal, device=self.device
        )

    @property
    def by_content(self) -> bool:
        """Whether content has chosen blocks of 128 for whole tiles, whose lists are made without a plan."""
        whole = self.given is None and not self.options.is_causal and isinstance(self.pattern, SelectedBlocks)
        return whole and self.pattern.block_size == TILE

    @cached_property
    def _content(self) -> content_lists.Columns:
        assert isinstance(self.pattern, SelectedBlocks)
        return content_lists.Columns(self.pattern, self.tiles)

    @cached_property
    def every_row_has_keys(self) -> bool:
        """Whether no row is without keys, as far as lists can tell: blocks that are seen whole, and no mask."""
        if self.selection is not None:
            return self.listed.every_row_has_keys
        if self.by_content:  # every row sees its own block
            return not self.has_mask and covered(self.carrier, "query")
        plan = self.plan
        listed = plan.whole is None and not self.has_mask and covered(self.carrier, "query")
        return listed and bool((plan.counts > 0).all())

    @cached_property
    def forward_lists(self) -> ForwardLists:
        """The lists as the Hopper kernel of the forward pass reads them."""
        shape = self.shape
        if self.by_content:
            return content_lists.forward_lists(self._content, shape, self.tiles)
        return forward_lists(
            self.plan, shape.heads, shape.query_rows, shape.key_rows, is_causal=self.options.is_causal
        )  # fmt: skip

    @cached_property
    def backward_lists(self) -> BackwardLists:
        """The lists as the Hopper kernel of the backward pass reads them."""
        shape = self.shape
        if self.by_content:
            return content_lists.backward_lists(self._content, shape, self.tiles)
        return backward_lists(
            self.plan, shape.heads, shape.kv_heads, shape.query_rows, shape.key_rows,
            is_causal=self.options.is_causal,
        )  # fmt: skip

    @cached_property
    def carrier(self) -> Problem:
        """The same tensors under some dilated pattern: what helpers that look at no pattern take."""
        lone = DilatedPattern((1,), (1,))
        return Problem(lone, self.shape, self.options, self.documents, self.dtype, self.device, self.has_mask)


@lru_cache(maxsize=32)
def _always_seen(*arguments: Any) -> SparseProblem:
    """Made once, for these lists are no content's."""
    return SparseProblem(*arguments)


@lru_cache(maxsize=32)
def _cached(code: str, *rest: Any) -> SparseProblem:
    return SparseProblem(decode(code), *rest)


def make_problem(code: str, tensors: Sequence[Tensor], *rest: Any) -> SparseProblem:
    """The problem of a pattern's code and tensors; one for equal calls, so that lists are made once."""
    if not tensors:
        return _cached(code, *rest)
    return SparseProblem(bind(decode(code), tensors), *rest)
