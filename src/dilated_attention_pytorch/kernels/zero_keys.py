"""The zero keys of padding="zeros", added to a finished result: one more partial with out 0 and lse = log(count)."""

from __future__ import annotations

import triton
import triton.language as tl

from .tile import COUNTS, head_offset, locate, zero_keys_of


@triton.jit(do_not_specialize=COUNTS)
def zero_keys_kernel(
    out, lse, cells, branches, num_cells, stride, interleaved, num_branches, num_heads, query_rows_total,
    DV: tl.constexpr, PADDED_V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rescale out (B, Nq, H, DV) and raise lse (B, Nq, H) in place where a row has zero keys."""
    head, _, cell = locate(cells, num_cells, stride)
    batch = tl.load(cell).to(tl.int64)
    count, document = tl.load(cell + 3), tl.load(cell + 7)
    steps, dims = tl.arange(0, BLOCK), tl.arange(0, PADDED_V)
    positions = tl.load(cell + 2) + steps
    zeros = tl.zeros([BLOCK], tl.int32)
    for branch in range(num_branches):
        length, rate = tl.load(branches + 2 * branch), tl.load(branches + 2 * branch + 1)
        offset = head_offset(head, rate, num_heads, interleaved)
        active = (positions % length) % rate == offset
        zeros += tl.where(active, zero_keys_of(positions // length * length, length, rate, offset, document), 0)
    touched = (steps < count) & (zeros > 0)
    if tl.max(touched.to(tl.int32), 0) > 0:
        target = (batch * query_rows_total + tl.load(cell + 1) + steps) * num_heads + head
        before = tl.load(lse + target, mask=touched, other=0.0)
        extra = tl.log(zeros.to(tl.float32))
        peak = tl.maximum(before, tl.where(touched, extra, 0.0))
        after = peak + tl.log(tl.exp(before - peak) + tl.exp(tl.where(touched, extra, 0.0) - peak))
        place = out + target[:, None] * DV + dims[None, :]
        mask = touched[:, None] & (dims < DV)[None, :]
        rows = tl.load(place, mask=mask, other=0.0).to(tl.float32) * tl.exp(before - after)[:, None]
        tl.store(place, rows.to(out.dtype.element_ty), mask=mask)
        tl.store(lse + target, after, mask=touched)
