"""Choosing key blocks by their summaries with a kernel of its own, where there is one."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ...kernels import has_triton
from ...patterns.blocks import Tiles
from ...patterns.content import ContentTopK
from .. import triton as dilated
from ..tables import capability
from .tiled import Layout

_LONGEST = 64
"""Blocks of a row that are looked for at once; for more the scores are computed again."""
_ROWS = 128
"""Rows of a program."""


def has_kernel(content: ContentTopK, query: Tensor, scale: float) -> bool:
    """Whether `choose` takes a call."""
    return (
        scale > 0
        and query.dtype != torch.float64
        and dilated._padded(query.shape[3]) <= 256
        and query.is_cuda
        and has_triton()
        and (torch.version.hip is not None or capability(str(query.device)) >= (8, 0))
    )


def choose(
    found: Tensor,
    content: ContentTopK,
    query: Tensor,
    own: Layout,
    tiles: Tiles,
    summaries: Tensor,
    filled: Tensor | None,
    scale: float,
) -> None:
    """Write what every row chooses into ``found`` (B, H, Nq, keep); other rows stay as they are.

    Args:
        found, content, query, own, tiles, summaries, scale: as for `selection.choose_blocks`.
        filled: (S,) bool, which of the key tiles have a key that is not masked; None: all of them.
    """
    from ...kernels.block_choice import POOLINGS, QUAD, block_choice_kernel

    rows, heads = found.shape[2:0:-1]
    low, high, shift, places, around, targets = _tables(tiles, own, content, found.shape[0], rows)
    pooled = not tiles.queries.is_causal
    if pooled:  # (1, T, H, D)
        number = own.exists.sum(1).clamp(min=1)[:, None, None]
        summed = own.read(query).sum(2, dtype=torch.float32).transpose(0, 1)
        aligned = dilated._aligned((summed / number)[None])
    else:
        aligned = dilated._aligned(query.reshape(found.shape[0], rows, heads, query.shape[3]))
    dim, padded = aligned.shape[3], dilated._padded(aligned.shape[3])
    pooling = POOLINGS[content.pooling]
    wide = pooling == POOLINGS["moments"] or aligned.dtype == torch.float32  # squares of a query need float32
    if padded > summaries.shape[3]:
        summaries = torch.nn.functional.pad(summaries, (0, padded - summaries.shape[3]))
    table = rest = summaries.contiguous()
    if not wide:
        table = table.to(aligned.dtype)
        rest = (rest - table).to(aligned.dtype)
    span = 1 if pooled else own.rows.shape[1]
    columns = 32 if wide else 64
    keep = min(_LONGEST, max(columns // QUAD.value, 1 << (content.keep - 1).bit_length()))
    lines = 64 if pooled else _ROWS if span < 64 else span
    programs = -(-len(places) // lines)
    unit = dilated._unit(aligned)
    strides = [aligned.stride(i) // unit if aligned.shape[i] > 1 else 0 for i in range(3)]
    if pooled:
        strides[0] = strides[1] * rows  # places, too, are counted by rows of a batch entry
    block_choice_kernel[(programs * heads,)](
        aligned, table, rest, table if filled is None else filled.to(torch.uint8), places, low, high, shift, around,
        targets, found, programs, heads, heads // summaries.shape[0], summaries.shape[1], len(places), rows,
        summaries.shape[2], content.keep, content.always_local, *strides, scale / 2,
        ROWS=lines, SPAN=span, COLUMNS=columns, COLUMN_BITS=(columns // QUAD.value).bit_length() - 1, KEEP=keep,
        KEEP_BITS=keep.bit_length() - 1, ROUNDS=-(-content.keep // keep), MASKED=filled is not None, POOLED=pooled,
        D=dim, PADDED=padded, POOLING=pooling, SPLIT=not wide, WIDE=wide, PRECISION="tf32x3", UNIT=unit,
        num_warps=lines // 16, num_stages=2,
    )  # fmt: skip


@lru_cache(maxsize=4)
def _tables(tiles: Tiles, own: Layout, content: ContentTopK, batch: int, rows: int) -> tuple[Tensor, ...]:
    """(T,) first and last + 1 key tile that a query tile may choose, its key tile less its block; (places,) row of
    the query and, not causal, own key tile and row of the result. int32; equal calls share them.
    """
    low, high = content.candidates(tiles.queries)
    shift = tiles.first_tile - tiles.first_block
    low, high = torch.maximum(low, tiles.first_block) + shift, high + shift
    if tiles.queries.is_causal:
        # Positions that a query has no row for, and rows of other ranks, choose nothing.
        places = around = targets = own.rows.masked_fill(~own.exists | (own.rows >= batch * rows), -1).reshape(-1)
    else:
        entry, first = tiles.queries.tiles[:, :2].long().unbind(1)
        targets, around = entry * rows + first, tiles.queries.block + shift
        places = torch.arange(len(entry), device=low.device)
    found = low, high, shift, places, around, targets
    return tuple(table.int().contiguous() for table in found)
