"""Forward of dilated attention for Hopper GPUs (Gluon): all branches of a query tile in one online softmax.

A tile holds 128 rows of one head and one residue class, so that its rows take part in the same branches. One CTA per
SM has a list of tiles: a scheduler warp finds the next tile, a producer warp works out which keys it meets,
loads them through TMA and writes a small record beside every block of keys (`hopper_producer`); two warpgroups of 64
rows each consume the blocks and need no geometry.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper_producer import (
    BLOCK_KEYS,
    BLOCK_ROWS,
    COLUMNS,
    FOREIGN,
    HEAD_DIMS,
    INT32,
    MAX_BRANCHES,
    ROWS,
    SKIPPED,
    Spec,
    allocate,
    field,
    is_member,
    load_rows,
    place_of,
    producer,
    read_record,
    scheduler,
)
from .launch import Address, Launch, View
from .schedule import KEPT, TILE_COST, Group, deal, met_blocks

# ------------------------------------------------------------------------------------------------------ consumers


@gluon.jit
def _turn(spec: gl.constexpr, token, warpgroup: gl.constexpr, arrive: gl.constexpr):
    """Named barriers 10 and 11 let the warpgroups issue their products in turn."""
    if spec.alternate:
        if arrive:
            if warpgroup == 0:
                token = gl.inline_asm_elementwise(
                    "bar.arrive 10, 256; mov.b32 $0, $1;", "=r,r", [token], dtype=gl.int32, is_pure=False, pack=1
                )
            else:
                token = gl.inline_asm_elementwise(
                    "bar.arrive 11, 256; mov.b32 $0, $1;", "=r,r", [token], dtype=gl.int32, is_pure=False, pack=1
                )
        else:
            if warpgroup == 0:
                token = gl.inline_asm_elementwise(
                    "bar.sync 10, 256; mov.b32 $0, $1;", "=r,r", [token], dtype=gl.int32, is_pure=False, pack=1
                )
            else:
                token = gl.inline_asm_elementwise(
                    "bar.sync 11, 256; mov.b32 $0, $1;", "=r,r", [token], dtype=gl.int32, is_pure=False, pack=1
                )
    return token


@gluon.jit
def _scores(spec: gl.constexpr, q, k, zeros):
    if spec.second:
        s = warpgroup_mma(
            q.slice(0, spec.first, 1), k.slice(0, spec.first, 1).permute((1, 0)), zeros, use_acc=False, is_async=True
        )
        s = warpgroup_mma(
            q.slice(spec.first, spec.second, 1), k.slice(spec.first, spec.second, 1).permute((1, 0)), s, is_async=True
        )
    else:
        s = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
    return s


@gluon.jit
def _wait_values(spec: gl.constexpr, sums, p, p32, v_full, phase):
    """Wait for the product of values; a ``late_wait`` comes when the next block's probabilities ``p32`` are there.

    ptxas moves a wait up, to behind the scores, but not across the loop of a barrier, which was passed long ago.
    """
    if spec.late_wait:
        mbarrier.wait(v_full, phase)
        sums, p, p32 = warpgroup_mma_wait(0, deps=[sums, p, p32])
    else:
        sums, p = warpgroup_mma_wait(0, deps=[sums, p])
    return sums, p, p32


@gluon.jit
def _drop_foreign(spec: gl.constexpr, v, keep):
    """Zero the value rows behind a short run, so that 0 * NaN cannot happen. Both warpgroups write the same."""
    wide: gl.constexpr = spec.padded // 8
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // wide, wide], [4, 1], [1, 0])
    row = gl.arange(0, 32, gl.SliceLayout(1, layout))
    parts: gl.constexpr = spec.keys // 32
    for part in gl.static_range(parts):
        piece = v.slice(32 * part, 32, 0)
        values = piece.load(layout)
        piece.store(gl.where((row + 32 * part < keep)[:, None], values, gl.zeros_like(values)))
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def _mask_columns(spec: gl.constexpr, s, low, high, limit):
    """Scores without columns below ``low``, above ``high`` or, if causal, above a row's ``limit``."""
    layout: gl.constexpr = s.type.layout
    if spec.padded > 64:
        # Column 8 i + j is at hand as i, a constant of the code, and j, of which a thread holds two: numbers of
        # columns would take 32 registers of a thread, and there are none to spare.
        parts = s.reshape([64, spec.keys // 8, 8])
        parts_layout: gl.constexpr = parts.type.layout
        i = 8 * gl.arange(0, spec.keys // 8, gl.SliceLayout(0, gl.SliceLayout(2, parts_layout)))
        j = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, parts_layout)))
        keep = i[None, :, None] >= (low - j)[None, None, :]
        if spec.causal:
            limit = gl.convert_layout(limit, gl.SliceLayout(1, gl.SliceLayout(2, parts_layout)))
            keep = keep & (i[None, :, None] <= limit[:, None, None] - j[None, None, :])
        else:
            keep = keep & (i[None, :, None] <= (high - j)[None, None, :])
        s = gl.convert_layout(gl.where(keep, parts, -float("inf")).reshape([64, spec.keys]), layout)
    else:
        column = gl.arange(0, spec.keys, gl.SliceLayout(0, layout))
        if spec.causal:
            s = gl.where((column >= low)[None, :] & (column[None, :] <= limit[:, None]), s, -float("inf"))
        else:
            s = gl.where(((column >= low) & (column <= high))[None, :], s, -float("inf"))
    return s


