"""LongNetLM: against a plain transformer, causal, document by document, and under every way of running it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dilated_attention_pytorch.models import LongNetLM, LongNetLMConfig
from dilated_attention_pytorch.testing import oracle

VOCAB = 50
TINY: dict[str, Any] = {
    "vocab_size": VOCAB,
    "context_length": 64,
    "embed_dim": 32,
    "num_layers": 2,
    "num_heads": 4,
    "segment_lengths": (8, 16, 64),
    "dilation_rates": (1, 3, 4),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "sub-ln": {},
    "pre-rms": {"norm": "pre-rms", "tie_embeddings": True, "num_kv_heads": 2, "head_offsets": "interleaved"},
    "local": {"norm": "pre-rms", "ngram_sizes": (2, 4), "ngram_buckets": 64, "short_convolution": 3, "num_kv_heads": 2},
}


def build(*, dtype: torch.dtype = torch.float64, seed: int = 0, **options: Any) -> LongNetLM:
    torch.manual_seed(seed)
    model = LongNetLM(LongNetLMConfig(**{**TINY, **options}), dtype=dtype)
    with torch.no_grad():  # initial biases are 0 and norms 1: draw them, so that none can go missing unseen
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def gradients(model: LongNetLM, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def ngram_rows(config: LongNetLMConfig, tokens: Tensor) -> Tensor:
    """Rows of the n-gram table from Python's integers; a token before the first is number 0, token t is t + 1."""
    prime = 2**31 - 1
    result = torch.empty(*tokens.shape, len(config.ngram_sizes), dtype=torch.int64)
    for b, row in enumerate(tokens.tolist()):
        for n in range(len(row)):
            for which, size in enumerate(config.ngram_sizes):
                value = row[n] + 1
                for back in range(1, size):
                    value = (value * 1_000_003 + (row[n - back] + 1 if n >= back else 0)) % prime
                result[b, n, which] = value * 48_271 % prime % config.ngram_buckets + which * config.ngram_buckets
    return result


def convolved(x: Tensor, weight: Tensor) -> Tensor:
    """Each channel's sum over the rows up to this one, row by row."""
    rows = [
        torch.stack([x[:, n - back] * weight[back] for back in range(min(len(weight), n + 1))]).sum(0)
        for n in range(x.shape[1])
    ]
    return torch.stack(rows, dim=1)


