# mypy: disable-error-code="possibly-undefined"
"""Backward of dilated attention on Hopper GPUs (sm90), in Gluon: dK and dV written once, dQ added by the copy engine.

A tile is up to 128 key rows of one residue class: rows ``first + stride * i`` inside one segment of the shortest
branch (`patterns.tiles`). Its K and V stay in shared memory and its dK and dV in registers while the query rows of
all branches stream by in blocks, so nothing partial is written. Each block's dQ is summed over tiles in float32 by
TMA reductions. Per thread block: two consumer warpgroups of 64 key rows each, a producer warp (geometry, loads) and a
writer warp (dQ). The producer passes what it knows about a tile and about a block through shared memory.

Rows of one residue modulo r are read through the view (T // r, r + T % r, heads, D) of the T flattened rows: row f is
(f // r, f % r) and, where that is one row too far, (f // r - 1, f % r + r), so no address lies beyond the tensor.
"""

from __future__ import annotations

import math

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
)

from .hopper_backward_consumer import _consumer, _get
from .hopper_producer import members

KEY_ROWS = 128
"""Key rows of a tile; a caller's cells span at most this many times the class stride."""
MAX_BRANCHES = 8
HEAD_DIMS = (48, 64, 96, 128)
TRITON_VERSIONS = ("3.6",)
"""Triton versions whose private TMA reduction `_reduce_add` was tested with."""
LONGEST = 2**30
"""Positions and segment lengths stay below."""
_LOG2E = tl.constexpr(math.log2(math.e))


@builtin
def _reduce_add(descriptor, coordinate, source, _semantic=None):
    """Add a block of shared memory to global memory; Gluon 3.6 has the operation but no public name for it."""
    from triton._C.libtriton import ir

    coordinate = _semantic._convert_to_ir_values(coordinate, require_i64=False)
    _semantic.builder.create_async_tma_reduce(
        ir.DESCRIPTOR_REDUCE_KIND.ADD, descriptor.handle, coordinate, source.handle
    )


# Constants of a kernel, one tuple P:
# 0 H, 1 H_kv, 2 D, 3 padded D, 4 query rows of a block, 5 stages, 6 class stride, 7 is_causal,
# 8 interleaved offsets, 9 segment lengths, 10 dilation rates, 11 add to dK and dV instead of writing


@gluon.jit
def _put(memory, index: gl.constexpr, value):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    memory.slice(index, 1).store(gl.full([1], value, gl.int32, layout))


@gluon.jit
def _as_4d(memory, ROWS: gl.constexpr, COLUMNS: gl.constexpr, BITS: gl.constexpr):
    layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=BITS, rank=4)
    return memory._reinterpret(memory.dtype, [ROWS, 1, 1, COLUMNS], layout)


@gluon.jit
def _offset(P: gl.constexpr, R: gl.constexpr, head):
    """Residue that a query head keeps."""
    if P[8]:
        return head % R
    else:
        return head // ((P[0] + R - 1) // R)


