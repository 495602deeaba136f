"""Forward pass in plain Triton: one online softmax over the keys of all branches, so that nothing is written twice."""

from __future__ import annotations

import triton
import triton.language as tl

from .tile import COUNTS, head_offset, kept, load_rows, locate, rows_of, run_of


@triton.jit
def _attend(
    q,
    k_pointers,
    v_pointers,
    hidden_pointers,
    accumulator,
    largest,
    total,
    active,
    limits,
    columns_left,
    partial,
    scale_log2,
    seed,
    drop_below,
    keep_scale,
    key_rows,
    query_rows,
    batch_head,
    branch,
    D: tl.constexpr,
    DV: tl.constexpr,
    HIDDEN: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add one block of keys to the running softmax (accumulator, largest score in log2 units, total)."""
    columns = tl.arange(0, k_pointers.shape[0])
    seen = columns < columns_left
    if HIDDEN:
        seen = seen & (tl.load(hidden_pointers, mask=seen, other=1) == 0)
    k = load_rows(k_pointers, seen, D)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if HIDDEN:
        s = tl.where(seen[None, :], s, -float("inf"))
    if partial:
        s = tl.where(columns[None, :] <= limits[:, None], s, -float("inf"))
    # Rows that take no part keep what they have: a shift of inf makes their weights 0 at no cost per pair.
    new = tl.where(active, tl.maximum(largest, tl.max(s, 1) * scale_log2), largest)
    shift = tl.where(active, tl.where(new == -float("inf"), 0.0, new), float("inf"))
    p = tl.exp2(s * scale_log2 - shift[:, None])
    decay = tl.where(active, tl.exp2(largest - shift), 1.0)
    total = total * decay + tl.sum(p, 1)
    if DROPOUT:
        p = tl.where(kept(seed, drop_below, key_rows[None, :], query_rows[:, None], batch_head, branch), p, 0.0)
        p = p * keep_scale
    v = load_rows(v_pointers, seen, DV)
    accumulator = tl.dot(p.to(v.dtype), v, accumulator * decay[:, None], input_precision=PRECISION)
    return accumulator, new, total


@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    query,
    key,
    value,
    hidden,
    out,
    lse,
    cells,
    branches,
    num_cells,
    stride,
    interleaved,
    num_branches,
    first_branch,
    num_heads,
    group,
    query_rows_total,
    first_query,
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    hidden_batch,
    scale_log2,
    seed,
    drop_below,
    keep_scale,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    DV: tl.constexpr,
    PADDED_V: tl.constexpr,
    CAUSAL: tl.constexpr,
    HIDDEN: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
):
    """out (B, Nq, H, DV) and lse (B, Nq, H), both contiguous, of one tile of query rows."""
    q_batch, q_row, q_head = q_batch * UNIT, q_row * UNIT, q_head * UNIT
    k_batch, k_row, k_head = k_batch * UNIT, k_row * UNIT, k_head * UNIT
    v_batch, v_row, v_head = v_batch * UNIT, v_row * UNIT, v_head * UNIT
    head, residue, cell = locate(cells, num_cells, stride)
    wide_head, wide_kv_head = head.to(tl.int64), (head // group).to(tl.int64)
    batch = tl.load(cell).to(tl.int64)
    row = tl.load(cell + 1) + residue
    first = tl.load(cell + 2) + residue
    count = (tl.load(cell + 3) - residue + stride - 1) // stride
    if count <= 0:
        return
    key_row0, begin, end = tl.load(cell + 4), tl.load(cell + 5), tl.load(cell + 6)
    steps, columns = tl.arange(0, BLOCK), tl.arange(0, KEYS)
    dims, value_dims = tl.arange(0, PADDED), tl.arange(0, PADDED_V)
    in_tile = steps < count
    positions = first + stride * steps
    last = first + stride * (count - 1)
    rows = (row + stride * steps).to(tl.int64)
    q = tl.load(
        query + batch * q_batch + wide_head * q_head + rows[:, None] * q_row + dims[None, :],
        mask=in_tile[:, None] & (dims < D)[None, :],
        other=0.0,
    )
    accumulator = tl.zeros([BLOCK, PADDED_V], tl.float32)
    largest = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for branch in range(num_branches):
        length, rate = tl.load(branches + 2 * branch), tl.load(branches + 2 * branch + 1)
        offset = head_offset(head, rate, num_heads, interleaved)
        for segment in range(first // length, last // length + 1):
            active = rows_of(positions, in_tile, segment, length, rate, offset)
            if tl.max(active.to(tl.int32), 0) > 0:
                start = segment * length
                run, keys = run_of(start, length, rate, offset, begin, end)
                unmasked = keys
                if CAUSAL:
                    low = first + stride * (tl.maximum(start - first + stride - 1, 0) // stride)
                    unmasked = tl.minimum(keys, (tl.maximum(low - run + rate, 0)) // rate)
                    keys = tl.minimum(keys, tl.maximum(tl.minimum(last, start + length - 1) - run + rate, 0) // rate)
                unmasked = unmasked // KEYS * KEYS
                run_row = (key_row0 + run).to(tl.int64)
                step = rate.to(tl.int64) * columns
                key_rows = (run_row + step)[:, None]
                k_pointers = key + batch * k_batch + wide_kv_head * k_head + key_rows * k_row + dims[None, :]
                v_pointers = value + batch * v_batch + wide_kv_head * v_head + key_rows * v_row + value_dims[None, :]
                hidden_pointers = hidden + batch * hidden_batch + run_row + step
                jump = rate.to(tl.int64) * KEYS
                # Key j of the run lies at run + rate * j, so a row at position p sees those up to (p - run) / rate.
                limits = tl.zeros_like(positions) + (keys - 1)
                if CAUSAL:
                    limits = tl.minimum(limits, (positions - run + rate) // rate - 1)
                for block in range(0, keys, KEYS):
                    accumulator, largest, total = _attend(
                        q, k_pointers, v_pointers, hidden_pointers, accumulator, largest, total, active,
                        limits - block, keys - block, block >= unmasked,
                        scale_log2, seed, drop_below, keep_scale,
                        key_row0 + run + rate * (block + columns), first_query + row + stride * steps,
                        batch.to(tl.int32) * num_heads + head, first_branch + branch,
                        D, DV, HIDDEN, DROPOUT, PRECISION,
                    )  # fmt: skip
                    k_pointers += jump * k_row
                    v_pointers += jump * v_row
                    hidden_pointers += jump
    share = tl.where(total == 0, 0.0, 1.0 / total)
    target = (batch * query_rows_total + rows) * num_heads + head
    tl.store(
        out + target[:, None] * DV + value_dims[None, :],
        (accumulator * share[:, None]).to(out.dtype.element_ty),
        mask=in_tile[:, None] & (value_dims < DV)[None, :],
    )
    natural = tl.where(total == 0, -float("inf"), (largest + tl.log2(total)) * 0.6931471805599453)
    tl.store(lse + target, natural, mask=in_tile)
