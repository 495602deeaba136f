"""Backward of dilated attention on Hopper GPUs: launches `hopper_backward_kernel` and what surrounds it.

dQ is summed in float32 for a few heads at a time, so that the sums take little memory; two such passes are under way
at once, each on its own stream.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .hopper_backward_kernel import HEAD_DIMS, KEY_ROWS, LONGEST, MAX_BRANCHES, TRITON_VERSIONS, backward_kernel

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
    """target[row, head0 + head] = scale * source[row, head] for rows of (row, head) pairs."""
    pair = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, DP)
    there = (pair < flat_rows.to(tl.int64) * heads)[:, None] & (d < D)[None, :]
    place = pair // heads * width + pair % heads
    value = tl.load(source + place[:, None] * D + d[None, :], mask=there, other=0.0) * scale
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


def _view(tensor: Tensor, rate: int, rows: int, columns: int, total: int) -> TensorDescriptor:
    """The flattened rows of a (B, N, H, D) tensor by residue modulo ``rate``: see the module's docstring."""
    heads, d = tensor.shape[-2:]
    stride, head_stride = tensor.stride()[-3:-1]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8 * tensor.element_size(), rank=4)
    shape = [total // rate, rate + total % rate, heads, d] if total >= rate else [1, total, heads, d]
    return TensorDescriptor(tensor, shape, [rate * stride, stride, head_stride, 1], [rows, 1, 1, columns], layout)


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


def unsupported(
    query: Tensor, key: Tensor, value: Tensor, segment_lengths: Sequence[int], *, deterministic: bool = False
) -> str | None:
    """Why `backward` cannot take these tensors and branches, or None. Reads shapes, strides and dtypes only."""
    d = query.shape[3]
    if not triton.__version__.startswith(tuple(f"{version}." for version in TRITON_VERSIONS)):
        return f"Triton is {triton.__version__}; the Hopper backward is tested with {', '.join(TRITON_VERSIONS)}"
    if query.dtype not in (torch.bfloat16, torch.float16) or not query.dtype == key.dtype == value.dtype:
        return f"dtypes are {query.dtype}, {key.dtype}, {value.dtype}; the Hopper backward takes bfloat16 or float16"
    if d not in HEAD_DIMS or value.shape[3] != d:
        return f"head dims are {d} and {value.shape[3]}; the Hopper backward takes equal ones of {HEAD_DIMS}"
    if len(segment_lengths) > MAX_BRANCHES:
        return f"there are {len(segment_lengths)} branches; the Hopper backward takes at most {MAX_BRANCHES}"
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not _ready(tensor):
            return f"{name} has strides {tensor.stride()}; the Hopper backward needs evenly spaced, aligned rows"
    if deterministic:
        return "the Hopper backward adds dQ in any order; it is not deterministic"
    return None


def _offset_of(head: int, rate: int, heads: int, interleaved: bool) -> int:
    return head % rate if interleaved else head // -(-heads // rate)


@lru_cache(maxsize=64)
def _class_order(
    segments: tuple[int, ...], rates: tuple[int, ...], stride: int, tiles: int, heads: int, kv_heads: int,
    interleaved: bool, device: torch.device,
) -> Tensor:  # fmt: skip
    """For every key head the places of a cell (tiles of one head), the heaviest first."""

    def weight(kv_head: int, place: int) -> float:
        group = heads // kv_heads
        total = 0.0
        for w, r in zip(segments, rates, strict=True):
            common = math.gcd(r, stride)
            met = sum(
                place % stride % common == _offset_of(head, r, heads, interleaved) % common
                for head in range(kv_head * group, (kv_head + 1) * group)
            )
            total += met * w / r
        return total

    order = [sorted(range(tiles), key=lambda p: (-weight(head, p), p)) for head in range(kv_heads)]
    return torch.tensor(order, dtype=torch.int32, device=device)


@lru_cache(maxsize=64)
def _branch_groups(
    segments: tuple[int, ...], rates: tuple[int, ...], stride: int, is_causal: bool, longest: int
) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """(class stride, branches) of each launch.

    Without a causal mask one launch takes all branches. With one, a tile that spans much of a segment computes many
    pairs in vain, so branches of small rates take tiles of a smaller stride (a divisor of ``stride``) in a launch of
    their own; it pays where it saves more than a second pass over dK and dV costs.
    """
    branches = tuple(range(len(rates)))
    if not is_causal:
        return ((stride, branches),)

    def cost(own: int, group: tuple[int, ...]) -> float:
        total = 0.0
        for i in group:
            w = min(segments[i], longest)
            total += math.gcd(rates[i], own) ** -1 * (w + KEY_ROWS * own) / rates[i] / 2
        return total + 64

    divisors = [d for d in range(1, stride + 1) if stride % d == 0]

    def best(group: tuple[int, ...]) -> tuple[float, int]:
        return min((cost(own, group), own) for own in divisors)

    one = best(branches)
    choices: list[tuple[float, tuple[tuple[int, tuple[int, ...]], ...]]] = [(one[0], ((one[1], branches),))]
    ordered = sorted(branches, key=lambda i: rates[i])
    for cut in range(1, len(ordered)):
        low, high = tuple(sorted(ordered[:cut])), tuple(sorted(ordered[cut:]))
        a, b = best(low), best(high)
        choices.append((a[0] + b[0], ((a[1], low), (b[1], high))))
    return min(choices)[1]


def _heads_per_pass(query: Tensor, key: Tensor) -> int:
    """Key heads of one pass: the dQ sums of two passes take at most a fifth of the gradients' bytes (or 24 MiB)."""
    heads, kv_heads, d = query.shape[2], key.shape[2], query.shape[3]
    gradients = (query.numel() + 2 * key.numel()) * query.element_size()
    one = query.shape[0] * query.shape[1] * (heads // kv_heads) * d * 4
    return max(1, min(-(-kv_heads // 2), max(gradients // 5, 24 << 20) // (2 * one)))


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    cells: Tensor,
    stride: int,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    interleaved: bool,
    is_causal: bool,
    scale: float,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, contiguous and in their dtypes, from the final out and lse.

    Args:
        grad_out, out: (B, Nq, H, D); grad_lse, lse: (B, Nq, H) float32, natural logarithms.
        query: (B, Nq, H, D); key, value: (B, Nk, H_kv, D).
        cells: `patterns.tiles.cells` of the key side, on the device, of at most 128 * ``stride`` rows each.
        stride: class stride; a tile takes every ``stride``-th row of a cell.

    Raises:
        NotImplementedError: what `unsupported` names.
    """
    reason = unsupported(query, key, value, segment_lengths, deterministic=deterministic)
    if reason:
        raise NotImplementedError(reason)
    batches, query_rows, heads, d = query.shape
    key_rows, kv_heads = key.shape[1:3]
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value))
    if not len(cells) or not dq.numel():
        return dq.zero_(), dk.zero_(), dv.zero_()
    if not _ready(grad_out):
        grad_out = grad_out.contiguous()
    if out.stride(3) != 1:
        out = out.contiguous()
    padded = triton.next_power_of_2(d)
    segments = tuple(min(w, LONGEST) for w in segment_lengths)
    rates = tuple(dilation_rates)
    total, group = batches * query_rows, heads // kv_heads
    sums = torch.empty(batches, heads, query_rows, dtype=torch.int64, device=query.device)
    grid = (triton.cdiv(query_rows, 64) * batches * heads,)
    _row_kernel[grid](
        out, grad_out, lse.contiguous(), None if grad_lse is None else grad_lse.contiguous(), sums, query_rows,
        *out.stride()[:3], *grad_out.stride()[:3], heads, d, padded, 64, num_warps=4,
    )  # fmt: skip
    _gap_kernel[(len(cells) + 1, 4)](cells, dk, dv, len(cells), key_rows, batches, kv_heads * d, 4096)
    per_pass = _heads_per_pass(query, key)
    # A run's dQ may start at any row, so the last row of its view by residues may lie beyond the last.
    shape = (2, 1, max(-(-total // r) * r for r in rates), per_pass * group, d)
    scratch = torch.empty(shape, dtype=torch.float32, device=query.device)
    launches = _branch_groups(segments, rates, stride, is_causal, max(query_rows, key_rows))
    passes = range(0, kv_heads, per_pass)
    counters = torch.zeros(len(passes), len(launches), 4, dtype=torch.int32, device=query.device)
    compiled: list[Any] = [None] * len(launches)
    block, stages, registers = _tuning(padded)
    programs = _processors(query.device)
    launched = []
    for number, (own, branches) in enumerate(launches):
        some_segments, some_rates = tuple(segments[i] for i in branches), tuple(rates[i] for i in branches)
        spare = [None] * (MAX_BRANCHES - len(branches))
        reads: list[Any] = [
            *(_view(query, r, block, padded, total) for r in some_rates), *spare,
            *(_view(grad_out, r, block, padded, total) for r in some_rates), *spare,
        ]  # fmt: skip
        sums_of = [
            [*(_view(part, r, block, padded // 2, -(-total // r) * r) for r in some_rates), *spare] for part in scratch
        ]
        tiles = [_view(t, own, 64, padded, batches * key_rows) for t in (key, value)]
        order = _class_order(some_segments, some_rates, own, stride, heads, kv_heads, interleaved, query.device)
        constants = (
            heads, kv_heads, d, padded, block, stages, own, stride, is_causal, interleaved, some_segments, some_rates,
            number > 0,
        )  # fmt: skip
        commons = tuple(math.gcd(r, own) for r in some_rates)
        launched.append((constants, commons, tiles, reads, sums_of, order))
    main = torch.cuda.current_stream(query.device)
    lanes = (main, _side_stream(query.device))
    lanes[1].wait_stream(main)
    for turn, head0 in enumerate(passes):
        count = min(per_pass, kv_heads - head0)
        lane = turn % 2
        # Two passes are under way at a time: one's last tiles and its conversion overlap the other's first tiles.
        with torch.cuda.stream(lanes[lane]):
            scratch[lane].zero_()
            for at, (constants, commons, tiles, reads, sums_of, order) in enumerate(launched):
                arguments = (
                    constants, commons, *tiles, *reads, *sums_of[lane], key, value, dk, dv, sums, cells, order,
                    counters[turn, at], len(cells), query_rows, key_rows, batches, head0, count, head0 * group,
                    key.stride(1), key.stride(2), value.stride(1), value.stride(2), scale * math.log2(math.e), scale,
                    *registers,
                )  # fmt: skip
                # Every pass is the same kernel; Triton's own look-up of it costs the host more than the launch.
                if compiled[at] is None:
                    compiled[at] = backward_kernel[(programs,)](*arguments, num_warps=4)
                else:
                    compiled[at][(programs, 1, 1)](*arguments)
            _convert_kernel[(triton.cdiv(total * count * group, 64),)](
                scratch[lane], dq, total, head0 * group, count * group, per_pass * group, scale, heads, d, padded, 64,
                num_warps=4,
            )  # fmt: skip
    main.wait_stream(lanes[1])
    return dq, dk, dv


@lru_cache(maxsize=16)
def _side_stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)


def _tuning(padded: int) -> tuple[int, int, tuple[int, int]]:
    """Query rows of a block, stages of the pipeline, registers of (consumers, producer and writer)."""
    return (64, 2, (232, 40)) if padded == 128 else (64, 3, (216, 72))


@lru_cache(maxsize=16)
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