@gluon.jit
def _run(
    P: gl.constexpr, W: gl.constexpr, R: gl.constexpr, COMMON: gl.constexpr, head, segment, first, rows, begin,
    end, flat0, total,
):  # fmt: skip
    """Query rows that one branch and segment give a tile.

    Returns their number, the first one's position, how many blocks they make, how many of these (the leading ones)
    need masks, and whether the last row makes a block of its own.
    """
    BQ: gl.constexpr = P[4]
    STRIDE: gl.constexpr = P[6]
    offset = _offset(P, R, head)
    base = segment * W
    last = first + (rows - 1) * STRIDE
    low = gl.maximum(base, begin)
    if P[7]:
        low = gl.maximum(low, first)
    high = gl.minimum(base + W, end)
    start = gl.maximum(low - base - offset + R - 1, 0) // R
    count = gl.maximum(high - base - offset + R - 1, 0) // R - start
    count = gl.where((first % COMMON) == ((base + offset) % COMMON), gl.maximum(count, 0), 0)
    position = base + offset + start * R
    # A run that neither fits its view nor leaves a full block before its last row: that row is a block of its own.
    flat = flat0 + position
    beyond = (flat + (count - 1) * R) // R >= gl.maximum(total // R, 1)
    split = beyond & (flat < R) & (count <= BQ) & (count > 1)
    blocks = (count + BQ - 1) // BQ + split.to(gl.int32)
    masked = (rows < 128) | (first < base) | (last >= base + W) | (count < BQ) | split
    if COMMON != R:
        masked = masked | True
    if P[7]:  # noqa: SIM108
        edges = gl.minimum((gl.maximum(last - position, 0) + R * BQ - 1) // (R * BQ), blocks)
    else:
        edges = blocks * 0
    return count, position, blocks, gl.where(masked, blocks, edges), split


@gluon.jit
def _branch_blocks(
    P: gl.constexpr, BRANCH: gl.constexpr, COMMON: gl.constexpr, head, first, rows, begin, end, flat0, total,
):  # fmt: skip
    """How many blocks of one branch need masks, and how many there are."""
    SEGMENTS: gl.constexpr = P[9]
    RATES: gl.constexpr = P[10]
    W: gl.constexpr = SEGMENTS[BRANCH]
    R: gl.constexpr = RATES[BRANCH]
    masked = 0
    every = 0
    for segment in range(first // W, (first + (rows - 1) * P[6]) // W + 1):
        _count, _position, blocks, edges, _split = _run(
            P, W, R, COMMON, head, segment, first, rows, begin, end, flat0, total
        )
        masked += edges
        every += blocks
    return masked, every


@gluon.jit
def _load_branch(
    P: gl.constexpr, BRANCH: gl.constexpr, COMMON: gl.constexpr, INVERSE: gl.constexpr, clean, q_d, do_d, sums, q_s,
    do_s, row_s, info_s, q_full, do_full, empty, head, first, rows, begin, end, flat0, total, it,
):  # fmt: skip
    """Load the masked (clean = 0) or the other blocks of one branch, tell consumers and writer where they lie."""
    BQ: gl.constexpr = P[4]
    STAGES: gl.constexpr = P[5]
    SEGMENTS: gl.constexpr = P[9]
    RATES: gl.constexpr = P[10]
    W: gl.constexpr = SEGMENTS[BRANCH]
    R: gl.constexpr = RATES[BRANCH]
    lane: gl.constexpr = gl.BlockedLayout([BQ // 32], [32], [1], [0])
    for segment in range(first // W, (first + (rows - 1) * P[6]) // W + 1):
        count, position, blocks, edges, split = _run(
            P, W, R, COMMON, head, segment, first, rows, begin, end, flat0, total
        )
        taking_part = members(R // COMMON, INVERSE, (first - segment * W - _offset(P, R, head)) // COMMON)
        for j in range(gl.where(clean > 0, edges, 0), gl.where(clean > 0, blocks, edges)):
            # The last block ends with the run's last row; rows that an earlier block had are masked by lse = inf.
            start = gl.where(split, j * (count - 1), gl.maximum(gl.minimum(j * BQ, count - BQ), 0))
            low = gl.where(split, 0, j * BQ - start)
            high = gl.minimum(gl.where(split & (j == 0), count - 1, count) - start, BQ)
            here = position + start * R
            flat = flat0 + here
            row = flat // R
            residue = flat % R
            beyond = (row + high - 1 >= gl.maximum(total // R, 1)).to(gl.int32)
            stage = it % STAGES
            # Before the wait, so that it hides the load's latency: one warp does all of this, block after block.
            index = gl.arange(0, BQ, lane)
            both = gl.load(sums + here + index * R, mask=(index >= low) & (index < high), other=0x7F800000)
            mbarrier.wait(empty.index(stage), ((it // STAGES) & 1) ^ 1)
            place = [row - beyond, residue + beyond * R, head, 0]
            mbarrier.expect(q_full.index(stage), BQ * P[3] * 2)
            tma.async_copy_global_to_shared(q_d, place, q_full.index(stage), _as_4d(q_s.index(stage), BQ, P[3], 16))
            mbarrier.expect(do_full.index(stage), BQ * P[3] * 2)
            tma.async_copy_global_to_shared(do_d, place, do_full.index(stage), _as_4d(do_s.index(stage), BQ, P[3], 16))
            info = info_s.index(it % 4)
            _put(info, 0, segment * W)
            _put(info, 1, W)
            _put(info, 2, R)
            _put(info, 3, taking_part)
            _put(info, 4, here)
            _put(info, 5, low)
            _put(info, 6, high)
            _put(info, 7, ((count < BQ) | split).to(gl.int32))
            _put(info, 8, row)
            _put(info, 9, residue)
            _put(info, 10, head)
            _put(info, 11, BRANCH)
            row_s.index(stage).slice(0, BQ).store((both & 0xFFFFFFFF).to(gl.int32).to(gl.float32, bitcast=True))
            row_s.index(stage).slice(BQ, BQ).store((both >> 32).to(gl.int32).to(gl.float32, bitcast=True))
            mbarrier.arrive(do_full.index(stage), count=1)
            it += 1
    return it


@gluon.jit
def _producer(
    P: gl.constexpr, COMMONS: gl.constexpr, INVERSES: gl.constexpr, k_d, v_d, q_ds, do_ds, sums, cells, tiles, starts,
    cell_count, query_rows, key_rows, batches, head0, k_s, v_s, q_s, do_s, row_s, info_s, tile_s, bars,
):  # fmt: skip
    DP: gl.constexpr = P[3]
    STRIDE: gl.constexpr = P[6]
    RATES: gl.constexpr = P[10]
    GROUP: gl.constexpr = P[0] // P[1]
    kv_full, kv_empty, q_full, do_full, empty, _dq_full, _dq_empty = bars
    total = batches * query_rows
    turn = 0
    it = 0
    at = gl.load(starts + gl.program_id(0))
    stop = gl.load(starts + gl.program_id(0) + 1)
    while at < stop:
        tile = gl.load(tiles + at)
        kv_head = head0 + tile // STRIDE // cell_count
        record = cells + (tile // STRIDE % cell_count) * 8
        batch = gl.load(record)
        skip = tile % STRIDE
        first = gl.load(record + 2) + skip
        rows = gl.minimum((gl.load(record + 3) - skip + STRIDE - 1) // STRIDE, 128)
        own = batch * key_rows + gl.load(record + 1) + skip
        other = gl.load(record + 4)
        begin = gl.load(record + 5)
        end = gl.load(record + 6)
        flat0 = batch * query_rows + other
        masked = 0
        every = 0
        for head in range(kv_head * GROUP, kv_head * GROUP + GROUP):
            for i in gl.static_range(len(RATES)):
                m, e = _branch_blocks(P, i, COMMONS[i], head, first, rows, begin, end, flat0, total)
                masked += m
                every += e
        beyond = (own // STRIDE + 127 >= batches * key_rows // STRIDE).to(gl.int32)
        direct = (rows == 128) & (own // STRIDE - beyond >= 0)
        mbarrier.wait(kv_empty, (turn & 1) ^ 1)
        _put(tile_s, 0, masked)
        _put(tile_s, 6, every - masked)
        _put(tile_s, 1, own)
        _put(tile_s, 2, rows)
        _put(tile_s, 3, first)
        _put(tile_s, 4, kv_head)
        _put(tile_s, 5, direct.to(gl.int32))
        fence_async_shared()
        if direct:
            mbarrier.expect(kv_full, 4 * 64 * DP * 2)
            for g in gl.static_range(2):
                coordinate = [own // STRIDE - beyond + 64 * g, own % STRIDE + beyond * STRIDE, kv_head, 0]
                tma.async_copy_global_to_shared(k_d, coordinate, kv_full, _as_4d(k_s.index(g), 64, DP, 16))
                tma.async_copy_global_to_shared(v_d, coordinate, kv_full, _as_4d(v_s.index(g), 64, DP, 16))
        mbarrier.arrive(kv_full, count=1, pred=direct == 0)
        turn += 1
        for part in range(2 * GROUP):
            head = kv_head * GROUP + part % GROUP
            head_sums = sums + (batch * P[0] + head).to(gl.int64) * query_rows + other
            for i in gl.static_range(len(RATES)):
                it = _load_branch(
                    P, i, COMMONS[i], INVERSES[i], part // GROUP, q_ds[i], do_ds[i], head_sums, q_s, do_s, row_s,
                    info_s, q_full, do_full, empty, head, first, rows, begin, end, flat0, total, it,
                )  # fmt: skip
        at += 1
    mbarrier.wait(kv_empty, (turn & 1) ^ 1)
    _put(tile_s, 0, -1)
    fence_async_shared()
    mbarrier.arrive(kv_full, count=1)


@gluon.jit
def _writer(P: gl.constexpr, dq_ds, dq_s, info_s, tile_s, bars, query_head0):
    BQ: gl.constexpr = P[4]
    HALF: gl.constexpr = P[3] // 2
    RATES: gl.constexpr = P[10]
    kv_full, kv_empty, _q_full, _do_full, _empty, dq_full, dq_empty = bars
    turn = 0
    it = 0
    mbarrier.wait(kv_full, 0)
    masked = _get(tile_s, 0, 1)
    while masked >= 0:
        blocks = masked + _get(tile_s, 6, 1)
        mbarrier.arrive(kv_empty, count=1)
        for j in range(blocks):
            mbarrier.wait(dq_full.index(0), (it + j) & 1)
            info = info_s.index((it + j) % 4)
            row = _get(info, 8, 1)
            residue = _get(info, 9, 1)
            head = _get(info, 10, 1) - query_head0
            branch = _get(info, 11, 1)
            for g in gl.static_range(2):
                if g == 1:
                    mbarrier.wait(dq_full.index(1), (it + j) & 1)
                for i in gl.static_range(len(RATES)):
                    if branch == i:
                        _reduce_add(dq_ds[i], [row, residue, head, g * HALF], _as_4d(dq_s.index(g), BQ, HALF, 32))
            tma.store_wait(0)
            mbarrier.arrive(dq_empty.index(0), count=1)
            mbarrier.arrive(dq_empty.index(1), count=1)
        it += blocks
        turn += 1
        mbarrier.wait(kv_full, turn & 1)
        masked = _get(tile_s, 0, 1)


@gluon.jit
def _allocate(P: gl.constexpr, dtype: gl.constexpr):
    """Shared memory and barriers of a thread block."""
    DP: gl.constexpr = P[3]
    BQ: gl.constexpr = P[4]
    STAGES: gl.constexpr = P[5]
    half: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    word: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)
    plain: gl.constexpr = gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[0])
    bar_l: gl.constexpr = mbarrier.MBarrierLayout()
    k_s = gl.allocate_shared_memory(dtype, [2, 64, DP], half)
    v_s = gl.allocate_shared_memory(dtype, [2, 64, DP], half)
    q_s = gl.allocate_shared_memory(dtype, [STAGES, BQ, DP], half)
    do_s = gl.allocate_shared_memory(dtype, [STAGES, BQ, DP], half)
    ds_s = gl.allocate_shared_memory(dtype, [4, 64, BQ], half)
    out_s = gl.allocate_shared_memory(dtype, [2, 64, DP], half)
    dq_s = gl.allocate_shared_memory(gl.float32, [2, BQ, DP // 2], word)
    row_s = gl.allocate_shared_memory(gl.float32, [STAGES, 2 * BQ], plain)
    info_s = gl.allocate_shared_memory(gl.int32, [4, 16], plain)
    tile_s = gl.allocate_shared_memory(gl.int32, [8], plain)
    kv_full = gl.allocate_shared_memory(gl.int64, [1], bar_l)
    kv_empty = gl.allocate_shared_memory(gl.int64, [1], bar_l)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar_l)
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar_l)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar_l)
    dq_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar_l)
    dq_empty = gl.allocate_shared_memory(gl.int64, [2, 1], bar_l)
    mbarrier.init(kv_full, count=1)
    mbarrier.init(kv_empty, count=3)
    for i in gl.static_range(2):
        mbarrier.init(dq_full.index(i), count=1)
        mbarrier.init(dq_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(do_full.index(i), count=2)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    bars = (kv_full, kv_empty, q_full, do_full, empty, dq_full, dq_empty)
    return k_s, v_s, q_s, do_s, ds_s, dq_s, row_s, info_s, tile_s, out_s, bars


_INTEGERS = [
    "cell_count", "query_rows", "key_rows", "batches", "head0", "query_head0", "key_stride", "key_head_stride",
    "value_stride", "value_head_stride",
]  # fmt: skip


@gluon.jit(do_not_specialize=_INTEGERS)
def backward_kernel(
    P: gl.constexpr, COMMONS: gl.constexpr, INVERSES: gl.constexpr, k_d, v_d, q0, q1, q2, q3, q4, q5, q6, q7, do0, do1,
    do2, do3, do4, do5, do6, do7, dq0, dq1, dq2, dq3, dq4, dq5, dq6, dq7, key, value, dk_out, dv_out, sums, cells,
    tiles, starts, cell_count, query_rows, key_rows, batches, head0, query_head0, key_stride,
    key_head_stride, value_stride, value_head_stride, scale_log2, scale, CONSUMER_REGISTERS: gl.constexpr,
    OTHER_REGISTERS: gl.constexpr,
):  # fmt: skip
    q_ds = (q0, q1, q2, q3, q4, q5, q6, q7)
    do_ds = (do0, do1, do2, do3, do4, do5, do6, do7)
    dq_ds = (dq0, dq1, dq2, dq3, dq4, dq5, dq6, dq7)
    k_s, v_s, q_s, do_s, ds_s, dq_s, row_s, info_s, tile_s, out_s, bars = _allocate(P, k_d.dtype)
    gl.warp_specialize([
        (_consumer, (P, 0, scale_log2, scale, key, value, dk_out, dv_out, key_stride, key_head_stride, value_stride,
         value_head_stride, k_s, v_s, q_s, do_s, ds_s, dq_s, row_s, info_s, tile_s, out_s, bars)),
        (_consumer, (P, 1, scale_log2, scale, key, value, dk_out, dv_out, key_stride, key_head_stride, value_stride,
         value_head_stride, k_s, v_s, q_s, do_s, ds_s, dq_s, row_s, info_s, tile_s, out_s, bars)),
        (_producer, (P, COMMONS, INVERSES, k_d, v_d, q_ds, do_ds, sums, cells, tiles, starts, cell_count,
         query_rows, key_rows, batches, head0, k_s, v_s, q_s, do_s, row_s, info_s, tile_s, bars)),
        (_writer, (P, dq_ds, dq_s, info_s, tile_s, bars, query_head0)),
    ], [4, 1, 1], [CONSUMER_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS])  # fmt: skip
