"""Choosing key blocks by their summaries with a kernel of its own, where there is one."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ...kernels import has_triton
from ...patterns.blocks import QueryBlocks
from ...patterns.content import ContentTopK
from .. import triton as dilated
from ..tables import capability
from .tiled import Layout

_WIDTH = 256
"""Numbers of a row among which the best are looked for at once."""
_MOST = _WIDTH // 2
"""Blocks that a row may choose."""
_PROGRAMS = 4
"""Programs a processor."""


def has_kernel(content: ContentTopK, query: Tensor, blocks: QueryBlocks, scale: float) -> bool:
    """Whether `choose` takes a call: rows that choose for themselves, on a GPU."""
    return (
        blocks.is_causal
        and content.keep <= _MOST
        and scale > 0
        and query.dtype != torch.float64
        and dilated._padded(query.shape[3]) <= 256
        and query.is_cuda
        and has_triton()
        and (torch.version.hip is not None or capability(str(query.device)) >= (8, 0))
    )


@lru_cache(maxsize=8)
def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count * _PROGRAMS


def choose(
    found: Tensor,
    content: ContentTopK,
    query: Tensor,
    own: Layout,
    low: Tensor,
    high: Tensor,
    shift: Tensor,
    summaries: Tensor,
    filled: Tensor,
    scale: float,
) -> None:
    """Write what every row chooses into ``found`` (B, H, Nq, keep), which holds -1.

    Args:
        found, content, query, own, summaries, filled, scale: as for `selection.choose_blocks`.
        low, high: (T,) first and last + 1 key tile that a query tile may choose.
        shift: (T,) key tile of a query tile's document less its block.
    """
    from ...kernels.block_choice import POOLINGS, block_choice_kernel

    rows, heads = found.shape[2:0:-1]
    aligned = dilated._aligned(query.reshape(found.shape[0], rows, heads, query.shape[3]))
    dim, padded = aligned.shape[3], dilated._padded(aligned.shape[3])
    pooling = POOLINGS[content.pooling]
    wide = pooling == POOLINGS["moments"] or query.dtype == torch.float32  # squares of a query need float32
    table = rest = torch.nn.functional.pad(summaries, (0, padded - summaries.shape[3])).contiguous()
    if not wide:
        table = table.to(query.dtype)
        rest = (rest - table.to(rest.dtype)).to(query.dtype)
    tiles, size = own.rows.shape
    # Positions that a query has no row for, and rows of other ranks, choose nothing.
    places = own.rows.masked_fill(~own.exists | (own.rows >= found.shape[0] * rows), -1).int()
    lines, columns = min(64, size), 32 if content.keep <= 32 else 64
    keep = -(-content.keep // columns) * columns
    total = heads * tiles * (size // lines)
    programs = min(total, _programs(query.device))
    numbers = torch.empty((programs, _WIDTH, lines), dtype=torch.int32, device=query.device)
    indices = torch.empty((programs, 2 * keep, lines), dtype=torch.int32, device=query.device)
    unit = dilated._unit(aligned)
    strides = (aligned.stride(i) // unit if aligned.shape[i] > 1 else 0 for i in range(3))
    block_choice_kernel[(programs,)](
        aligned, table, rest, filled.to(torch.uint8), places, low.int(), high.int(), shift.int(), found, numbers,
        indices, total, tiles, heads, heads // summaries.shape[0], summaries.shape[1], rows, summaries.shape[2],
        content.keep, *strides, scale / 2,
        ROWS=lines, SIZE=size, WIDTH=_WIDTH, KEEP=keep, COLUMNS=columns, D=dim, PADDED=padded,
        POOLING=pooling, SPLIT=not wide, WIDE=wide, PRECISION="tf32x3", UNIT=unit,
        num_warps=8 if lines == 64 else 4, num_stages=2,
    )  # fmt: skip
