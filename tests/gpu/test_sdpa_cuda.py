"""PyTorch's fused CUDA kernels, each by itself, against the dense oracle in float64 on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from dilated_attention_pytorch import dilated_attention, dilated_attention_with_lse, explain
from dilated_attention_pytorch.backends import vendor
from dilated_attention_pytorch.testing import Case, violations

pytestmark = pytest.mark.gpu

HALF = ("bfloat16", "float16")
DIMS = {
    "cudnn": (8, 16, 24, 40, 48, 64, 80, 96, 128),
    "flash": (8, 16, 24, 40, 48, 64, 80, 96, 128, 192, 256),
    "efficient": (8, 16, 24, 40, 48, 64, 80, 96, 128, 192, 256),
}
TAKES = [
    *(pytest.param(name, dtype, id=f"{name}-{dtype}") for name in ("cudnn", "flash") for dtype in HALF),
    pytest.param("efficient", "float32", id="efficient-float32"),
]
PATTERN = (16, 40, 128), (1, 3, 4)


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Leave one vendor kernel in the table, so that backend="sdpa" has to take it."""

    def leave(name: str) -> None:
        kernels = tuple(kernel for kernel in vendor.KERNELS if kernel.name == name)
        assert len(kernels) == 1
        monkeypatch.setattr(vendor, "KERNELS", kernels)

    return leave


