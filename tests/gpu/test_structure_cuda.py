"""The structure of a million rows, pair by pair, as in tests/test_structure.py, forward and backward."""

from __future__ import annotations

import pytest
import torch

from dilated_attention_pytorch import dilated_attention_with_lse
from dilated_attention_pytorch.backends import gluon

pytestmark = pytest.mark.gpu

HEADS, HEAD_DIM, MARKED, ASKING = 4, 64, 40, 16
PATTERNS = {
    "aligned": ((256, 2048, 65536, 1 << 20), (1, 4, 32, 512)),
    "misaligned": ((300, 2100, 50_000, 2_000_000), (1, 3, 32, 512)),
}


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("rows", [1 << 20, 999_983])
@pytest.mark.parametrize("backend", ["gluon", "triton", "sdpa"])
def test_every_pair_of_a_million_rows_is_there_once(counts, backend, rows, is_causal, pattern):
    if backend == "gluon" and (reason := gluon.unavailable()):
        pytest.skip(reason)
    marked, asking, none = (torch.zeros(rows, dtype=torch.bool) for _ in range(3))
    for start in (0, rows // 3, rows - MARKED):  # the beginning, the middle and the tail
        marked[start : start + MARKED] = True
    asking[rows - ASKING :] = asking[rows // 2 : rows // 2 + ASKING] = True
    total, inside, seen = counts(
        *pattern, torch.arange(rows), torch.zeros(rows, dtype=torch.int64), none, marked, asking,
        heads=HEADS, is_causal=is_causal,
    )  # fmt: skip

    shape = 1, rows, HEADS, HEAD_DIM
    query = torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
    key = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
    value = marked.to("cuda", torch.bfloat16)[None, :, None, None].expand(shape).contiguous().requires_grad_()
    out, lse = dilated_attention_with_lse(query, key, value, *pattern, is_causal=is_causal, backend=backend)

    assert torch.equal(lse[0].double().exp().round().long().cpu(), total)
    share = (inside / total.clamp(min=1)).T
    error = (out.detach()[0, :, :, 0].double().cpu() - share).abs()
    assert float((error - 2**-7 * share).max()) <= 1e-6
    # Rows that ask with the number of their keys give every key that they see 1, but for the rounding to bfloat16.
    grad = torch.where(asking, total, 0).T[None, :, :, None].expand(shape).to("cuda", torch.bfloat16)
    (dv,) = torch.autograd.grad(out, value, grad)
    assert torch.equal(dv[0, :, :, 0].double().round().long().T.cpu(), seen)
