"""Encoders, slides, images and the encoder-decoder over ranks: outputs and gradients of one device, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dilated_attention_pytorch import LongNet, LongNetEncoder, LongNetEncoderConfig, LongNetViT, Streaming
from dilated_attention_pytorch.models import ImageEmbedding, TileEmbedding

ENCODERS: dict[str, dict[str, Any]] = {
    "zeros": {"padding": "zeros", "mixing_grad": "detached"},
    "xpos": {"xpos": True, "xpos_scale_base": 64, "activation_checkpointing": True},
    "causal": {"is_causal": True, "subln": False, "drop_path_rate": 0.5},
    "packed": {"packed": True, "xpos": True, "xpos_scale_base": 64, "drop_path_rate": 0.5},
}


def check(answers: list[tuple[str, Any]], output: float = 1e-12, gradients: float = 1e-11) -> None:
    for rank, (status, answer) in enumerate(answers):
        assert status == "done", f"rank {rank}: {answer}"
        assert answer.get("patches", 0.0) <= output
        assert answer["output"] <= output, (rank, answer)
        assert answer["gradients"] <= gradients, (rank, answer)


@pytest.mark.parametrize("options", ENCODERS.values(), ids=ENCODERS.keys())
@pytest.mark.parametrize(
    ("world", "strategy", "layout"), [(2, "gather", "contiguous"), (3, "ring", "zigzag"), (4, "ulysses", "contiguous")]
)
def test_an_encoder_computes_the_same_over_ranks(pool, options, world, strategy, layout):
    check(pool.run("model encoder", world, options, strategy, layout))


@pytest.mark.parametrize("global_pool", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("world", "strategy", "layout"), [(2, "ring", "zigzag"), (4, "hybrid 2x2 ring", "contiguous")])
def test_slides_whose_tiles_are_sharded_have_the_same_embeddings(pool, global_pool, packed, world, strategy, layout):
    options = {"packed": packed, "global_pool": global_pool, "padding": "mask" if packed else "zeros"}
    check(pool.run("model slides", world, options, strategy, layout))


@pytest.mark.parametrize(("world", "layout"), [(3, "zigzag"), (4, "contiguous")])
def test_an_image_has_the_same_logits_and_patches(pool, world, layout):
    check(pool.run("model image", world, "auto", layout))


@pytest.mark.parametrize(
    ("world", "options"),
    [
        (2, {"source": 23, "norm_first": True, "batch_first": False}),
        (3, {"source": 60, "xpos_scale_base": 64.0}),
        (4, {"cross_attention": "dilated"}),
        (4, {}),
    ],
    ids=["shorter source", "longer source", "dilated", "dense"],
)
def test_an_encoder_decoder_computes_the_same_over_ranks(pool, world, options):
    check(pool.run("model encoder_decoder", world, options, "ring", "zigzag" if world < 4 else "contiguous"))


@pytest.mark.parametrize("world", [2, 4])
def test_layers_take_a_memory_that_is_sharded_or_whole(pool, world):
    check(pool.run("model layers", world, "gather", "zigzag"))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("lengths", "the target is 41 rows contiguous over (4,) ranks, the memory 39 rows"),
        ("whole", "the memory whole; give both one length"),
        ("rows", "the encoder's input has 41 rows; rank"),
        ("tiles", "take those of LongNetViT.tiles_of_rank"),
        ("ordering", "ordering 'hilbert', which needs all rows"),
    ],
)
def test_what_cannot_be_sharded_is_refused_on_all_ranks(pool, what, message):
    for status, answer in pool.run("model refused", 4, what):
        assert status == "raised"
        assert "ValueError: " in answer
        assert message in answer


PATTERN: dict[str, Any] = {"segment_lengths": (8, 64), "dilation_rates": (1, 4)}
CONFIG = LongNetEncoderConfig(embed_dim=16, num_layers=2, num_heads=4, **PATTERN)


@pytest.mark.parametrize("kind", ["encoder", "tiles", "image", "encoder_decoder"])
def test_models_stream_through_a_device_of_their_own(kind):
    torch.manual_seed(0)
    streaming = Streaming("cpu", memory_budget=1 << 20, chunk=13)
    x, hidden = torch.randn(2, 49, 16, dtype=torch.float64), torch.arange(49) >= torch.tensor([[49], [40]])
    options: dict[str, Any] = {"key_padding_mask": hidden}
    given: tuple[torch.Tensor, ...] = (x,)
    if kind == "encoder":
        model: torch.nn.Module = LongNetEncoder(CONFIG)
    elif kind == "tiles":
        model, given = LongNetViT(CONFIG, TileEmbedding(16, 16)), (x, torch.randint(9000, (2, 49, 2)))
    elif kind == "image":
        model, options = LongNetViT(CONFIG, ImageEmbedding(28, 4, in_chans=2, embed_dim=16)), {}
        given = (torch.randn(2, 2, 28, 28, dtype=torch.float64),)
    else:
        model, given = LongNet(16, 4, 1, 1, 24, **PATTERN, cross_attention="dilated"), (x, x[:, :30])
        options = {"src_key_padding_mask": hidden, "memory_key_padding_mask": hidden, "tgt_is_causal": True}
    model.double()
    results = []
    for where in ({}, {"parallel": streaming}):
        found = model(*given, **options, **where)
        (out,) = found if isinstance(found, list) else (found,)
        grads = torch.autograd.grad(out.square().sum(), list(model.parameters()), materialize_grads=True)
        results.append([out.detach(), *grads])
    assert streaming.moved.chunks > 8
    largest = max(float(t.abs().max()) for t in results[0])
    apart = torch.stack([(a - b).abs().max() for a, b in zip(*results, strict=True)])
    assert float(apart.max()) < 1e-12 * largest
