"""Encoder and decoder layers: PyTorch's where one segment covers all, the definition where none does."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dilated_attention_pytorch import DilatedPattern
from dilated_attention_pytorch.models.transformer_layers import (
    DilatedTransformerDecoderLayer,
    DilatedTransformerEncoderLayer,
    TurnedAttention,
    attend_alongside,
    find_activation,
)
from dilated_attention_pytorch.modules import DilatedAttention, MultiheadDilatedAttention
from dilated_attention_pytorch.testing import max_error, multiplicity

WIDTH, HEADS = 24, 4
DENSE: dict[str, Any] = {"segment_lengths": (64,), "dilation_rates": (1,)}
PATTERN: dict[str, Any] = {"segment_lengths": (6, 10), "dilation_rates": (1, 3)}
OPTIONS: list[dict[str, Any]] = [
    {"batch_first": True},
    {"norm_first": True, "bias": False, "activation": "gelu"},
    {"batch_first": True, "norm_first": True, "activation": nn.functional.silu, "layer_norm_eps": 1e-2},
]
PADDING = torch.tensor([[False] * 13, [False] * 9 + [True] * 4])


def pair(kind: type, dense_kind: type, **options: Any) -> tuple[nn.Module, nn.Module]:
    """A layer of ours and PyTorch's with the same weights, biases and norms drawn too."""
    options = {"dim_feedforward": 40, "dropout": 0.0, "dtype": torch.float64, **options}
    dense = dense_kind(WIDTH, HEADS, **options)
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    ours = kind(WIDTH, HEADS, **options, **DENSE)
    ours.load_state_dict(dense.state_dict())
    assert ours.state_dict().keys() == dense.state_dict().keys()
    return ours, dense


def check_same(ours: nn.Module, dense: nn.Module, inputs: list[Tensor], given: dict[str, Any], theirs: dict[str, Any]):
    """Outputs and gradients of inputs and weights agree."""
    inputs = [tensor.double().requires_grad_() for tensor in inputs]
    out, gold = ours(*inputs, **given), dense(*inputs, **theirs)
    assert max_error(out, gold) < 1e-12
    weight = torch.randn_like(gold)
    for (name, parameter), other in zip(ours.named_parameters(), dense.parameters(), strict=True):
        a, b = (torch.autograd.grad(o, p, weight, retain_graph=True)[0] for o, p in ((out, parameter), (gold, other)))
        assert max_error(a, b) < 1e-10, name
    for a, b in zip(
        torch.autograd.grad(out, inputs, weight, retain_graph=True),
        torch.autograd.grad(gold, inputs, weight),
        strict=True,
    ):
        assert max_error(a, b) < 1e-10


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("causal", [False, True])
def test_the_encoder_layer_is_pytorchs_where_one_segment_covers_all(options: dict[str, Any], causal: bool):
    ours, dense = pair(DilatedTransformerEncoderLayer, nn.TransformerEncoderLayer, **options)
    x = torch.randn(2, 13, WIDTH) if options.get("batch_first") else torch.randn(13, 2, WIDTH)
    mask = nn.Transformer.generate_square_subsequent_mask(13, dtype=torch.float64) if causal else None
    given: dict[str, Any] = {"src_key_padding_mask": PADDING}
    theirs = {**given, "src_mask": mask}
    for said in ({"is_causal": causal}, {"src_mask": mask}, {"src_mask": mask, "is_causal": causal}):
        check_same(ours, dense, [x], {**given, **said}, theirs)
    one = x.select(0 if options.get("batch_first") else 1, 0)
    check_same(ours, dense, [one], {"is_causal": causal}, {"src_mask": mask})


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("causal", [False, True])
def test_the_decoder_layer_is_pytorchs_where_one_segment_covers_all(options: dict[str, Any], causal: bool):
    ours, dense = pair(DilatedTransformerDecoderLayer, nn.TransformerDecoderLayer, **options)
    tgt, memory = torch.randn(2, 13, WIDTH), torch.randn(2, 17, WIDTH)
    if not options.get("batch_first"):
        tgt, memory = tgt.transpose(0, 1), memory.transpose(0, 1)
    mask = nn.Transformer.generate_square_subsequent_mask(13, dtype=torch.float64) if causal else None
    given: dict[str, Any] = {
        "tgt_key_padding_mask": PADDING,
        "memory_key_padding_mask": torch.rand(2, 17) < 0.3,
        "memory_mask": torch.rand(13, 17) < 0.2,
    }
    theirs = {**given, "tgt_mask": mask}
    for said in ({"tgt_is_causal": causal}, {"tgt_mask": None if mask is None else mask == -torch.inf}):
        check_same(ours, dense, [tgt, memory], {**given, **said}, theirs)


