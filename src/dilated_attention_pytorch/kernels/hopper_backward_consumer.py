# mypy: disable-error-code="possibly-undefined"
"""Consumer warpgroups of the backward kernels on Hopper GPUs (Gluon): the products of tiles and blocks.

`hopper_backward_kernel` says what a tile is and what the constants P are.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper_producer import is_member


@gluon.jit
def _meet_pair(token):
    """Barrier of the two consumer warpgroups."""
    return gl.inline_asm_elementwise(
        "bar.sync 10, 256; mov.b32 $0, $1;", "=r,r", [token], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _zero(value):
    """0 that the compiler cannot see through: addresses made with it are not kept in registers across the loop."""
    return gl.inline_asm_elementwise("mov.b32 $0, 0;", "=r,r", [value], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _get(memory, index: gl.constexpr, WARPS: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    return gl.max(memory.slice(index, 1).load(layout), 0)


@gluon.jit
def _first_query(P: gl.constexpr, G: gl.constexpr, info, tile_s, anchor, rows_l: gl.constexpr):
    """For each of a warpgroup's keys the first query of the block that attends to it, far behind it if none does."""
    base = _get(info, 0, 4)
    rate = _get(info, 2, 4)
    taking_part = _get(info, 3, 4)
    number = gl.arange(0, 64, rows_l) + (anchor + 64 * G)
    position = _get(tile_s, 3, 4) + number * P[6]
    met = (number < _get(tile_s, 2, 4)) & (position >= base) & (position - base < _get(info, 1, 4))
    if taking_part != 256:
        met = met & is_member(taking_part, number)
    first = gl.zeros([64], gl.int32, rows_l)
    if P[7]:
        # Whole for keys that are met, or far behind the block. No division.
        ahead = (position - _get(info, 4, 4)).to(gl.float32) * (1.0 / rate.to(gl.float32))
        first = (gl.maximum(ahead, 0.0) + 0.5).to(gl.int32)
    return gl.where(met, first, 2147483647)


@gluon.jit
def _clear(P: gl.constexpr, G: gl.constexpr, low, high, q, do, token):
    """Zero the rows of a block that are not the run's: they may hold anything, and 0 * NaN is NaN."""
    DP: gl.constexpr = P[3]
    r_l: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DP, DP // 8], [4, 1], [1, 0])
    line = gl.arange(0, P[4], gl.SliceLayout(1, r_l))
    mine = do if G else q
    rest = mine.load(r_l)
    mine.store(gl.where(((line >= low) & (line < high))[:, None], rest, gl.zeros_like(rest)))
    fence_async_shared()
    return _meet_pair(token)


@gluon.jit
def _operand(P: gl.constexpr, memory):
    """A warpgroup's rows of K or V as the first operand of products, in parts whose columns are a power of two.

    In registers, where they fit: in shared memory, which is what these kernels wait for, each block would read them.
    """
    LOW: gl.constexpr = P[3] // 2 if P[2] < P[3] else P[3]
    HIGH: gl.constexpr = P[2] - LOW
    low = memory
    high = memory
    if HIGH:
        low = memory.slice(0, LOW, 1)
        high = memory.slice(LOW, HIGH, 1)
    if P[3] <= 64:
        s_l: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, P[4], 16])
        low = low.load(gl.DotOperandLayout(0, s_l, 2))
        if HIGH:
            high = high.load(gl.DotOperandLayout(0, s_l, 2))
    return low, high


@gluon.jit
def _scores(P: gl.constexpr, rows, queries, zeros):
    """Products of 64 rows of K or V with a block's queries or their gradients."""
    LOW: gl.constexpr = P[3] // 2 if P[2] < P[3] else P[3]
    HIGH: gl.constexpr = P[2] - LOW
    low, high = rows
    if HIGH:
        s = warpgroup_mma(low, queries.slice(0, LOW, 1).permute((1, 0)), zeros, use_acc=False, is_async=True)
        s = warpgroup_mma(high, queries.slice(LOW, HIGH, 1).permute((1, 0)), s, is_async=True)
    else:
        s = warpgroup_mma(low, queries.permute((1, 0)), zeros, use_acc=False, is_async=True)
    return s


