"""LongNet as models of transformers: the same numbers as the library's own model, alone, padded, cached and saved."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from dilated_attention_pytorch import LongNetLM, LongNetLMConfig
from dilated_attention_pytorch.integrations.transformers import (
    LongNetCache,
    LongNetConfig,
    LongNetForCausalLM,
    LongNetForMaskedLM,
    LongNetModel,
    byte_tokenizer,
    register,
)
from dilated_attention_pytorch.modules import DilatedAttention
from dilated_attention_pytorch.testing import oracle

TINY: dict[str, Any] = {
    "vocab_size": 50,
    "context_length": 64,
    "embed_dim": 32,
    "num_layers": 2,
    "num_heads": 4,
    "segment_lengths": (6, 15, 30),
    "dilation_rates": (1, 3, 4),
}
LOCAL = {"norm": "pre-rms", "num_kv_heads": 2, "ngram_sizes": (2, 3), "ngram_buckets": 64, "short_convolution": 3}
VARIANTS: dict[str, dict[str, Any]] = {"sub-ln": {}, "tied": {"tie_embeddings": True}, "local": LOCAL}


def build(variant: str = "sub-ln", **options: Any) -> LongNetForCausalLM:
    torch.manual_seed(0)
    config = LongNetConfig(**{**TINY, **VARIANTS[variant], **options})
    return LongNetForCausalLM(config).double().eval()


def draw(batch: int, rows: int, seed: int = 0) -> Tensor:
    return torch.randint(1, TINY["vocab_size"], (batch, rows), generator=torch.Generator().manual_seed(seed))


def generate(model: LongNetForCausalLM, tokens: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    mask = torch.ones_like(tokens) if mask is None else mask
    return model.generate(tokens, attention_mask=mask, **{"max_new_tokens": 50, "do_sample": False, **options})


def refused(message: str) -> Any:
    return pytest.raises(ValueError, match=message)


def test_the_configuration_is_that_of_the_model_field_by_field(tmp_path: Path) -> None:
    lm_config = LongNetLMConfig(**TINY, **LOCAL, rope_base=500.0, dropout=0.1, backend="reference")
    config = LongNetConfig.from_lm_config(lm_config, eos_token_id=3)
    for field in dataclasses.fields(lm_config):
        value = getattr(lm_config, field.name)
        assert getattr(config, field.name) == (list(value) if isinstance(value, tuple) else value), field.name
    config.save_pretrained(tmp_path)
    again = LongNetConfig.from_pretrained(tmp_path)
    assert again.to_lm_config() == lm_config
    assert (again.eos_token_id, again.hidden_size, again.num_hidden_layers) == (3, 32, 2)
    assert LongNetConfig().to_lm_config() == LongNetLMConfig.preset("small")
    assert LongNetConfig(hidden_size=64, tie_word_embeddings=True, num_attention_heads=4).to_lm_config().head_dim == 16
    with refused("embed_dim is 30, num_heads is 4"):
        LongNetConfig(**{**TINY, "embed_dim": 30})
    config.dilation_rates = [1]
    with refused("dilation_rates has 1 entry"):
        config.to_lm_config()


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_loss_and_weights_are_those_of_the_library_model(variant: str) -> None:
    torch.manual_seed(1)
    lm = LongNetLM(LongNetLMConfig(**{**TINY, **VARIANTS[variant]}), dtype=torch.float64).eval()
    model, tokens = LongNetForCausalLM.from_longnet_lm(lm), draw(2, 61)
    output = model(tokens, labels=tokens, output_hidden_states=True)
    assert torch.equal(output.logits, lm(tokens))
    torch.testing.assert_close(output.loss, lm.loss(tokens[:, :-1], tokens[:, 1:]).to(output.loss), rtol=1e-5, atol=0)
    # A product of fewer rows may be summed in another order, on some processors.
    torch.testing.assert_close(model(tokens, logits_to_keep=2).logits, output.logits[:, -2:], rtol=1e-12, atol=1e-13)
    assert len(output.hidden_states) == 3
    torch.testing.assert_close(lm.logits(lm.norm(output.hidden_states[-1])), output.logits)
    back = model.to_longnet_lm()
    assert torch.equal(back(tokens), output.logits)
    assert back.config == lm.config
    assert back.state_dict().keys() == lm.state_dict().keys()
    assert all(torch.equal(value, lm.state_dict()[name]) for name, value in back.state_dict().items())
    with torch.no_grad():  # copies: nothing is shared
        back.embedding.weight.zero_()
    assert torch.equal(model(tokens).logits, lm(tokens))


def test_cached_generation_takes_the_most_probable_token_of_a_full_pass_each_time() -> None:
    model = build("local")
    lm, tokens = model.to_longnet_lm(), draw(2, 15)
    expected = tokens
    for _ in range(40):
        expected = torch.cat((expected, lm(expected)[:, -1:].argmax(-1)), 1)
    assert torch.equal(generate(model, tokens, max_new_tokens=40), expected)


SAMPLING: dict[str, Any] = {"do_sample": True, "top_k": 10, "temperature": 0.9, "max_new_tokens": 25}


@pytest.mark.parametrize(
    ("variant", "options"), [("local", {}), ("local", {"num_beams": 3}), ("sub-ln", SAMPLING)], ids=str
)
def test_cached_generation_equals_uncached(variant: str, options: dict[str, Any]) -> None:
    model, tokens = build(variant), draw(2, 15)
    results = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        results.append(generate(model, tokens, use_cache=use_cache, **options))
    assert results[0].shape == (2, 15 + options.get("max_new_tokens", 50))
    assert torch.equal(*results)


@pytest.mark.parametrize(("variant", "beams"), [("sub-ln", 1), ("local", 3)])
def test_left_padding_equals_each_prompt_alone(variant: str, beams: int) -> None:
    model, lengths = build(variant), (21, 13, 1)
    prompts = [draw(1, n, seed=n) for n in lengths]
    tokens = torch.cat([F.pad(prompt, (21 - prompt.shape[1], 0)) for prompt in prompts])
    mask = (torch.arange(21) >= 21 - torch.tensor(lengths)[:, None]).long()
    logits = model(tokens, attention_mask=mask).logits
    options = {"num_beams": beams, "max_new_tokens": 25}
    together = generate(model, tokens, mask, **options)
    for i, (n, prompt) in enumerate(zip(lengths, prompts, strict=True)):
        torch.testing.assert_close(logits[i, 21 - n :], model(prompt).logits[0], rtol=1e-9, atol=1e-10)
        assert torch.equal(together[i, 21:], generate(model, prompt, **options)[0, n:])


def test_the_cache_holds_one_longest_segment() -> None:
    model, tokens = build(), draw(1, 100)
    cache = LongNetCache()
    sizes = set()
    with torch.no_grad():
        for part in tokens.split(1, dim=1):
            model(part, past_key_values=cache)
            sizes.add(cache.state.nbytes)
    rows = 2 * TINY["embed_dim"] * 8  # bytes of a key and a value of one layer, float64
    assert cache.get_seq_length() == 100
    assert max(sizes) <= TINY["num_layers"] * max(TINY["segment_lengths"]) * rows
    assert repr(cache) == f"LongNetCache(length=100, nbytes={cache.state.nbytes})"


def test_a_text_goes_on_with_the_cache_of_its_beginning() -> None:
    model, tokens = build("local"), draw(2, 70)
    mask = torch.ones_like(tokens)
    mask[0, :9] = 0
    gold = model(tokens, attention_mask=mask, use_cache=False)
    assert gold.past_key_values is None
    cache, parts = None, []
    for start, end in ((0, 15), (15, 16), (16, 17), (17, 60), (60, 70)):
        output = model(tokens[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
        cache = output.past_key_values
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, 1)[mask > 0], gold.logits[mask > 0], rtol=1e-9, atol=1e-10)
    first = model.generate(
        tokens[1:, :15],
        max_new_tokens=20,
        do_sample=False,
        return_dict_in_generate=True,
        past_key_values=LongNetCache(),
    )
    longer = torch.cat((first.sequences, tokens[:1, :5]), 1)
    assert torch.equal(
        generate(model, longer, past_key_values=first.past_key_values), generate(model, longer, use_cache=False)
    )


def test_drafted_tokens_are_taken_back_and_beams_repeated() -> None:
    model, tokens = build("local"), draw(1, 20).repeat(1, 3)
    gold = generate(model, tokens)
    drafted = generate(model, tokens, prompt_lookup_num_tokens=5, eos_token_id=TINY["vocab_size"] + 1, pad_token_id=0)
    assert torch.equal(drafted, gold)
    assert generate(model, tokens, num_beams=4, num_return_sequences=2).shape == (2, 110)
    cache = model(tokens, past_key_values=LongNetCache(rollback=4)).past_key_values
    cache.crop(-4)
    cache.batch_repeat_interleave(3)
    cache.batch_select_indices(torch.tensor([2, 0]))
    again = model(tokens[:, -4:].repeat(2, 1), past_key_values=cache).logits
    torch.testing.assert_close(again, model(tokens).logits[:, -4:].repeat(2, 1, 1), rtol=1e-9, atol=1e-10)
    assert cache.is_croppable
    cache.reset()
    assert (cache.get_seq_length(), cache.is_initialized) == (0, False)
    with refused("give other models transformers' DynamicCache"):
        cache.update(tokens, tokens, 0)


@pytest.mark.parametrize("make", [build, lambda **options: LongNetForMaskedLM(LongNetConfig(**TINY)).double().eval()])
def test_padding_and_packing_equal_each_document_alone(make: Any) -> None:
    model, lengths = make(), (30, 11, 1)
    documents = [draw(1, n, seed=n) for n in lengths]
    right = torch.cat([F.pad(document, (0, 30 - document.shape[1])) for document in documents])
    left = torch.cat([F.pad(document, (30 - document.shape[1], 0)) for document in documents])
    kept = torch.arange(30) < torch.tensor(lengths)[:, None]
    padded = model(right, attention_mask=kept).logits
    shifted = model(left, attention_mask=kept.flip(1)).logits
    packed = model(torch.cat(documents, 1), cu_seqlens=torch.tensor([0, 30, 41, 42])).logits[0]
    for i, (n, document) in enumerate(zip(lengths, documents, strict=True)):
        alone = model(document).logits[0]
        start = sum(lengths[:i])
        for result in (padded[i, :n], shifted[i, 30 - n :], packed[start : start + n]):
            torch.testing.assert_close(result, alone, rtol=1e-9, atol=1e-10)


def test_the_masked_model_attends_in_both_directions() -> None:
    torch.manual_seed(0)
    model = LongNetForMaskedLM(LongNetConfig(**TINY)).double().eval()
    calls: list[tuple[Any, ...]] = []
    for module in model.modules():
        if isinstance(module, DilatedAttention):
            module.register_forward_hook(lambda module, inputs, output: calls.append((*inputs, output)))
    tokens, labels = draw(2, 61), draw(2, 61, seed=1)
    labels[:, ::2] = -100
    output = model(tokens, labels=labels)
    assert len(calls) == 2
    for query, key, value, out in calls:
        gold = oracle(query, key, value, TINY["segment_lengths"], TINY["dilation_rates"]).out
        torch.testing.assert_close(out, gold, rtol=1e-9, atol=1e-11)
    loss = F.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(output.loss.double(), loss, rtol=1e-5, atol=0)
    assert not model.config.is_causal
    causal = LongNetForCausalLM(model.config)  # a head decides, whatever the configuration was before
    assert causal.config.is_causal
    assert all(module.is_causal for module in causal.modules() if isinstance(module, DilatedAttention))


def test_what_it_cannot_do_is_refused_by_name() -> None:
    model, tokens = build(), draw(2, 10)
    mask = torch.ones_like(tokens)
    mask[1, 4] = 0
    with refused("attention_mask hides 1 keys between tokens of row 1"):
        model(tokens, attention_mask=mask)
    with refused(r"attention_mask has shape \(2, 1, 10, 10\)"):
        model(tokens, attention_mask=torch.ones(2, 1, 10, 10))
    right = torch.ones_like(tokens)
    right[0, 7:] = 0
    with refused("pad at the left"):
        generate(model, tokens, right)
    with refused("past_key_values is a DynamicCache; LongNet models take a LongNetCache"):
        model(tokens, past_key_values=DynamicCache())
    for text in (tokens, tokens[:, :6]):  # of another text, as far as can be told
        cache = LongNetCache()
        model(tokens, past_key_values=cache)
        with refused("past_key_values has seen 10 tokens, and input_ids has"):
            generate(model, text, past_key_values=cache)
    with refused("cache_implementation is 'static'"):
        generate(model, tokens, cache_implementation="static")
    for name, value in {"position_ids": tokens, "inputs_embeds": torch.zeros(2, 10, 32)}.items():
        with refused(f"{name} is given, but"):
            model(tokens, **{name: value})
    with refused("output_attentions is given, but attention weights are never formed"):
        model(tokens, output_attentions=True)
    with refused("input_ids is None"):
        model()
    cache = model(tokens).past_key_values
    with refused(r"give \(2, 10 \+ 3\), with the columns of the tokens that the cache has seen"):
        model(tokens[:, :3], attention_mask=torch.ones(2, 3), past_key_values=cache)
    with refused("attention_mask hides new tokens"):
        model(tokens[:, :1], attention_mask=F.pad(torch.ones(2, 10), (0, 1)), past_key_values=cache)
    with refused("cu_seqlens packs documents, attention_mask pads them"):
        model(tokens[:1], attention_mask=right[:1], cu_seqlens=torch.tensor([0, 10]))
    with refused("use_cache is True, but the model is bidirectional"):
        LongNetModel(LongNetConfig(**TINY, is_causal=False))(tokens, use_cache=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_model_comes_back_bit_by_bit(variant: str, tmp_path: Path) -> None:
    model, tokens = build(variant).float(), draw(2, 30)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert ("lm_head.weight" in saved) == (variant != "tied")
    again, found = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is LongNetForCausalLM
    assert not any(found.values())
    assert (again.lm_head.weight is again.get_input_embeddings().weight) == (variant == "tied")
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


AUTO = """
import json, sys
import dilated_attention_pytorch
assert not {"transformers", "tokenizers"} & sys.modules.keys()
import dilated_attention_pytorch.integrations
assert not {"transformers", "tokenizers"} & sys.modules.keys()
import dilated_attention_pytorch.integrations.transformers
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer
folder, tokens = sys.argv[1], torch.arange(40)[None]
classes = (AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForCausalLM)
made = [cls.from_pretrained(folder) for cls in classes]
logits = made[-1](tokens).logits[0, -1].tolist()
ids = AutoTokenizer.from_pretrained(folder)("é").input_ids
print(json.dumps({"types": [type(m).__name__ for m in made], "logits": logits, "ids": ids}))
"""


def test_auto_classes_load_in_a_fresh_process(tmp_path: Path) -> None:
    model = build("tied", vocab_size=256).float()
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    done = subprocess.run([sys.executable, "-c", AUTO, tmp_path], capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["types"] == ["LongNetConfig", "LongNetModel", "LongNetForMaskedLM", "LongNetForCausalLM"]
    assert found["ids"] == [195, 169]
    assert found["logits"] == model(torch.arange(40)[None]).logits[0, -1].tolist()
    register()  # once more does no harm
