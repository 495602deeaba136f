"""Blocks that the content of the tensors selects: summaries of key blocks, and the best of them for each query."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from .block_sparse import check_block_size, check_integer
from .blocks import Entries, QueryBlocks, Run, entries_of_runs, spread
from .codes import attach, register

Pooling = Literal["mean", "sub_means", "min_max", "moments"]


@register
@dataclass(frozen=True)
class ContentTopK:
    """The key blocks that look best for a query, beside its neighbours (MoBA, arXiv 2502.13189; Quest, 2406.10774).

    Causal: every query token sees its own block (up to itself), the ``always_local`` blocks before it, the first
    ``always_first`` blocks, and of the other past blocks the ``keep`` with the highest scores. Not causal: the rows
    of a query block are averaged and select together, among all blocks of the document. No gradient flows through
    the choice.

    The score of a block estimates the weight of its keys from a summary, by ``pooling``:

    - ``"mean"``: query . mean of the keys (MoBA);
    - ``"sub_means"``: the largest of query . mean over ``sub_blocks`` parts of the block;
    - ``"min_max"``: the largest score that a key between the least and the greatest entry of each column can have
      (Quest);
    - ``"moments"``: mean and half the variance of the scores, for keys with uncorrelated columns: the logarithm of
      the block's mean weight if its scores were normal.

    Args:
        keep: blocks to select for every query, beside those that are always seen.
        always_local: blocks on each side of a query's own (only before it when causal).
        always_first: first blocks of the document.
        pooling: how a block is summed up.
        block_size: tokens of a block: 16, 32, 64 or 128.
        sub_blocks: parts of a block for ``"sub_means"``, a divisor of ``block_size``: more parts find a single key
            better, and selecting costs ``sub_blocks / block_size`` of the dense scores.

    >>> ContentTopK(4, always_local=1, block_size=64).pooling
    'mean'
    """

    keep: int
    always_local: int = 0
    always_first: int = 0
    pooling: Pooling = "mean"
    block_size: int = 128
    sub_blocks: int = 4
    code: str = field(init=False, repr=False, compare=False)
    per_head = True
    num_tensors = 1

    def __post_init__(self) -> None:
        check_block_size(self.block_size)
        check_integer("keep", self.keep, 1)
        check_integer("always_local", self.always_local, 0)
        check_integer("always_first", self.always_first, 0)
        check_integer("sub_blocks", self.sub_blocks, 1)
        if self.block_size % self.sub_blocks:
            raise ValueError(f"sub_blocks is {self.sub_blocks}; give a divisor of block_size {self.block_size}")
        if self.pooling not in get_args(Pooling):
            raise ValueError(f"pooling is {self.pooling!r}; choose one of {', '.join(map(repr, get_args(Pooling)))}")
        attach(self)

    def summaries(self, keys: Tensor, exists: Tensor | None, dtype: torch.dtype) -> Tensor:
        """(G, S, parts, D) in ``dtype`` of keys (G, S, b, D); rows that do not exist (S, b) take no part.

        None: all rows exist.
        """
        shown = None if exists is None else exists[None, ..., None]
        if self.pooling == "min_max":
            low = keys if shown is None else keys.masked_fill(~shown, torch.inf)
            high = keys if shown is None else keys.masked_fill(~shown, -torch.inf)
            found = torch.stack([low.amin(2), high.amax(2)], 2).to(dtype)
            return found if exists is None else found.masked_fill(~exists.any(1)[None, :, None, None], 0.0)
        groups = self.sub_blocks if self.pooling == "sub_means" else 1
        rows = (keys if shown is None else keys.masked_fill(~shown, 0.0)).unflatten(2, (groups, -1))
        if exists is None:
            number: Tensor | int = rows.shape[3]
        else:
            number = exists.unflatten(1, (groups, -1)).sum(2).clamp(min=1)[None, ..., None]
        mean = rows.sum(3, dtype=dtype) / number
        if self.pooling == "mean" or (self.pooling == "sub_means" and exists is None):
            return mean
        if self.pooling == "sub_means":  # a part without keys takes the mean of the block, which is no maximum
            assert exists is not None
            whole = rows.sum((2, 3), dtype=dtype) / exists.sum(1).clamp(min=1)[None, :, None]
            empty = ~exists.unflatten(1, (groups, -1)).any(2)
            return torch.where(empty[None, ..., None], whole.unsqueeze(2), mean)
        squares = (rows - mean.unsqueeze(3)).square()
        if shown is not None:
            squares = squares.masked_fill(~shown.unsqueeze(2), 0.0)
        return torch.cat([mean, squares.sum(3) / number], 2)

    def scores(self, query: Tensor, summaries: Tensor, scale: float) -> Tensor:
        """(..., rows, S) of queries (..., rows, D) and summaries (..., S, parts, D): larger is better."""
        if self.pooling == "min_max":
            low, high = summaries.unbind(-2)
            query = query * scale
            return query.clamp(min=0) @ high.mT + query.clamp(max=0) @ low.mT
        if self.pooling == "moments":
            mean, variance = summaries.unbind(-2)
            return query @ mean.mT * scale + query.square() @ variance.mT * (scale * scale / 2)
        parts = summaries.shape[-2]
        found = query @ summaries.flatten(-3, -2).mT * scale
        return found.unflatten(-1, (-1, parts)).amax(-1)

    def candidates(self, query: QueryBlocks) -> tuple[Tensor, Tensor]:
        """(T,) first and last + 1 block that a tile may select; those around a tile itself are left out later."""
        first = torch.full_like(query.block, self.always_first)
        return first, query.block - self.always_local if query.is_causal else query.total

    def select(self, query: Tensor, summaries: Tensor, allowed: Tensor, scale: float) -> Tensor:
        """The selected key tiles, (..., rows, keep) int64, -1 where there are fewer.

        Args:
            query: (..., rows, D), the pooled queries if not causal.
            summaries: (..., S, parts, D).
            allowed: (..., rows, S) bool, the tiles that a row may select.
            scale: factor of the scores.
        """
        found = self.scores(query, summaries, scale).masked_fill(~allowed, -torch.inf)
        best, index = found.topk(min(self.keep, found.shape[-1]), dim=-1)
        index = index.masked_fill(best == -torch.inf, -1)
        missing = self.keep - index.shape[-1]
        return torch.nn.functional.pad(index, (0, missing), value=-1) if missing else index

    def bound(self, tensors: Sequence[Tensor]) -> SelectedBlocks:
        """The lists of a selection (B, H, N_q, keep) of block indices."""
        return SelectedBlocks(self, tensors[0])

    def entries(self, query: QueryBlocks) -> Entries:
        """Needs a selection: see `bound`."""
        raise ValueError("ContentTopK selects from the tensors; its lists exist only within sparse_attention")


@register
@dataclass(frozen=True)
class AlwaysSeen:
    """The blocks of a `ContentTopK` that need no choice: those around a query block, and the first ones."""

    always_local: int
    always_first: int
    block_size: int
    code: str = field(init=False, repr=False, compare=False)
    per_head = False

    def __post_init__(self) -> None:
        attach(self)

    def entries(self, query: QueryBlocks) -> Entries:
        """See `blocks.BlockPattern`."""
        runs = [Run(query.block - self.always_local, 1, 2 * self.always_local + 1)]
        runs += [Run(torch.zeros_like(query.block), 1, self.always_first)] if self.always_first else []
        return entries_of_runs(query, runs)


@dataclass(frozen=True, eq=False)
class SelectedBlocks:
    """What `ContentTopK` has selected on one call."""

    pattern: ContentTopK
    selection: Tensor
    """(B, H, N_q, keep) int32: blocks of a row's document, -1 for none."""
    per_head = True
    num_tensors = 1

    @property
    def block_size(self) -> int:
        """Positions of a block."""
        return self.pattern.block_size

    @property
    def code(self) -> str:
        """Text of the pattern; the selection goes beside it."""
        return self.pattern.code

    @property
    def always(self) -> AlwaysSeen:
        """The blocks that are seen without a choice."""
        return AlwaysSeen(self.pattern.always_local, self.pattern.always_first, self.block_size)

    def entries(self, query: QueryBlocks) -> Entries:
        """See `blocks.BlockPattern`."""
        count = len(query.block)
        row, column = self.always.entries(query)[:2]
        head = torch.arange(query.heads, device=row.device)[:, None]
        row, column = (row + head * count).reshape(-1), column.repeat(query.heads)
        batch, start, _, rows = query.tiles.long().unbind(1)
        if not query.is_causal:  # one selection a tile
            chosen = self.selection[batch, :, start].transpose(0, 1).long()  # (H, T, keep)
            flat = (torch.arange(query.heads * count, device=row.device)[:, None]).expand(-1, chosen.shape[2])
            real = chosen.reshape(-1) >= 0
            return Entries(
                torch.cat([row, flat.reshape(-1)[real]]), torch.cat([column, chosen.reshape(-1)[real]])
            )  # fmt: skip
        tile, place = spread(start, rows)
        chosen = self.selection[batch[tile], :, place].transpose(0, 1).long()  # (H, rows, keep)
        step = (place - start[tile])[None, :, None].expand_as(chosen)
        owner = (head * count + tile)[..., None].expand_as(chosen)
        real = chosen >= 0
        chosen, step, owner = chosen[real], step[real], owner[real]
        width = int(query.total.max()) if count else 1
        flat, place = torch.unique(owner * width + chosen, return_inverse=True)
        words = -(-self.block_size // 32)
        bits = torch.zeros(len(flat), words, dtype=torch.int64, device=row.device)
        # Every row selects a block at most once, so a sum of its bit is the bit.
        bits.index_put_((place, step // 32), torch.ones_like(step) << (step % 32), accumulate=True)
        signed = torch.where(bits >= 1 << 31, bits - (1 << 32), bits).int()
        listed = len(row)
        whole = torch.cat([torch.ones(listed, dtype=torch.bool, device=row.device), torch.zeros_like(flat).bool()])
        return Entries(
            torch.cat([row, flat // width]),
            torch.cat([column, flat % width]),
            whole,
            torch.cat([signed.new_zeros(listed, words), signed]),
        )