def draw(*size: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def with_gradients(tensors, grad, **options):
    """out, lse, dq, dk, dv of PATTERN."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out, lse = dilated_attention_with_lse(*leaves, *PATTERN, backend="sdpa", **options)
    return out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, grad)


@pytest.mark.parametrize(("name", "dtype"), TAKES)
@pytest.mark.parametrize("grad_lse", [False, True], ids=["out", "out_and_lse"])
def test_bound_b_of_every_option(only, name, dtype, shape, options, grad_lse):
    only(name)
    case = Case(**{"seed": 3, "head_dim": 16, "grad_lse": grad_lse, **shape, **options, "dtype": getattr(torch, dtype)})
    assert not (found := violations(case, ("sdpa",), device="cuda")), "\n".join(found)


@pytest.mark.parametrize(("name", "dtype"), TAKES)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_bound_b_of_every_head_dim(only, name, dtype, shape, is_causal):
    only(name)
    found = []
    for head_dim in DIMS[name]:
        case = Case(seed=head_dim, head_dim=head_dim, is_causal=is_causal, **shape, dtype=getattr(torch, dtype))
        found += violations(case, ("sdpa",), device="cuda")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(("name", "dtype"), TAKES)
def test_the_columns_of_a_mask_and_of_the_lse_need_room(only, name, dtype, shape):
    only(name)
    largest = {"cudnn": 128, "flash": 256}.get(name)
    if largest is None:  # takes any head dim
        case = Case(seed=1, head_dim=256, hidden="random", grad_lse=True, **shape, dtype=getattr(torch, dtype))
        assert not (found := violations(case, ("sdpa",), device="cuda")), "\n".join(found)
        return
    tensors = [draw(1, 30, 4, largest, dtype=getattr(torch, dtype)) for _ in range(3)]
    hidden = torch.zeros(1, 30, dtype=torch.bool, device="cuda")
    with pytest.raises(ValueError, match=f"{name} takes head dims up to {largest}, not {largest + 8}"):
        dilated_attention(*tensors, [16], [1], key_padding_mask=hidden, backend="sdpa")


@pytest.mark.parametrize(("name", "dtype"), TAKES)
def test_a_later_token_changes_nothing_before_it(only, name, dtype):
    only(name)
    inputs = [draw(1, 300, 4, 64, dtype=getattr(torch, dtype), seed=i) for i in range(3)]
    before = dilated_attention_with_lse(*inputs, *PATTERN, is_causal=True, backend="sdpa")
    for t in (1, 16, 150, 299):
        changed = [x.clone() for x in inputs]
        for x in changed:
            x[:, t] = 7.0
        after = dilated_attention_with_lse(*changed, *PATTERN, is_causal=True, backend="sdpa")
        assert torch.equal(before.out[:, :t], after.out[:, :t])
        assert torch.equal(before.lse[..., :t], after.lse[..., :t])
        assert not torch.equal(before.out[:, t], after.out[:, t])


@pytest.mark.parametrize(("name", "dtype"), TAKES)
def test_nan_in_masked_keys_and_left_padding_changes_nothing(only, name, dtype):
    only(name)
    inputs = [draw(2, 70, 4, 16, dtype=getattr(torch, dtype), seed=i) for i in range(4)]
    hidden = torch.rand(2, 70, generator=torch.Generator().manual_seed(1)).to("cuda") < 0.4
    start = torch.tensor([-30, -7])
    padded = torch.arange(70, device="cuda") < -start[:, None].to("cuda")
    tries = (({"key_padding_mask": hidden}, hidden, 1), ({"key_start": start, "is_causal": True}, padded, 0))
    for options, gone, first in tries:
        poisoned = [
            t.masked_fill(gone[:, :, None, None], torch.nan) if i >= first else t for i, t in enumerate(inputs[:3])
        ]
        clean = with_gradients(inputs[:3], inputs[3], **options)
        for i, (a, b) in enumerate(zip(clean, with_gradients(poisoned, inputs[3], **options), strict=True)):
            assert torch.isfinite(b).all() or i == 1
            torch.testing.assert_close(b, a, atol=0.02, rtol=0.02)  # atomics may add dQ in another order
            if i > 1 + first:
                assert (b[gone] == 0).all()


@pytest.mark.parametrize(("name", "dtype"), TAKES)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_huge_logits_stay_finite(only, name, dtype, is_causal):
    only(name)
    q, k, v, grad = (draw(1, 100, 4, 16, dtype=torch.float32, seed=i) for i in range(4))
    q, k = (t / t.norm(dim=-1, keepdim=True) * 200 for t in (q, k))  # scores of +-1e4 at scale 1/4
    inputs = [t.to(getattr(torch, dtype)) for t in (q, k, v, grad)]
    last = torch.arange(100, device="cuda")[None] >= 95
    for options in ({}, {"key_padding_mask": last}):
        for found in with_gradients(inputs[:3], inputs[3], is_causal=is_causal, **options):
            assert torch.isfinite(found if found.dim() == 4 else found[..., :95]).all()


@pytest.mark.parametrize(("name", "dtype"), TAKES)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_exp_lse_is_the_number_of_keys(only, counts, name, dtype, is_causal):
    only(name)
    rows, heads, pattern = 20_011, 4, ((64, 1000, 30_000), (1, 3, 8))
    key = draw(1, rows, heads, 16, dtype=getattr(torch, dtype))
    _, lse = dilated_attention_with_lse(torch.zeros_like(key), key, key, *pattern, is_causal=is_causal, backend="sdpa")
    one, none = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.bool)
    expected, _, _ = counts(*pattern, torch.arange(rows), one, none, none, heads=heads, is_causal=is_causal)
    assert torch.equal(lse[0].double().exp().round().long().cpu(), expected)


def test_auto_takes_what_explain_names_and_dropout_is_the_same_everywhere():
    q = draw(1, 70, 4, 16)
    named = explain(q, q, q, *PATTERN).backend
    assert torch.equal(dilated_attention(q, q, q, *PATTERN), dilated_attention(q, q, q, *PATTERN, backend=named))
    torch.manual_seed(5)
    out = dilated_attention(q, q, q, *PATTERN, dropout_p=0.3)
    torch.manual_seed(5)
    torch.testing.assert_close(
        out, dilated_attention(q, q, q, *PATTERN, dropout_p=0.3, backend="reference"), atol=0.03, rtol=0.03
    )


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_reference_runs_there_too(dtype, shape, options):
    for dropout_p in (0.0, 0.3):
        case = Case(
            **{"seed": 4, "head_dim": 16, "grad_lse": True, **shape, **options},
            dtype=getattr(torch, dtype),
            dropout_p=dropout_p,
        )
        assert not (found := violations(case, ("reference",), device="cuda")), "\n".join(found)


def test_autocast_and_one_compile():
    counter = CompileCounter()

    @torch.compile(fullgraph=True, backend=counter)
    def attend(*tensors):
        return dilated_attention(*tensors, (16, 40), (1, 3), is_causal=True)

    leaves = [draw(1, 70, 4, 16, dtype=torch.float32, seed=i).requires_grad_() for i in range(3)]
    with torch.autocast("cuda", torch.bfloat16):
        out = attend(*leaves)
    assert out.dtype == torch.bfloat16
    assert counter.frame_count == 1
    grads = torch.autograd.grad(out.float().sum(), leaves)
    expected = [t.detach().bfloat16().requires_grad_() for t in leaves]
    plain = dilated_attention(*expected, (16, 40), (1, 3), is_causal=True)
    assert torch.equal(out, plain)
    for a, b in zip(grads, torch.autograd.grad(plain.float().sum(), expected), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b.float(), atol=0.02, rtol=0.02)
