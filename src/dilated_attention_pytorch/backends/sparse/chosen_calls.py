"""Key blocks that every row has chosen for itself, by PyTorch's fused kernels: what `chosen` does with its own.

Rows of one head are packed by the block that they chose, and every so many of them with that block are a problem of a
call. A row's place among its problem's rows depends on earlier rows alone, so no bit of it depends on later ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...merge import accumulator_dtype
from .. import sdpa
from ..vendor import Kernel
from .packing import Packed
from .problem import SparseProblem
from .tiled import _GATHERED, layout

_ROWS = 128
"""Packed rows of a problem."""


class _Part(NamedTuple):
    """Problems of one call."""

    entries: Tensor
    """(problems, rows): those behind the last entry of a block repeat one."""
    real: Tensor
    """(problems, rows) bool: which do not."""
    tiles: Tensor
    """(problems,) key tiles."""
    low: int
    high: int
    """Rows of the tiles that exist."""


def _by_head(problem: SparseProblem) -> Packed:
    shape, packed = problem.shape, problem.packed
    return Packed(packed.chosen.view(shape.batch * shape.heads, -1), packed.keep, packed.tiles)


def _parts(packed: Packed, line: int, table: Tensor, key_tiles: Tensor, size: int, width: int) -> Iterator[_Part]:
    """The calls of one head; ``table`` has its pieces."""
    table = table[table[:, 2] > 0].long()
    low = key_tiles[table[:, 0], 2] % size
    kind = low * (size + 1) + low + key_tiles[table[:, 0], 3]
    steps = torch.arange(_ROWS, device=table.device)
    step = max(1, _GATHERED // (max(size, _ROWS) * width))
    for value in torch.unique(kind).tolist():
        for some in table[kind == value].split(step):
            real = steps < some[:, 2:]
            entries = packed.order[line][some[:, 1:2] + steps * real]
            yield _Part(entries, real, some[:, 0], value // (size + 1), value % (size + 1))


def _rows(tensor: Tensor) -> Tensor:
    """(B * H, Nq, D) of (B, Nq, H, D)."""
    return tensor.transpose(1, 2).flatten(0, 1)


def _keys(tensor: Tensor, part: _Part) -> Tensor:
    """(1, problems, keys, D) of the key tiles (S, b, D) of a head."""
    return tensor[part.tiles, part.low : part.high].unsqueeze(0)


def joined(
    kernel: Kernel, width: int, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    problem: SparseProblem, mask: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The chosen blocks joined to out (B, Nq, H, Dv) and lse (B, Nq, H) of what all rows see."""
    if not problem.packed.tiles:
        return out, lse
    shape, packed, acc = problem.shape, _by_head(problem), accumulator_dtype(query.dtype)
    size, scale, tiles = problem.pattern.block_size, problem.options.scale, problem.tiles.keys.long()
    place = layout(problem.tiles.keys, size, shape.key_rows)
    q, k, v = sdpa._carry(query, key, value, problem.carrier, mask, width)
    q, k, v = _rows(q), place.tiled(k), place.tiled(v)
    table, final, sums = packed.pieces(_ROWS).table, _rows(lse[..., None]), _rows(out).to(acc)
    for line in range(len(packed.chosen)):
        kv_head = line % shape.heads * shape.kv_heads // shape.heads
        entries = packed.chosen.shape[1]
        part_out = q.new_zeros((entries, shape.value_dim), dtype=acc)
        part_lse = q.new_full((entries,), -torch.inf, dtype=acc)
        for part in _parts(packed, line, table[line], tiles, size, width):
            found, found_lse = kernel.forward(
                q[line, part.entries // packed.keep].unsqueeze(0), _keys(k[kv_head], part), _keys(v[kv_head], part),
                False, scale,
            )  # fmt: skip
            where = part.entries[part.real]
            part_out[where] = found[0, ..., : shape.value_dim][part.real].to(acc)
            part_lse[where] = found_lse[0][part.real].to(acc)
        parts = torch.cat([final[line].to(acc), part_lse.view(-1, packed.keep)], 1)
        total = parts.logsumexp(1, keepdim=True)
        weights = (parts - total.masked_fill(total == -torch.inf, 0.0)).exp().unsqueeze(1)
        every = torch.cat([sums[line].unsqueeze(1), part_out.view(-1, packed.keep, shape.value_dim)], 1)
        sums[line], final[line] = (weights @ every).squeeze(1), total
    size_of = (shape.batch, shape.heads, shape.query_rows)
    out = sums.view(*size_of, -1).transpose(1, 2).to(query.dtype).contiguous()
    return out, final.view(size_of).transpose(1, 2).contiguous()


def add_chosen(
    kernel: Kernel, width: int, grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor,
    out: Tensor, lse: Tensor, gradients: tuple[Tensor, Tensor, Tensor], problem: SparseProblem, mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of query, key and value with the share of the chosen blocks."""
    if not problem.packed.tiles:
        return gradients
    shape, packed, acc = problem.shape, _by_head(problem), accumulator_dtype(query.dtype)
    size, scale, tiles = problem.pattern.block_size, problem.options.scale, problem.tiles.keys.long()
    place = layout(problem.tiles.keys, size, shape.key_rows)
    carried = sdpa._carry(query, key, value, problem.carrier, mask, width)
    grad_out, out = sdpa._pad(grad_out, width), sdpa._pad(out, width)
    if grad_lse is not None:
        sdpa._carry_grad_lse(grad_out, out, grad_lse)
    q, do, o = (_rows(t) for t in (carried[0], grad_out, out))
    k, v = (place.tiled(t) for t in carried[1:])
    final = _rows(lse.masked_fill(lse == -torch.inf, torch.inf)[..., None])[..., 0]
    dk, dv = (torch.zeros_like(t, dtype=acc) for t in (k, v))
    table, dq = packed.pieces(_ROWS).table, _rows(gradients[0]).to(acc)
    for line in range(len(packed.chosen)):
        kv_head = line % shape.heads * shape.kv_heads // shape.heads
        part_grad = q.new_zeros((packed.chosen.shape[1], shape.head_dim), dtype=acc)
        for part in _parts(packed, line, table[line], tiles, size, width):
            rows = part.entries // packed.keep
            grads = kernel.backward(
                do[line, rows].unsqueeze(0), q[line, rows].unsqueeze(0), _keys(k[kv_head], part),
                _keys(v[kv_head], part), o[line, rows].unsqueeze(0),
                final[line, rows].masked_fill(~part.real, torch.inf).unsqueeze(0), False, scale,
            )  # fmt: skip
            part_grad[part.entries[part.real]] = grads[0][0, ..., : shape.head_dim][part.real].to(acc)
            for total, grad in ((dk, grads[1]), (dv, grads[2])):
                total[kv_head][:, part.low : part.high].index_add_(0, part.tiles, grad[0].to(acc))
        dq[line] += part_grad.view(-1, packed.keep, shape.head_dim).sum(1)
    size_of = (shape.batch, shape.heads, shape.query_rows)
    return (
        dq.view(*size_of, -1).transpose(1, 2).to(query.dtype).contiguous(),
        (gradients[1] + place.restored(dk[..., : shape.head_dim], key)).to(key.dtype),
        (gradients[2] + place.restored(dv[..., : shape.value_dim], value)).to(value.dtype),
    )
