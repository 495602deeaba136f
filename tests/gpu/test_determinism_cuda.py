"""A thousand calls give equal bits: forward on every backend, and backward where torch asks for determinism."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dilated_attention_pytorch import dilated_attention_with_lse
from dilated_attention_pytorch.backends import gluon

pytestmark = pytest.mark.gpu

PATTERN = (512, 1024, 4096), (1, 2, 4)
REPEATS = 1000


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def drawn(head_dim: int) -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(head_dim)
    shapes = [(1, 2001, heads, head_dim) for heads in (4, 2, 2, 4)]
    return [torch.randn(shape, device="cuda", generator=generator).to(torch.bfloat16) for shape in shapes]


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("backend", ["gluon", "triton", "sdpa"])
def test_a_thousand_forward_passes(backend, is_causal):
    if backend == "gluon" and (reason := gluon.unavailable()):
        pytest.skip(reason)
    query, key, value, _ = drawn(64)

    def attend() -> tuple[torch.Tensor, torch.Tensor]:
        return dilated_attention_with_lse(query, key, value, *PATTERN, is_causal=is_causal, backend=backend)

    expected = attend()
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(REPEATS):
        for one, other in zip(attend(), expected, strict=True):
            differing += (one != other).sum()
    assert int(differing) == 0


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("head_dim", [48, 128])
def test_a_thousand_backward_passes_where_torch_asks_for_determinism(head_dim, is_causal):
    query, key, value, grad = drawn(head_dim)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    out, _ = dilated_attention_with_lse(*leaves, *PATTERN, is_causal=is_causal)
    expected = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(REPEATS):
        for one, other in zip(torch.autograd.grad(out, leaves, grad, retain_graph=True), expected, strict=True):
            differing += (one != other).sum()
    assert int(differing) == 0
