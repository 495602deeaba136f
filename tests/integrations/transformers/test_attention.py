"""Dilated attention in stock models, against the same models with transformers' SDPA and a dense mask.

An additive mask log m(h, q, k) over all pairs, m from `testing.multiplicity`, is dilated attention written out: it is
the independent oracle here.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    StaticCache,
)

from dilated_attention_pytorch.integrations.transformers import register_attention
from dilated_attention_pytorch.integrations.transformers.padding import Padding, read_padding
from dilated_attention_pytorch.patterns import DilatedPattern
from dilated_attention_pytorch.testing import multiplicity

LENGTHS, RATES = [8, 24, 50], [1, 3, 4]
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LLAMA: dict[str, Any] = {**SIZES, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None}
PATTERN: dict[str, Any] = {"dilated_segment_lengths": LENGTHS, "dilated_dilation_rates": RATES}


@pytest.fixture(autouse=True)
def registered() -> None:
    register_attention()


def llama(attention: str = "dilated", **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**{**LLAMA, **PATTERN, **options})
    return LlamaForCausalLM._from_config(config, attn_implementation=attention, dtype=torch.float64).eval()


def bert(attention: str = "dilated", **options: Any) -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(**{**SIZES, "hidden_dropout_prob": 0.0, **PATTERN, **options})
    return BertModel._from_config(config, attn_implementation=attention, dtype=torch.float64).eval()


def draw(batch: int, rows: int, seed: int = 0) -> Tensor:
    return torch.randint(1, SIZES["vocab_size"], (batch, rows), generator=torch.Generator().manual_seed(seed))


def padding_mask(side: str, batch: int, rows: int) -> Tensor | None:
    """Rows of 0, 5, 13, ... tokens of padding at a side."""
    if side == "none":
        return None
    pad = torch.tensor([0, 5, 13])[:batch, None]
    row = torch.arange(rows)
    return ((row >= pad) if side == "left" else (row < rows - pad)).long()


def dense_mask(mask: Tensor | None, batch: int, rows: int, *, is_causal: bool) -> Tensor:
    """log m(h, q, k), (B, H, N, N); 0 in the rows of padding, whose results nobody reads."""
    pattern = DilatedPattern(tuple(LENGTHS), tuple(RATES))
    found = []
    for b in range(batch):
        kept = torch.ones(rows, dtype=torch.bool) if mask is None else mask[b].bool()
        position = torch.arange(rows) - int(kept.nonzero()[0])
        m = multiplicity(
            pattern, 4, position, torch.zeros(rows, dtype=torch.int64), rows, is_causal=is_causal, hidden=~kept
        )
        found.append(m.sum(0).double().log().masked_fill(~kept[:, None], 0.0))
    return torch.stack(found)


def run(model: PreTrainedModel, tokens: Tensor, mask: Tensor | None, weight: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Output, 0 in the rows that ``weight (B, N, 1)`` hides, and the gradients of its weighted sum."""
    model.zero_grad()
    output = model(tokens, attention_mask=mask)[0] * weight
    (output * torch.linspace(-1, 1, output.shape[-1], dtype=output.dtype)).sum().backward()
    return output.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("make", [llama, bert])
def test_equals_the_dense_mask_of_the_pattern(make: Any, side: str) -> None:
    tokens, mask = draw(3, 61), padding_mask(side, 3, 61)
    model, dense = make(), make("sdpa")
    dense.load_state_dict(model.state_dict())
    for module in (*model.modules(), *dense.modules()):
        if hasattr(module, "scaling"):
            module.scaling = 0.6  # not the default, 1 / sqrt(8)
    weight = torch.ones(3, 61, 1) if mask is None else mask[:, :, None]
    output, grads = run(model, tokens, mask, weight)
    gold, gold_grads = run(dense, tokens, dense_mask(mask, 3, 61, is_causal=make is llama), weight)
    assert gold.abs().max() > 0.1
    torch.testing.assert_close(output, gold, rtol=1e-9, atol=1e-10)
    assert len(grads) == len(gold_grads) > 10
    for grad, gold_grad in zip(grads, gold_grads, strict=True):
        torch.testing.assert_close(grad, gold_grad, rtol=1e-8, atol=1e-9)


def test_decoding_with_the_dynamic_cache_equals_full_passes() -> None:
    model, tokens = llama(), draw(2, 21)
    options: dict[str, Any] = {"max_new_tokens": 50, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    cached = model.generate(tokens, **options, use_cache=True, output_logits=True, return_dict_in_generate=True)
    plain = model.generate(tokens, **options, use_cache=False, output_logits=True, return_dict_in_generate=True)
    assert torch.equal(cached.sequences, plain.sequences)
    assert cached.sequences.shape == (2, 71)  # past every segment border
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), rtol=1e-9, atol=1e-10)
    options["max_new_tokens"] = 20
    beams = [model.generate(tokens, **options, use_cache=use, num_beams=3) for use in (True, False)]
    assert torch.equal(*beams)


