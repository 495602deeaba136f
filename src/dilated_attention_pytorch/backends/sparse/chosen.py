"""Key blocks that every row has chosen for itself, joined to what all rows of its tile see.

The blocks that all rows of a tile see are a problem of their own, for any backend. The chosen ones follow here: rows
are packed by the block that they chose (`packing`), attend to it as dense tiles, and their partial results join
by their log-sum-exps. Partial results are kept in the dtype of the tensors, for as many heads at a time as fit
`_PARTIAL_BYTES`, so each is rounded once more than it would be in registers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import triton as dilated
from .problem import SparseProblem

_PARTIAL_BYTES = 1 << 30
"""Partial results that exist at a time, unless those of one key head are more."""
_TILES = 8
"""Tiles of packed rows that meet a block of keys before it is loaded anew by another program."""
_JOINED = 16
"""Rows of one head that a program joins."""


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Packed rows of a tile, keys of a block, and how the compiler shall spread them."""

    rows: int
    keys: int
    warps: int
    stages: int


def _sizes(dim: int, block_size: int, itemsize: int, device: str, *, backward: bool) -> _Sizes:
    """Tile sizes for a padded head dim: a whole block of keys where it fits."""
    plain = dilated._sizes(dim, itemsize, device, "key" if backward else "forward")
    needed = (2 * block_size + 4 * 64) * dim * itemsize
    fits = torch.device(device).type == "cuda" and needed <= dilated._shared_memory(device)
    if fits and itemsize == 2 and dim <= 128:
        return _Sizes(64, block_size, 8 if backward and block_size == 128 and dim > 64 else 4, 3)
    if backward:
        return _Sizes(plain.others, min(plain.block, block_size), plain.warps, plain.stages)
    return _Sizes(plain.block, min(plain.others, block_size), plain.warps, plain.stages)


def unsupported(problem: SparseProblem) -> str | None:
    """Why these kernels cannot compute the chosen blocks of a problem, or None."""
    reason = dilated.unsupported(problem.carrier)
    if reason:
        return reason
    shape = problem.shape
    entries = shape.heads // shape.kv_heads * shape.query_rows * problem.packed.keep
    if entries >= 2**31:
        return f"the kernels count the choices of a key head in 32 bits, and there are {entries}"
    return None