def test_a_fresh_layer_has_pytorchs_weights():
    for ours, dense in (
        (DilatedTransformerEncoderLayer, nn.TransformerEncoderLayer),
        (DilatedTransformerDecoderLayer, nn.TransformerDecoderLayer),
    ):
        torch.manual_seed(3)
        gold = dense(WIDTH, HEADS).state_dict()
        torch.manual_seed(3)
        found = ours(WIDTH, HEADS, **DENSE).state_dict()
        assert all(torch.equal(found[name], weight) for name, weight in gold.items())


def attend(q: Tensor, k: Tensor, v: Tensor, *, hidden: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """One softmax over the multiset of keys of PATTERN for (rows, width) tensors, the query's first row being row 0."""
    rows = max(len(q), len(k))
    pattern = DilatedPattern(**PATTERN)
    position = torch.arange(rows)
    m = multiplicity(pattern, HEADS, position, torch.zeros_like(position), rows, is_causal=is_causal).sum(0)
    m = m[:, : len(q), : len(k)].double()
    if hidden is not None:
        m = m * ~hidden
    q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(0, 1) for t in (q, k, v))
    weights = m * (q @ k.mT / math.sqrt(q.shape[-1])).exp()
    total = weights.sum(-1, keepdim=True)
    return ((weights / torch.where(total == 0, 1, total)) @ v).transpose(0, 1).flatten(1)


@pytest.mark.parametrize(("rows", "keys"), [(23, 23), (9, 23), (31, 14)])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_dilated_cross_attention_looks_from_the_same_row(rows: int, keys: int, is_causal: bool, masked: bool):
    attention = MultiheadDilatedAttention(WIDTH, HEADS, dtype=torch.float64, **PATTERN)
    nn.init.normal_(attention.in_proj_bias)
    nn.init.normal_(attention.out_proj.bias)
    x, memory = torch.randn(2, rows, WIDTH).double(), torch.randn(2, keys, WIDTH).double()
    hidden = torch.rand(2, keys) < 0.3 if masked else None
    out = attend_alongside(attention, x, memory, hidden, is_causal=is_causal)
    weights = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    for b in range(2):
        q, k, v = (t @ w.T + a for t, w, a in zip((x[b], memory[b], memory[b]), *weights, strict=True))
        gold = attend(q, k, v, hidden=None if hidden is None else hidden[b], is_causal=is_causal)
        assert max_error(out[b], attention.out_proj(gold)) < 1e-12
    alone = attend_alongside(attention, x[0], memory[0], None if hidden is None else hidden[0], is_causal=is_causal)
    assert max_error(alone, out[0]) < 1e-12


def test_layers_use_the_pattern():
    """Each attention of a decoder layer, through the whole layer, with the weights of the layer."""
    layer = DilatedTransformerDecoderLayer(
        WIDTH, HEADS, 40, 0.0, batch_first=True, dtype=torch.float64, cross_attention="dilated", **PATTERN
    )
    tgt, memory = torch.randn(1, 23, WIDTH).double(), torch.randn(1, 23, WIDTH).double()

    def run(attention: MultiheadDilatedAttention, x: Tensor, other: Tensor, *, is_causal: bool) -> Tensor:
        q, k, v = (t @ w.T for t, w in zip((x, other, other), attention.in_proj_weight.chunk(3), strict=True))
        return attention.out_proj(attend(q, k, v, is_causal=is_causal))

    x = layer.norm1(tgt[0] + run(layer.self_attn, tgt[0], tgt[0], is_causal=True))
    x = layer.norm2(x + run(layer.multihead_attn, x, memory[0], is_causal=False))
    x = layer.norm3(x + layer.linear2(layer.linear1(x).relu()))
    assert max_error(layer(tgt, memory, tgt_is_causal=True)[0], x) < 1e-12


