"""LongViT's segment table and the names in its different checkpoints."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dilated_attention_pytorch.models import WeightsError, longvit_segment_lengths
from dilated_attention_pytorch.models.longvit import longvit_sizes, read_longvit

WEIGHTS = {
    "pos_embed": torch.randn(1, 16, 8),
    "patch_embed.proj.weight": torch.zeros(8, 3, 2, 2),
    "encoder.layers.0.ffn.fc1.weight": torch.zeros(16, 8),
}


def prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in WEIGHTS.items()}


def test_segment_lengths() -> None:
    assert longvit_segment_lengths(224) == longvit_segment_lengths(1024) == (64, 128, 256, 512, 1024)
    assert longvit_segment_lengths(8192) == (1024, 4096, 8192, 16384, 65536)
    assert longvit_segment_lengths(32768) == (1024, 4096, 32768, 262144, 1048576)


@pytest.mark.parametrize("prefix", ["", "model.", "backbone.", "module.backbone."])
def test_checkpoints_name_the_same_weights_differently(prefix: str) -> None:
    given = prefixed(prefix)
    if "backbone" in prefix:  # what the pretraining adds has no place in the model
        given |= {f"{prefix}norm.weight": torch.ones(8), "module.head.mlp.0.weight": torch.ones(4, 8)}
    found, _ = read_longvit({"model": given}, img_size=8, patch_size=2)
    assert found.keys() == WEIGHTS.keys()
    assert found["pos_embed"] is WEIGHTS["pos_embed"]


def test_sizes_are_read_off_the_weights() -> None:
    sizes = longvit_sizes(WEIGHTS, WEIGHTS)
    assert (sizes.in_chans, sizes.patch_size, sizes.num_classes) == (3, 2, 0)
    assert sizes.encoder == {"embed_dim": 8, "num_layers": 1, "ffn_dim": 16}
    assert longvit_sizes({**WEIGHTS, "head.weight": torch.zeros(4, 8)}, WEIGHTS).num_classes == 4
    with pytest.raises(WeightsError, match="is no LongViT: it lacks pos_embed"):
        longvit_sizes({k: v for k, v in WEIGHTS.items() if k != "pos_embed"}, WEIGHTS)


def test_positions_for_another_size_are_resized() -> None:
    found = read_longvit(WEIGHTS, img_size=12, patch_size=2)[0]["pos_embed"]
    square = WEIGHTS["pos_embed"].view(1, 4, 4, 8).permute(0, 3, 1, 2)
    expected = F.interpolate(square, size=(6, 6), mode="bicubic", align_corners=False)
    torch.testing.assert_close(found.view(1, 6, 6, 8).permute(0, 3, 1, 2), expected)
    with pytest.raises(WeightsError, match="pos_embed: there are 15 positions"):
        read_longvit({**WEIGHTS, "pos_embed": torch.zeros(1, 15, 8)}, img_size=8, patch_size=2)
