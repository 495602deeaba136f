"""Forward of block-sparse attention for Hopper GPUs (Gluon): the consumers of dilated attention, fed by lists.

A tile holds up to 128 consecutive query rows of one head. The consumers take what they need to know of a block of
keys from its record (`hopper_producer`), so a scheduler that reads tiles from a table, and a producer that reads
records from a list, are all that block-sparse attention adds. `backends.sparse.rectangles` makes both tables.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .hopper_forward import Sizes, _consumer, _processors, tuning_of
from .hopper_producer import (
    BLOCK_KEYS,
    BLOCK_ROWS,
    HEAD_DIMS,
    INT32,
    Spec,
    _next_plan,
    _produce_nothing,
    _produce_tile,
    allocate,
    load_rows,
    write_record,
)
from .launch import Address, Launch
from .schedule import Work
from .spread_work import SpreadWork


@gluon.jit
def _list_scheduler(spec: gl.constexpr, plans, tile_table, tiles, starts):
    """Read this program's tiles (`schedule.deal`), ahead of the producer."""
    plan_s, plan_full, plan_empty = plans
    turn = 0
    at = gl.load(starts + gl.program_id(0))
    stop = gl.load(starts + gl.program_id(0) + 1)
    mbarrier.wait(plan_empty, 1)
    while at < stop:
        entry = tile_table + gl.load(tiles + at) * 4
        row = gl.load(entry)
        packed = gl.load(entry + 1)
        first = gl.load(entry + 2)
        count = gl.load(entry + 3)
        # A tile without keys still has rows to write: it gets a block without keys.
        write_record(
            plan_s.index(0), gl.where(count > 0, count, -1), packed % 256, row, packed // 256, first, 0, 0, 0
        )  # fmt: skip
        mbarrier.arrive(plan_full, count=1)
        turn += 1
        mbarrier.wait(plan_empty, (turn & 1) ^ 1)
        at += 1
    write_record(plan_s.index(0), 0, 0, 0, 0, 0, 0, 0, 0)
    mbarrier.arrive(plan_full, count=1)


