"""The blocks' initial values."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from dilated_attention_pytorch.models import LongNetLM, LongNetLMConfig
from dilated_attention_pytorch.models.config import Norm


@pytest.mark.parametrize(
    ("norm", "inner", "last"),
    [("sub-ln", math.sqrt(math.log(12)), math.sqrt(math.log(12))), ("pre-rms", 1.0, 12**-0.5)],
)
def test_initial_gains_are_magneto_s_or_those_of_pre_norm(norm: Norm, inner: float, last: float) -> None:
    torch.manual_seed(0)
    config = LongNetLMConfig(
        context_length=64,
        embed_dim=128,
        num_layers=6,
        num_heads=4,
        num_kv_heads=2,
        mlp_dim=256,
        segment_lengths=(8, 64),
        dilation_rates=(1, 4),
        norm=norm,
    )
    model = LongNetLM(config)
    for block in model.blocks:
        query, key, value = block.attention.in_proj.weight.split([128, 64, 64])
        for weight, gain in (
            (query, 1.0),
            (key, 1.0),
            (value, inner),
            (block.attention.out_proj.weight, last),
            (block.feed_forward.in_proj.weight, inner),
            (block.feed_forward.out_proj.weight, last),
        ):
            assert abs(weight.std() / (gain * math.sqrt(2 / sum(weight.shape))) - 1) < 0.05
        biases = [b for name, b in block.named_parameters() if name.endswith("bias")]
        assert all(not b.any() for b in biases)
        assert bool(biases) == (norm == "sub-ln")


def test_with_a_short_convolution_keys_begin_as_queries_of_the_row_before() -> None:
    config = LongNetLMConfig(
        context_length=64,
        embed_dim=32,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        segment_lengths=(8, 64),
        dilation_rates=(1, 4),
        short_convolution=3,
    )
    attention = LongNetLM(config).blocks[0].attention
    query, key, _ = attention.in_proj.weight.split([32, 16, 16])
    assert torch.equal(key.view(2, 8, 32), query.view(2, 2, 8, 32)[:, 0])  # the first of each group's heads
    x = torch.randn(1, 5, 64)
    q, k, v = attention.short_convolution(x, None).split([32, 16, 16], dim=-1)
    gold_q, gold_k, gold_v = x.split([32, 16, 16], dim=-1)
    assert torch.equal(q, gold_q)
    # The first key head is a row back, the second two, with its values one: what follows is found either way.
    gold_k = torch.cat([F.pad(gold_k[..., :8], (0, 0, 1, -1)), F.pad(gold_k[..., 8:], (0, 0, 2, -2))], dim=-1)
    assert torch.equal(k, gold_k)
    assert torch.equal(v, torch.cat([gold_v[..., :8], F.pad(gold_v[..., 8:], (0, 0, 1, -1))], dim=-1))
