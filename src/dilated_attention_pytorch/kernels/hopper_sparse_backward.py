"""Backward of block-sparse attention on Hopper GPUs (Gluon): the consumers of dilated attention, fed by lists.

As in `hopper_backward_kernel` a tile of up to 128 key rows stays in shared memory while blocks of 64 query rows stream
by; here the producer reads from lists which ones. `backends.sparse.rectangles` makes them.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from .hopper_backward import (
    _convert_kernel,
    _heads_per_pass,
    _processors,
    _ready,
    _row_kernel,
    _side_stream,
    _Strides,
    _tuning,
    _view,
)
from .hopper_backward_consumer import _consumer
from .hopper_backward_kernel import LONGEST, _allocate, _as_4d, _put, _writer
from .launch import Address, Launch
from .schedule import Work
from .spread_work import SpreadWork

_ONE_PASS = 64 << 20
"""Bytes of float32 sums of dQ up to which all heads are done in one pass: more passes only cost the host time."""


@gluon.jit
def _list_producer(
    P: gl.constexpr, k_d, v_d, q_d, do_d, sums, tile_table, segments, records, tiles, starts, list_step,
    tile_count, query_rows, key_rows, head0, k_s, v_s, q_s, do_s, row_s, info_s, tile_s, bars,
):  # fmt: skip
    DP: gl.constexpr = P[3]
    BQ: gl.constexpr = P[4]
    STAGES: gl.constexpr = P[5]
    GROUP: gl.constexpr = P[0] // P[1]
    lane: gl.constexpr = gl.BlockedLayout([BQ // 32], [32], [1], [0])
    kv_full, kv_empty, q_full, do_full, empty, _dq_full, _dq_empty = bars
    turn = 0
    it = 0
    dealt = gl.load(starts + gl.program_id(0))
    stop = gl.load(starts + gl.program_id(0) + 1)
    while dealt < stop:
        tile = gl.load(tiles + dealt)
        kv_head = head0 + tile // tile_count
        at = tile % tile_count
        own = gl.load(tile_table + at * 4)
        rows = gl.load(tile_table + at * 4 + 1)
        first = gl.load(tile_table + at * 4 + 2)
        masked = 0
        clean = 0
        for g in range(GROUP):
            counted = segments + ((kv_head * GROUP + g) * list_step + at).to(gl.int64) * 4
            masked += gl.load(counted + 1)
            clean += gl.load(counted + 2)
        direct = rows == 128
        mbarrier.wait(kv_empty, (turn & 1) ^ 1)
        _put(tile_s, 0, masked)
        _put(tile_s, 6, clean)
        _put(tile_s, 1, own)
        _put(tile_s, 2, rows)
        _put(tile_s, 3, first)
        _put(tile_s, 4, kv_head)
        _put(tile_s, 5, direct.to(gl.int32))
        fence_async_shared()
        if direct:
            mbarrier.expect(kv_full, 4 * 64 * DP * 2)
            for half in gl.static_range(2):
                tma.async_copy_global_to_shared(
                    k_d, [own + 64 * half, 0, kv_head, 0], kv_full, _as_4d(k_s.index(half), 64, DP, 16)
                )
                tma.async_copy_global_to_shared(
                    v_d, [own + 64 * half, 0, kv_head, 0], kv_full, _as_4d(v_s.index(half), 64, DP, 16)
                )
        mbarrier.arrive(kv_full, count=1, pred=direct == 0)
        turn += 1
        batch = (own // key_rows).to(gl.int64)
        for part in range(2 * GROUP):
            # The blocks of every head that need a mask, then those of every head that need none.
            head = kv_head * GROUP + part % GROUP
            listed = segments + ((kv_head * GROUP + part % GROUP) * list_step + at).to(gl.int64) * 4
            with_mask = gl.load(listed + 1)
            start = gl.load(listed) + gl.where(part < GROUP, 0, with_mask)
            number = gl.where(part < GROUP, with_mask, gl.load(listed + 2))
            # Rows count through all batch entries; sums of a head begin anew in each.
            head_sums = sums + (batch * (P[0] - 1) + head) * query_rows
            entry = records + start.to(gl.int64) * 4
            there = number > 0
            flat = gl.load(entry, mask=there, other=0)
            position = gl.load(entry + 1, mask=there, other=0)
            packed = gl.load(entry + 2, mask=there, other=0)
            for j in range(number):
                stage = it % STAGES
                high = packed % 256
                left = packed // 256 % 256
                right = packed // 65536
                # Before the wait, so that it hides the loads' latency: one warp does all of this, block after block.
                index = gl.arange(0, BQ, lane)
                both = gl.load(head_sums + flat + index, mask=index < high, other=0x7F800000)
                entry += 4
                there = j + 1 < number
                next_flat = gl.load(entry, mask=there, other=0)
                next_position = gl.load(entry + 1, mask=there, other=0)
                next_packed = gl.load(entry + 2, mask=there, other=0)
                mbarrier.wait(empty.index(stage), ((it // STAGES) & 1) ^ 1)
                place = [flat, 0, head, 0]
                mbarrier.expect(q_full.index(stage), BQ * DP * 2)
                tma.async_copy_global_to_shared(q_d, place, q_full.index(stage), _as_4d(q_s.index(stage), BQ, DP, 16))
                mbarrier.expect(do_full.index(stage), BQ * DP * 2)
                tma.async_copy_global_to_shared(
                    do_d, place, do_full.index(stage), _as_4d(do_s.index(stage), BQ, DP, 16)
                )
                info = info_s.index(it % 4)
                _put(info, 0, first + left)
                _put(info, 1, right - left)
                _put(info, 2, 1)
                _put(info, 3, 256)
                _put(info, 4, position)
                _put(info, 5, 0)
                _put(info, 6, high)
                _put(info, 7, (high < BQ).to(gl.int32))
                _put(info, 8, flat)
                _put(info, 9, 0)
                _put(info, 10, head)
                _put(info, 11, 0)
                row_s.index(stage).slice(0, BQ).store((both & 0xFFFFFFFF).to(gl.int32).to(gl.float32, bitcast=True))
                row_s.index(stage).slice(BQ, BQ).store((both >> 32).to(gl.int32).to(gl.float32, bitcast=True))
                mbarrier.arrive(do_full.index(stage), count=1)
                it += 1
                flat = next_flat
                position = next_position
                packed = next_packed
        dealt += 1
    mbarrier.wait(kv_empty, (turn & 1) ^ 1)
    _put(tile_s, 0, -1)
    fence_async_shared()
    mbarrier.arrive(kv_full, count=1)


_INTEGERS = [
    "list_step", "tile_count", "query_rows", "key_rows", "head0", "query_head0", "key_stride",
    "key_head_stride", "value_stride", "value_head_stride",
]  # fmt: skip


@gluon.jit(do_not_specialize=_INTEGERS)
def sparse_backward_kernel(
    P: gl.constexpr, k_d, v_d, q_d, do_d, dq_d, key, value, dk_out, dv_out, sums, tile_table, segments, records, tiles,
    starts, list_step, tile_count, query_rows, key_rows, head0, query_head0, key_stride,
    key_head_stride, value_stride, value_head_stride, scale_log2, scale, CONSUMER_REGISTERS: gl.constexpr,
    OTHER_REGISTERS: gl.constexpr,
):  # fmt: skip
    k_s, v_s, q_s, do_s, ds_s, dq_s, row_s, info_s, tile_s, out_s, bars = _allocate(P, k_d.dtype)
    gl.warp_specialize([
        (_consumer, (P, 0, scale_log2, scale, key, value, dk_out, dv_out, key_stride, key_head_stride, value_stride,
         value_head_stride, k_s, v_s, q_s, do_s, ds_s, dq_s, row_s, info_s, tile_s, out_s, bars)),
        (_consumer, (P, 1, scale_log2, scale, key, value, dk_out, dv_out, key_stride, key_head_stride, value_stride,
         value_head_stride, k_s, v_s, q_s, do_s, ds_s, dq_s, row_s, info_s, tile_s, out_s, bars)),
        (_list_producer, (P, k_d, v_d, q_d, do_d, sums, tile_table, segments, records, tiles, starts, list_step,
         tile_count, query_rows, key_rows, head0, k_s, v_s, q_s, do_s, row_s, info_s, tile_s,
         bars)),
        (_writer, (P, (dq_d,), dq_s, info_s, tile_s, bars, query_head0)),
    ], [4, 1, 1], [CONSUMER_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS])  # fmt: skip


class _Launches(NamedTuple):
    rows: Launch
    """Of (out, grad_out, lse, sums) and, where there is one, grad_lse."""
    scratch: tuple[int, ...]
    """Shape of the sums of dQ of one pass, float32."""
    heads: int
    """Key heads of a pass, but perhaps of the last."""
    passes: tuple[tuple[Launch, Launch], ...]
    """For some heads, of (query, key, value, grad_out, dk, dv, sums, tiles, dq sums, segments, records, tiles dealt,
    their starts), and of (dq sums, dq)."""


def _heads_for_even_passes(work: Work | SpreadWork, programs: int) -> int:
    """Key heads that a pass needs so that its heaviest tile does not take longer than all of it; 1 if nobody knows.

    Two passes are under way at a time, so each may take twice its share of the processors.
    """
    if isinstance(work, SpreadWork):
        total, heaviest = work.total, work.heaviest
    else:
        total, heaviest = int(work.blocks.sum()), int(work.blocks.max(initial=0))
    passes = max(1, 2 * total // (programs * heaviest)) if heaviest else len(work.blocks)
    return -(-len(work.blocks) // passes)


@lru_cache(maxsize=256)
def _launches(
    query: torch.Size, key: torch.Size, strides: _Strides, dtype: torch.dtype, device: torch.device, has_grad_lse: bool,
    tiles: int, list_step: int, is_causal: bool, scale: float, least_heads: int,
) -> _Launches:  # fmt: skip
    batches, query_rows, heads, d = query
    key_rows, kv_heads = key[1:3]
    padded = triton.next_power_of_2(d)
    total, group = batches * query_rows, heads // kv_heads
    rows = Launch(
        _row_kernel, triton.cdiv(query_rows, 64) * batches * heads,
        (Address(0), Address(1), Address(2), Address(4) if has_grad_lse else None, Address(3), query_rows,
         *strides.out[:3], *strides.grad_out[:3], heads, d, padded, 64),
        device, num_warps=4,
    )  # fmt: skip
    all_at_once = total * heads * d * 4 <= _ONE_PASS
    per_pass = kv_heads if all_at_once else max(least_heads, _heads_per_pass(query, key, dtype.itemsize))
    scratch, scratch_strides = (1, total, per_pass * group, d), (0, per_pass * group * d, d, 1)
    block, stages, registers = _tuning(padded)
    constants = (heads, kv_heads, d, padded, block, stages, 1, is_causal, False, (LONGEST,), (1,), False)
    passes = []
    for head0 in range(0, kv_heads, per_pass):
        count = min(per_pass, kv_heads - head0)
        arguments = (
            constants,
            _view(1, key, strides.key, dtype, 1, 64, padded, batches * key_rows),
            _view(2, key, strides.value, dtype, 1, 64, padded, batches * key_rows),
            _view(0, query, strides.query, dtype, 1, block, padded, total),
            _view(3, query, strides.grad_out, dtype, 1, block, padded, total),
            _view(8, scratch, scratch_strides, torch.float32, 1, block, padded // 2, total),
            Address(1), Address(2), Address(4), Address(5), Address(6), Address(7), Address(9), Address(10),
            Address(11), Address(12), list_step, tiles, query_rows, key_rows, head0, head0 * group,
            *strides.key[1:3], *strides.value[1:3], scale * math.log2(math.e), scale, *registers,
        )  # fmt: skip
        gradients = Launch(sparse_backward_kernel, _processors(device), arguments, device, num_warps=4)
        convert = Launch(
            _convert_kernel, triton.cdiv(total * count * group, 64),
            (Address(0), Address(1), total, head0 * group, count * group, per_pass * group, scale, heads, d, padded,
             64),
            device, num_warps=4,
        )  # fmt: skip
        passes.append((gradients, convert))
    return _Launches(rows, scratch, per_pass, tuple(passes))


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    dk: Tensor,
    dv: Tensor,
    *,
    tiles: Tensor,
    segments: Tensor,
    records: Tensor,
    work: Work | SpreadWork,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """The gradient of the query; those of key and value go into dk and dv, both contiguous.

    Args:
        grad_out, out: (B, Nq, H, D); grad_lse, lse: (B, Nq, H) float32, natural logarithms.
        query, key, value: (B, Nq, H, D), (B, Nk, H_kv, D), (B, Nk, H_kv, D) in bfloat16 or float16, whose batch
            stride is rows x row stride, with rows and heads at multiples of 16 bytes.
        dk, dv: key rows of no tile are left as they are.
        tiles, segments, records, work: `backends.sparse.rectangles.BackwardLists`.
        is_causal, scale: as for `sparse_attention`.
    """
    device = query.device
    dq = torch.empty(query.shape, dtype=query.dtype, device=device)
    if not len(tiles):
        return dq.zero_()
    if not _ready(grad_out):
        grad_out = grad_out.contiguous()
    if out.stride(3) != 1:
        out = out.contiguous()
    launches = _launches(
        query.shape, key.shape,
        _Strides(query.stride(), key.stride(), value.stride(), out.stride(), grad_out.stride()),
        query.dtype, device, grad_lse is not None, len(tiles),
        len(tiles) if len(segments) > len(tiles) else 0, is_causal, scale,
        _heads_for_even_passes(work, _processors(device)),
    )  # fmt: skip
    batches, query_rows, heads = query.shape[:3]
    sums = torch.empty((batches, heads, query_rows), dtype=torch.int64, device=device)
    launches.rows(out, grad_out, lse.contiguous(), sums, *(() if grad_lse is None else (grad_lse.contiguous(),)))
    lanes = min(2, len(launches.passes))
    scratch = torch.empty((lanes, *launches.scratch), dtype=torch.float32, device=device).unbind()
    main = torch.cuda.current_stream(device)
    streams = (main, _side_stream(device))
    if lanes > 1:
        streams[1].wait_stream(main)
    for turn, (gradients, convert) in enumerate(launches.passes):
        # Two passes are under way at a time: one's last tiles and its conversion overlap the other's first tiles.
        with torch.cuda.stream(streams[turn % lanes]):
            part = scratch[turn % lanes].zero_()
            schedule = work.dealt(turn * launches.heads, launches.heads, _processors(device), device)
            assert schedule is not None  # there are tiles
            gradients(
                query, key, value, grad_out, dk, dv, sums, tiles, part, segments, records, schedule.tiles,
                schedule.starts,
            )  # fmt: skip
            convert(part, dq)
    if lanes > 1:
        main.wait_stream(streams[1])
    return dq