@gluon.jit
def _mask(spec: gl.constexpr, s, flags, place, row, v, v_full, phase):
    """Scores without the columns that a row must not see, and per row 0 or, where it takes no part, infinity."""
    layout: gl.constexpr = row.type.layout
    away = gl.zeros([64], gl.float32, layout)
    if flags != 0:
        record = read_record(place, 4)
        ahead = field(record, 3) + spec.stride * row
        high = field(record, 2)
        if flags & ROWS:
            member = (row >= field(record, 5)) & (row < field(record, 6)) & is_member(field(record, 7), row)
            away = gl.where(member, 0.0, float("inf"))
        if flags & COLUMNS:
            limit = ahead
            if spec.causal:
                # Exact for the rows that take part: their quotient is whole, or far beyond the block. No division.
                keys = ahead.to(gl.float32) * (1.0 / field(record, 4).to(gl.float32))
                limit = gl.minimum((gl.maximum(keys, -1.0) + 1.5).to(gl.int32) - 1, high)
            s = _mask_columns(spec, s, field(record, 1), high, limit)
        if flags & FOREIGN:
            mbarrier.wait(v_full, phase)
            _drop_foreign(spec, v, high + 1)
    return s, away


@gluon.jit
def _blocks(spec: gl.constexpr, warpgroup: gl.constexpr, tile):
    """How many blocks of a tile a warpgroup takes."""
    blocks = field(tile, 0)
    if spec.skip and warpgroup == 0:
        blocks = field(tile, 4)
    return blocks


@gluon.jit
def _next_block(spec: gl.constexpr, warpgroup: gl.constexpr, shared, held, held_phase):
    """Stage, phase, flags and record of the next block that a warpgroup takes, whose keys are there."""
    _, _, _, block_s, _, _, _, k_full, k_empty, v_full, v_empty = shared
    stages: gl.constexpr = spec.stages
    stage = gl.where(held == stages - 1, 0, held + 1)
    phase = gl.where(held == stages - 1, held_phase ^ 1, held_phase)
    mbarrier.wait(k_full.index(stage), phase)
    flags = field(read_record(block_s.index(stage + stages * phase), 4), 0)
    skips: gl.constexpr = spec.skip and warpgroup == 0
    if skips:
        skipped = flags & SKIPPED
        if skipped != 0:
            mbarrier.arrive(k_empty.index(stage), count=1)
            mbarrier.wait(v_full.index(stage), phase)
            mbarrier.arrive(v_empty.index(stage), count=1)
            wraps = stage == stages - 1
            stage = gl.where(wraps, 0, stage + 1)
            phase = gl.where(wraps, phase ^ 1, phase)
            mbarrier.wait(k_full.index(stage), phase)
            flags = field(read_record(block_s.index(stage + stages * phase), 4), 0)
    return stage, phase, flags, block_s.index(stage + stages * phase)


