"""The structure of long rows, pair by pair: counted with integers, not with tolerances.

A bound on rounding errors cannot see one wrong pair in a long row. With a query of zeros every key has weight 1, so
exp(lse) is the number of a row's keys, out is the share of those keys that lie in a marked block, and, for a gradient
of out that is that number, the gradient of a value is the number of rows that see its key.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from dilated_attention_pytorch import dilated_attention_with_lse

HEADS = 4


def padding_slots(lengths, rates, bounds) -> torch.Tensor:
    """(H, N) keys of zeros that torchscale adds: every document laid out in full segments, slot by slot."""
    zeros = torch.zeros(HEADS, bounds[-1], dtype=torch.int64)
    for first, last in pairwise(bounds):
        for w, r in zip(lengths, rates, strict=True):
            width = min(w, last - first)
            segments, padded = -(-(last - first) // width), -(-width // r) * r
            slot, segment = torch.arange(padded), torch.arange(segments)[:, None]
            empty = (slot >= width) | (segment * width + slot >= last - first)
            row = torch.arange(last - first)
            for head in range(HEADS):
                offset = head // -(-HEADS // r)
                per_segment = (empty & (slot % r == offset)).sum(1)
                zeros[head, first:last] += torch.where(row % width % r == offset, per_segment[row // width], 0)
    return zeros


LONG = ((256, 2048, 65536), (1, 4, 32))
SHORT = ((60, 777, 70_000), (1, 7, 64))
ODD = ((60, 777, 5000, 70_000), (1, 3, 7, 32))
# rows, pattern, dtype, backend, options; a mask, left padding and packing are made from the length
CASES = {
    "64K": (65536, LONG, "float32", "sdpa", {}),
    "64K causal": (65536, LONG, "bfloat16", "sdpa", {"is_causal": True}),
    "64K dense branch causal": (65536, ODD, "float16", "sdpa", {"is_causal": True}),
    "odd": (50_021, ODD, "float32", "sdpa", {"head_offsets": "interleaved"}),
    "odd zeros": (50_021, ODD, "float32", "sdpa", {"padding": "zeros"}),
    "odd zeros of packed documents": (20_011, ODD, "bfloat16", "sdpa", {"padding": "zeros", "packed": True}),
    "odd packed causal": (20_011, ODD, "float32", "sdpa", {"is_causal": True, "packed": True}),
    "odd mask": (10_007, ODD, "float32", "sdpa", {"masked": True}),
    "odd mask causal": (20_011, ODD, "bfloat16", "sdpa", {"masked": True, "is_causal": True}),
    "odd left padding": (20_011, ODD, "float16", "sdpa", {"key_start": -1234, "is_causal": True}),
    "odd after eviction": (20_011, ODD, "float32", "sdpa", {"key_start": 123_457}),
    "reference 64K causal": (65536, ((512, 65536), (4, 64)), "bfloat16", "reference", {"is_causal": True}),
    "reference odd": (20_011, SHORT, "bfloat16", "reference", {}),
    "reference odd zeros of packed documents": (
        12_011, SHORT, "float32", "reference", {"padding": "zeros", "packed": True}
    ),
    "reference odd mask": (6_011, SHORT, "float64", "reference", {"masked": True, "is_causal": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_every_pair_is_there_once(counts, name):
    rows, (lengths, rates), dtype_name, backend, given = CASES[name]
    dtype, options = getattr(torch, dtype_name), dict(given)
    is_causal = options.get("is_causal", False)
    position, document = torch.arange(rows) + options.get("key_start", 0), torch.zeros(rows, dtype=torch.int64)
    hidden, marked = torch.zeros(rows, dtype=torch.bool), torch.zeros(rows, dtype=torch.bool)
    bounds = [0, rows]
    generator = torch.Generator().manual_seed(rows)
    if options.pop("packed", False):
        bounds = [0, 1, 1, 4000, 4059, 11_000, rows]
        options["cu_seqlens"] = torch.tensor(bounds)
        for index, (first, last) in enumerate(pairwise(bounds)):
            position[first:last], document[first:last] = torch.arange(last - first), index
    if options.pop("masked", False):
        hidden = torch.rand(rows, generator=generator) < 0.3
        options["key_padding_mask"] = hidden[None]
    marked[rows // 3 : rows // 3 + 40] = True
    zeros = torch.zeros(HEADS, rows, dtype=torch.int64)
    if options.get("padding") == "zeros":
        zeros = padding_slots(lengths, rates, [b for i, b in enumerate(bounds) if i == 0 or b > bounds[i - 1]])
    total, inside, seen = counts(
        lengths, rates, position, document, hidden, marked, heads=HEADS, is_causal=is_causal,
        head_offsets=options.get("head_offsets", "contiguous"),
    )  # fmt: skip
    total = total + zeros

    query = torch.zeros(1, rows, HEADS, 8, dtype=dtype)
    key = torch.randn(1, rows, HEADS, 8, generator=generator).to(dtype)
    value = marked.to(dtype)[None, :, None, None].expand(1, rows, HEADS, 8).contiguous().requires_grad_()
    arguments: dict[str, Any] = {"backend": backend, **options}
    out, lse = dilated_attention_with_lse(query, key, value, lengths, rates, **arguments)

    assert torch.equal(lse[0].double().exp().round().long(), total)
    share = (inside / total.clamp(min=1)).T
    eps = torch.finfo(dtype).eps
    # Relative to the share, for each of the branches' results is rounded; and what joining them in float32 leaves,
    # which one key in 65536 is still well above.
    error = (out.detach()[0].double() - share[:, :, None]).abs()
    worst = float((error - 2 * max(eps, 2.5e-6) * share[:, :, None]).max())
    assert worst <= 1e-6

    if dtype in (torch.float32, torch.float64):
        (dv,) = torch.autograd.grad(out, value, total.T[None, :, :, None].expand_as(out).to(dtype))
        error = (dv[0, :, :, 0].double().T - seen).abs()
        assert float((error / seen.clamp(min=1e-9)).max()) <= 1e-5
