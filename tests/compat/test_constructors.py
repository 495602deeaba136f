"""Every old class: constructed with its old arguments, by position and by name, and equal to what replaces it."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dilated_attention_pytorch as package
from dilated_attention_pytorch import DilatedAttention, MultiheadDilatedAttention, dilated_attention
from dilated_attention_pytorch.compat.resolve import old, resolve
from dilated_attention_pytorch.compat.table import OldName, Required, load
from dilated_attention_pytorch.ordering import HilbertOrdering

LENGTHS, RATES = [8, 32], [1, 4]
ROWS, HEADS, HEAD_DIM, WIDTH = 48, 4, 8, 32
VALUES: dict[str, Any] = {
    "segment_lengths": LENGTHS,
    "dilation_rates": RATES,
    "sequence_lengths": LENGTHS,
    "embed_dim": WIDTH,
    "hidden_dim": WIDTH,
    "dim": WIDTH,
    "d_model": WIDTH,
    "num_heads": HEADS,
    "heads": HEADS,
    "nhead": HEADS,
    "head_dim": HEAD_DIM,
    "num_tokens": 11,
    "num_encoder_layers": 2,
    "num_decoder_layers": 1,
    "dim_feedforward": 24,
    "segment_size": 8,
    "dilation_rate": 2,
    "dropout": 0.0,
}
"""Values for the arguments that mean something; the others are left out."""


def entries(*kinds: str) -> list[OldName]:
    """One record of each old class of these kinds."""
    return [entry for entry in load().names if entry.kind in kinds]


def label(entry: OldName) -> str:
    return f"{entry.modules[0] or 'package'}.{entry.name}"


def settings(entry: OldName) -> Any:
    """The settings object that the module of an old class had."""
    name = {"RingDilatedAttentionProduction": "RingAttentionConfig"}.get(entry.name, "RingAttentionConfig")
    if entry.kind in ("encoder_layer", "decoder_layer"):
        name = "TransformerLayerConfig"
    if entry.group == "base":
        name = "DilatedAttentionConfig"
    cls = old(name)
    return cls(**{field: VALUES[field] for field in cls.signature.defaults if field in VALUES})


def old_arguments(entry: OldName) -> dict[str, Any]:
    """Old arguments by their old names, in the old order, up to the last that has a value here."""
    defaults = entry.signature().defaults
    if "config" in defaults and defaults["config"] is Required:
        return {"config": settings(entry)}
    found = {}
    for name, default in defaults.items():
        if name in VALUES:
            found[name] = VALUES[name]
        elif name == "multihead_config" and default is Required:
            continue
    if entry.signature().takes_more and "config" in defaults:
        found |= {name: VALUES[name] for name in ("segment_lengths", "dilation_rates") if name not in found}
        if entry.kind in ("encoder_layer", "decoder_layer"):
            found |= {name: VALUES[name] for name in ("d_model", "nhead", "dim_feedforward", "dropout")}
        if entry.kind in ("multihead", "sparse_multihead"):
            found |= {name: VALUES[name] for name in ("embed_dim", "num_heads")}
    return found


def positional(entry: OldName, given: dict[str, Any]) -> list[Any]:
    """The longest run of leading arguments that are all given."""
    leading = []
    for name in entry.signature().defaults:
        if name not in given:
            break
        leading.append(given[name])
    return leading


def both_ways(entry: OldName) -> tuple[nn.Module, nn.Module]:
    """The class made by name, and by position as far as the old order goes; both with the same weights."""
    given = old_arguments(entry)
    leading = positional(entry, given)
    rest = dict(list(given.items())[len(leading) :])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        torch.manual_seed(0)
        by_name = resolve(entry)(**given)
        torch.manual_seed(0)
        by_position = resolve(entry)(*leading, **rest)
    assert by_name.state_dict().keys() == by_position.state_dict().keys()
    return by_name.double(), by_position.double()


def qkv() -> list[Tensor]:
    return [torch.randn(2, ROWS, HEADS, HEAD_DIM, dtype=torch.float64, requires_grad=True) for _ in range(3)]


def embeddings() -> Tensor:
    return torch.randn(2, ROWS, WIDTH, dtype=torch.float64, requires_grad=True)


def same(actual: Callable[..., Any], expected: Callable[..., Any], *inputs: Tensor) -> None:
    """Outputs and gradients of the inputs are equal."""
    found = []
    for function in (actual, expected):
        leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
        out = function(*leaves)
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        floating = [leaf for leaf in leaves if leaf.requires_grad]
        found.append([out, *(torch.autograd.grad((out * weight).sum(), floating) if floating else ())])
    for mine, theirs in zip(*found, strict=True):
        assert torch.isfinite(mine).all()
        assert mine.abs().max() > 0
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def square(rows: int) -> HilbertOrdering:
    side = math.ceil(math.sqrt(rows))
    cells = torch.tensor([[row // side, row % side] for row in range(rows)])
    return HilbertOrdering.from_coordinates(cells)


def unpair(entry: OldName, result: Any) -> Tensor:
    """The output, of the type the old class returned."""
    if entry.returns == "pair":
        out, weights = result
        assert weights is None
        return out
    assert isinstance(result, Tensor)
    return result


@pytest.mark.parametrize("entry", entries("attention", "hilbert_attention"), ids=label)
def test_bare_attention(entry: OldName):
    assert entry.call.split()[0] in ("q", "query")
    lengths, rates = tuple(LENGTHS), tuple(RATES)
    for made in both_ways(entry):
        if made.use_hilbert:
            order = square(ROWS)

            def expected(*x: Tensor, order=order) -> Tensor:
                return order.invert(dilated_attention(*map(order.apply, x), lengths, rates))
        else:

            def expected(*x: Tensor) -> Tensor:
                return dilated_attention(*x, lengths, rates)

        same(lambda *x, made=made: unpair(entry, made(*x)), expected, *qkv())


@pytest.mark.parametrize("entry", entries("attention"), ids=label)
def test_bare_attention_is_causal_by_name(entry: OldName):
    made, _ = both_ways(entry)
    x = qkv()
    assert torch.equal(unpair(entry, made(*x, is_causal=True)), dilated_attention(*x, LENGTHS, RATES, is_causal=True))


@pytest.mark.parametrize("entry", entries("full"), ids=label)
def test_full_attention(entry: OldName):
    same(resolve(entry)(), lambda *x: dilated_attention(*x, (ROWS,), (1,)), *qkv())


@pytest.mark.parametrize("entry", entries("dynamic"), ids=label)
def test_segments_by_length(entry: OldName):
    made = resolve(entry)(min_segment_size=8, max_segment_size=32)
    same(made, lambda *x: dilated_attention(*x, (8, 16, 32), (1, 2, 4)), *qkv())


def twin(
    made: nn.Module, lengths: tuple[int, ...] = tuple(LENGTHS), rates: tuple[int, ...] = tuple(RATES)
) -> nn.Module:
    """The replacement, made here from nothing but numbers, with the weights of the old class."""
    weights = made.replacement.state_dict()
    new = MultiheadDilatedAttention(
        WIDTH,
        HEADS,
        bias="in_proj_bias" in weights,
        segment_lengths=lengths,
        dilation_rates=rates,
        sub_layer_norm="sub_norm.weight" in weights,
    ).double()
    new.load_state_dict(weights)
    return new


@pytest.mark.parametrize("entry", entries("multihead"), ids=label)
def test_attention_with_projections(entry: OldName):
    assert entry.call.startswith(("query", "q "))
    layer_norm = entry.signature().defaults.get("layer_norm", False)
    for made in both_ways(entry):
        new = twin(made)
        assert (new.sub_norm is not None) == bool(layer_norm)
        same(lambda x, made=made: unpair(entry, made(x, x, x)), lambda x, new=new: new(x, x, x)[0], embeddings())
        same(
            lambda q, k, v, made=made: unpair(entry, made(q, k, v, is_causal=True)),
            lambda q, k, v, new=new: new(q, k, v, is_causal=True)[0],
            *(embeddings() for _ in range(3)),
        )


@pytest.mark.parametrize("entry", entries("dynamic_multihead"), ids=label)
def test_segments_by_length_with_projections(entry: OldName):
    made = resolve(entry)(WIDTH, HEADS, min_segment_size=8).double()
    new = twin(made, (8, 16, 32), (1, 2, 4))
    same(lambda x: made(x, x, x)[0], lambda x: new(x, x, x)[0], embeddings())


@pytest.mark.parametrize("entry", entries("self", "hilbert_self"), ids=label)
def test_self_attention(entry: OldName):
    if entry.name == "RingDilatedAttentionFixedSimple":
        pattern = ((1 << 30,), (1,))
    elif "segment_size" in entry.signature().defaults:
        pattern = ((8,), (2,))
    else:
        pattern = (tuple(LENGTHS), tuple(RATES))
    for made in both_ways(entry):
        new = twin(made, *pattern)
        order = square(ROWS) if entry.kind == "hilbert_self" else None

        def expected(x: Tensor, new=new, order=order) -> Tensor:
            if order is None:
                return new(x, x, x)[0]
            return order.invert(new(*[order.apply(x)] * 3)[0])

        same(lambda x, made=made: unpair(entry, made(x)), expected, embeddings())


@pytest.mark.parametrize("entry", entries("encoder_layer", "decoder_layer", "longnet", "longnet_lm"), ids=label)
def test_models(entry: OldName):
    for made in both_ways(entry):
        x = embeddings()
        options = {"batch_first": True, "norm_first": True, "segment_lengths": LENGTHS, "dilation_rates": RATES}
        if entry.kind == "encoder_layer":
            new: nn.Module = package.models.DilatedTransformerEncoderLayer(WIDTH, HEADS, 24, 0.0, **options)
            calls = (lambda x, made=made: made(x, is_causal=True), lambda x, new=new: new(x, is_causal=True))
        elif entry.kind == "decoder_layer":
            new = package.models.DilatedTransformerDecoderLayer(
                WIDTH, HEADS, 24, 0.0, cross_attention="dilated", **options
            )
            calls = (lambda x, made=made: made(x, x), lambda x, new=new: new(x, x))
        else:
            xpos = 512.0 if entry.kind == "longnet_lm" else None
            new = package.models.LongNet(
                WIDTH, HEADS, 2, 1, 24, cross_attention="dilated", xpos_scale_base=xpos, **options
            )
            causal = {"src_is_causal": True, "tgt_is_causal": True, "memory_is_causal": True}
            calls = (made, lambda x, new=new, causal=causal: new(x, x, **causal))
        new.double().load_state_dict(made.replacement.state_dict())
        if entry.kind == "longnet_lm":
            x = torch.randint(11, (2, ROWS))
            head = copy.deepcopy((made.token_embedding, made.norm, made.out))
            calls = (made, lambda x, inner=calls[1], head=head: head[2](head[1](inner(head[0](x)))))
            same(*calls, x)
            made(x).sum().backward()
            assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in made.parameters())
        else:
            same(*calls, x)


def test_bare_calls_of_classes_with_a_width():
    made = old("RingDilatedAttentionHilbertGPUOptimized")(segment_lengths=LENGTHS, dilation_rates=RATES)
    order = square(ROWS)
    same(made, lambda *x: order.invert(dilated_attention(*map(order.apply, x), LENGTHS, RATES)), *qkv())
    made = old("RingDilatedAttentionV3")(LENGTHS, RATES)
    same(made, lambda *x: dilated_attention(*x, LENGTHS, RATES), *qkv())


def test_replacement_is_the_public_class():
    assert type(old("DilatedAttention", "dilated_attention")(LENGTHS, RATES).replacement) is DilatedAttention
