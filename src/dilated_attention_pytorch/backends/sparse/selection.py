"""The operator that lets `ContentTopK` select key blocks: summaries of all of them, then the best for each query."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...merge import accumulator_dtype
from ...patterns.blocks import Tiles, tiles_of
from ...patterns.codes import decode
from ...patterns.content import ContentTopK
from ...patterns.union import members_of
from ...types import Document, Shape
from ..documents import read_documents
from ..ops import _register, no_autocast
from .choosing import choose, has_kernel
from .tiled import Layout, layout

_SCORES = 1 << 23
"""Scores that exist at a time."""


def _select(
    query: Tensor,
    key: Tensor,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    key_starts: Tensor | None,
    pattern: str,
    key_start: int,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    """(B, H, Nq, keep) int32: blocks that query rows select, -1 for none; not causal, at a tile's first row alone."""
    content: ContentTopK = decode(pattern)
    batch, rows, heads, dim = query.shape
    kv_heads = key.shape[2]
    shape = Shape(batch, rows, key.shape[1], heads, kv_heads, dim, dim)
    documents = read_documents(
        shape, key_start=key_start, key_starts=key_starts, cu_seqlens=cu_seqlens, suffix_mask=None
    )  # fmt: skip
    tiles, own, other = _laid_out(shape, documents, content.block_size, is_causal, query.device)
    found = torch.full((batch, heads, rows, content.keep), -1, dtype=torch.int32, device=query.device)
    if len(tiles.queries.block):
        with no_autocast(query.device.type):
            _fill(found, content, query, key, key_padding_mask, tiles, own, other, scale)
    return found


@lru_cache(maxsize=16)
def _laid_out(
    shape: Shape, documents: tuple[Document, ...], size: int, is_causal: bool, device: torch.device
) -> tuple[Tiles, Layout, Layout]:
    """The tiles of a call, and where the rows of query and key lie in them; equal calls share them."""
    tiles = tiles_of(shape, documents, size, is_causal=is_causal, device=device)
    return tiles, layout(tiles.queries.tiles, size, shape.query_rows), layout(tiles.keys, size, shape.key_rows)


def _fill(
    found: Tensor,
    content: ContentTopK,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    tiles: Tiles,
    own: Layout,
    other: Layout,
    scale: float | None,
) -> None:
    """Write the selection of every row into ``found``."""
    acc = accumulator_dtype(query.dtype)
    exists = other.exists
    if mask is not None:
        exists = exists & ~other.tiled(mask[:, :, None, None])[0, ..., 0]
    alone = None if mask is None and other.complete else exists
    summaries = content.summaries(other.read(key), alone, acc)  # (G, S, parts, D)
    scale = 1 / math.sqrt(query.shape[3]) if scale is None else scale
    choose_blocks(found, content, query, own, tiles, summaries, None if mask is None else exists.any(1), scale)


def choose_blocks(
    found: Tensor,
    content: ContentTopK,
    query: Tensor,
    own: Layout,
    tiles: Tiles,
    summaries: Tensor,
    filled: Tensor | None,
    scale: float,
) -> None:
    """Write what the rows of every query tile select into ``found`` (B, H, Nq, keep), a few tiles at a time.

    Args:
        found: its B * Nq rows are the first of the flat rows that ``own`` counts; the others select nothing. Not
            causal, only the first row of a tile is written.
        content: the pattern.
        query: (B, N, H, D), of whose flat rows ``own`` says which lie in a query tile.
        own: (T, b) for each query tile.
        tiles: of the query, and of all keys.
        summaries: (G, S, parts, D) of the key tiles.
        filled: (S,) bool, which of them have a key that is not masked; None: all of them.
        scale: factor of the scores.
    """
    if has_kernel(content, query, scale):
        choose(found, content, query, own, tiles, summaries, filled, scale)
        return
    size, blocks, acc, heads = content.block_size, tiles.queries, accumulator_dtype(query.dtype), query.shape[2]
    shift = tiles.first_tile - tiles.first_block  # block -> key tile
    low, high = content.candidates(blocks)
    low, high = torch.maximum(low, tiles.first_block) + shift, high + shift
    queries = own.read(query)  # (H, T, b, D)
    if not blocks.is_causal:
        number = own.exists.sum(1).clamp(min=1)[:, None, None]
        queries = queries.sum(2, keepdim=True, dtype=acc) / number
    per_tile = 1 if not blocks.is_causal else size
    group = heads // summaries.shape[0]
    step = max(1, _SCORES // (heads * per_tile * len(tiles.keys)))
    rows = found.shape[2]
    written = own.exists & (own.rows < found.shape[0] * rows)
    for begin in range(0, len(blocks.block), step):
        here, first, last = slice(begin, begin + step), 0, len(tiles.keys)
        if len(blocks.block) > step:  # only then is it worth waiting for the device
            first = int(low[here].min())
            last = max(int(high[here].max()), first + 1)
        columns = torch.arange(first, max(first, min(last, len(tiles.keys))), device=query.device)
        if not len(columns):
            continue
        allowed = (columns >= low[here, None]) & (columns < high[here, None])
        if filled is not None:
            allowed &= filled[columns]
        if not blocks.is_causal:
            distance = columns - (blocks.block + shift)[here, None]
            allowed &= distance.abs() > content.always_local
        q = queries[:, here].to(acc)  # (H, t, b or 1, D)
        q = q.unflatten(0, (-1, group)).flatten(2, 3)  # (G, group, t * rows, D)
        known = summaries[:, None, first : first + len(columns)]
        mine = content.select(q, known, allowed.repeat_interleave(per_tile, 0), scale)
        mine = mine.flatten(0, 1).unflatten(1, (-1, per_tile))  # (H, t, rows, keep)
        block = torch.where(mine >= 0, mine + (first - shift[here])[None, :, None, None], -1).int()
        if not blocks.is_causal:
            batch, row = blocks.tiles[here, :2].long().unbind(1)
            found[batch, :, row] = block[:, :, 0].transpose(0, 1)
            continue
        places = own.rows[here][written[here]]
        batch, row = places // rows, places % rows
        found[batch, :, row] = block.transpose(0, 1).transpose(1, 2)[written[here]]


def pattern_tensors(pattern: Any, select: Callable[[ContentTopK], Tensor]) -> list[Tensor]:
    """Tensors that go with a pattern's code: explicit lists, and what the content of query and key selects."""
    lists: list[Tensor] = []
    for member in members_of(pattern):
        if isinstance(member, ContentTopK):
            lists.append(select(member))
        else:
            lists += getattr(member, "tensors", ())
    return lists


def _fake_select(query: Tensor, key: Tensor, mask: Any, cu: Any, starts: Any, pattern: str, *_: Any) -> Tensor:
    batch, rows, heads = query.shape[:3]
    return query.new_empty(batch, heads, rows, decode(pattern).keep, dtype=torch.int32)


sparse_select = _register("sparse_select", _select, _fake_select)
