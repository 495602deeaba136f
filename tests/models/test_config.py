"""LongNetLMConfig: presets, JSON round trips, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

from dilated_attention_pytorch.models import LongNetLM, LongNetLMConfig
from dilated_attention_pytorch.models.config import PRESETS

TINY: dict[str, Any] = {
    "context_length": 64,
    "embed_dim": 16,
    "num_layers": 2,
    "num_heads": 4,
    "segment_lengths": (8, 32),
    "dilation_rates": (1, 4),
}


def test_base_is_the_paper_s() -> None:
    config = LongNetLMConfig.preset("base")
    assert (config.embed_dim, config.num_layers, config.num_heads) == (768, 12, 12)
    assert (config.mlp_width, config.context_length, config.norm) == (3072, 32768, "sub-ln")
    assert config.segment_lengths == (2048, 4096, 8192, 16384, 32768)
    assert config.dilation_rates == (1, 2, 4, 6, 12)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_let_every_head_see_the_whole_context(name: str) -> None:
    config = LongNetLMConfig.preset(name)
    assert max(config.segment_lengths) == config.context_length >= 4096
    assert max(config.dilation_rates) <= config.num_heads
    assert min(config.dilation_rates) == 1


@pytest.mark.parametrize(("name", "low", "high"), [("demo", 3e5, 3e6), ("small", 2e7, 4e7), ("base", 8e7, 1e8)])
def test_presets_have_the_parameters_that_their_sizes_imply(name: str, low: float, high: float) -> None:
    config = LongNetLMConfig.preset(name)
    with torch.device("meta"):
        model = LongNetLM(config)
    e, m, layers = config.embed_dim, config.mlp_width, config.num_layers
    sub_ln = config.norm == "sub-ln"
    kv = config.kv_heads * config.head_dim
    weights = e * (e + 2 * kv) + e * e + 2 * e * m
    biases = (e + 2 * kv) + e + m + e if sub_ln else 0
    norms = (2 if sub_ln else 1) * (2 * e + ((e + m) if sub_ln else 0))
    head = e * config.vocab_size * (1 if config.tie_embeddings else 2) + (2 if sub_ln else 1) * e
    head += len(config.ngram_sizes) * config.ngram_buckets * e
    convolution = config.short_convolution * (e + 2 * kv)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == layers * (weights + biases + norms + convolution) + head
    assert low <= count <= high
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip(name: str) -> None:
    config = LongNetLMConfig.preset(name, dropout=0.1, num_kv_heads=1, head_offsets="interleaved")
    assert (config.dropout, config.kv_heads) == (0.1, 1)
    text = json.dumps(config.to_dict())
    again = LongNetLMConfig.from_dict(json.loads(text))
    assert again == config
    assert hash(again) == hash(config)
    assert json.loads(text).keys() == {field.name for field in dataclasses.fields(config)}


def test_frozen_and_keyword_only() -> None:
    config = LongNetLMConfig(**TINY)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.dropout = 0.5  # type: ignore[misc]
    with pytest.raises(TypeError, match="positional"):
        LongNetLMConfig(256)  # type: ignore[call-arg, misc]


BAD = {
    "vocab_size": (0, "vocab_size is 0; give an integer of at least 1"),
    "num_layers": (True, "num_layers is True; give an integer"),
    "context_length": ("4096", "context_length is '4096'; give an integer"),
    "embed_dim": (20, "embed_dim is 20, num_heads is 4; embed_dim must be an even multiple of num_heads"),
    "num_heads": (3, "embed_dim is 16, num_heads is 3"),
    "num_kv_heads": (3, "num_kv_heads is 3, num_heads is 4; give a divisor of num_heads"),
    "mlp_dim": (-1, "mlp_dim is -1; give an integer of at least 1"),
    "segment_lengths": (
        (8,),
        "segment_lengths has 1 entry, dilation_rates has 2; give one rate a segment length",
    ),
    "dilation_rates": ((1, 64), "dilation rate 64 is larger than its segment length 32"),
    "head_offsets": ("random", "head_offsets is 'random'; choose one of 'contiguous', 'interleaved'"),
    "norm": ("post-ln", "norm is 'post-ln'; choose one of 'sub-ln', 'pre-rms'"),
    "tie_embeddings": (1, "tie_embeddings is 1; give True or False"),
    "activation_checkpointing": (None, "activation_checkpointing is None; give True or False"),
    "dropout": (1.0, "dropout is 1.0; give a probability of at least 0 and below 1"),
    "attention_dropout": (float("nan"), "attention_dropout is nan; give a probability"),
    "rope_base": (1.0, "rope_base is 1.0; give a finite number above 1"),
    "ngram_sizes": ((3, 1), "ngram_sizes is (3, 1"),
    "ngram_buckets": (0, "ngram_buckets is 0; give an integer of at least 1"),
    "short_convolution": (-1, "short_convolution is -1; give a number of rows, 0 for none"),
    "backend": ("", "backend is ''; give 'auto' or the name of a backend"),
}


@pytest.mark.parametrize("field", BAD)
def test_bad_values_are_helpful_errors(field: str) -> None:
    value, message = BAD[field]
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace("'", ".")):
        LongNetLMConfig(**{**TINY, field: value})


def test_unknown_names_are_helpful_errors() -> None:
    with pytest.raises(ValueError, match="preset is 'large'; choose one of 'demo', 'small', 'base'"):
        LongNetLMConfig.preset("large")
    with pytest.raises(ValueError, match="the configuration has no width; its fields are vocab_size, "):
        LongNetLMConfig.from_dict({**TINY, "width": 4})
    with pytest.raises(ValueError, match="the configuration lacks num_layers, num_heads"):
        LongNetLMConfig.from_dict({n: v for n, v in TINY.items() if n not in ("num_layers", "num_heads")})
