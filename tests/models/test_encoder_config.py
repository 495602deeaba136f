"""LongNetEncoderConfig: what it refuses, and what it derives."""

from __future__ import annotations

from typing import Any

import pytest

from dilated_attention_pytorch.models import LongNetEncoderConfig

SIZES: dict[str, Any] = {
    "embed_dim": 24,
    "num_layers": 3,
    "num_heads": 3,
    "segment_lengths": [8, 32],
    "dilation_rates": [1, 2],
}


def test_defaults() -> None:
    config = LongNetEncoderConfig(**SIZES, drop_path_rate=0.2)
    assert (config.ffn_width, config.head_dim, config.segment_lengths) == (96, 8, (8, 32))
    assert [config.drop_path(i) for i in range(3)] == pytest.approx([0.0, 0.1, 0.2])
    assert hash(config) == hash(LongNetEncoderConfig(**SIZES, drop_path_rate=0.2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_dim": 25}, "embed_dim is 25, num_heads is 3"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"ffn_dim": -1}, "ffn_dim is -1"),
        ({"dilation_rates": (1, 2, 4)}, "segment_lengths has 2 entries, dilation_rates has 3"),
        ({"padding": "zero"}, "padding is 'zero'; choose one of 'mask', 'zeros'"),
        ({"mixing_grad": "none"}, "mixing_grad is 'none'"),
        ({"subln": 1}, "subln is 1; give True or False"),
        ({"normalize_before": False}, "subln is True and normalize_before is False"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"drop_path_rate": "0.1"}, "drop_path_rate is '0.1'"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps is 0.0"),
        ({"xpos": True, "num_heads": 8}, "xpos turns pairs, and a head is 3 wide"),
        ({"xpos_scale_base": float("inf")}, "xpos_scale_base is inf"),
        ({"backend": ""}, "backend is ''"),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + message.replace("(", r"\(")):
        LongNetEncoderConfig(**SIZES | options)
