"""Tensors laid out by tiles, and the calls of a fused kernel that cover a plan of blocks.

A tensor (B, N, heads, D) becomes (heads, tiles, b, D): every tile has b rows, of which those that its document does
not have are zeros. So any list of key tiles is a gather of contiguous memory, and where lists move with their query
tiles (a window) or stay (global tokens) it is a view.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...patterns.blocks import BlockPlan

_GATHERED = 1 << 22
"""Elements of the keys of one call: more would leave the caches, and in the backward pass take memory."""
_LONG = 4
"""Tiles that a view must span on average to be worth a call, and a merge, of its own."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the rows of a table of tiles lie: flat row (tiles, b) in (B * N) rows, and which of them exist."""

    rows: Tensor
    exists: Tensor

    @cached_property
    def complete(self) -> bool:
        """Whether all rows of all tiles exist."""
        return bool(self.exists.all())

    @cached_property
    def regular(self) -> bool:
        """Whether the tiles are complete and follow one another from flat row 0 on."""
        in_turn = self.rows[:, 0] == torch.arange(len(self.rows), device=self.rows.device) * self.rows.shape[1]
        return self.complete and bool(in_turn.all())

    def read(self, tensor: Tensor) -> Tensor:
        """(heads, tiles, b, D) of a (B, N, heads, D) tensor to read from: a view where the tiles are regular."""
        count, size = self.rows.shape
        if self.regular and count * size == tensor.shape[0] * tensor.shape[1]:
            return tensor.flatten(0, 1).unflatten(0, (count, size)).permute(2, 0, 1, 3)
        return self.tiled(tensor)

    def tiled(self, tensor: Tensor) -> Tensor:
        """(heads, tiles, b, D) of a (B, N, heads, D) tensor, contiguous; zeros where no row exists."""
        flat = tensor.flatten(0, 1)
        found = flat.new_empty(tensor.shape[2], *self.rows.shape, tensor.shape[3])
        picked = flat.index_select(0, self.rows.clamp(0, flat.shape[0] - 1).reshape(-1))
        found.copy_(picked.unflatten(0, self.rows.shape).permute(2, 0, 1, 3))
        if not self.complete:
            found.masked_fill_(~self.exists[..., None], 0)
        return found

    def restored(self, tiled: Tensor, like: Tensor, fill: float = 0.0) -> Tensor:
        """(B, N, heads, D) of a (heads, tiles, b, D) tensor; ``fill`` in rows of no tile."""
        batch, rows = like.shape[:2]
        out = tiled.new_full((batch * rows, tiled.shape[0], tiled.shape[3]), fill)
        out.index_copy_(0, self.rows[self.exists], tiled.permute(1, 2, 0, 3)[self.exists])
        return out.unflatten(0, (batch, rows))


def layout(tiles: Tensor, block_size: int, rows: int) -> Layout:
    """The layout of a tile table (batch entry, first row, position, rows) over batch entries of ``rows`` rows."""
    batch, first, position, count = tiles.long().unbind(1)
    low = position % block_size
    steps = torch.arange(block_size, device=tiles.device)
    index = (batch * rows + first - low)[:, None] + steps
    return Layout(index, (steps >= low[:, None]) & (steps < (low + count)[:, None]))


@dataclass(frozen=True, slots=True)
class Part:
    """One fused call: a problem for each of ``rows``, over the ``keys.shape[1]`` key tiles that it lists."""

    rows: Tensor
    """(problems,) head * T + query tile, each once."""
    keys: Tensor
    """(problems, n) kv head * S + key tile."""
    low: int
    high: int
    """Rows of a key tile that exist; of the whole tile if n > 1."""
    step: int | None
    """The keys of a problem are contiguous, and start this many tiles after those of the one before; None: neither."""
    is_causal: bool
    fresh: bool
    """Whether no part before had these rows."""

    def take(self, tiled: Tensor) -> Tensor:
        """(1, problems, keys, D) of a (heads, tiles, b, D) tensor of keys: a view if the lists allow it."""
        flat = tiled.flatten(0, 1)
        size, dim = flat.shape[1], flat.shape[2]
        problems, count = self.keys.shape
        if self.step is not None:
            strides = (0, self.step * size * dim, dim, 1)
            offset = flat.storage_offset() + int(self.keys[0, 0]) * size * dim
            found = flat.as_strided((1, problems, count * size, dim), strides, offset)
        else:
            found = flat.index_select(0, self.keys.reshape(-1)).view(1, problems, count * size, dim)
        return found if count > 1 else found[:, :, self.low : self.high]


