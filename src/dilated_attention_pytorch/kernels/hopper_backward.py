"""Backward of dilated attention on Hopper GPUs: launches `hopper_backward_kernel` and what surrounds it.

dQ is summed in float32 for a few heads at a time, so that the sums take little memory; two such passes are under way
at once, each on its own stream.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl

from .hopper_backward_kernel import KEY_ROWS, LONGEST, MAX_BRANCHES, backward_kernel
from .launch import Address, Launch, View
from .schedule import KEPT, TILE_COST, Group, deal, met_blocks

_LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit(do_not_specialize=["query_rows"])
def _row_kernel(
    out, grad_out, lse, grad_lse, sums, query_rows, out_b, out_n, out_h, grad_b, grad_n, grad_h, H: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Per query row: lse in base 2 (low word; +inf where no key is) and rowsum(dO * O) - dLSE (high word)."""
    blocks = tl.cdiv(query_rows, ROWS)
    n = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(0) // blocks % H
    batch = (tl.program_id(0) // blocks // H).to(tl.int64)
    d = tl.arange(0, DP)
    there = n < query_rows
    both = there[:, None] & (d < D)[None, :]
    place = n.to(tl.int64)
    o = tl.load(
        out + batch * out_b + place[:, None] * out_n + head.to(tl.int64) * out_h + d[None, :], mask=both, other=0.0
    )
    g = tl.load(
        grad_out + batch * grad_b + place[:, None] * grad_n + head.to(tl.int64) * grad_h + d[None, :],
        mask=both,
        other=0.0,
    )
    delta = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    place = (batch * query_rows + place) * H + head
    shift = tl.load(lse + place, mask=there, other=0.0)
    if grad_lse is not None:
        delta -= tl.load(grad_lse + place, mask=there, other=0.0)
    empty = shift == -float("inf")
    shift = tl.where(empty, float("inf"), shift * _LOG2E).to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    delta = tl.where(empty, 0.0, delta).to(tl.int32, bitcast=True).to(tl.int64) << 32
    tl.store(sums + (batch * H + head) * query_rows + n, delta | shift, mask=there)


@triton.jit(do_not_specialize=["flat_rows", "head0", "heads", "width"])
def _convert_kernel(
    source, target, flat_rows, head0, heads, width, scale, H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """target[row, head0 + head] = scale * source[row, head] for rows of (row, head) pairs.

    Of every 32 columns the source holds those next to each other that one thread of a product has: column
    8 j + 2 t + e at 8 t + 2 j + e, so that a thread writes 16 bytes without bank conflicts.
    """
    pair = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, DP)
    there = (pair < flat_rows.to(tl.int64) * heads)[:, None] & (d < D)[None, :]
    place = pair // heads * width + pair % heads
    dealt = tl.where(d < D // 32 * 32, d // 32 * 32 + d % 8 // 2 * 8 + d % 32 // 8 * 2 + d % 2, d)
    value = tl.load(source + place[:, None] * D + dealt[None, :], mask=there, other=0.0) * scale
    place = pair // heads * H + head0 + pair % heads
    tl.store(target + place[:, None] * D + d[None, :], value.to(target.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["cell_count", "key_rows", "batches"])
def _gap_kernel(cells, dk, dv, cell_count, key_rows, batches, WIDTH: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Zeros in the key rows between one cell and the next: rows of no document. Cells ascend by (batch, row)."""
    i = tl.program_id(0)
    start = tl.zeros([], tl.int64)
    stop = batches.to(tl.int64) * key_rows
    if i > 0:
        before = cells + (i - 1).to(tl.int64) * 8
        start = tl.load(before).to(tl.int64) * key_rows + tl.load(before + 1) + tl.load(before + 3)
    if i < cell_count:
        after = cells + i.to(tl.int64) * 8
        stop = tl.load(after).to(tl.int64) * key_rows + tl.load(after + 1)
    for at in range(start * WIDTH + tl.program_id(1) * BLOCK, stop * WIDTH, tl.num_programs(1) * BLOCK):
        place = at + tl.arange(0, BLOCK)
        zero = tl.zeros([BLOCK], dk.dtype.element_ty)
        tl.store(dk + place, zero, mask=place < stop * WIDTH)
        tl.store(dv + place, zero, mask=place < stop * WIDTH)


def _view(
    slot: int, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, rate: int, rows: int, columns: int,
    total: int,
) -> View:  # fmt: skip
    """The flattened rows of a (B, N, H, D) tensor by residue modulo ``rate``, ``total`` rows in all."""
    heads, d = shape[-2:]
    row, head = strides[-3:-1]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8 * dtype.itemsize, rank=4)
    sizes = (total // rate, rate + total % rate, heads, d) if total >= rate else (1, total, heads, d)
    return View(slot, sizes, (rate * row, row, head, 1), (rows, 1, 1, columns), layout)


def _ready(tensor: Tensor) -> bool:
    """Whether the copy engine can read the flattened rows of a (B, N, H, D) tensor."""
    batch, rows, heads, d = tensor.shape
    b, n, h, e = tensor.stride()
    step = 16 // tensor.element_size()
    return (
        tensor.data_ptr() % 16 == 0
        and (e == 1 or d == 1)
        and n % step == 0
        and (h % step == 0 or heads == 1)
        and n > 0
        and (h > 0 or heads == 1)
        and (batch == 1 or b == rows * n)
    )


def _heads_per_pass(query: torch.Size, key: torch.Size, itemsize: int) -> int:
    """Key heads of one pass: all, or so many that the dQ sums of two passes take a fifth of the gradients' bytes.

    24 MiB are always allowed.
    """
    heads, kv_heads, d = query[2], key[2], query[3]
    gradients = (query.numel() + 2 * key.numel()) * itemsize
    one = query[0] * query[1] * (heads // kv_heads) * d * 4
    most = max(gradients // 5, 24 << 20)
    return kv_heads if kv_heads * one <= most else max(1, min(-(-kv_heads // 2), most // (2 * one)))


class _Strides(NamedTuple):
    """Of the tensors that a backward pass reads."""

    query: tuple[int, ...]
    key: tuple[int, ...]
    value: tuple[int, ...]
    out: tuple[int, ...]
    grad_out: tuple[int, ...]


class _Pass(NamedTuple):
    """Launches for some heads, of (query, key, value, grad_out, dk, dv, sums, dq sums)."""

    gradients: tuple[Launch, ...]
    convert: Launch
    """Of (dq sums, dq)."""


class _Launches(NamedTuple):
    rows: Launch
    """Of (out, grad_out, lse, sums) and, where there is one, grad_lse."""
    gaps: Launch
    """Of (dk, dv)."""
    scratch: tuple[int, ...]
    """Shape of the sums of dQ of one pass, float32."""
    passes: tuple[_Pass, ...]


@lru_cache(maxsize=KEPT)
def _launches(
    query: torch.Size, key: torch.Size, strides: _Strides, dtype: torch.dtype, device: torch.device, has_grad_lse: bool,
    groups: tuple[Group, ...], interleaved: bool, is_causal: bool, scale: float,
) -> _Launches:  # fmt: skip
    batches, query_rows, heads, d = query
    key_rows, kv_heads = key[1:3]
    padded = triton.next_power_of_2(d)
    rates = {rate for part in groups for rate in part.dilation_rates}
    cells = groups[0].cells
    total, group = batches * query_rows, heads // kv_heads
    rows = Launch(
        _row_kernel, triton.cdiv(query_rows, 64) * batches * heads,
        (Address(0), Address(1), Address(2), Address(4) if has_grad_lse else None, Address(3), query_rows,
         *strides.out[:3], *strides.grad_out[:3], heads, d, padded, 64),
        device, num_warps=4,
    )  # fmt: skip
    gaps = Launch(
        _gap_kernel, (len(cells) + 1, 4),
        (cells.device, Address(0), Address(1), len(cells), key_rows, batches, kv_heads * d, 4096), device,
    )  # fmt: skip
    per_pass = _heads_per_pass(query, key, dtype.itemsize)
    # A run's dQ may start at any row, so the last row of its view by residues may lie beyond the last.
    scratch = (1, max(-(-total // r) * r for r in rates), per_pass * group, d)
    scratch_strides = (0, per_pass * group * d, d, 1)
    block, stages, registers = _tuning(padded)
    parts = []
    for number, (lengths, some_rates, own, table) in enumerate(groups):
        segments = tuple(min(w, LONGEST) for w in lengths)
        blocks = met_blocks(
            table.host, side="key", heads=heads, stride=own, segment_lengths=segments, dilation_rates=some_rates,
            interleaved=interleaved, is_causal=is_causal, tile_rows=KEY_ROWS, block_rows=block,
        )  # fmt: skip
        blocks = blocks.reshape(kv_heads, group, *blocks.shape[1:])
        # What an earlier launch wrote stays as it is where this one has no queries.
        wanted = blocks.max(1) > 0 if number else blocks.min(1) >= 0
        parts.append((number, own, segments, some_rates, table, blocks.sum(1) + TILE_COST, wanted))
    passes = []
    for head0 in range(0, kv_heads, per_pass):
        count = min(per_pass, kv_heads - head0)
        gradients = []
        for number, own, some_segments, some_rates, table, costs, wanted in parts:
            schedule = deal(
                costs[head0 : head0 + count], wanted[head0 : head0 + count], _processors(device), device
            )  # fmt: skip
            if schedule is None:
                continue
            spare = [None] * (MAX_BRANCHES - len(some_rates))
            constants = (
                heads, kv_heads, d, padded, block, stages, own, is_causal, interleaved, some_segments,
                some_rates, number > 0,
            )  # fmt: skip
            commons = tuple(math.gcd(r, own) for r in some_rates)
            inverses = tuple(pow(own // c, -1, r // c) for r, c in zip(some_rates, commons, strict=True))
            arguments = (
                constants, commons, inverses,
                _view(1, key, strides.key, dtype, own, 64, padded, batches * key_rows),
                _view(2, key, strides.value, dtype, own, 64, padded, batches * key_rows),
                *(_view(0, query, strides.query, dtype, r, block, padded, total) for r in some_rates), *spare,
                *(_view(3, query, strides.grad_out, dtype, r, block, padded, total) for r in some_rates), *spare,
                *(_view(7, scratch, scratch_strides, torch.float32, r, block, padded // 2, -(-total // r) * r)
                  for r in some_rates), *spare,
                Address(1), Address(2), Address(4), Address(5), Address(6), table.device,
                schedule.tiles, schedule.starts, len(table), query_rows, key_rows, batches, head0, head0 * group,
                *strides.key[1:3], *strides.value[1:3], scale * math.log2(math.e), scale, *registers,
            )  # fmt: skip
            gradients.append(Launch(backward_kernel, schedule.programs, arguments, device, num_warps=4))
        convert = Launch(
            _convert_kernel, triton.cdiv(total * count * group, 64),
            (Address(0), Address(1), total, head0 * group, count * group, per_pass * group, scale, heads, d, padded,
             64),
            device, num_warps=4,
        )  # fmt: skip
        passes.append(_Pass(tuple(gradients), convert))
    return _Launches(rows, gaps, scratch, tuple(passes))


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    groups: tuple[Group, ...],
    interleaved: bool,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, contiguous and in their dtypes, from the final out and lse.

    Args:
        grad_out, out: (B, Nq, H, D); grad_lse, lse: (B, Nq, H) float32, natural logarithms.
        query: (B, Nq, H, D); key, value: (B, Nk, H_kv, D); `backends.gluon.unsupported` says which.
        groups: with cells of the key side of at most 128 * ``stride`` rows each, see `patterns.tiles`.
        interleaved, is_causal, scale: as for the forward.
    """
    device = query.device
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value))
    if not len(groups[0].cells) or not dq.numel():
        return dq.zero_(), dk.zero_(), dv.zero_()
    if not _ready(grad_out):
        grad_out = grad_out.contiguous()
    if out.stride(3) != 1:
        out = out.contiguous()
    launches = _launches(
        query.shape, key.shape,
        _Strides(query.stride(), key.stride(), value.stride(), out.stride(), grad_out.stride()),
        query.dtype, device, grad_lse is not None, groups, interleaved, is_causal, scale,
    )  # fmt: skip
    batches, query_rows, heads = query.shape[:3]
    sums = torch.empty((batches, heads, query_rows), dtype=torch.int64, device=device)
    launches.rows(out, grad_out, lse.contiguous(), sums, *(() if grad_lse is None else (grad_lse.contiguous(),)))
    launches.gaps(dk, dv)
    lanes = min(2, len(launches.passes))
    scratch = torch.empty((lanes, *launches.scratch), dtype=torch.float32, device=device).unbind()
    given = (query, key, value, grad_out, dk, dv, sums)
    if lanes == 1:
        _run(launches.passes[0], given, scratch[0], dq)
        return dq, dk, dv
    # Two passes are under way at a time: one's last tiles and its conversion overlap the other's first tiles.
    main = torch.cuda.current_stream(device)
    streams = (main, _side_stream(device))
    streams[1].wait_stream(main)
    for turn, one in enumerate(launches.passes):
        with torch.cuda.stream(streams[turn % 2]):
            _run(one, given, scratch[turn % 2], dq)
    main.wait_stream(streams[1])
    return dq, dk, dv


def _run(one: _Pass, given: tuple[Tensor, ...], scratch: Tensor, dq: Tensor) -> None:
    scratch.zero_()
    for launch in one.gradients:
        launch(*given, scratch)
    one.convert(scratch, dq)


@lru_cache(maxsize=16)
def _side_stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)


def _tuning(padded: int) -> tuple[int, int, tuple[int, int]]:
    """Query rows of a block, stages of the pipeline, registers of (consumers, producer and writer)."""
    return (64, 2, (232, 40)) if padded == 128 else (64, 3, (224, 56))


@lru_cache(maxsize=16)
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
