"""What a checkpoint of LongViT (torchscale's examples/longvit) says about the model, and its table of segments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .positions import square_side
from .weights import EncoderSizes, WeightsError, WeightsSource, describe, encoder_sizes, read_weights, size_of

_SEGMENT_LENGTHS = {
    4096: (1024, 2048, 4096, 8192, 16384),
    8192: (1024, 4096, 8192, 16384, 65536),
    16384: (1024, 4096, 16384, 65536, 262144),
    32768: (1024, 4096, 32768, 262144, 1048576),
}
_BACKBONES = ("module.backbone.", "backbone.")


def longvit_segment_lengths(img_size: int) -> tuple[int, ...]:
    """LongViT's five segment lengths for images of ``img_size`` pixels a side.

    >>> longvit_segment_lengths(1024), longvit_segment_lengths(4096)
    ((64, 128, 256, 512, 1024), (1024, 2048, 4096, 8192, 16384))
    """
    return _SEGMENT_LENGTHS.get(img_size, (64, 128, 256, 512, 1024))


class LongViTSizes(NamedTuple):
    """What the weights say about the model; ``num_classes`` is 0 without a classifier."""

    in_chans: int
    patch_size: int
    num_classes: int
    encoder: EncoderSizes


def longvit_sizes(weights: Mapping[str, Tensor], source: WeightsSource) -> LongViTSizes:
    """Sizes of the model, read off its weights.

    Raises:
        WeightsError: the tensors that tell them are not there.
    """
    what = "LongViT"
    embed_dim, in_chans, patch_size, _ = size_of(weights, "patch_embed.proj.weight", 4, source, what)
    size_of(weights, "pos_embed", 3, source, what)
    classes = size_of(weights, "head.weight", 2, source, what)[0] if "head.weight" in weights else 0
    return LongViTSizes(in_chans, patch_size, classes, encoder_sizes(weights, embed_dim, source, what))


def read_longvit(source: WeightsSource, *, img_size: int, patch_size: int) -> tuple[dict[str, Tensor], LongViTSizes]:
    """The weights under the names of a bare LongViT, and their sizes; positions are for ``img_size``.

    A fine-tuned classifier, which is kept, has them below ``model.``. A checkpoint of the pretraining has them below
    ``backbone.``; its last norm and projection head, which LongViT has no place for, are left out, as its own loader
    does. Positions that were learned for another image size are resized, bicubic.

    Raises:
        WeightsError: unreadable or foreign weights, or positions that are not those of a square.
    """
    weights = read_weights(source, wrappers=("model", "module", "teacher"))
    for prefix in _BACKBONES:
        found = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        if found:
            weights = {name: value for name, value in found.items() if name not in ("norm.weight", "norm.bias")}
            break
    else:
        weights = {name.removeprefix("model."): value for name, value in weights.items()}
    sizes = longvit_sizes(weights, source)
    weights["pos_embed"] = _fit_positions(weights["pos_embed"], img_size // patch_size, source)
    return weights, sizes


def _fit_positions(positions: Tensor, side: int, source: WeightsSource) -> Tensor:
    try:
        given = square_side(positions.shape[1])
    except ValueError as error:
        raise WeightsError(f"{describe(source)}: pos_embed: {error}") from None
    if given == side:
        return positions
    square = positions.float().unflatten(1, (given, given)).permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=(side, side), mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1).flatten(1, 2).to(torch.promote_types(positions.dtype, torch.float32))