def _views(tiles: Tensor, columns: Tensor) -> list[tuple[int, int, int]] | None:
    """Cut the columns of alike lists into (first, last + 1, step) pieces that are views, or None if they are not.

    ``columns`` (tiles, n): the lists of neighbouring query tiles.
    """
    if len(tiles) < 2 or not bool((tiles.diff() == 1).all()):
        return None
    moved = columns.diff(dim=0)
    step = moved[0]
    if not bool(((moved == step) & (step >= 0) & (step <= 1)).all()):
        return None
    first, steps = columns[0].tolist(), step.tolist()
    cuts = [0, *(c for c in range(1, len(first)) if first[c] != first[c - 1] + 1 or steps[c] != steps[c - 1])]
    if len(cuts) * _LONG > len(first) + _LONG:
        return None
    return [(a, b, steps[a]) for a, b in zip(cuts, [*cuts[1:], len(first)], strict=True)]


def parts(plan: BlockPlan, heads: int, kv_heads: int, width: int, *, is_causal: bool) -> Iterator[Part]:
    """The calls that cover a plan of whole blocks, for keys of ``width`` columns."""
    size = plan.block_size
    count, keys = plan.query_tiles.shape[0], plan.key_tiles.shape[0]
    low = plan.key_tiles[:, 2].long() % size
    high = low + plan.key_tiles[:, 3]
    ragged = (low > 0) | (high < size)
    entry_row, column = plan.entry_rows, plan.columns.long()
    diagonal = torch.zeros_like(column, dtype=torch.bool)
    if is_causal:
        own = plan.query_tiles[entry_row % count].long()
        other = plan.key_tiles[column].long()
        # Of a block that lies on several ranks a tile may hold the rows before the query's alone: all are seen.
        diagonal = (own[:, 2] // size == other[:, 2] // size) & (other[:, 2] + other[:, 3] > own[:, 2])
    per_call = max(1, _GATHERED // (size * width))
    regular = ~diagonal & ~ragged[column]
    yield from _regular(plan, entry_row[regular], column[regular], heads, kv_heads, per_call)

    alone = ~regular
    if not bool(alone.any()):
        return
    # Causal squares and ragged tiles: one key tile a problem, alike in which of its rows exist, no query tile twice.
    entry_row, column, kind = (
        given[alone]
        for given in (entry_row, column, (diagonal.long() * size + low[column]) * (size + 1) + high[column])
    )
    order = torch.argsort(kind * plan.counts.numel() + entry_row, stable=True)
    entry_row, column, kind = entry_row[order], column[order], kind[order]
    same = torch.zeros_like(kind)
    same[1:] = (kind.diff() == 0) & (entry_row.diff() == 0)
    turn = same.cumsum(0) - torch.where(same == 0, same.cumsum(0), 0).cummax(0).values
    row_heads = 1 if plan.per_head else heads
    kind = kind + turn * 2 * size * (size + 1)
    for value in torch.unique(kind).tolist():
        chosen = kind == value
        rest, top = divmod(value % (2 * size * (size + 1)), size + 1)
        square, bottom = divmod(rest, size)
        rows, tiles = _every_head(entry_row[chosen], column[chosen][:, None], row_heads, count)
        tiles = tiles + (rows // count * kv_heads // heads * keys)[:, None]
        for begin in range(0, len(rows), per_call):
            here = slice(begin, begin + per_call)
            yield Part(rows[here], tiles[here], bottom, top, None, bool(square), False)


def _every_head(rows: Tensor, columns: Tensor, heads: int, count: int) -> tuple[Tensor, Tensor]:
    """Rows and lists of head 0 for each of ``heads`` heads."""
    if heads == 1:
        return rows, columns
    head = torch.arange(heads, device=rows.device)[:, None]
    return (rows + head * count).reshape(-1), columns.repeat(heads, 1)


def _regular(
    plan: BlockPlan, entry_row: Tensor, column: Tensor, heads: int, kv_heads: int, per_call: int
) -> Iterator[Part]:
    """Calls of whole key tiles: query tiles that list equally many of them share calls."""
    size = plan.block_size
    count, keys = plan.query_tiles.shape[0], plan.key_tiles.shape[0]
    number = torch.bincount(entry_row, minlength=plan.counts.numel())
    first = number.cumsum(0) - number
    for length in torch.unique(number).tolist():
        if length == 0:
            continue
        rows = (number == length).nonzero()[:, 0]
        columns = column[first[rows][:, None] + torch.arange(length, device=rows.device)]
        views = None if plan.per_head else _views(rows, columns)
        if views is None:
            rows, tiles = _every_head(rows, columns, 1 if plan.per_head else heads, count)
            tiles = tiles + (rows // count * kv_heads // heads * keys)[:, None]
            step = max(1, per_call // length)
            for begin in range(0, len(rows), step):
                here = slice(begin, begin + step)
                yield Part(rows[here], tiles[here], 0, size, None, False, True)
            continue
        for head in range(heads):
            shift = head * kv_heads // heads * keys
            for number_of_view, (a, b, moved) in enumerate(views):
                step = max(1, per_call // (b - a))
                for begin in range(0, len(rows), step):
                    here = slice(begin, begin + step)
                    yield Part(
                        rows[here] + head * count, columns[here, a:b] + shift, 0, size, moved, False,
                        number_of_view == 0,
                    )  # fmt: skip
