"""Projections of normalised rows: equal to the modules one by one, with less kept for the backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dilated_attention_pytorch import LongNetEncoder, LongNetEncoderConfig
from dilated_attention_pytorch.models import pointwise
from dilated_attention_pytorch.models.pointwise import Stream, add_norm_linear, norm_linear
from dilated_attention_pytorch.testing import error_bound, max_error


@pytest.fixture(autouse=True)
def recompute(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    monkeypatch.setattr(pointwise, "_recomputes", lambda x: True)


def modules(dtype: torch.dtype, outputs: tuple[int, ...] = (7, 4)) -> tuple[nn.LayerNorm, list[nn.Linear]]:
    norm = nn.LayerNorm(20, dtype=dtype)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm, [nn.Linear(20, width, dtype=dtype) for width in outputs]


def one_by_one(x: torch.Tensor, norm: nn.Module, linears: list[nn.Linear], gelu: bool) -> list[torch.Tensor]:
    normalised = norm(F.gelu(x) if gelu else x)
    return [linear(normalised) for linear in linears]


@pytest.mark.parametrize("gelu", [False, True])
def test_outputs_and_gradients_in_float64(gelu: bool) -> None:
    norm, linears = modules(torch.float64)
    x = torch.randn(3, 6, 20, dtype=torch.float64, requires_grad=True)
    leaves = [x, *norm.parameters(), *(p for linear in linears for p in linear.parameters())]
    found, expected = norm_linear(x, norm, linears, gelu=gelu), one_by_one(x, norm, linears, gelu)
    grads = [torch.randn_like(out) for out in expected]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    mine, theirs = (torch.autograd.grad(outs, leaves, grads) for outs in (found, expected))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other)


FACTORS = {"none": None, "a document": torch.tensor([0.0, 1.25, 1.0]), "a row": torch.arange(18) / 4}


@pytest.mark.parametrize("factor", FACTORS)
def test_the_sum_of_a_stream_and_gradients_through_both_in_float64(factor: str) -> None:
    norm, linears = modules(torch.float64)
    x, update = (torch.randn(3, 6, 20, dtype=torch.float64, requires_grad=True) for _ in range(2))
    scale = None if FACTORS[factor] is None else FACTORS[factor].double()
    total, outs = add_norm_linear(Stream(x, update, scale), norm, linears)
    scaled = update if scale is None else (update.reshape(len(scale), -1, 20) * scale[:, None, None]).view(3, 6, 20)
    expected = x + scaled
    results = [(total, *outs), (expected, *one_by_one(expected, norm, linears, False))]
    leaves = [x, update, *norm.parameters(), *(p for linear in linears for p in linear.parameters())]
    grads = [torch.randn_like(out) for out in results[0]]
    second = []
    for outputs in results:
        first = torch.autograd.grad(outputs, leaves, grads, create_graph=True)
        squares = sum(grad.square().sum() for grad in first)
        twice = [x, update, norm.weight, linears[0].weight]
        second.append([*first, *torch.autograd.grad(squares, twice, retain_graph=True)])
        second[-1] += torch.autograd.grad(outputs, leaves, grads)  # without a graph of its own
    for one, other in zip([*results[0], *second[0]], [*results[1], *second[1]], strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("gelu", [False, True])
def test_under_autocast_within_bound_b(gelu: bool) -> None:
    norm, linears = modules(torch.float32)
    x, grads = torch.randn(64, 20), [torch.randn(64, 7), torch.randn(64, 4)]

    def run(function: Any, dtype: torch.dtype, autocast: bool) -> list[torch.Tensor]:
        for module in (norm, *linears):
            module.to(dtype)
        leaf = x.to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outs = function(leaf, norm, linears, gelu=gelu)
        leaves = [leaf, *norm.parameters(), *(p for linear in linears for p in linear.parameters())]
        return [*outs, *torch.autograd.grad(outs, leaves, [g.to(o.dtype) for g, o in zip(grads, outs, strict=True)])]

    gold, eager, found = (
        [t.detach() for t in run(*how)]
        for how in (
            (one_by_one, torch.float64, False),
            (one_by_one, torch.float32, True),
            (norm_linear, torch.float32, True),
        )
    )
    for actual, other, truth in zip(found, eager, gold, strict=True):
        assert actual.dtype == other.dtype
        assert max_error(actual, truth) <= error_bound(truth, other, torch.bfloat16)


def test_what_is_kept_for_the_backward_pass() -> None:
    """Of a layer under autocast: not the results of norms and of GELU."""
    config = LongNetEncoderConfig(
        embed_dim=32, num_layers=1, num_heads=4, segment_lengths=(64,), dilation_rates=(1,), ffn_dim=256
    )
    layer = LongNetEncoder(config).layers[0]
    from dilated_attention_pytorch.models.blocks import Documents

    def kept() -> int:
        parameters = {p.data_ptr() for p in layer.parameters()}
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.data_ptr() not in parameters:
                sizes[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = torch.randn(1, 512, 32, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16):
            out = layer(Stream(x), Documents(None, None, 0), None)
        alive = out  # saved tensors live as long as the graph
        del alive
        return sum(sizes.values())

    with pytest.MonkeyPatch.context() as patch:
        ours = kept()
        patch.setattr(pointwise, "_plain", lambda *_: False)
        theirs = kept()
    assert ours < theirs / 2, (ours, theirs)


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_the_encoder_is_the_same_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LongNetEncoderConfig(
        embed_dim=16, num_layers=2, num_heads=2, segment_lengths=(8, 32), dilation_rates=(1, 2), xpos=True
    )
    model, x = LongNetEncoder(config, dtype=torch.float64), torch.randn(2, 30, 16, dtype=torch.float64)
    grad, results = torch.randn_like(x), []
    for recompute in (True, False):
        monkeypatch.setattr(pointwise, "_recomputes", lambda x, recompute=recompute: recompute)
        out = model(x)
        results.append([out, *torch.autograd.grad(out, list(model.parameters()), grad)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_replaced_modules_and_hooks_are_obeyed() -> None:
    norm, linears = modules(torch.float32)
    x = torch.randn(5, 20)
    replaced = [Doubled(20, 3), linears[0]]
    for one, other in zip(norm_linear(x, norm, replaced), one_by_one(x, norm, replaced, False), strict=True):
        torch.testing.assert_close(one, other)
    seen = []
    linears[1].register_forward_hook(lambda *_: seen.append(True))
    norm_linear(x, norm, linears)
    assert seen == [True]
    rms = nn.RMSNorm(20)
    torch.testing.assert_close(norm_linear(x, rms, linears[:1])[0], linears[0](rms(x)))


@pytest.mark.parametrize("gelu", [False, True])
def test_double_backward(gelu: bool) -> None:
    norm, linears = modules(torch.float64)
    x = torch.randn(5, 20, dtype=torch.float64, requires_grad=True)
    second = []
    for function in (norm_linear, one_by_one):
        outs = function(x, norm, linears, gelu=gelu)
        (grad,) = torch.autograd.grad([out.square().sum() for out in outs], x, create_graph=True)
        second.append(torch.autograd.grad(grad.square().sum(), [x, norm.weight, linears[0].weight]))
    for one, other in zip(*second, strict=True):
        torch.testing.assert_close(one, other)


def test_frozen_parts_get_no_gradient() -> None:
    norm, linears = modules(torch.float64)
    linears[0].requires_grad_(False)
    x = torch.randn(5, 20, dtype=torch.float64)
    norm_linear(x, norm, linears)[0].sum().backward()
    assert linears[0].weight.grad is None
    expected = torch.autograd.grad(one_by_one(x, norm, linears, False)[0].sum(), norm.weight)
    torch.testing.assert_close(norm.weight.grad, expected[0])


def test_compiled_in_one_graph() -> None:
    norm, linears = modules(torch.float32)
    x = torch.randn(5, 20)
    compiled = torch.compile(lambda x: norm_linear(x, norm, linears, gelu=True), fullgraph=True, backend="eager")
    for one, other in zip(compiled(x), one_by_one(x, norm, linears, True), strict=True):
        torch.testing.assert_close(one, other)
