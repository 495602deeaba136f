"""Few query rows against many keys: the keys of all branches, split over programs, joined by the last to finish."""

from __future__ import annotations

import triton
import triton.language as tl

from .tile import COUNTS, head_offset, kept, load_rows, run_of


@triton.jit
def _keys_of(position, length, rate, offset, begin, end, CAUSAL: tl.constexpr):
    """(first position, number) of the keys that a row at ``position`` meets in one branch; none if it is inactive."""
    start = position // length * length
    run, keys = run_of(start, length, rate, offset, begin, end)
    if CAUSAL:
        keys = tl.minimum(keys, tl.maximum(position - run + rate, 0) // rate)
    return run, tl.where((position % length) % rate == offset, keys, 0)


@triton.jit(do_not_specialize=COUNTS)
def decode_kernel(
    query, key, value, hidden, out, lse, parts, tickets, cells, branches,
    num_cells, stride, interleaved, num_branches, first_branch, num_heads, group, query_rows_total, first_query,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, hidden_batch,
    scale_log2, seed, drop_below, keep_scale,
    KEYS: tl.constexpr, SPLITS: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, DV: tl.constexpr,
    PADDED_V: tl.constexpr, CAUSAL: tl.constexpr, HIDDEN: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """out (B, Nq, H, DV) and lse (B, Nq, H) of one row and head.

    ``parts`` (programs, PADDED_V + 2) float32 holds partial sums, largest scores and totals; ``tickets`` counts the
    programs of a row that are done, and is left at zero.
    """
    q_batch, q_row, q_head = q_batch * UNIT, q_row * UNIT, q_head * UNIT
    k_batch, k_row, k_head = k_batch * UNIT, k_row * UNIT, k_head * UNIT
    v_batch, v_row, v_head = v_batch * UNIT, v_row * UNIT, v_head * UNIT
    split = tl.program_id(0) % SPLITS
    task = tl.program_id(0) // SPLITS
    head, cell = task % num_heads, cells + (task // num_heads) * 8
    wide_head, wide_kv_head = head.to(tl.int64), (head // group).to(tl.int64)
    batch = tl.load(cell).to(tl.int64)
    row, position = tl.load(cell + 1), tl.load(cell + 2)
    key_row0, begin, end = tl.load(cell + 4), tl.load(cell + 5), tl.load(cell + 6)
    columns, dims, value_dims = tl.arange(0, KEYS), tl.arange(0, PADDED), tl.arange(0, PADDED_V)
    q = tl.load(
        query + batch * q_batch + row.to(tl.int64) * q_row + wide_head * q_head + dims, mask=dims < D, other=0.0
    )
    q = q.to(tl.float32) * scale_log2
    count = 0
    for branch in range(num_branches):
        length, rate = tl.load(branches + 2 * branch), tl.load(branches + 2 * branch + 1)
        offset = head_offset(head, rate, num_heads, interleaved)
        _, keys = _keys_of(position, length, rate, offset, begin, end, CAUSAL)
        count += (keys + KEYS - 1) // KEYS
    # This program takes blocks [first, last) of the branches' blocks, one branch after the other.
    first, last = count * split // SPLITS, count * (split + 1) // SPLITS
    accumulator = tl.zeros([PADDED_V], tl.float32)
    largest = tl.full([1], -float("inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    before = 0
    for branch in range(num_branches):
        length, rate = tl.load(branches + 2 * branch), tl.load(branches + 2 * branch + 1)
        offset = head_offset(head, rate, num_heads, interleaved)
        run, keys = _keys_of(position, length, rate, offset, begin, end, CAUSAL)
        blocks = (keys + KEYS - 1) // KEYS
        low, high = tl.maximum(first - before, 0), tl.minimum(last - before, blocks)
        before += blocks
        for block in range(low, high):
            indices = block * KEYS + columns
            seen = indices < keys
            rows = (key_row0 + run + rate * indices).to(tl.int64)
            if HIDDEN:
                seen = seen & (tl.load(hidden + batch * hidden_batch + rows, mask=seen, other=1) == 0)
            k = load_rows(
                key + batch * k_batch + wide_kv_head * k_head + rows[:, None] * k_row + dims[None, :], seen, D
            )
            s = tl.where(seen, tl.sum(k.to(tl.float32) * q[None, :], 1), -float("inf"))
            new = tl.maximum(largest, tl.max(s, 0))
            shift = tl.where(new == -float("inf"), 0.0, new)
            p, decay = tl.exp2(s - shift), tl.exp2(largest - shift)
            total = total * decay + tl.sum(p, 0)
            if DROPOUT:
                survives = kept(
                    seed, drop_below, key_row0 + run + rate * indices, first_query + row + tl.zeros_like(indices),
                    batch.to(tl.int32) * num_heads + head, first_branch + branch,
                )  # fmt: skip
                p = tl.where(survives, p * keep_scale, 0.0)
            v_pointers = value + batch * v_batch + wide_kv_head * v_head + rows[:, None] * v_row + value_dims[None, :]
            v = load_rows(v_pointers, seen, DV)
            accumulator = accumulator * decay + tl.sum(v.to(tl.float32) * p[:, None], 0)
            largest = new
    own = parts + tl.program_id(0).to(tl.int64) * (PADDED_V + 2)
    one = tl.arange(0, 1)
    tl.store(own + value_dims, accumulator)
    tl.store(own + PADDED_V + one, largest)
    tl.store(own + PADDED_V + 1 + one, total)
    tl.debug_barrier()
    if tl.atomic_add(tickets + task, 1, sem="acq_rel") == SPLITS - 1:
        tl.store(tickets + task, 0)
        splits = tl.arange(0, SPLITS)
        all_parts = parts + (task.to(tl.int64) * SPLITS + splits) * (PADDED_V + 2)
        peaks = tl.load(all_parts + PADDED_V, cache_modifier=".cg")
        totals = tl.load(all_parts + PADDED_V + 1, cache_modifier=".cg")
        peak = tl.max(peaks, 0)
        weights = tl.exp2(peaks - tl.where(peak == -float("inf"), 0.0, peak))
        sums = tl.load(all_parts[:, None] + value_dims[None, :], cache_modifier=".cg")
        whole = tl.sum(totals * weights, 0)
        mixed = tl.sum(sums * weights[:, None], 0) * tl.where(whole == 0, 0.0, 1.0 / whole)
        target = (batch * query_rows_total + row) * num_heads + head
        tl.store(out + target * DV + value_dims, mixed.to(out.dtype.element_ty), mask=value_dims < DV)
        natural = tl.where(whole == 0, -float("inf"), (peak + tl.log2(whole)) * 0.6931471805599453)
        tl.store(lse + target, natural)