def _some_lists(lists: int, entries: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """(first, number) of lists whose partial results exist together."""
    step = max(1, _PARTIAL_BYTES // max(1, entries * row_bytes))
    for first in range(0, lists, step):
        yield first, min(step, lists - first)


def _common(problem: SparseProblem, mask: Tensor | None, seed: int | None, aligned: list[Tensor]) -> dict[str, Any]:
    """Arguments that the kernels which attend take."""
    shared = dilated._shared(problem.carrier, mask, seed, aligned)
    for name in ("branches", "interleaved", "num_branches", "num_heads", "CAUSAL"):
        del shared[name]
    packed, shape = problem.packed, problem.shape
    return {
        **shared,
        "order": packed.order,
        "order_rows": packed.order_rows,
        "key_tiles": problem.listed.plan.key_tiles,
        "entries_of_list": packed.chosen.shape[1],
        "keep": packed.keep,
        "kv_heads": shape.kv_heads,
        "SIZE": problem.pattern.block_size,
        "ALONE": shape.heads == shape.kv_heads,
    }


def _of_rows(problem: SparseProblem) -> dict[str, Any]:
    """Arguments that the kernels which join take."""
    shape, packed = problem.shape, problem.packed
    return {
        "chosen": packed.chosen,
        "entries_of_list": packed.chosen.shape[1],
        "keep": packed.keep,
        "kv_heads": shape.kv_heads,
        "group": shape.heads // shape.kv_heads,
        "query_rows_total": shape.query_rows,
        "BLOCK": _JOINED,
    }


def _strides(name: str, tensor: Tensor) -> dict[str, int]:
    return {f"{name}_{axis}": tensor.stride(i) for i, axis in enumerate(("batch", "row", "head"))}


def join_chosen(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, problem: SparseProblem,
    mask: Tensor | None, seed: int | None,
) -> None:  # fmt: skip
    """Join the chosen blocks to out (B, Nq, H, Dv), whose last axis is contiguous, and lse (B, Nq, H), contiguous."""
    from ...kernels.chosen_blocks import chosen_forward_kernel, chosen_join_kernel

    shape, packed = problem.shape, problem.packed
    lists, entries = packed.chosen.shape
    if not packed.tiles or not entries:
        return
    aligned = [dilated._aligned(t) for t in (query, key, value)]
    dim, value_dim, itemsize = aligned[0].shape[3], out.shape[3], problem.dtype.itemsize
    common = _common(problem, mask, seed, aligned) | {"DV": value_dim}
    size = _sizes(
        dilated._padded(max(dim, value_dim)), problem.pattern.block_size, itemsize, problem.device, backward=False
    )  # fmt: skip
    pieces = packed.pieces(size.rows * _TILES)
    tiles = -(-shape.query_rows // _JOINED)
    keep = max(2, 1 << (packed.keep - 1).bit_length())
    for first, number in _some_lists(lists, entries, value_dim * itemsize):
        part_out = torch.empty((number, entries, value_dim), dtype=value.dtype, device=value.device)
        part_lse = torch.empty((number, entries), dtype=torch.float32, device=value.device)
        chosen_forward_kernel[(number * pieces.per_list,)](
            *aligned, part_out=part_out, part_lse=part_lse, pieces=pieces.table, first_list=first,
            programs_of_list=pieces.per_list, BLOCK=size.rows, KEYS=size.keys, num_warps=size.warps,
            num_stages=size.stages, **common,
        )  # fmt: skip
        chosen_join_kernel[(number * (shape.heads // shape.kv_heads) * tiles,)](
            part_out=part_out, part_lse=part_lse, out=out, lse=lse, first_list=first, KEEP=keep, DV=value_dim,
            PADDED_V=dilated._padded(value_dim), **_strides("out", out), **_of_rows(problem),
        )  # fmt: skip


def add_chosen(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor], problem: SparseProblem, mask: Tensor | None, seed: int | None,
) -> None:  # fmt: skip
    """Add the share of the chosen blocks to gradients of query, key and value, whose last axes are contiguous."""
    from ...kernels.chosen_blocks import chosen_backward_kernel, chosen_sum_kernel

    shape, packed = problem.shape, problem.packed
    lists, entries = packed.chosen.shape
    if not packed.tiles or not entries:
        return
    dq, dk, dv = gradients
    delta = dilated._delta(out, grad_out, grad_lse)
    aligned = [dilated._aligned(t) for t in (query, key, value, grad_out)]
    dim, value_dim, itemsize = dq.shape[3], dv.shape[3], problem.dtype.itemsize
    common = _common(problem, mask, seed, aligned) | {"D": dim, "DV": value_dim}
    size = _sizes(
        dilated._padded(max(dim, value_dim)), problem.pattern.block_size, itemsize, problem.device, backward=True
    )  # fmt: skip
    kind = query.dtype if size.keys == problem.pattern.block_size else torch.float32
    tiles = -(-shape.query_rows // _JOINED)
    for first, number in _some_lists(lists, entries, dim * kind.itemsize):
        part = torch.empty((number, entries, dim), dtype=kind, device=query.device)
        heavy = packed.counts[first : first + number].reshape(-1).argsort(descending=True)
        chosen_backward_kernel[(len(heavy),)](
            *aligned[:3], grad_out=aligned[3], lse=lse, delta=delta, part_grad=part, grad_key=dk, grad_value=dv,
            heavy=heavy, first_entry=packed.first, counts=packed.counts, first_list=first,
            key_tiles_total=packed.tiles, scale=problem.options.scale, BLOCK=size.keys, QUERIES=size.rows,
            num_warps=size.warps, num_stages=size.stages, **_strides("dk", dk), **_strides("dv", dv), **common,
        )  # fmt: skip
        chosen_sum_kernel[(number * (shape.heads // shape.kv_heads) * tiles,)](
            part_grad=part, grad_query=dq, first_list=first, D=dim, PADDED=dilated._padded(dim),
            **_strides("dq", dq), **_of_rows(problem),
        )  # fmt: skip
