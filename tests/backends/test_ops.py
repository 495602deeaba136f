"""The registered operators: schemas, fakes, autograd, compile, autocast, checkpointing."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from dilated_attention_pytorch import dilated_attention, dilated_attention_with_lse
from dilated_attention_pytorch.backends.ops import attention, attention_backward, attention_forward
from dilated_attention_pytorch.functional import checked_arguments


def draw(*size, seed=0, dtype=torch.float32):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def arguments(q, k, v, **options):
    found = checked_arguments(q, k, v, (8, 32), (1, 3), **options)
    return {**found, "seed": None, "backend": "auto"}


Q, KV = draw(2, 20, 4, 8), draw(2, 20, 2, 8, seed=1)
PACKED = torch.tensor([0, 7, 20])
SETS = {
    "plain": arguments(Q, Q, Q),
    "grouped": arguments(Q, KV, KV, is_causal=True),
    "value dim": arguments(Q, KV, draw(2, 20, 2, 16, seed=2)),
    "transposed": arguments(*(draw(2, 4, 20, 8, seed=i).transpose(1, 2) for i in range(3))),
    "sliced": arguments(*draw(2, 20, 4, 24).chunk(3, -1)),
    "shorter query": arguments(Q[:, 15:], KV, KV, is_causal=True, key_start=3),
    "mask": arguments(Q, Q, Q, key_padding_mask=torch.arange(20).expand(2, -1) > 15),
    "packed": arguments(Q[:1], Q[:1], Q[:1], cu_seqlens=PACKED, padding="zeros", mixing_grad="detached"),
    "starts": arguments(Q, Q, Q, key_start=torch.tensor([-4, 2])),
    "float64": arguments(Q.double(), Q.double(), Q.double()),
    "bfloat16": arguments(Q.bfloat16(), Q.bfloat16(), Q.bfloat16()),
    "dropout": {**arguments(Q, Q, Q, dropout_p=0.2), "seed": torch.tensor([5])},
}


@pytest.mark.parametrize("name", SETS)
def test_opcheck(name):
    leaves = {n: SETS[name][n].detach().requires_grad_() for n in ("query", "key", "value")}
    torch.library.opcheck(attention_forward, (), {**SETS[name], **leaves})


def test_opcheck_of_the_backward():
    given = SETS["grouped"]
    out, lse = attention_forward(**given)
    for grad_lse in (None, torch.ones_like(lse)):
        torch.library.opcheck(
            attention_backward,
            (),
            {**given, "grad_out": torch.ones_like(out), "grad_lse": grad_lse, "out": out, "lse": lse},
            test_utils=("test_schema", "test_faketensor"),
        )


def test_fifty_lengths_take_two_compiles():
    counter = CompileCounter()

    @torch.compile(fullgraph=True, backend=counter)
    def attend(q, k, v):
        out, lse = dilated_attention_with_lse(q, k, v, [8, 32], [1, 4], is_causal=True)
        return out.square().sum() + lse.sum()

    for n in range(3, 53):
        leaves = [draw(1, n, 4, 8, seed=i).requires_grad_() for i in range(3)]
        compiled = torch.autograd.grad(attend(*leaves), leaves)
        out, lse = dilated_attention_with_lse(*leaves, [8, 32], [1, 4], is_causal=True)
        eager = torch.autograd.grad(out.square().sum() + lse.sum(), leaves)
        for a, b in zip(compiled, eager, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count <= 2


def test_decoding_positions_take_two_compiles():
    counter = CompileCounter()

    @torch.compile(fullgraph=True, backend=counter)
    def attend(q, k, v, start):
        return dilated_attention(q, k, v, [8, 32], [1, 4], is_causal=True, key_start=start)

    x = draw(1, 80, 4, 8)
    whole = dilated_attention(x, x, x, [8, 32], [1, 4], is_causal=True)
    for t in range(40, 80):
        start = t // 32 * 32
        if t + 1 - start < 2:
            continue  # one row is a size that compilers treat apart
        kept = x[:, start : t + 1]
        torch.testing.assert_close(attend(x[:, t : t + 1], kept, kept, start)[:, 0], whole[:, t])
    assert counter.frame_count <= 3


@pytest.mark.full  # needs a C++ compiler
def test_inductor_gives_what_eager_gives():
    leaves = [draw(1, 40, 4, 8, seed=i).requires_grad_() for i in range(3)]

    def attend(*t):
        return (dilated_attention(*t, [8, 32], [1, 4], is_causal=True) * 2).tanh()

    compiled = torch.compile(attend, fullgraph=True)(*leaves)
    torch.testing.assert_close(compiled, attend(*leaves))
    for a, b in zip(
        torch.autograd.grad(compiled.sum(), leaves), torch.autograd.grad(attend(*leaves).sum(), leaves), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_autocast_casts_what_attention_casts(backend):
    leaves = [draw(1, 40, 4, 8, seed=i).requires_grad_() for i in range(3)]
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = dilated_attention_with_lse(*leaves, [8, 32], [1, 4], backend=backend)
        double = dilated_attention(*(t.double() for t in leaves), [8, 32], [1, 4], backend=backend)
        grads = torch.autograd.grad(out.float().sum(), leaves)
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    assert double.dtype == torch.float64
    low = [t.detach().bfloat16().requires_grad_() for t in leaves]
    expected = dilated_attention(*low, [8, 32], [1, 4], backend=backend)
    assert torch.equal(out, expected)
    for a, b in zip(grads, torch.autograd.grad(expected.float().sum(), low), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b.float())


def test_fake_and_meta_tensors_have_the_real_shapes():
    real = dilated_attention_with_lse(Q, KV, draw(2, 20, 2, 16), [8], [2])
    with FakeTensorMode():
        q, k, v = torch.empty(2, 20, 4, 8), torch.empty(2, 20, 2, 8), torch.empty(2, 20, 2, 16)
        fake = dilated_attention_with_lse(q, k, v, [8], [2])
    meta = dilated_attention_with_lse(*(torch.empty(t, device="meta") for t in (q.shape, k.shape, v.shape)), [8], [2])
    for a, b, c in zip(real, fake, meta, strict=True):
        assert a.shape == b.shape == c.shape
        assert a.stride() == b.stride() == c.stride()
        assert a.dtype == b.dtype == c.dtype


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_recomputation_gives_the_same_gradients(dropout_p):
    leaves = [draw(1, 40, 4, 8, seed=i).requires_grad_() for i in range(3)]

    def attend(*t):
        return dilated_attention(*t, [8, 32], [1, 4], dropout_p=dropout_p).square()

    torch.manual_seed(3)
    plain = torch.autograd.grad(attend(*leaves).sum(), leaves)
    torch.manual_seed(3)
    again = torch.autograd.grad(checkpoint(attend, *leaves, use_reentrant=False).sum(), leaves)
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a, b)


def test_gradients_of_some_inputs_only():
    leaves = [draw(1, 40, 4, 8, seed=i).requires_grad_() for i in range(3)]
    grads = torch.autograd.grad(dilated_attention(*leaves, [8, 32], [1, 4]).sum(), leaves)
    for index, grad in enumerate(grads):
        inputs = [t.detach().requires_grad_(i == index) for i, t in enumerate(leaves)]
        (alone,) = torch.autograd.grad(dilated_attention(*inputs, [8, 32], [1, 4]).sum(), inputs[index])
        assert torch.equal(alone, grad)


def test_inputs_are_left_as_they_were():
    inputs = [draw(2, 40, 4, 8, seed=i).requires_grad_() for i in range(3)]
    before = [t.detach().clone() for t in inputs]
    mask = torch.arange(40).expand(2, -1) > 30
    out, lse = dilated_attention_with_lse(*inputs, [8, 32], [1, 4], key_padding_mask=mask)
    kept = out.detach().clone()
    grad = torch.ones_like(out)
    torch.autograd.grad([out, lse], inputs, [grad, torch.ones_like(lse)])
    for a, b in zip([*inputs, out, grad], [*before, kept, torch.ones_like(out)], strict=True):
        assert torch.equal(a, b)


class Listener(TorchDispatchMode):
    """Remembers the names of the operators that it sees."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def test_who_looks_on_sees_operators():
    leaves = [draw(1, 20, 4, 8, seed=i).requires_grad_() for i in range(3)]

    def both_passes():
        out = dilated_attention(*leaves, [8, 32], [1, 3])
        return torch.autograd.grad(out.sum(), leaves)

    operators = {f"dilated_attention_pytorch::{name}" for name in ("forward", "backward")}
    with Listener() as listener:
        both_passes()
    assert operators <= set(listener.names)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        both_passes()
    assert operators <= {event.key for event in recorded.key_averages()}
    graph = make_fx(lambda q: dilated_attention(q, q, q, [8, 32], [1, 3]))(Q)
    assert any(node.target is attention_forward for node in graph.graph.nodes)


