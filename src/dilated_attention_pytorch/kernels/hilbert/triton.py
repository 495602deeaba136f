"""Rows of a tensor in another order, in one pass: the index is loaded where the rows are."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 2048
"""Elements of a program, at most 8 bytes each."""


@triton.jit
def permute_rows_kernel(
    source, index, target, rows, columns, per_index,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """target[o, i] = source[o, index[o // per_index, i]] for (outer, rows, columns); one program a tile of target."""
    program = tl.program_id(0).to(tl.int64)
    column_tiles = tl.cdiv(columns, COLUMNS)
    row_tiles = tl.cdiv(rows, ROWS)
    column = (program % column_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    tile = program // column_tiles
    row = (tile % row_tiles) * ROWS + tl.arange(0, ROWS)
    outer = tile // row_tiles
    taken = tl.load(index + (outer // per_index) * rows + row, mask=row < rows, other=0)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    first = outer * rows * columns
    moved = tl.load(source + first + taken[:, None] * columns + column[None, :], mask=mask)
    tl.store(target + first + row[:, None] * columns + column[None, :], moved, mask=mask)


def permute_rows(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """``x`` with row index[i] of dimension ``dim`` in place i, contiguous; any dtype, 64-bit offsets.

    ``index`` is int64, (rows,), or (x.shape[0], rows) for an order for each entry of the first dimension. Its values
    are not checked: whoever calls has made sure that each is the number of a row.
    """
    source = x.contiguous()
    target = torch.empty_like(source)
    if not source.numel():
        return target
    outer, rows, inner = source.shape[:dim].numel(), source.shape[dim], source.shape[dim + 1 :].numel()
    word = _word(inner * source.element_size(), source, target)
    columns = inner * source.element_size() // word.itemsize
    width = min(triton.next_power_of_2(columns), 256)
    height = min(triton.next_power_of_2(rows), max(_TILE // width, 1))
    grid = (outer * triton.cdiv(rows, height) * triton.cdiv(columns, width),)
    if grid[0] >= 2**31:
        raise ValueError(f"a tensor of shape {tuple(x.shape)} is too large for one launch; split the batch")
    per_index = outer if index.dim() == 1 else outer // source.shape[0]
    with torch.cuda.device_of(source):
        permute_rows_kernel[grid](
            _flat(source, word), index.contiguous(), _flat(target, word), rows, columns, per_index,
            ROWS=height, COLUMNS=width,
        )  # fmt: skip
    return target


def _word(row_bytes: int, *tensors: Tensor) -> torch.dtype:
    """The widest integer that divides a row of every tensor: only bytes are moved."""
    for dtype in (torch.int64, torch.int32, torch.int16):
        if all(number % dtype.itemsize == 0 for number in (row_bytes, *(x.data_ptr() for x in tensors))):
            return dtype
    return torch.uint8


def _flat(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.reshape(-1).view(torch.uint8).view(dtype)