@gluon.jit
def _largest(s, m):
    """Largest score of each row: of pairs first, because one chain through all of a thread's scores takes long."""
    layout: gl.constexpr = m.type.layout
    even, odd = gl.split(s.reshape([64, s.shape[1] // 2, 2]))
    return gl.convert_layout(gl.max(gl.maximum(even, odd), 1), layout)


@gluon.jit
def _row_sums(spec: gl.constexpr, p32):
    """Sums of each row; in eight parts, each of one thread, which nobody has to exchange, if ``split_sums``."""
    if spec.split_sums:
        return gl.sum(p32.reshape([64, spec.keys // 8, 8]), 1)
    else:
        return gl.sum(p32, 1)


@gluon.jit
def _decayed(spec: gl.constexpr, total, decay):
    if spec.split_sums:
        layout: gl.constexpr = total.type.layout
        return total * gl.convert_layout(decay, gl.SliceLayout(1, layout))[:, None]
    else:
        return total * decay


@gluon.jit
def _softmax(s, away, m, scale_log2):
    """Probabilities of a block against the new maximum, and that maximum: both as before where ``away`` is infinite."""
    new = gl.where(away == 0, gl.maximum(m, _largest(s, m) * scale_log2), m)
    return gl.exp2(s * scale_log2 - (new + away)[:, None]), new


@gluon.jit
def _consumer(spec: gl.constexpr, warpgroup: gl.constexpr, scale_log2, query_total, out_desc, out, lse, o_s, o_full,
              shared):  # fmt: skip
    q_s, k_s, v_s, _block_s, tile_s, q_full, q_empty, _k_full, k_empty, v_full, v_empty = shared
    element: gl.constexpr = out_desc.dtype
    stages: gl.constexpr = spec.stages
    keys: gl.constexpr = spec.keys
    padded: gl.constexpr = spec.padded
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, spec.keys, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, spec.padded, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    wide: gl.constexpr = spec.padded // 8
    store_layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // wide, wide], [4, 1], [1, 0])
    token = gl.full([128], 0, gl.int32, gl.BlockedLayout([1], [32], [4], [0]))
    if warpgroup == 1:
        token = _turn(spec, token, 0, True)
    row = gl.arange(0, 64, gl.SliceLayout(1, s_layout)) + 64 * warpgroup
    zeros = gl.zeros([64, keys], gl.float32, s_layout)
    lowest = gl.full([64], -3.4028234663852886e38, gl.float32, gl.SliceLayout(1, s_layout))

    mbarrier.wait(q_full.index(0), 0)
    tile = read_record(tile_s.index(0), 4)
    blocks = _blocks(spec, warpgroup, tile)
    rows = field(tile, 1)
    first_row = field(tile, 2)
    head = field(tile, 3)
    # The stage whose values wait for their product, and its phase.
    held, held_phase, flags, record = _next_block(spec, warpgroup, shared, gl.to_tensor(stages - 1), gl.to_tensor(1))
    s = _scores(spec, q_s.index(warpgroup), k_s.index(held), zeros)
    s = warpgroup_mma_wait(0, deps=[s])
    s, away = _mask(spec, s, flags, record, row, v_s.index(held), v_full.index(held), held_phase)
    mbarrier.arrive(k_empty.index(held), count=1)
    p32, m = _softmax(s, away, lowest, scale_log2)
    total = _row_sums(spec, p32)
    p = gl.convert_layout(p32.to(element), p_layout)
    turn = 0
    while blocks > 0:
        buffer = turn & 1
        q = q_s.index(2 * buffer + warpgroup)
        sums = gl.zeros([64, padded], gl.float32, o_layout)
        before = lowest
        if spec.merge:
            place = (first_row.to(gl.int64) + spec.stride * row) * spec.heads + head
            before = gl.load(lse + place, mask=row < rows, other=-float("inf"))
            j, x = place_of(first_row + 64 * spec.stride * warpgroup, spec.stride, query_total % spec.stride)
            tma.store_wait(0)
            mbarrier.expect(o_full, 64 * spec.padded * 2)
            load_rows(spec, 64, out_desc, j, x, head, o_full, o_s)
        for _ in range(1, blocks):
            stage, phase, flags, record = _next_block(spec, warpgroup, shared, held, held_phase)
            token = _turn(spec, token, warpgroup, False)
            s = _scores(spec, q, k_s.index(stage), zeros)
            mbarrier.wait(v_full.index(held), held_phase)
            sums = warpgroup_mma(p, v_s.index(held), sums, is_async=True)
            token = _turn(spec, token, 1 - warpgroup, True)
            s = warpgroup_mma_wait(1, deps=[s])
            s, away = _mask(spec, s, flags, record, row, v_s.index(stage), v_full.index(stage), phase)
            if stages == 2:
                mbarrier.arrive(k_empty.index(stage), count=1)
            p32, new = _softmax(s, away, m, scale_log2)
            decay = gl.exp2(m - new)
            total = _decayed(spec, total, decay) + _row_sums(spec, p32)
            m = new
            sums, p, p32 = _wait_values(spec, sums, p, p32, v_full.index(held), held_phase)
            if stages > 2:
                mbarrier.arrive(k_empty.index(stage), count=1)
            mbarrier.arrive(v_empty.index(held), count=1)
            p = gl.convert_layout(p32.to(element), p_layout)
            sums = sums * gl.convert_layout(decay, o_rows)[:, None]
            held = stage
            held_phase = phase
        mbarrier.arrive(q_empty.index(buffer), count=1)

        # The next tile's first scores run beside this tile's last values.
        turn += 1
        next_buffer = turn & 1
        mbarrier.wait(q_full.index(next_buffer), (turn >> 1) & 1)
        next_tile = read_record(tile_s.index(next_buffer), 4)
        stage_n, phase_n, flags, record = _next_block(spec, warpgroup, shared, held, held_phase)
        token = _turn(spec, token, warpgroup, False)
        s = _scores(spec, q_s.index(2 * next_buffer + warpgroup), k_s.index(stage_n), zeros)
        mbarrier.wait(v_full.index(held), held_phase)
        sums = warpgroup_mma(p, v_s.index(held), sums, is_async=True)
        token = _turn(spec, token, 1 - warpgroup, True)
        s = warpgroup_mma_wait(1, deps=[s])
        s, away = _mask(spec, s, flags, record, row, v_s.index(stage_n), v_full.index(stage_n), phase_n)
        mbarrier.arrive(k_empty.index(stage_n), count=1)
        p32, new_m = _softmax(s, away, lowest, scale_log2)
        new_total = _row_sums(spec, p32)
        sums, p, p32 = _wait_values(spec, sums, p, p32, v_full.index(held), held_phase)
        mbarrier.arrive(v_empty.index(held), count=1)
        p = gl.convert_layout(p32.to(element), p_layout)
        held = stage_n
        held_phase = phase_n

        place = (first_row.to(gl.int64) + spec.stride * row) * spec.heads + head
        j, x = place_of(first_row + 64 * spec.stride * warpgroup, spec.stride, query_total % spec.stride)
        if spec.split_sums:
            total = gl.convert_layout(gl.sum(total, 1), gl.SliceLayout(1, s_layout))
        normaliser = gl.where(total == 0, -float("inf"), (m + gl.log2(total)) * 0.6931471805599453)
        factor = gl.where(total == 0, 0.0, 1.0 / total)
        if spec.merge:
            largest = gl.maximum(before, normaliser)
            largest = gl.where(largest == -float("inf"), 0.0, largest)
            old = gl.exp(before - largest)
            fresh = gl.exp(normaliser - largest)
            both = old + fresh
            share = gl.where(both == 0, 0.0, old / both)
            factor = gl.where(both == 0, 0.0, factor * (fresh / both))
            normaliser = largest + gl.log(both)
            mbarrier.wait(o_full, (turn - 1) & 1)
            sums = sums * gl.convert_layout(factor, o_rows)[:, None]
            sums += o_s.load(o_layout).to(gl.float32) * gl.convert_layout(share, o_rows)[:, None]
        else:
            sums = sums * gl.convert_layout(factor, o_rows)[:, None]
            tma.store_wait(0)
        gl.store(lse + place, normaliser, mask=row < rows)
        o_s.store(sums.to(element))
        if rows >= 64 * (warpgroup + 1):
            fence_async_shared()
            tma.async_copy_shared_to_global(
                out_desc, [j, x, head, 0], o_s._reinterpret(element, [64, 1, 1, spec.padded], out_desc.layout)
            )
        else:
            store_row = gl.arange(0, 64, gl.SliceLayout(1, store_layout)) + 64 * warpgroup
            store_column = gl.arange(0, spec.padded, gl.SliceLayout(0, store_layout))
            to = (first_row.to(gl.int64) + spec.stride * store_row) * (spec.heads * spec.dim) + head * spec.dim
            gl.store(
                out + to[:, None] + store_column[None, :],
                o_s.load(store_layout),
                mask=(store_row < rows)[:, None] & (store_column < spec.dim)[None, :],
            )
        blocks = _blocks(spec, warpgroup, next_tile)
        rows = field(next_tile, 1)
        first_row = field(next_tile, 2)
        head = field(next_tile, 3)
        m = new_m
        total = new_total
    # The last block was there for its scores alone: no copy may be under way when the shared memory is given back.
    mbarrier.wait(v_full.index(held), held_phase)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=[
    "cell_count", "query_rows", "key_rows", "query_total", "key_total"
])  # fmt: skip
def hopper_forward_kernel(
    spec: gl.constexpr, q_desc, out_desc, k0, k1, k2, k3, k4, k5, k6, k7, v0, v1, v2, v3, v4, v5, v6, v7,
    out, lse, cells, tiles, starts, cell_count, query_rows, key_rows, query_total, key_total,
    scale_log2, consumer_registers: gl.constexpr, producer_registers: gl.constexpr,
):  # fmt: skip
    """One CTA per SM; see the top of this file."""
    o_s, o_full, shared, plans = allocate(spec, q_desc.dtype)
    k_descs = (k0, k1, k2, k3, k4, k5, k6, k7)
    v_descs = (v0, v1, v2, v3, v4, v5, v6, v7)
    gl.warp_specialize([
        (_consumer, (spec, 0, scale_log2, query_total, out_desc, out, lse, o_s.index(0), o_full.index(0), shared)),
        (_consumer, (spec, 1, scale_log2, query_total, out_desc, out, lse, o_s.index(1), o_full.index(1), shared)),
        (producer, (spec, q_desc, k_descs, v_descs, shared, plans, query_total, key_total)),
        (scheduler, (spec, plans, cells, tiles, starts, cell_count, query_rows, key_rows)),
    ], [4, 1, 1], [consumer_registers, producer_registers, producer_registers])  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- host


@dataclass(frozen=True)
class Tuning:
    """What changes the speed and nothing else."""

    stages: int = 2
    alternate: bool = False
    late_wait: bool = False
    split_sums: bool = True
    consumer_registers: int = 232
    producer_registers: int = 40


def tuning_of(dim: int, is_causal: bool) -> Tuning:
    """The fastest settings that were measured on an H200."""
    if dim > 64:
        return Tuning(2, alternate=not is_causal)
    small = Tuning(4, consumer_registers=208, producer_registers=88)
    if dim <= 48:
        return replace(small, late_wait=True)
    return small if is_causal else replace(small, stages=3, alternate=True, split_sums=False)


@lru_cache(maxsize=16)
def _layout(padded: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(min(128, padded * 2), 16, 4)


class Sizes(NamedTuple):
    """Shape and strides of a tensor (B, N, H, D)."""

    shape: torch.Size
    strides: tuple[int, ...]

    def view(self, slot: int, rate: int, rows: int, padded: int) -> View:
        """The overlapping view of all rows of the batch, ``rate`` apart."""
        batch, length, heads, dim = self.shape
        total = batch * length
        row = self.strides[1] if length > 1 else heads * dim
        head = self.strides[2] if heads > 1 else dim
        shape = (total // rate, rate + total % rate, heads, dim)
        return View(slot, shape, (rate * row, row, head, 1), (rows, 1, 1, padded), _layout(padded))


@lru_cache(maxsize=8)
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache(maxsize=KEPT)
def _launches(
    query: Sizes, key: Sizes, value: Sizes, dtype: torch.dtype, device: torch.device, groups: tuple[Group, ...],
    interleaved: bool, is_causal: bool, scale: float, tuning: Tuning,
) -> tuple[Launch, ...]:  # fmt: skip
    """A launch for each group of branches, of (query, key, value, out, lse)."""
    batch, query_rows, heads, dim = query.shape
    key_rows, kv_heads = key.shape[1:3]
    padded = 1 << (dim - 1).bit_length()
    first, second = HEAD_DIMS[dim]
    out = Sizes(query.shape, (query_rows * heads * dim, heads * dim, dim, 1))
    launches = []
    for number, (lengths, rates, stride, cells) in enumerate(groups):
        lengths = tuple(min(length, INT32) for length in lengths)
        spec = Spec(
            heads=heads,
            group=heads // kv_heads,
            dim=dim,
            padded=padded,
            first=first,
            second=second,
            stride=stride,
            keys=BLOCK_KEYS,
            stages=tuning.stages,
            lengths=lengths,
            rates=rates,
            interleaved=interleaved,
            causal=is_causal,
            merge=number > 0,
            alternate=tuning.alternate,
            late_wait=tuning.late_wait,
            split_sums=tuning.split_sums,
        )
        unused = [None] * (MAX_BRANCHES - len(rates))
        blocks = met_blocks(
            cells.host, side="query", heads=heads, stride=stride, segment_lengths=lengths,
            dilation_rates=rates, interleaved=interleaved, is_causal=is_causal, tile_rows=BLOCK_ROWS,
            block_rows=BLOCK_KEYS,
        )  # fmt: skip
        # What earlier groups wrote stays as it is where this one has no keys.
        wanted = blocks > 0 if number else blocks >= 0
        schedule = deal(blocks + TILE_COST, wanted, _processors(device), device)
        if schedule is None:
            continue
        arguments = (
            spec,
            query.view(0, stride, BLOCK_ROWS // 2, padded),
            out.view(3, stride, BLOCK_ROWS // 2, padded),
            *(key.view(1, rate, BLOCK_KEYS, padded) for rate in rates),
            *unused,
            *(value.view(2, rate, BLOCK_KEYS, padded) for rate in rates),
            *unused,
            Address(3),
            Address(4),
            cells.device,
            schedule.tiles,
            schedule.starts,
            len(cells),
            query_rows,
            key_rows,
            batch * query_rows,
            batch * key_rows,
            scale * math.log2(math.e),
            tuning.consumer_registers,
            tuning.producer_registers,
        )
        launches.append(Launch(hopper_forward_kernel, schedule.programs, arguments, device, num_warps=4))
    return tuple(launches)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    groups: tuple[Group, ...],
    interleaved: bool,
    is_causal: bool,
    scale: float,
    tuning: Tuning | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of all branches, group by group.

    Args:
        query, key, value: (B, Nq, H, D), (B, Nk, H_kv, D), (B, Nk, H_kv, D); `backends.gluon.unsupported` says which.
        groups: with cells of the query side of at most ``128 * stride`` rows each, see `patterns.tiles`.
        interleaved: which offsets heads have.
        is_causal, scale: as for `dilated_attention`.
        tuning: instead of the measured settings.

    Returns:
        out (B, Nq, H, D) in the input's dtype and lse (B, Nq, H) float32; rows outside all cells are left unwritten.
    """
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    if not len(groups[0].cells) or not out.numel():
        return out, lse
    launches = _launches(
        Sizes(query.shape, query.stride()),
        Sizes(key.shape, key.stride()),
        Sizes(value.shape, value.stride()),
        query.dtype,
        query.device,
        groups,
        interleaved,
        is_causal,
        scale,
        tuning or tuning_of(query.shape[3], is_causal),
    )
    for launch in launches:
        launch(query, key, value, out, lse)
    return out, lse