@pytest.mark.parametrize("name", ["plain", "grouped", "mask", "packed", "dropout", "bfloat16"])
def test_called_straight_or_as_an_operator_it_is_the_same(name):
    leaves = {n: SETS[name][n].detach().requires_grad_() for n in ("query", "key", "value")}
    results = []
    for function in (attention, attention_forward):
        out, lse = function(**{**SETS[name], **leaves})
        results.append([out, lse, *torch.autograd.grad((out, lse), list(leaves.values()), (out, lse.sin()))])
        assert [t.grad_fn is not None for t in results[-1][:2]] == [True, True]
        with torch.no_grad():
            results[-1] += function(**{**SETS[name], **leaves})
    for straight, operator in zip(*results, strict=True):
        assert torch.equal(straight, operator)


def test_gradients_in_a_batch_are_those_one_by_one():
    leaves = [draw(1, 20, 4, 8, seed=i).requires_grad_() for i in range(3)]
    out, lse = dilated_attention_with_lse(*leaves, [8, 32], [1, 3])
    for output in (out, lse):
        several = torch.stack([draw(*output.shape, seed=i) for i in range(3)])
        batched = torch.autograd.grad(output, leaves[:2], several, retain_graph=True, is_grads_batched=True)
        for i, one in enumerate(several):
            alone = torch.autograd.grad(output, leaves[:2], one, retain_graph=True)
            for a, b in zip(batched, alone, strict=True):
                torch.testing.assert_close(a[i], b)


def test_transforms_of_functions():
    q, k, v = (draw(2, 20, 4, 8, seed=i) for i in range(3))

    def loss(q, k, v):
        out, lse = dilated_attention_with_lse(q, k, v, [8, 32], [1, 3], is_causal=True)
        return out.square().sum() + lse.sin().sum()

    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    wanted = torch.autograd.grad(loss(*leaves), leaves)
    one = torch.func.grad(lambda *row: loss(*(t[None] for t in row)), argnums=(0, 1, 2))
    for found in (torch.func.grad(loss, argnums=(0, 1, 2))(q, k, v), torch.func.vmap(one)(q, k, v)):
        torch.testing.assert_close(found, wanted)
    rows, pull = torch.func.vjp(lambda q: dilated_attention(q, k, v, [8, 32], [1, 3]).sum((0, 2, 3)), q)
    several = torch.func.jacrev(lambda q: dilated_attention(q, k, v, [8, 32], [1, 3]).sum((0, 2, 3)))(q)
    torch.testing.assert_close(several.sum(0), pull(torch.ones_like(rows))[0])
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.func.grad(lambda q: torch.func.grad(loss)(q, k, v).sum())(q)
