"""Which tiles a Hopper CTA computes and which keys they meet: the scheduler warp and the producer warp.

Keys of a branch are ``rate`` rows apart. A tensor of T rows is described to TMA as the overlapping view (T // rate,
rate + T % rate, heads, D): place (j, x) is row ``x + rate * j``, which reaches all T rows and nothing behind them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

BLOCK_ROWS = 128
"""Query rows of a tile."""
BLOCK_KEYS = 128
"""Keys of a block."""
MAX_BRANCHES = 8
HEAD_DIMS = {32: (32, 0), 48: (32, 16), 64: (64, 0), 96: (64, 32), 128: (128, 0)}
"""Head dims, each with the powers of two that it is the sum of: the widths of the scores' products."""
INT32 = 2**31 - 1

# Bits of a block's record.
COLUMNS = gl.constexpr(1)  # some columns are masked
ROWS = gl.constexpr(2)  # some rows take no part
SKIPPED = gl.constexpr(8)  # none of the first warpgroup's rows meets these keys, which it skips
FOREIGN = gl.constexpr(4)  # rows behind the run's end were loaded: their values must not reach the product


@dataclass(frozen=True)
class Spec:
    """What a kernel is compiled for. Lengths of tensors are no part of it."""

    heads: int
    group: int
    dim: int
    padded: int
    first: int
    second: int
    stride: int
    keys: int
    stages: int
    lengths: tuple[int, ...]
    rates: tuple[int, ...]
    interleaved: bool
    causal: bool
    merge: bool
    alternate: bool
    late_wait: bool
    split_sums: bool

    @property
    def skip(self) -> bool:
        """Whether the first warpgroup skips blocks that lie behind all of its rows."""
        return self.causal and not self.alternate

    @property
    def commons(self) -> tuple[int, ...]:
        """Greatest common divisors of the rates and the class stride."""
        return tuple(math.gcd(rate, self.stride) for rate in self.rates)

    @property
    def periods(self) -> tuple[int, ...]:
        """Distance, in rows of a tile, of those that take part in a branch."""
        return tuple(rate // common for rate, common in zip(self.rates, self.commons, strict=True))

    @property
    def inverses(self) -> tuple[int, ...]:
        """Of the class stride over the common divisor, modulo the period."""
        return tuple(
            pow(self.stride // common, -1, period) for common, period in zip(self.commons, self.periods, strict=True)
        )


# ---------------------------------------------------------------------------------------------------- small tools


@gluon.jit
def write_record(record, a, b, c, d, e, f, g, h):
    """Store eight integers; one thread holds and stores all of them."""
    layout: gl.constexpr = gl.BlockedLayout([8], [32], [1], [0])
    n = gl.arange(0, 8, layout)
    low = gl.where(n == 0, a, gl.where(n == 1, b, gl.where(n == 2, c, d)))
    high = gl.where(n == 4, e, gl.where(n == 5, f, gl.where(n == 6, g, h)))
    record.store(gl.where(n < 4, low, high))


@gluon.jit
def read_record(record, warps: gl.constexpr):
    """The eight integers of a record, held by every thread."""
    layout: gl.constexpr = gl.BlockedLayout([8], [32], [warps], [0])
    return record.load(layout)


@gluon.jit
def field(values, which: gl.constexpr, warps: gl.constexpr = 4):
    layout: gl.constexpr = gl.BlockedLayout([8], [32], [warps], [0])
    return gl.sum(gl.where(gl.arange(0, 8, layout) == which, values, 0), 0)


@gluon.jit
def place_of(row, rate: gl.constexpr, remainder):
    """(j, x) of a row in the overlapping view, so that as many rows as possible can follow it."""
    j = row // rate
    x = row - j * rate
    later = (x < remainder) & (j > 0)
    return gl.where(later, j - 1, j), gl.where(later, x + rate, x)


@gluon.jit
def members(period: gl.constexpr, inverse: gl.constexpr, ahead):
    """``256 * period + first`` of the rows i of a tile that take part: ``ahead + stride * i`` is a multiple of a rate.

    ``ahead`` comes divided by the common divisor of rate and stride. A tile has fewer than 255 rows.
    """
    if period == 1:
        packed = gl.to_tensor(256)
    else:
        capped: gl.constexpr = period if period < 255 else 255
        first = ((period - ahead % period) * gl.to_tensor(inverse).to(gl.int64) % period).to(gl.int32)
        packed = capped * 256 + gl.minimum(first, 255)
    return packed


@gluon.jit
def is_member(packed, row):
    """Whether rows of a tile take part, see `members`. No division."""
    period = packed // 256
    behind = row - packed % 256
    times = (behind.to(gl.float32) * (1.0 / period.to(gl.float32)) + 0.01).to(gl.int32)
    return (behind >= 0) & (times * period == behind)


@gluon.jit
def load_rows(spec: gl.constexpr, rows: gl.constexpr, descriptor, j, x, head, full, target):
    layout: gl.constexpr = descriptor.layout
    tma.async_copy_global_to_shared(
        descriptor, [j, x, head, 0], full, target._reinterpret(target.dtype, [rows, 1, 1, spec.padded], layout)
    )


@gluon.jit
def allocate(spec: gl.constexpr, element: gl.constexpr):
    """Shared memory and barriers of a CTA: (results, their barriers, what all warps share, what a plan needs)."""
    flat: gl.constexpr = gl.NVMMASharedLayout(min(128, spec.padded * 2), 16, 2)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    q_s = gl.allocate_shared_memory(element, [4, 64, spec.padded], flat)
    o_s = gl.allocate_shared_memory(element, [2, 64, spec.padded], flat)
    k_s = gl.allocate_shared_memory(element, [spec.stages, spec.keys, spec.padded], flat)
    v_s = gl.allocate_shared_memory(element, [spec.stages, spec.keys, spec.padded], flat)
    block_s = gl.allocate_shared_memory(gl.int32, [2 * spec.stages, 8], plain)
    tile_s = gl.allocate_shared_memory(gl.int32, [2, 8], plain)
    plan_s = gl.allocate_shared_memory(gl.int32, [1, 8], plain)
    plan_full = gl.allocate_shared_memory(gl.int64, [1], barrier)
    plan_empty = gl.allocate_shared_memory(gl.int64, [1], barrier)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    o_full = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    k_full = gl.allocate_shared_memory(gl.int64, [spec.stages, 1], barrier)
    k_empty = gl.allocate_shared_memory(gl.int64, [spec.stages, 1], barrier)
    v_full = gl.allocate_shared_memory(gl.int64, [spec.stages, 1], barrier)
    v_empty = gl.allocate_shared_memory(gl.int64, [spec.stages, 1], barrier)
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(o_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=2)
    mbarrier.init(plan_full, count=1)
    mbarrier.init(plan_empty, count=1)
    stages: gl.constexpr = spec.stages
    for i in gl.static_range(stages):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()
    shared = (q_s, k_s, v_s, block_s, tile_s, q_full, q_empty, k_full, k_empty, v_full, v_empty)
    plans = (plan_s, plan_full, plan_empty)
    return o_s, o_full, shared, plans


# ------------------------------------------------------------------------------------------------------- producer


@gluon.jit
def _run(spec: gl.constexpr, length: gl.constexpr, rate: gl.constexpr, common: gl.constexpr, later: gl.constexpr,
         position, rows, head, begin, end):  # fmt: skip
    """The keys of one branch in the first or, if ``later``, the second segment that the tile touches.

    Returns (number of keys, position of the first, first and last + 1 row of the tile inside the segment).
    """
    offset = head % rate if spec.interleaved else head // ((spec.heads + rate - 1) // rate)
    last = position + spec.stride * (rows - 1)
    segment = position // length + later
    base = segment * length
    first_key = base + offset
    first_key += gl.where(begin > first_key, (begin - first_key + rate - 1) // rate * rate, 0)
    end_key = base + gl.minimum(end - base, length)
    if spec.causal:
        end_key = gl.minimum(end_key, last + 1)
    count = gl.where(end_key > first_key, (end_key - first_key + rate - 1) // rate, 0)
    if later:
        count = gl.where(last - (base - length) >= length, count, 0)
        row_begin = (base - position + spec.stride - 1) // spec.stride
        row_end = rows
    else:
        row_begin = 0
        row_end = gl.where(last - base >= length, (base + length - 1 - position) // spec.stride + 1, rows)
    # C's remainder of a negative number is 0 in the same cases.
    count = gl.where((position - first_key) % common == 0, count, 0)
    return count, first_key, row_begin, row_end


@gluon.jit
def _skips(spec: gl.constexpr, branch: gl.constexpr, position, first_key, blocks):
    """Whether the first block of a run, with its last keys, lies behind all rows of the first warpgroup.

    Never the only block, so that a warpgroup takes a block of every run, and skips one at a time.
    """
    found = blocks < 0
    if spec.skip:
        found = (blocks > 1) & (position + 63 * spec.stride < first_key + spec.rates[branch] * spec.keys * (blocks - 1))
    return found


@gluon.jit
def _produce_run(spec: gl.constexpr, branch: gl.constexpr, k_desc, v_desc, shared,
                 count, first_key, row_begin, row_end, rows, position, head, key_row, key_rows, block, plan_empty,
                 ask):  # fmt: skip
    _, k_s, v_s, block_s, _, _, _, k_full, k_empty, v_full, v_empty = shared
    rate: gl.constexpr = spec.rates[branch]
    common: gl.constexpr = spec.commons[branch]
    size: gl.constexpr = spec.keys * spec.padded * 2
    kv_head = head // spec.group
    remainder = key_rows % rate
    ahead = position - first_key
    blocks = (count + spec.keys - 1) // spec.keys
    taking_part = members(spec.periods[branch], spec.inverses[branch], ahead // common)
    skips = _skips(spec, branch, position, first_key, blocks)
    some_rows = (row_begin > 0) | (row_end < rows)
    if common != rate:
        some_rows = blocks > 0
    for n in range(blocks):
        mbarrier.arrive(plan_empty, count=1, pred=block == ask)
        start = (blocks - 1 - n) * spec.keys
        behind = gl.maximum(start + spec.keys - count, 0)
        # The last block begins earlier, where it can, and leaves out what the next will bring.
        back = gl.minimum(behind, start)
        low = back
        high = gl.where(back < behind, count - 1, spec.keys - 1)
        start -= back
        masked = (low > 0) | (back < behind)
        if spec.causal:
            masked = masked | (ahead + spec.stride * row_begin < rate * (start + spec.keys - 1))
        flags = (
            gl.where((n == 0) & skips, SKIPPED, 0)
            + gl.where(masked, COLUMNS, 0)
            + gl.where(some_rows, ROWS, 0)
            + gl.where(back < behind, FOREIGN, 0)
        )
        j, x = place_of(key_row + first_key + rate * start, rate, remainder)
        stage = block % spec.stages
        phase = ((block // spec.stages) & 1) ^ 1
        mbarrier.wait(k_empty.index(stage), phase)
        write_record(
            block_s.index(block % (2 * spec.stages)),
            flags, low, high, ahead - rate * start, rate, row_begin, row_end, taking_part,
        )  # fmt: skip
        mbarrier.expect(k_full.index(stage), size)
        load_rows(spec, spec.keys, k_desc, j, x, kv_head, k_full.index(stage), k_s.index(stage))
        mbarrier.wait(v_empty.index(stage), phase)
        mbarrier.expect(v_full.index(stage), size)
        load_rows(spec, spec.keys, v_desc, j, x, kv_head, v_full.index(stage), v_s.index(stage))
        block += 1
    return block


@gluon.jit
def _produce_nothing(spec: gl.constexpr, k_desc, v_desc, shared, key_rows, block):
    """A block without any key: TMA fills places behind the tensor with zeros."""
    _, k_s, v_s, block_s, _, _, _, k_full, k_empty, v_full, v_empty = shared
    size: gl.constexpr = spec.keys * spec.padded * 2
    stage = block % spec.stages
    phase = ((block // spec.stages) & 1) ^ 1
    mbarrier.wait(k_empty.index(stage), phase)
    write_record(block_s.index(block % (2 * spec.stages)), COLUMNS.value, 0, -1, 0, 1, 0, 0, 0)
    mbarrier.expect(k_full.index(stage), size)
    load_rows(spec, spec.keys, k_desc, key_rows, 0, 0, k_full.index(stage), k_s.index(stage))
    mbarrier.wait(v_empty.index(stage), phase)
    mbarrier.expect(v_full.index(stage), size)
    load_rows(spec, spec.keys, v_desc, key_rows, 0, 0, v_full.index(stage), v_s.index(stage))
    return block + 1


@gluon.jit
def _produce_tile(spec: gl.constexpr, q_desc, shared, turn, blocks, skipped, rows, row, head, query_total):
    q_s, _, _, _, tile_s, q_full, q_empty, _, _, _, _ = shared
    buffer = turn & 1
    mbarrier.wait(q_empty.index(buffer), ((turn >> 1) & 1) ^ 1)
    write_record(tile_s.index(buffer), blocks, rows, row, head, blocks - skipped, 0, 0, 0)
    mbarrier.expect(q_full.index(buffer), 128 * spec.padded * 2)
    for g in gl.static_range(2):
        j, x = place_of(row + 64 * spec.stride * g, spec.stride, query_total % spec.stride)
        load_rows(spec, 64, q_desc, j, x, head, q_full.index(buffer), q_s.index(2 * buffer + g))


@gluon.jit
def scheduler(spec: gl.constexpr, plans, cells, tiles, starts, cell_count, query_rows, key_rows):
    """Read this program's tiles (`schedule.deal`), ahead of the producer, and pass on those that have keys."""
    plan_s, plan_full, plan_empty = plans
    visits: gl.constexpr = 2 * len(spec.rates)
    turn = 0
    at = gl.load(starts + gl.program_id(0))
    stop = gl.load(starts + gl.program_id(0) + 1)
    mbarrier.wait(plan_empty, 1)
    while at < stop:
        tile = gl.load(tiles + at)
        group = tile // spec.stride
        head = group // cell_count
        record = cells + (group % cell_count) * 8
        batch = gl.load(record)
        key_row = batch * key_rows + gl.load(record + 4)
        begin = gl.load(record + 5)
        end = gl.load(record + 6)
        first_row = tile % spec.stride
        rows = gl.minimum((gl.load(record + 3) - first_row + spec.stride - 1) // spec.stride, 128)
        row = batch * query_rows + gl.load(record + 1) + first_row
        position = gl.load(record + 2) + first_row
        blocks = gl.to_tensor(0)
        skipped = gl.to_tensor(0)
        for i in gl.static_range(visits):
            count, first_key, _, _ = _run(
                spec, spec.lengths[i // 2], spec.rates[i // 2], spec.commons[i // 2], i % 2,
                position, rows, head, begin, end,
            )  # fmt: skip
            run = (count + spec.keys - 1) // spec.keys
            blocks += run
            skipped += _skips(spec, i // 2, position, first_key, run).to(gl.int32)
        # A tile without keys still has rows to write: it gets a block without keys.
        write_record(
            plan_s.index(0), gl.where(blocks > 0, blocks, -1), rows + 256 * skipped, row, head, position, key_row,
            begin, end,
        )  # fmt: skip
        mbarrier.arrive(plan_full, count=1)
        turn += 1
        mbarrier.wait(plan_empty, (turn & 1) ^ 1)
        at += 1
    write_record(plan_s.index(0), 0, 0, 0, 0, 0, 0, 0, 0)
    mbarrier.arrive(plan_full, count=1)


@gluon.jit
def _next_plan(plans, turn):
    plan_s, plan_full, _ = plans
    mbarrier.wait(plan_full, turn & 1)
    plan = read_record(plan_s.index(0), 1)
    blocks = field(plan, 0, 1)
    rows = field(plan, 1, 1)
    row = field(plan, 2, 1)
    head = field(plan, 3, 1)
    position = field(plan, 4, 1)
    key_row = field(plan, 5, 1)
    begin = field(plan, 6, 1)
    end = field(plan, 7, 1)
    return blocks, rows, row, head, position, key_row, begin, end


@gluon.jit
def producer(spec: gl.constexpr, q_desc, k_descs, v_descs, shared, plans, query_total, key_total):
    visits: gl.constexpr = 2 * len(spec.rates)
    block = 0
    turn = 0
    blocks, rows, row, head, position, key_row, begin, end = _next_plan(plans, turn)
    while blocks != 0:
        skipped = rows // 256
        rows_t = rows % 256
        _produce_tile(spec, q_desc, shared, turn, gl.maximum(blocks, 1), skipped, rows_t, row, head, query_total)
        turn += 1
        ask = block + gl.maximum(blocks - 3, 0)
        if blocks < 0:
            mbarrier.arrive(plans[2], count=1)
            block = _produce_nothing(spec, k_descs[0], v_descs[0], shared, key_total, block)
        else:
            for i in gl.static_range(visits):
                count, first_key, row_begin, row_end = _run(
                    spec, spec.lengths[i // 2], spec.rates[i // 2], spec.commons[i // 2], i % 2,
                    position, rows_t, head, begin, end,
                )  # fmt: skip
                block = _produce_run(
                    spec, i // 2, k_descs[i // 2], v_descs[i // 2], shared,
                    count, first_key, row_begin, row_end, rows_t, position, head, key_row, key_total, block,
                    plans[2], ask,
                )  # fmt: skip
        blocks, rows, row, head, position, key_row, begin, end = _next_plan(plans, turn)
    # A tile of no blocks ends the consumers, which expect a first block behind their last tile.
    _produce_tile(spec, q_desc, shared, turn, 0, 0, 0, 0, 0, query_total)
    _produce_nothing(spec, k_descs[0], v_descs[0], shared, key_total, block)
