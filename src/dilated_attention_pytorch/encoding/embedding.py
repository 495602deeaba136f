"""A slide through the encoder: its embeddings, and how much attention every tile receives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..functional import received_attention
from ..models import LongNetViT
from ..models.encoder import EncoderLayer
from ..models.slides import Slides
from ..modules import DilatedAttention
from .reading import TileFeatures


@torch.no_grad()  # not inference_mode: received_attention takes a gradient, for which it would copy its tensors
def embed_slide(
    model: LongNetViT, slide: TileFeatures, *, autocast: torch.dtype | None = None, received: bool = False
) -> dict[str, Tensor]:
    """Embeddings of one slide, float32 on the CPU, from one pass through the encoder.

    Args:
        model: a slide encoder, on the device that is to compute.
        slide: its tiles, checked.
        autocast: dtype to compute in, None for the weights' own.
        received: whether to add ``received_attention``.

    Returns:
        ``class_token (E,)`` and ``pooled (E,)``, what ``model(x, coords)`` gives without and with ``global_pool``;
        ``layers (1 + layers, E)``, what ``all_layer_embed=True`` gives, for the model's own ``global_pool``; and
        ``received_attention (layers, tiles)``: the attention that all rows give a tile, in the mean over heads.
    """
    assert model.cls_token is not None
    assert model.norm is not None
    device = model.cls_token.device
    x, coords = slide.features[None].to(device), slide.coords[None].floor().long().to(device)  # the cell is the same
    slides = Slides.of(x, None, None)
    pool = slides.mean_of_tiles if model.global_pool else slides.class_tokens
    with torch.autocast(device.type, autocast, enabled=autocast is not None), _received(model, received) as shares:
        tokens = slides.insert(model.cls_token, model.patch_embed(x, coords, None))
        state, layers = tokens, []
        # Each state is let go before the next: those of all layers would be many times as large.
        for state in model.encoder.iter_states(tokens):
            layers.append(model.norm(pool(state))[0])
        last = state if model.encoder.layer_norm is None else model.encoder.layer_norm(state)
        found = {
            "class_token": model.norm(slides.class_tokens(last))[0],
            "pooled": model.norm(slides.mean_of_tiles(last))[0],
            "layers": torch.stack(layers),
        }
    if received:
        found["received_attention"] = torch.stack(shares)[:, 1:]  # without the class token
    return {name: tensor.float().cpu().contiguous() for name, tensor in found.items()}


@contextmanager
def _received(model: LongNetViT, wanted: bool) -> Iterator[list[Tensor]]:
    """Fill a list with what every row receives, layer by layer, while the model runs."""
    shares: list[Tensor] = []

    def look(attention: DilatedAttention, arguments: tuple[Tensor, ...], options: dict[str, Any]) -> None:
        query, key, _ = arguments
        pattern = attention.pattern
        received = received_attention(
            query, key, pattern.segment_lengths, pattern.dilation_rates, scale=attention.scale,
            head_offsets=pattern.head_offsets, padding=attention.padding, backend=attention.backend,
        )  # fmt: skip
        shares.append(received[0].mean(0).cpu())

    handles = []
    for layer in model.encoder.layers if wanted else ():
        assert isinstance(layer, EncoderLayer)
        handles.append(layer.self_attn.attention.register_forward_pre_hook(look, with_kwargs=True))
    try:
        yield shares
    finally:
        for handle in handles:
            handle.remove()