def test_left_padded_prompts_generate_as_each_alone() -> None:
    model, lengths = llama(), (21, 16, 8)
    prompts = [draw(1, n, seed=n) for n in lengths]
    tokens = torch.cat([torch.nn.functional.pad(prompt, (21 - prompt.shape[1], 0)) for prompt in prompts])
    mask = padding_mask("left", 3, 21)
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False}
    together = model.generate(tokens, attention_mask=mask, **options)
    for row, prompt in zip(together, prompts, strict=True):
        alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        assert torch.equal(row[21:], alone[0, prompt.shape[1] :])


def test_the_pattern_is_saved_with_the_configuration(tmp_path: Any) -> None:
    model, tokens = llama(), draw(1, 40)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="dilated")
    assert again.config.dilated_segment_lengths == LENGTHS
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    assert (dense(tokens).logits - model(tokens).logits).abs().max() > 1e-3


def test_a_pattern_can_be_given_as_arguments() -> None:
    plain: dict[str, Any] = {"dilated_segment_lengths": None, "dilated_dilation_rates": None}
    tokens = draw(1, 40)
    register_attention("dilated-by-name", segment_lengths=LENGTHS, dilation_rates=RATES)
    assert torch.equal(llama("dilated-by-name", **plain)(tokens).logits, llama()(tokens).logits)
    with pytest.raises(ValueError, match="LlamaConfig has no pattern; set its dilated_segment_lengths"):
        llama(**plain)(tokens)
    with pytest.raises(ValueError, match="dilation_rates is empty"):
        register_attention("broken", segment_lengths=[8])
    interleaved = llama(dilated_head_offsets="interleaved", num_attention_heads=8, num_key_value_heads=2)
    contiguous = llama(num_attention_heads=8, num_key_value_heads=2)
    assert (interleaved(tokens).logits - contiguous(tokens).logits).abs().max() > 1e-3


def test_dropout_of_the_model_acts_in_training() -> None:
    model, tokens = llama(attention_dropout=0.5), draw(1, 40)
    gold = model(tokens).logits
    assert torch.equal(model(tokens).logits, gold)
    model.train()
    assert (model(tokens).logits - gold).abs().max() > 1e-3


def refused(message: str) -> Any:
    return pytest.raises(ValueError, match=message)


def test_masks_it_cannot_express_are_refused_by_name() -> None:
    model, tokens = llama(), draw(2, 30)
    hole = torch.ones(2, 30, dtype=torch.int64)
    hole[1, 7] = 0
    with refused("attention_mask hides 1 keys between tokens of row 1"):
        model(tokens, attention_mask=hole)
    with refused(r"LlamaAttention was given a mask of shape \(2, 1, 30, 30\)"):
        model(tokens, attention_mask=torch.ones(2, 1, 30, 30, dtype=torch.bool).tril())
    with refused("mask made by .*packed_sequence_mask_function.*packed documents"):
        model(tokens, position_ids=torch.arange(30).remainder(10).expand(2, 30), use_cache=False)
    with refused("last query row is at 29, the keys are rows 0 to 63; .*DynamicCache, not a static"):
        model(tokens, past_key_values=StaticCache(config=model.config, max_cache_len=64), use_cache=True)
    with refused(r"attention_mask has shape \(2, 29\)"):
        model(tokens, attention_mask=hole[:, 1:], past_key_values=None, use_cache=True)
    right = torch.ones(2, 30, dtype=torch.int64)
    right[0, 20:] = 0
    with refused("between tokens of row 0.*pad prompts at the left"):
        model.generate(tokens, attention_mask=right, max_new_tokens=3)


def test_options_it_cannot_compute_are_refused_by_name() -> None:
    tokens = draw(1, 30)
    small: dict[str, Any] = {**LLAMA, **PATTERN}
    mistral = MistralForCausalLM._from_config(MistralConfig(**small, sliding_window=8), attn_implementation="dilated")
    with refused("mask made by sliding_window_overlay and causal_mask_function; .*Sliding windows"):
        mistral(tokens)
    model = llama()
    for name, value in {"softcap": 30.0, "s_aux": torch.zeros(4), "cu_seq_lens_q": torch.tensor([0, 30])}.items():
        with refused(rf"LlamaAttention asks for .* \({name}\), which dilated attention does not compute"):
            model(tokens, **{name: value})
    decoder = bert(is_decoder=True, add_cross_attention=True)
    for rows in (30, 12):
        with refused("BertCrossAttention attends from one sequence to another"):
            decoder(tokens, encoder_hidden_states=torch.randn(1, rows, 32, dtype=torch.float64))
    with refused("query rows have to be the last rows"):
        decoder(
            tokens,
            encoder_hidden_states=torch.randn(1, 12, 32, dtype=torch.float64),
            encoder_attention_mask=torch.ones(1, 12),
        )


def test_reading_padding() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]])
    key_start, hidden = read_padding(mask, 4, 4)
    assert isinstance(key_start, Tensor)
    assert key_start.tolist() == [-2, 0, -1, -4]
    assert hidden is not None
    assert hidden.tolist() == [[False] * 4, [False] * 4, [False, False, True, True], [False] * 4]
    assert read_padding(mask[:1].bool(), 1, 4) == Padding(-2, None)
    assert read_padding(torch.ones(2, 4), 2, 4) == read_padding(None, 2, 4) == Padding(0, None)
    with refused(r"attention_mask has shape \(4, 4\); give \(batch, keys\), here \(4, 5\)"):
        read_padding(mask, 4, 5)