@gluon.jit
def _hand_over(P: gl.constexpr, G: gl.constexpr, it, dq, dq_s, bars):
    """A warpgroup's columns of a block's dQ to the writer, whole 32 of them dealt out as `_convert_kernel` says."""
    WIDTH: gl.constexpr = dq.shape[1]
    _kv_full, _kv_empty, _q_full, _do_full, _empty, dq_full, dq_empty = bars
    mbarrier.wait(dq_empty.index(G), (it & 1) ^ 1)
    if WIDTH % 32 == 0:
        dq = dq.reshape([P[4], WIDTH // 32, 4, 4, 2]).permute((0, 1, 3, 2, 4)).reshape([P[4], WIDTH])
    dq_s.index(G).slice(0, WIDTH, 1).store(dq)
    fence_async_shared()
    mbarrier.arrive(dq_full.index(G), count=1)


@gluon.jit
def _block(
    P: gl.constexpr, G: gl.constexpr, MASKED: gl.constexpr, it, dk, dv, k, v, token, scale_log2, k_s, v_s, q_s,
    do_s, ds_s, dq_s, row_s, info_s, tile_s, bars,
):  # fmt: skip
    """One block of queries against the 64 key rows of warpgroup G: adds to dk and dv, hands its columns of dQ over."""
    DP: gl.constexpr = P[3]
    BQ: gl.constexpr = P[4]
    STAGES: gl.constexpr = P[5]
    HALF: gl.constexpr = DP // 2
    COLUMNS: gl.constexpr = P[2] - HALF if G else HALF
    PARTS: gl.constexpr = 2 if P[2] < DP else 1
    _kv_full, _kv_empty, q_full, do_full, empty, _dq_full, _dq_empty = bars
    dtype: gl.constexpr = k_s.dtype
    s_l: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BQ, 16])
    d_l: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DP, 16])
    q_l: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLUMNS, 16])
    a_l: gl.constexpr = gl.DotOperandLayout(0, d_l, 2)
    query_l: gl.constexpr = gl.SliceLayout(0, s_l)
    stage = it % STAGES
    phase = (it // STAGES) & 1
    mbarrier.wait(q_full.index(stage), phase)
    if MASKED:
        mbarrier.wait(do_full.index(stage), phase)
        info = info_s.index(it % 4)
        low = _get(info, 5, 4)
        high = _get(info, 6, 4)
        if _get(info, 7, 4) > 0:
            token = _clear(P, G, low, high, q_s.index(stage), do_s.index(stage), token)
    anchor = _zero(it)
    if DP > 64:
        k = _operand(P, k_s.index(anchor + G))
        v = _operand(P, v_s.index(anchor + G))
    zero_s = gl.zeros([64, BQ], gl.float32, s_l)
    s = _scores(P, k, q_s.index(stage), zero_s)
    mbarrier.wait(do_full.index(stage), phase)
    dp = _scores(P, v, do_s.index(stage), zero_s)
    lse = row_s.index(stage).slice(0, BQ).load(query_l)
    if MASKED:
        first = _first_query(P, G, info, tile_s, anchor, gl.SliceLayout(1, s_l))
    s = warpgroup_mma_wait(PARTS, deps=[s])
    p = gl.exp2(s * scale_log2 - lse[None, :])
    if MASKED:
        p = gl.where(first[:, None] <= (gl.arange(0, BQ, query_l) + anchor)[None, :], p, 0.0)
    p_half = gl.convert_layout(p.to(dtype), a_l)
    delta = row_s.index(stage).slice(BQ, BQ).load(query_l)
    dp = warpgroup_mma_wait(0, deps=[dp])
    dv = warpgroup_mma(p_half, do_s.index(stage), dv, is_async=True)
    ds = p * (dp - delta[None, :])
    if MASKED:
        ds = gl.where(p == 0, 0.0, ds)
    ds_half = ds.to(dtype)
    ds_operand = gl.convert_layout(ds_half, a_l)
    buffer = (it & 1) * 2
    ds_s.index(buffer + G).store(ds_half)
    fence_async_shared()
    token = _meet_pair(token)
    dq = warpgroup_mma(
        ds_s.index(buffer).permute((1, 0)),
        k_s.index(anchor).slice(G * HALF, COLUMNS, 1),
        gl.zeros([BQ, COLUMNS], gl.float32, q_l),
        use_acc=False,
        is_async=True,
    )
    dq = warpgroup_mma(
        ds_s.index(buffer + 1).permute((1, 0)), k_s.index(anchor + 1).slice(G * HALF, COLUMNS, 1), dq, is_async=True
    )
    dv, p_half = warpgroup_mma_wait(2, deps=[dv, p_half])
    dk = warpgroup_mma(ds_operand, q_s.index(stage), dk, is_async=True)
    dq = warpgroup_mma_wait(1, deps=[dq])
    if MASKED:
        line = gl.arange(0, BQ, gl.SliceLayout(1, q_l))
        dq = gl.where(((line >= low) & (line < high))[:, None], dq, 0.0)
    _hand_over(P, G, it, dq, dq_s, bars)
    dk, ds_operand = warpgroup_mma_wait(0, deps=[dk, ds_operand])
    mbarrier.arrive(empty.index(stage), count=1)
    return dk, dv, token


@gluon.jit
def _fetch(P: gl.constexpr, G: gl.constexpr, pointer, row_stride, rows, memory):
    """A warpgroup's 64 rows of K or V of a tile with fewer rows, zeros after the last."""
    DP: gl.constexpr = P[3]
    r_l: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DP, DP // 8], [4, 1], [1, 0])
    number = gl.arange(0, 64, gl.SliceLayout(1, r_l)) + 64 * G
    column = gl.arange(0, DP, gl.SliceLayout(0, r_l))
    place = (number.to(gl.int64) * row_stride)[:, None] + column[None, :]
    memory.store(gl.load(pointer + place, mask=(number < rows)[:, None] & (column < P[2])[None, :], other=0.0))


@gluon.jit
def _flush(P: gl.constexpr, G: gl.constexpr, gradient, pointer, rows, out_s):
    """Write a warpgroup's 64 rows of dK or dV; ``pointer`` is the tile's first row, rows lie a class stride apart."""
    DP: gl.constexpr = P[3]
    step: gl.constexpr = P[6] * P[1] * P[2]
    d_l: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DP, 16])
    r_l: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DP, DP // 8], [4, 1], [1, 0])
    if P[11]:
        number_d = gl.arange(0, 64, gl.SliceLayout(1, d_l)) + 64 * G
        column_d = gl.arange(0, DP, gl.SliceLayout(0, d_l))
        place_d = (number_d.to(gl.int64) * step)[:, None] + column_d[None, :]
        there = (number_d < rows)[:, None] & (column_d < P[2])[None, :]
        gradient = gradient + gl.load(pointer + place_d, mask=there, other=0.0).to(gl.float32)
    out_s.store(gradient.to(out_s.dtype))
    number = gl.arange(0, 64, gl.SliceLayout(1, r_l)) + 64 * G
    column = gl.arange(0, DP, gl.SliceLayout(0, r_l))
    place = (number.to(gl.int64) * step)[:, None] + column[None, :]
    gl.store(pointer + place, out_s.load(r_l), mask=(number < rows)[:, None] & (column < P[2])[None, :])


