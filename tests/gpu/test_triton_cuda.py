"""The plain Triton kernels on a GPU, against the dense oracle in float64 on the CPU."""

from __future__ import annotations

import pytest
import torch

from dilated_attention_pytorch import dilated_attention, dilated_attention_with_lse
from dilated_attention_pytorch.testing import Case, violations

pytestmark = pytest.mark.gpu


def draw(*size: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


@pytest.mark.parametrize(
    ("dtype", "dropout_p"),
    [("bfloat16", 0.0), ("float32", 0.0), ("float16", 0.3)],
    ids=["bfloat16", "float32", "float16-dropout"],
)
def test_bound_b_of_every_option(shape, options, dtype, dropout_p):
    given = {"seed": 3, "head_dim": 16, "grad_lse": True, **shape, **options}
    if dtype != "float32" and (given.get("value_dim") or given["head_dim"]) < given["head_dim"]:
        pytest.skip("refused, see backends/triton.py")
    case = Case(**given, dtype=getattr(torch, dtype), dropout_p=dropout_p)
    assert not (found := violations(case, ("triton",), device="cuda")), "\n".join(found)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("head_dim", [8, 24, 48, 64, 80, 96, 128, 192, 256])
def test_bound_b_of_every_head_dim(shape, head_dim, dtype):
    found = []
    for is_causal in (False, True):
        sizes = {**shape, "key_rows": 300, "segment_lengths": (64, 140, 300)}
        case = Case(seed=head_dim, head_dim=head_dim, is_causal=is_causal, **sizes, dtype=getattr(torch, dtype))
        found += violations(case, ("triton",), device="cuda")
    assert not found, "\n".join(found)


def test_repeats_are_equal_bit_by_bit():
    leaves = [draw(1, 3000, 4, 64, seed=i).requires_grad_() for i in range(3)]
    grad, first = draw(1, 3000, 4, 64, seed=9), None
    for _ in range(1000):
        out, lse = dilated_attention_with_lse(*leaves, (256, 1000), (1, 4), is_causal=True, backend="triton")
        found = (out, lse, *torch.autograd.grad(out, leaves, grad))
        first = first or found
        assert all(torch.equal(a, b) for a, b in zip(first, found, strict=True))


def test_decoding_one_row_at_a_time_equals_the_whole():
    q, k, v = (draw(2, 400, 4, 64, seed=i) for i in range(3))
    pattern = (64, 200, 400), (1, 2, 4)
    whole = dilated_attention(q, k, v, *pattern, is_causal=True, backend="triton")
    for t in (0, 1, 63, 64, 199, 399):
        step = dilated_attention(
            q[:, t : t + 1], k[:, : t + 1], v[:, : t + 1], *pattern, is_causal=True, backend="triton"
        )
        torch.testing.assert_close(step[:, 0], whole[:, t], atol=0.02, rtol=0.02)


@pytest.mark.parametrize("backend", ["triton", "gluon"])
def test_a_graph_can_be_captured_and_replayed(backend):
    q, k, v = (draw(1, 2048, 4, 64, seed=i) for i in range(3))
    pattern = (512, 2048), (1, 4)
    try:
        dilated_attention(q, k, v, *pattern, backend=backend)
    except ValueError as error:
        pytest.skip(str(error))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        dilated_attention(q, k, v, *pattern, backend=backend)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = dilated_attention(q, k, v, *pattern, backend=backend)
    for tensor in (q, k, v):
        tensor.copy_(torch.randn_like(tensor))
    graph.replay()
    assert torch.equal(out, dilated_attention(q, k, v, *pattern, backend=backend))
