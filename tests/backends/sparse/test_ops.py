"""The registered operators of block-sparse attention: schemas, fakes, autograd, compile, autocast, checkpointing."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from dilated_attention_pytorch import (
    BlockList,
    ContentTopK,
    GlobalLocal,
    LocalWindow,
    RandomBlocks,
    Union,
    sparse_attention,
    sparse_attention_with_lse,
)
from dilated_attention_pytorch.backends.arguments import checked_tensors
from dilated_attention_pytorch.backends.sparse.gate import sparse_gate, sparse_gate_backward
from dilated_attention_pytorch.backends.sparse.ops import sparse_backward, sparse_forward
from dilated_attention_pytorch.backends.sparse.selection import sparse_select


def draw(*size, seed=0, dtype=torch.float32):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def arguments(q, k, v, pattern, **given):
    defaults = {"is_causal": False, "scale": None, "dropout_p": 0.0, "key_padding_mask": None}
    found = checked_tensors(q, k, v, **{**defaults, "cu_seqlens": None, "key_start": 0, **given})
    return {
        **found,
        "seed": None,
        "lists": list(getattr(pattern, "tensors", ())),
        "pattern": pattern.code,
        "backend": "auto",
    }


Q, KV = draw(2, 50, 4, 8), draw(2, 50, 2, 8, seed=1)
LOCAL, BIG = LocalWindow(16, 16), Union((GlobalLocal(16, 1, block_size=16), RandomBlocks(1, block_size=16)))
LIST = BlockList.from_mask(torch.ones(4, 4).tril().bool(), block_size=16)
SETS = {
    "plain": arguments(Q, Q, Q, LOCAL),
    "grouped": arguments(Q, KV, KV, BIG, is_causal=True),
    "value dim": arguments(Q, KV, draw(2, 50, 2, 16, seed=2), LOCAL),
    "transposed": arguments(*(draw(2, 4, 50, 8, seed=i).transpose(1, 2) for i in range(3)), LIST),
    "mask": arguments(Q, Q, Q, BIG, key_padding_mask=torch.arange(50).expand(2, -1) > 40),
    "packed": arguments(Q[:1], Q[:1], Q[:1], LIST, cu_seqlens=torch.tensor([0, 7, 50])),
    "starts": arguments(Q, Q, Q, LOCAL, key_start=torch.tensor([-3, 5])),
}


@pytest.mark.parametrize("name", SETS)
def test_opcheck(name):
    given = SETS[name]
    names = [argument.name for argument in sparse_forward._schema.arguments]
    leaves = tuple(
        t.clone().requires_grad_() if n in ("query", "key", "value") else t for n, t in ((n, given[n]) for n in names)
    )
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(sparse_forward, leaves, test_utils=tests)
    with torch.no_grad():
        out, lse = sparse_forward(*leaves)
    plain = tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in leaves)
    grads = (torch.ones_like(out), torch.ones_like(lse), *plain[:3], out, lse, *plain[3:])
    torch.library.opcheck(sparse_backward, grads, test_utils=tests[:2])


CONTENT = ContentTopK(1, block_size=16)


@pytest.mark.parametrize("name", ["plain", "grouped", "transposed", "mask", "packed", "starts"])
def test_opcheck_of_the_choice_and_its_gate(name):
    given = {**SETS[name], "pattern": CONTENT.code}
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    names = [argument.name for argument in sparse_select._schema.arguments]
    choice = tuple(given[n] for n in names)
    torch.library.opcheck(sparse_select, choice, test_utils=tests[:2])
    lists = [sparse_select(*choice)]
    names = [argument.name for argument in sparse_forward._schema.arguments][:-1]  # all but the backend
    rest = tuple({**given, "lists": lists}[n] for n in names)
    out, lse = sparse_forward(*rest, "reference")
    gate = draw(*choice[0].shape[:1], 4, 50, 6, seed=3).requires_grad_()
    torch.library.opcheck(sparse_gate, (gate, out, lse, *rest), test_utils=tests)
    grads = torch.ones_like(out), torch.ones_like(lse), gate.detach(), out, lse
    torch.library.opcheck(sparse_gate_backward, (*grads, *rest), test_utils=tests[:2])


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gate"])
def test_a_choice_by_content_compiles_into_one_graph(gated):
    counter = CompileCounter()

    def attend(q, k, v, gate):
        out, lse = sparse_attention_with_lse(q, k, v, CONTENT, is_causal=True, gate=gate if gated else None)
        return out.square().sum() + lse.sum()

    compiled = torch.compile(attend, backend=counter, fullgraph=True)
    leaves = [t.requires_grad_() for t in (*(draw(1, 50, 2, 8, seed=i) for i in range(3)), draw(1, 2, 50, 4))]
    expected = torch.autograd.grad(attend(*leaves), leaves, allow_unused=not gated)
    got = torch.autograd.grad(compiled(*leaves), leaves, allow_unused=not gated)
    assert counter.frame_count == 1
    assert (got[3] is None) == (not gated)
    for a, b in zip(got[: 3 + gated], expected[: 3 + gated], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("pattern", [BIG, LIST, Union((LOCAL, LIST), multiplicity=True)], ids=["big", "list", "sum"])
def test_compiles_into_one_graph(pattern):
    counter = CompileCounter()

    def attend(q, k, v):
        out, lse = sparse_attention_with_lse(q, k, v, pattern, is_causal=True)
        return out.square().sum() + lse.sum()

    compiled = torch.compile(attend, backend=counter, fullgraph=True)
    leaves = [draw(1, 50, 2, 8, seed=i).requires_grad_() for i in range(3)]
    expected = torch.autograd.grad(attend(*leaves), leaves)
    got = torch.autograd.grad(compiled(*leaves), leaves)
    assert counter.frame_count == 1
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_casts_as_sdpa_does():
    q = draw(1, 50, 2, 8).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = sparse_attention_with_lse(q, q, q, LOCAL)
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    low = q.detach().bfloat16()
    assert torch.equal(out, sparse_attention(low, low, low, LOCAL))
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32


def test_fake_and_meta_tensors_have_the_real_shapes():
    real = sparse_attention_with_lse(Q, KV, draw(2, 50, 2, 16), LOCAL)
    with FakeTensorMode():
        q, k, v = torch.empty(2, 50, 4, 8), torch.empty(2, 50, 2, 8), torch.empty(2, 50, 2, 16)
        fake = sparse_attention_with_lse(q, k, v, LOCAL)
    meta = sparse_attention_with_lse(*(torch.empty(t.shape, device="meta") for t in (q, k, v)), LOCAL)
    for a, b, c in zip(real, fake, meta, strict=True):
        assert a.shape == b.shape == c.shape
        assert a.stride() == b.stride() == c.stride()
        assert a.dtype == b.dtype == c.dtype


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_recomputation_gives_the_same_gradients(dropout_p):
    leaves = [draw(1, 40, 4, 8, seed=i).requires_grad_() for i in range(3)]

    def attend(*t):
        return sparse_attention(*t, BIG, dropout_p=dropout_p).square()

    torch.manual_seed(3)
    plain = torch.autograd.grad(attend(*leaves).sum(), leaves)
    torch.manual_seed(3)
    again = torch.autograd.grad(checkpoint(attend, *leaves, use_reentrant=False).sum(), leaves)
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a, b)


def test_gradients_have_no_derivative():
    q = draw(1, 40, 2, 8).requires_grad_()
    (grad,) = torch.autograd.grad(sparse_attention(q, q, q, LOCAL).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


@pytest.mark.parametrize("pattern", [LOCAL, ContentTopK(1, block_size=16)], ids=["list", "content"])
def test_the_gradient_of_a_function(pattern):
    q, k, v = (draw(1, 80, 2, 8, seed=i) for i in range(3))

    def loss(q, k, v):
        return sparse_attention(q, k, v, pattern, is_causal=True).square().sum()

    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    wanted = torch.autograd.grad(loss(*leaves), leaves)
    torch.testing.assert_close(torch.func.grad(loss, argnums=(0, 1, 2))(q, k, v), wanted)


def test_inputs_are_left_as_they_were():
    inputs = [draw(2, 40, 4, 8, seed=i).requires_grad_() for i in range(3)]
    before = [t.detach().clone() for t in inputs]
    mask = torch.arange(40).expand(2, -1) > 30
    out, lse = sparse_attention_with_lse(*inputs, LOCAL, key_padding_mask=mask)
    kept, grad = out.detach().clone(), torch.ones_like(out)
    torch.autograd.grad([out, lse], inputs, [grad, torch.ones_like(lse)])
    for a, b in zip([*inputs, out, grad], [*before, kept, torch.ones_like(out)], strict=True):
        assert torch.equal(a, b)
