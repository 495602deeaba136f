"""The modules against nn.MultiheadAttention, the dense oracle and the formula of MAGNETO."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dilated_attention_pytorch.modules import DilatedAttention, MultiheadDilatedAttention
from dilated_attention_pytorch.testing import oracle

PATTERN: dict[str, Any] = {"segment_lengths": (8, 16), "dilation_rates": (1, 3)}
WHOLE: dict[str, Any] = {"segment_lengths": (64,), "dilation_rates": (1,)}


def heads(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def pair(
    embed_dim: int = 24, num_heads: int = 4, **options: Any
) -> tuple[nn.MultiheadAttention, MultiheadDilatedAttention]:
    """Torch's module with random biases, and ours with its state dict and one segment at rate 1."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(embed_dim, num_heads, batch_first=True, dtype=torch.float64, **options)
    for name, parameter in theirs.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    ours = MultiheadDilatedAttention(embed_dim, num_heads, dtype=torch.float64, **options, **WHOLE)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def assert_same_backward(theirs: nn.Module, ours: nn.Module, expected: Tensor, actual: Tensor, *inputs: Tensor):
    """Outputs agree, and with the same output gradient the gradients of inputs and parameters."""
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    grad = torch.randn_like(expected)
    gold = torch.autograd.grad(expected, [*inputs, *theirs.parameters()], grad)
    grads = torch.autograd.grad(actual, [*inputs, *ours.parameters()], grad)
    names = [name for name, _ in theirs.named_parameters()]
    assert names == [name for name, _ in ours.named_parameters()]
    for a, b in zip(grads, gold, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True, "scale": 0.5},
        {"head_offsets": "interleaved", "backend": "reference"},
        {"padding": "zeros", "mixing_grad": "detached"},
    ],
    ids=str,
)
def test_dilated_attention_equals_the_oracle(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    q, k, v = heads(2, 21, 4, 8), heads(2, 21, 2, 8), heads(2, 21, 2, 6)
    out = DilatedAttention(**PATTERN, **options)(q, k, v)
    gold = oracle(q, k, v, **PATTERN, **{n: o for n, o in options.items() if n != "backend"}).out
    torch.testing.assert_close(out, gold, rtol=1e-10, atol=1e-12)
    grad = torch.randn_like(gold)
    grads, golds = (torch.autograd.grad(o, (q, k, v), grad) for o in (out, gold))
    for a, b in zip(grads, golds, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_dilated_attention_passes_where_documents_lie() -> None:
    torch.manual_seed(0)
    q, k, v = (heads(2, 20, 3, 8) for _ in range(3))
    attention = DilatedAttention(**PATTERN, is_causal=True)
    key_start = torch.tensor([-5, 3])
    mask = torch.zeros(2, 20, dtype=torch.bool)
    mask[:, 17:] = True
    gold = oracle(q, k, v, **PATTERN, is_causal=True, key_start=key_start, key_padding_mask=mask).out
    torch.testing.assert_close(attention(q, k, v, key_start=key_start, key_padding_mask=mask), gold)
    cu_seqlens = torch.tensor([0, 13, 20])
    gold = oracle(q[:1], k[:1], v[:1], **PATTERN, is_causal=True, cu_seqlens=cu_seqlens).out
    torch.testing.assert_close(attention(q[:1], k[:1], v[:1], cu_seqlens=cu_seqlens), gold)
    gold = oracle(q, k, v, **PATTERN, is_causal=False).out
    torch.testing.assert_close(attention(q, k, v, is_causal=False), gold)


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    query = torch.zeros(1, 64, 4, 8)
    value = torch.ones(1, 64, 4, 8)
    attention = DilatedAttention((64,), (1,), dropout=0.25)
    assert torch.allclose(attention.eval()(query, query, value), value)
    kept = attention.train()(query, query, value)[..., 0]
    # A row keeps each of 64 equal weights with probability 3/4, times 4/3: mean 1, deviation sqrt(1/3/64).
    assert abs(kept.mean() - 1) < 5 * (1 / 192 / kept.numel()) ** 0.5
    assert 0.05 < kept.std() < 0.1


def test_repr_shows_the_pattern_and_what_is_not_default() -> None:
    assert repr(DilatedAttention((8,), (2,))) == "DilatedAttention((8,), (2,))"
    assert (
        repr(DilatedAttention((8,), (2,), is_causal=True, dropout=0.1))
        == "DilatedAttention((8,), (2,), is_causal=True, dropout=0.1)"
    )
    text = repr(MultiheadDilatedAttention(8, 4, num_kv_heads=2, kdim=5, **PATTERN))
    assert "embed_dim=8, num_heads=4, num_kv_heads=2, kdim=5" in text


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 10, "vdim": 14}], ids=str)
def test_initial_values_and_keys_are_those_of_torch(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    gold = nn.MultiheadAttention(24, 4, batch_first=True, **options).state_dict()
    torch.manual_seed(0)
    ours = MultiheadDilatedAttention(24, 4, **options, **WHOLE)
    assert list(ours.state_dict()) == list(gold)
    for name, value in ours.state_dict().items():
        assert torch.equal(value, gold[name]), name


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("is_causal", [True, False])
def test_self_attention_equals_torch(bias: bool, is_causal: bool) -> None:
    theirs, ours = pair(bias=bias)
    x = torch.randn(2, 20, 24, dtype=torch.float64, requires_grad=True)
    causal = nn.Transformer.generate_square_subsequent_mask(20, dtype=torch.float64) if is_causal else None
    expected = theirs(x, x, x, attn_mask=causal, need_weights=False)[0]
    actual, weights = ours(x, x, x, is_causal=is_causal)
    assert weights is None
    assert_same_backward(theirs, ours, expected, actual, x)


def test_padded_cross_attention_with_own_widths_equals_torch() -> None:
    theirs, ours = pair(kdim=10, vdim=14)
    query = torch.randn(2, 7, 24, dtype=torch.float64, requires_grad=True)
    key = torch.randn(2, 20, 10, dtype=torch.float64, requires_grad=True)
    value = torch.randn(2, 20, 14, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 20) < 0.3
    expected = theirs(query, key, value, key_padding_mask=mask, need_weights=False)[0]
    actual, _ = ours(query, key, value, mask)
    assert_same_backward(theirs, ours, expected, actual, query, key, value)


def test_unbatched_inputs_and_distinct_tensors_equal_torch() -> None:
    theirs, ours = pair()
    query, key, value = (torch.randn(20, 24, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = torch.rand(20) < 0.3
    expected = theirs(query, key, value, key_padding_mask=mask, need_weights=False)[0]
    actual, _ = ours(query, key, value, key_padding_mask=mask)
    assert actual.shape == (20, 24)
    assert_same_backward(theirs, ours, expected, actual, query, key, value)


def test_grouped_query_equals_torch_with_repeated_key_and_value_heads() -> None:
    torch.manual_seed(0)
    ours = MultiheadDilatedAttention(24, 4, num_kv_heads=2, dtype=torch.float64, **WHOLE)
    nn.init.normal_(ours.in_proj_bias)
    theirs = nn.MultiheadAttention(24, 4, batch_first=True, dtype=torch.float64)

    def repeat(packed: Tensor) -> Tensor:
        q, k, v = packed.detach().split([24, 12, 12])
        return torch.cat([q, *(t.unflatten(0, (2, 6)).repeat_interleave(2, 0).flatten(0, 1) for t in (k, v))])

    state = {**ours.state_dict()}
    state["in_proj_weight"] = repeat(state["in_proj_weight"])
    state["in_proj_bias"] = repeat(state["in_proj_bias"])
    theirs.load_state_dict(state)
    x = torch.randn(2, 20, 24, dtype=torch.float64)
    torch.testing.assert_close(ours(x, x, x)[0], theirs(x, x, x)[0], rtol=1e-10, atol=1e-12)


def test_dilated_pattern_reaches_the_heads() -> None:
    torch.manual_seed(0)
    ours = MultiheadDilatedAttention(24, 4, dtype=torch.float64, head_offsets="interleaved", **PATTERN)
    x = torch.randn(1, 20, 24, dtype=torch.float64)
    q, k, v = nn.functional.linear(x, ours.in_proj_weight).unflatten(-1, (3, 4, 6)).unbind(2)
    mixed = oracle(q, k, v, **PATTERN, head_offsets="interleaved", is_causal=True).out
    gold = mixed.flatten(-2) @ ours.out_proj.weight.T
    torch.testing.assert_close(ours(x, x, x, is_causal=True)[0], gold, rtol=1e-10, atol=1e-12)


def test_sub_layer_norm_normalises_the_concatenated_heads() -> None:
    theirs, _ = pair()
    ours = MultiheadDilatedAttention(24, 4, sub_layer_norm=True, dtype=torch.float64, **WHOLE)
    with torch.no_grad():
        ours.sub_norm.weight.uniform_(0.5, 1.5)
        ours.sub_norm.bias.normal_()
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert (missing, unexpected) == (["sub_norm.weight", "sub_norm.bias"], [])
    x = torch.randn(2, 20, 24, dtype=torch.float64)
    weight, bias = theirs.out_proj.weight.clone(), theirs.out_proj.bias.clone()
    with torch.no_grad():  # torch's module without its output projection gives the concatenated heads
        nn.init.eye_(theirs.out_proj.weight)
        nn.init.zeros_(theirs.out_proj.bias)
        mixed = theirs(x, x, x, need_weights=False)[0]
        centred = mixed - mixed.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        gold = (scaled * ours.sub_norm.weight + ours.sub_norm.bias) @ weight.T + bias
    torch.testing.assert_close(ours(x, x, x)[0], gold, rtol=1e-10, atol=1e-10)


def test_row_without_keys_gives_the_output_bias() -> None:
    _, ours = pair()
    x = torch.randn(2, 20, 24, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True] * 20, [False] * 20])
    out, _ = ours(x, x, x, key_padding_mask=mask)
    assert torch.equal(out[0], ours.out_proj.bias.expand(20, 24))
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(grad[0], torch.zeros(20, 24, dtype=torch.float64))
    assert torch.isfinite(grad[1]).all()


def call(**options: Any) -> Any:
    x = torch.randn(1, 8, 8)
    given = {"query": x, "key": x, "value": x, **options}
    return MultiheadDilatedAttention(8, 2, **PATTERN)(**given)


BAD = {
    "rates": (lambda: DilatedAttention((8, 16), (1,)), "give one rate a segment length"),
    "rate": (lambda: DilatedAttention((8,), (9,)), "dilation rate 9 is larger than its segment length 8"),
    "dropout": (lambda: DilatedAttention((8,), (1,), dropout=1.0), "dropout is 1.0; give a probability"),
    "padding": (lambda: DilatedAttention((8,), (1,), padding="same"), "'mask', 'zeros'"),
    "mixing": (lambda: DilatedAttention((8,), (1,), mixing_grad="none"), "'exact', 'detached'"),
    "backend": (lambda: DilatedAttention((8,), (1,), backend="abacus"), "backend is 'abacus'"),
    "width": (lambda: MultiheadDilatedAttention(10, 4, **PATTERN), "embed_dim is 10, num_heads is 4"),
    "kv heads": (lambda: MultiheadDilatedAttention(8, 4, num_kv_heads=3, **PATTERN), "num_kv_heads is 3"),
    "batch": (lambda: MultiheadDilatedAttention(8, 4, batch_first=False, **PATTERN), "batch_first is False"),
    "bias": (lambda: MultiheadDilatedAttention(8, 4, add_bias_kv=True, **PATTERN), "add_bias_kv is True"),
    "zero": (lambda: MultiheadDilatedAttention(8, 4, add_zero_attn=True, **PATTERN), "add_zero_attn is True"),
    "weights": (lambda: call(need_weights=True), "give need_weights=False"),
    "attn_mask": (lambda: call(attn_mask=torch.zeros(8, 8)), "attn_mask is given"),
    "query": (
        lambda: call(query=torch.randn(1, 8, 7)),
        r"query has shape \(1, 8, 7\); give \(batch, rows, 8\)",
    ),
    "mixed": (lambda: call(key=torch.randn(8, 8)), r"key has shape \(8, 8\)"),
    "rows": (lambda: call(query=torch.randn(1, 9, 8)), "query has 9 rows, key has 8"),
    "mask": (lambda: call(key_padding_mask=torch.zeros(1, 8)), "give bool of shape"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_a_helpful_value_error(name: str) -> None:
    make, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        make()