def plain_transformer(model: LongNetLM, tokens: Tensor, attend: Callable[..., Tensor]) -> Tensor:
    """The same network around ``attend(query, key, value)``, written from the weights alone."""
    config, state = model.config, model.state_dict()
    b, n = tokens.shape

    def norm(x: Tensor, name: str) -> Tensor:
        if f"{name}.weight" not in state:
            return x
        if config.norm == "sub-ln":
            return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * state[f"{name}.weight"]

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def heads(x: Tensor, count: int, *, rotary: bool) -> Tensor:
        x = x.view(b, n, count, config.head_dim)
        if rotary:
            half = config.head_dim // 2
            frequency = config.rope_base ** (-torch.arange(half).double() / half)
            turn = torch.polar(torch.ones(n, half).double(), torch.arange(n)[:, None] * frequency)
            z = torch.complex(x[..., :half], x[..., half:]) * turn[:, None]
            x = torch.cat([z.real, z.imag], -1)
        return x

    x = state["embedding.weight"][tokens]
    if config.ngram_sizes:
        x = (x + state["ngrams.embedding.weight"][ngram_rows(config, tokens)].sum(-2)) / math.sqrt(
            1 + len(config.ngram_sizes)
        )
    x = x * math.sqrt(config.embed_dim)
    for i in range(config.num_layers):
        at, ff = f"blocks.{i}.attention", f"blocks.{i}.feed_forward"
        widths = [count * config.head_dim for count in (config.num_heads, config.kv_heads, config.kv_heads)]
        q, k, v = linear(norm(x, f"{at}_norm"), f"{at}.in_proj").split(widths, -1)
        if config.short_convolution:
            q, k, v = convolved(torch.cat([q, k, v], -1), state[f"{at}.short_convolution.weight"]).split(widths, -1)
        mixed = attend(
            heads(q, config.num_heads, rotary=True),
            heads(k, config.kv_heads, rotary=True),
            heads(v, config.kv_heads, rotary=False),
        )
        x = x + linear(norm(mixed.flatten(-2), f"{at}.inner_norm"), f"{at}.out_proj")
        hidden = F.gelu(linear(norm(x, f"{ff}_norm"), f"{ff}.in_proj"))
        x = x + linear(norm(hidden, f"{ff}.inner_norm"), f"{ff}.out_proj")
    output = "embedding.weight" if config.tie_embeddings else "output.weight"
    return norm(x, "norm") @ state[output].T


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_segment_at_rate_1_is_a_plain_transformer(variant: str) -> None:
    model = build(segment_lengths=(64,), dilation_rates=(1,), rope_base=500.0, mlp_dim=40, **VARIANTS[variant])
    tokens = draw(2, 41)

    def dense(*heads: Tensor) -> Tensor:
        query, key, value = (x.transpose(1, 2) for x in heads)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2)

    gold = plain_transformer(model, tokens, dense)
    torch.testing.assert_close(model(tokens), gold, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("variant", VARIANTS)
def test_dilated_it_is_that_transformer_around_the_oracle(variant: str) -> None:
    model = build(**VARIANTS[variant])
    config, tokens = model.config, draw(2, 41)

    def dilated(*heads: Tensor) -> Tensor:
        offsets = config.head_offsets
        lists = (config.segment_lengths, config.dilation_rates)
        return oracle(*heads, *lists, is_causal=True, head_offsets=offsets).out

    gold = plain_transformer(model, tokens, dilated)
    torch.testing.assert_close(model(tokens), gold, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("option", ["dropout", "attention_dropout"])
def test_dropout_acts_in_training_only(option: str) -> None:
    model, tokens = build(**{option: 0.5}), draw(1, 41)
    gold = build()(tokens)
    assert torch.equal(model.eval()(tokens), gold)
    model.train().dropout.eval()  # the blocks must drop too, not only the embedding
    noisy = [model(tokens) for _ in range(2)]
    assert all((logits - gold).abs().max() > 0.01 for logits in noisy)
    assert not torch.equal(*noisy)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_causality_is_bit_exact(variant: str, dtype: torch.dtype) -> None:
    model = build(dtype=dtype, **VARIANTS[variant])
    tokens = draw(1, 50)
    logits = model(tokens)
    for t in (1, 16, 17, 49):
        changed = tokens.clone()
        changed[0, t] = (changed[0, t] + 1) % VOCAB
        others = model(changed)
        assert torch.equal(others[:, :t], logits[:, :t])
        assert not torch.equal(others[:, t], logits[:, t])


def test_one_byte_after_the_other_equals_a_full_pass() -> None:
    model = build(**VARIANTS["local"])
    tokens = draw(1, 20)
    logits = model(tokens)
    for n in range(1, 21):  # fewer rows than the convolution and the n-grams reach back to, too
        torch.testing.assert_close(model(tokens[:, :n])[:, -1], logits[:, n - 1], rtol=1e-10, atol=1e-12)


def test_ngrams_beyond_the_table_still_have_rows() -> None:
    model = build(**VARIANTS["local"])
    assert model.ngrams is not None
    ids = model.ngrams.ids(draw(4, 1000), None)
    first, second = ids.unbind(-1)
    assert set(first.flatten().tolist()) == set(range(64))  # all of its 64 buckets, and none of the other's
    assert set(second.flatten().tolist()) == set(range(64, 128))


def test_the_longest_branch_reaches_back_to_the_first_token() -> None:
    model = build()
    tokens = draw(1, 64)
    changed = tokens.clone()
    changed[0, 0] = (changed[0, 0] + 1) % VOCAB
    assert (model(changed)[0, 60] - model(tokens)[0, 60]).abs().max() > 1e-6
    near = build(segment_lengths=(8,), dilation_rates=(1,))
    assert torch.equal(near(changed)[0, 8:], near(tokens)[0, 8:])


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_documents_equal_each_alone(variant: str) -> None:
    model = build(**VARIANTS[variant])
    documents = [draw(1, n, seed=n) for n in (19, 1, 30)]
    packed = torch.cat(documents, dim=1)
    logits = model(packed, cu_seqlens=torch.tensor([0, 19, 20, 50]))
    alone = torch.cat([model(document) for document in documents], dim=1)
    torch.testing.assert_close(logits, alone, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_padded_prompts_equal_each_alone(variant: str) -> None:
    model = build(**VARIANTS[variant])
    lengths = (30, 11, 1)
    prompts = [draw(1, n, seed=n) for n in lengths]
    left = torch.cat([F.pad(prompt, (30 - prompt.shape[1], 0)) for prompt in prompts])
    right = torch.cat([F.pad(prompt, (0, 30 - prompt.shape[1])) for prompt in prompts])
    key_start = torch.tensor([n - 30 for n in lengths])
    mask = torch.arange(30) >= torch.tensor(lengths)[:, None]
    shifted, masked = model(left, key_start=key_start), model(right, key_padding_mask=mask)
    assert torch.isfinite(shifted).all()
    for i, (n, prompt) in enumerate(zip(lengths, prompts, strict=True)):
        alone = model(prompt)[0]
        torch.testing.assert_close(shifted[i, 30 - n :], alone, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(masked[i, :n], alone, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(model(left[1:2], key_start=-19), shifted[1:2], rtol=1e-10, atol=1e-12)


def test_a_shift_by_whole_segments_changes_nothing() -> None:
    model = build(segment_lengths=(8, 64), dilation_rates=(1, 4))
    tokens = draw(1, 50)
    torch.testing.assert_close(model(tokens, key_start=64 * 1000), model(tokens), rtol=1e-8, atol=1e-8)
    assert (model(tokens, key_start=3) - model(tokens)).abs().max() > 1e-3


def test_tied_embedding_is_one_tensor_with_both_gradients() -> None:
    tied, untied = build(tie_embeddings=True), build()
    assert set(untied.state_dict()) - set(tied.state_dict()) == {"output.weight"}
    state = {**tied.state_dict(), "output.weight": tied.embedding.weight.detach().clone()}
    untied.load_state_dict(state)
    tokens = draw(2, 31)
    losses = [model.loss(tokens[:, :-1], tokens[:, 1:]) for model in (tied, untied)]
    torch.testing.assert_close(*losses)
    one, two = (gradients(model, loss) for model, loss in zip((tied, untied), losses, strict=True))
    torch.testing.assert_close(one["embedding.weight"], two["embedding.weight"] + two["output.weight"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_materialised_from_meta_equals_drawn_in_place(variant: str) -> None:
    here = build(**VARIANTS[variant])
    model = LongNetLM(LongNetLMConfig(**{**TINY, **VARIANTS[variant]}), device="meta", dtype=torch.float64).to_empty(
        device="cpu"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    for each in (here, model):
        torch.manual_seed(0)
        each.reset_parameters()
    gold = here.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, gold[name]), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_checkpointing_changes_no_bit(variant: str) -> None:
    options = {**VARIANTS[variant], "dropout": 0.1, "attention_dropout": 0.1}
    stored, recomputed = build(**options), build(**options, activation_checkpointing=True)
    tokens = draw(2, 41)
    results = []
    for model in (stored, recomputed):
        torch.manual_seed(3)
        loss = model.train().loss(tokens[:, :-1], tokens[:, 1:], key_start=torch.tensor([0, -4]))
        results.append((loss, gradients(model, loss)))
    (loss, grads), (loss_again, grads_again) = results
    assert torch.equal(loss, loss_again)
    for name, grad in grads.items():
        assert torch.equal(grad, grads_again[name]), name


def test_checkpointing_stores_less() -> None:
    tokens = draw(1, 65)
    stored = []
    for checkpointing in (False, True):
        model = build(activation_checkpointing=checkpointing, num_layers=4)
        parameters = {parameter.data_ptr() for parameter in model.parameters()}
        sizes: list[int] = []

        def pack(x: Tensor, sizes: list[int] = sizes, parameters: set[int] = parameters) -> Tensor:
            if x.data_ptr() not in parameters:
                sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model.loss(tokens[:, :-1], tokens[:, 1:])
        stored.append(sum(sizes))
    assert stored[1] < stored[0] / 4


@pytest.mark.parametrize("chunk", [1000, 7])
def test_loss_is_the_cross_entropy_of_the_logits(chunk: int) -> None:
    model = build()
    tokens = draw(2, 41)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[0, 5:30] = -100
    logits = model(inputs)
    gold = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss = model.loss(inputs, targets, chunk=chunk)
    torch.testing.assert_close(loss, gold)
    grads, golds = gradients(model, loss), gradients(model, gold)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, golds[name], rtol=1e-9, atol=1e-12)
    each = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    torch.testing.assert_close(model.loss(inputs, targets, reduction="none", chunk=chunk), each)
    torch.testing.assert_close(model.loss(inputs, targets, reduction="sum", chunk=chunk), each.sum())
    other = model.loss(inputs, targets.masked_fill(targets == -100, 9), ignore_index=9, chunk=chunk)
    torch.testing.assert_close(other, each[(targets != -100) & (targets != 9)].mean())
    assert model.loss(inputs, torch.full_like(targets, -100)) == 0


def test_loss_never_holds_the_logits_of_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    tokens = draw(1, 61)
    rows: list[int] = []
    logits = model.logits

    def counted(features: Tensor) -> Tensor:
        rows.append(features.shape[0])
        return logits(features)

    monkeypatch.setattr(model, "logits", counted)
    largest = 0

    def pack(x: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, x.numel() if x.shape[-1:] == (VOCAB,) else 0)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model.loss(tokens[:, :-1], tokens[:, 1:], chunk=16)
    assert largest == 0
    assert rows == [16, 16, 16, 12]
    loss.backward()
    assert sorted(rows) == [12, 12, 16, 16, 16, 16, 16, 16]


@pytest.mark.parametrize("variant", ["pre-rms", "local"])
def test_compiles_without_graph_breaks(variant: str) -> None:
    pattern = {"segment_lengths": (8, 64), "dilation_rates": (1, 4)}
    model = build(activation_checkpointing=True, num_layers=1, **pattern, **VARIANTS[variant])
    tokens = draw(1, 33)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(tokens, key_start=-3), model(tokens, key_start=-3))
    compiled_loss = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    loss, gold = (f(tokens[:, :-1], tokens[:, 1:]) for f in (compiled_loss, model.loss))
    torch.testing.assert_close(loss, gold)
    grads, golds = gradients(model, loss), gradients(model, gold)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, golds[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast_is_as_good_as_bfloat16_and_keeps_far_positions(variant: str) -> None:
    model = build(dtype=torch.float32, **VARIANTS[variant])
    gold_model = copy.deepcopy(model).double()
    tokens = draw(1, 50)
    for key_start in (0, 64 * 16384):
        gold = gold_model(tokens, key_start=key_start)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(tokens, key_start=key_start)
            loss = model.loss(tokens[:, :-1], tokens[:, 1:], key_start=key_start)
        assert loss.dtype == torch.float32
        relative = (logits.double() - gold).norm() / gold.norm()
        assert relative < 0.02
        assert all(torch.isfinite(grad).all() for grad in gradients(model, loss).values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_learns(variant: str) -> None:
    model = build(dtype=torch.float32, segment_lengths=(8, 32), dilation_rates=(1, 4), **VARIANTS[variant])
    tokens = draw(1, 33)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(25):
        optimizer.zero_grad()
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
    assert model.loss(tokens[:, :-1], tokens[:, 1:]) < 0.1


BAD: dict[str, tuple[Tensor, dict[str, Any], str]] = {
    "dtype": (draw(1, 8).byte(), {}, r"tokens has shape \(1, 8\) and dtype torch.uint8; .* torch.int64"),
    "rank": (draw(8), {}, r"tokens has shape \(8,\)"),
    "empty": (draw(1, 0), {}, r"tokens has shape \(1, 0\)"),
    "high": (draw(1, 8) + 1000, {}, "vocab_size is 50, so give 0 to 49"),
    "low": (draw(1, 8) - 1000, {}, "vocab_size is 50, so give 0 to 49"),
    "key_start": (
        draw(2, 8),
        {"key_start": torch.zeros(3, dtype=torch.int64)},
        r"give an int or shape \(2,\)",
    ),
    "key_start type": (draw(2, 8), {"key_start": 0.5}, "key_start is 0.5; give an int"),
    "cu_seqlens": (draw(1, 8), {"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens"),
    "cu_seqlens rank": (draw(1, 8), {"cu_seqlens": torch.tensor([[0, 8]])}, r"cu_seqlens has shape \(1, 2\)"),
    "cu_seqlens batch": (draw(2, 8), {"cu_seqlens": torch.tensor([0, 8])}, "give batch 1"),
    "mask": (draw(1, 8), {"key_padding_mask": torch.zeros(1, 7, dtype=torch.bool)}, "key_padding_mask is"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_a_helpful_value_error(name: str) -> None:
    tokens, options, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        build(dtype=torch.float32)(tokens, **options)


def test_bad_loss_arguments_are_helpful_value_errors() -> None:
    model, tokens = build(), draw(1, 8)
    with pytest.raises(ValueError, match=r"targets has shape \(1, 7\) .* a token, shape \(1, 8\)"):
        model.loss(tokens, tokens[:, 1:])
    with pytest.raises(ValueError, match=r"dtype torch.int32; give one torch.int64 target"):
        model.loss(tokens, tokens.int())
    with pytest.raises(ValueError, match="reduction is 'median'; choose 'mean', 'sum' or 'none'"):
        model.loss(tokens, tokens, reduction="median")
    with pytest.raises(ValueError, match="chunk is 0; give at least 1 row"):
        model.loss(tokens, tokens, chunk=0)
    with pytest.raises(ValueError, match="backend is 'abacus'"):
        build(backend="abacus")