def test_xpos_gives_each_pair_of_rows_its_angle_and_decay():
    base, dim, rows = 20.0, 8, 21
    turned = TurnedAttention(DilatedAttention((64,), (1,), is_causal=True), dim, base, None)
    q, k, v = torch.randn(3, 1, rows, 2, dim).double()
    complex_q, complex_k = (torch.view_as_complex(t.unflatten(-1, (-1, 2)).contiguous()) for t in (q, k))
    pair_number = torch.arange(dim // 2).double()
    angle = 10000.0 ** (-2 * pair_number / dim)
    decay = ((2 * pair_number + 0.4 * dim) / (1.4 * dim)) ** (1 / base)
    scores = torch.full((rows, rows, 2), -torch.inf, dtype=torch.float64)
    for n in range(rows):
        for m in range(n + 1):
            turn = torch.polar(decay ** (n - m), angle * (n - m))
            scores[n, m] = (complex_q[0, n] * turn * complex_k[0, m].conj()).real.sum(-1) / math.sqrt(dim)
    gold = torch.einsum("nmh,mhd->nhd", scores.softmax(1), v[0])
    out = turned(q, k, v)
    assert max_error(out[0], gold) < 1e-6  # the buffer of xPos is float32
    layer = DilatedTransformerEncoderLayer(32, 4, dropout=0.0, batch_first=True, xpos_scale_base=base, **PATTERN)
    x = torch.randn(1, 30, 32)
    assert max_error(layer(x.flip(1)).flip(1), layer(x).double()) > 1e-3  # the order of rows counts
    with pytest.raises(ValueError, match="xpos scales"):
        layer(torch.randn(1, 100_000, 32))


def test_dropout_acts_in_training_only():
    layer = DilatedTransformerEncoderLayer(WIDTH, HEADS, dropout=0.5, **PATTERN)
    x = torch.randn(13, 2, WIDTH)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_pytorchs_containers_take_the_layers():
    layer, dense = pair(DilatedTransformerEncoderLayer, nn.TransformerEncoderLayer, batch_first=True)
    stacks = [nn.TransformerEncoder(one, 2, enable_nested_tensor=False) for one in (layer, dense)]
    x = torch.randn(2, 13, WIDTH).double()
    options = {"src_key_padding_mask": PADDING}
    assert max_error(stacks[0](x, **options), stacks[1](x, **options)) < 1e-12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "tanhh"}, "activation is 'tanhh'"),
        ({"cross_attention": "none"}, "cross_attention is 'none'"),
        ({"xpos_scale_base": 0}, "xpos_scale_base is 0"),
        ({"dim_feedforward": 0}, "dim_feedforward is 0; give an integer of at least 1"),
        ({"layer_norm_eps": -1.0}, "layer_norm_eps is -1.0; give a number of at least 0"),
        ({"activation": 3}, "activation is 3; give 'relu', 'gelu' or a function"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        DilatedTransformerDecoderLayer(WIDTH, HEADS, **options, **PATTERN)


def test_masks_that_cannot_be_kept_are_refused():
    layer = DilatedTransformerEncoderLayer(WIDTH, HEADS, batch_first=True, **PATTERN)
    x = torch.randn(2, 13, WIDTH)
    for mask in (torch.zeros(13, 13), torch.ones(13, 13).tril(), torch.ones(13, 13).tril().bool(), torch.zeros(2, 3)):
        with pytest.raises(ValueError, match="src_mask is no causal mask"):
            layer(x, src_mask=mask)
    with pytest.raises(ValueError, match="other values than 0 and -inf"):
        layer(x, src_key_padding_mask=torch.ones(2, 13))
    assert find_activation("gelu") is nn.functional.gelu