@gluon.jit
def _consumer(
    P: gl.constexpr, G: gl.constexpr, scale_log2, scale, key, value, dk_out, dv_out, key_stride, key_head_stride,
    value_stride, value_head_stride, k_s, v_s, q_s, do_s, ds_s, dq_s, row_s, info_s, tile_s, out_s, bars,
):  # fmt: skip
    DP: gl.constexpr = P[3]
    kv_full, kv_empty, _q_full, _do_full, _empty, _dq_full, _dq_empty = bars
    d_l: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DP, 16])
    token = gl.full([128], 0, gl.int32, gl.BlockedLayout([1], [32], [4], [0]))
    turn = 0
    it = 0
    mbarrier.wait(kv_full, 0)
    masked = _get(tile_s, 0, 4)
    while masked >= 0:
        if _get(tile_s, 5, 4) == 0:
            rows_f = _get(tile_s, 2, 4)
            own_f = _get(tile_s, 1, 4).to(gl.int64)
            head_f = _get(tile_s, 4, 4).to(gl.int64)
            key_from = key + own_f * key_stride + head_f * key_head_stride
            _fetch(P, G, key_from, key_stride * P[6], rows_f, k_s.index(G))
            value_from = value + own_f * value_stride + head_f * value_head_stride
            _fetch(P, G, value_from, value_stride * P[6], rows_f, v_s.index(G))
            fence_async_shared()
            token = _meet_pair(token)
        dk = gl.zeros([64, DP], gl.float32, d_l)
        dv = gl.zeros([64, DP], gl.float32, d_l)
        k = token
        v = token
        if DP <= 64:
            k = _operand(P, k_s.index(G))
            v = _operand(P, v_s.index(G))
        for j in range(masked):
            dk, dv, token = _block(
                P, G, True, it + j, dk, dv, k, v, token, scale_log2, k_s, v_s, q_s, do_s, ds_s, dq_s, row_s,
                info_s, tile_s, bars,
            )  # fmt: skip
        it += masked
        clean = _get(tile_s, 6, 4)
        for j in range(clean):
            dk, dv, token = _block(
                P, G, False, it + j, dk, dv, k, v, token, scale_log2, k_s, v_s, q_s, do_s, ds_s, dq_s, row_s,
                info_s, tile_s, bars,
            )  # fmt: skip
        it += clean
        rows = _get(tile_s, 2, 4)
        to = _get(tile_s, 1, 4).to(gl.int64) * (P[1] * P[2]) + _get(tile_s, 4, 4) * P[2]
        mbarrier.arrive(kv_empty, count=1)
        _flush(P, G, dv, dv_out + to, rows, out_s.index(G))
        _flush(P, G, dk * scale, dk_out + to, rows, out_s.index(G))
        turn += 1
        mbarrier.wait(kv_full, turn & 1)
        masked = _get(tile_s, 0, 4)