@gluon.jit
def _list_producer(spec: gl.constexpr, q_desc, k_desc, v_desc, shared, plans, records, query_total, key_total):
    _, k_s, v_s, block_s, _, _, _, k_full, k_empty, v_full, v_empty = shared
    size: gl.constexpr = spec.keys * spec.padded * 2
    block = 0
    turn = 0
    blocks, rows, row, head, first, _a, _b, _c = _next_plan(plans, turn)
    while blocks != 0:
        _produce_tile(spec, q_desc, shared, turn, gl.maximum(blocks, 1), 0, rows, row, head, query_total)
        turn += 1
        ask = block + gl.maximum(blocks - 3, 0)
        if blocks < 0:
            mbarrier.arrive(plans[2], count=1)
            block = _produce_nothing(spec, k_desc, v_desc, shared, key_total, block)
        else:
            kv_head = head // spec.group
            entry = records + first.to(gl.int64) * 4
            key_row = gl.load(entry)
            ahead = gl.load(entry + 1)
            keys = gl.load(entry + 2)
            members = gl.load(entry + 3)
            for n in range(blocks):
                mbarrier.arrive(plans[2], count=1, pred=block == ask)
                # The next record is on its way while this block waits for room.
                entry += gl.where(n + 1 < blocks, 4, 0)
                next_key_row = gl.load(entry)
                next_ahead = gl.load(entry + 1)
                next_keys = gl.load(entry + 2)
                next_members = gl.load(entry + 3)
                stage = block % spec.stages
                phase = ((block // spec.stages) & 1) ^ 1
                mbarrier.wait(k_empty.index(stage), phase)
                write_record(
                    block_s.index(block % (2 * spec.stages)),
                    keys // 65536, keys % 256, keys // 256 % 256, ahead, 1, members % 256, members // 256, 256,
                )  # fmt: skip
                mbarrier.expect(k_full.index(stage), size)
                load_rows(spec, spec.keys, k_desc, key_row, 0, kv_head, k_full.index(stage), k_s.index(stage))
                mbarrier.wait(v_empty.index(stage), phase)
                mbarrier.expect(v_full.index(stage), size)
                load_rows(spec, spec.keys, v_desc, key_row, 0, kv_head, v_full.index(stage), v_s.index(stage))
                block += 1
                key_row = next_key_row
                ahead = next_ahead
                keys = next_keys
                members = next_members
        blocks, rows, row, head, first, _a, _b, _c = _next_plan(plans, turn)
    # A tile of no blocks ends the consumers, which expect a first block behind their last tile.
    _produce_tile(spec, q_desc, shared, turn, 0, 0, 0, 0, 0, query_total)
    _produce_nothing(spec, k_desc, v_desc, shared, key_total, block)


@gluon.jit(do_not_specialize=["query_total", "key_total"])
def sparse_forward_kernel(
    spec: gl.constexpr, q_desc, out_desc, k_desc, v_desc, out, lse, tile_table, records, tiles, starts, query_total,
    key_total, scale_log2, consumer_registers: gl.constexpr, producer_registers: gl.constexpr,
):  # fmt: skip
    """One CTA per SM."""
    o_s, o_full, shared, plans = allocate(spec, q_desc.dtype)
    gl.warp_specialize([
        (_consumer, (spec, 0, scale_log2, query_total, out_desc, out, lse, o_s.index(0), o_full.index(0), shared)),
        (_consumer, (spec, 1, scale_log2, query_total, out_desc, out, lse, o_s.index(1), o_full.index(1), shared)),
        (_list_producer, (spec, q_desc, k_desc, v_desc, shared, plans, records, query_total, key_total)),
        (_list_scheduler, (spec, plans, tile_table, tiles, starts)),
    ], [4, 1, 1], [consumer_registers, producer_registers, producer_registers])  # fmt: skip


@lru_cache(maxsize=64)
def _spec(heads: int, kv_heads: int, dim: int, is_causal: bool) -> Spec:
    """What the consumers are compiled for: one branch of rate 1, whose segment has no end."""
    tuning = tuning_of(dim, is_causal)
    first, second = HEAD_DIMS[dim]
    return Spec(
        heads=heads, group=heads // kv_heads, dim=dim, padded=1 << (dim - 1).bit_length(), first=first, second=second,
        stride=1, keys=BLOCK_KEYS, stages=tuning.stages, lengths=(INT32,), rates=(1,), interleaved=False,
        causal=is_causal, merge=False, alternate=tuning.alternate,
        late_wait=tuning.late_wait, split_sums=tuning.split_sums,
    )  # fmt: skip


@lru_cache(maxsize=256)
def _launch(
    query: Sizes, key: Sizes, value: Sizes, dtype: torch.dtype, device: torch.device, programs: int,
    is_causal: bool, scale: float,
) -> Launch:  # fmt: skip
    """A launch of (query, key, value, out, lse, tile table, records, tiles, starts)."""
    batch, query_rows, heads, dim = query.shape
    key_rows, kv_heads = key.shape[1:3]
    spec, tuning = _spec(heads, kv_heads, dim, is_causal), tuning_of(dim, is_causal)
    out = Sizes(query.shape, (query_rows * heads * dim, heads * dim, dim, 1))
    arguments = (
        spec,
        query.view(0, 1, BLOCK_ROWS // 2, spec.padded),
        out.view(3, 1, BLOCK_ROWS // 2, spec.padded),
        key.view(1, 1, BLOCK_KEYS, spec.padded),
        value.view(2, 1, BLOCK_KEYS, spec.padded),
        Address(3),
        Address(4),
        Address(5),
        Address(6),
        Address(7),
        Address(8),
        batch * query_rows,
        batch * key_rows,
        scale * math.log2(math.e),
        tuning.consumer_registers,
        tuning.producer_registers,
    )
    return Launch(sparse_forward_kernel, programs, arguments, device, num_warps=4)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    tiles: Tensor,
    records: Tensor,
    work: Work | SpreadWork,
    is_causal: bool,
    scale: float,
) -> None:
    """Write the rows of all tiles into out (B, Nq, H, D) and lse (B, Nq, H) float32, both contiguous.

    Args:
        query, key, value: (B, Nq, H, D), (B, Nk, H_kv, D), (B, Nk, H_kv, D) in bfloat16 or float16, whose batch
            stride is rows x row stride, with rows and heads at multiples of 16 bytes.
        out, lse: see above; rows of no tile are left as they are.
        tiles, records, work: `backends.sparse.rectangles.ForwardLists`.
        is_causal, scale: as for `sparse_attention`.
    """
    schedule = work.dealt(0, len(work.blocks), _processors(query.device), query.device)
    if schedule is None:
        return
    launch = _launch(
        Sizes(query.shape, query.stride()), Sizes(key.shape, key.stride()), Sizes(value.shape, value.stride()),
        query.dtype, query.device, schedule.programs, is_causal, scale,
    )  # fmt: skip
    launch(query, key, value, out, lse, tiles, records, schedule.tiles, schedule.starts)
