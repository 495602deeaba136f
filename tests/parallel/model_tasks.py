"""What one rank of the pool does with a model: its rows, beside the whole on one device with equal weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from dilated_attention_pytorch import (
    DilatedTransformerDecoderLayer,
    DilatedTransformerEncoderLayer,
    LongNet,
    LongNetEncoder,
    LongNetEncoderConfig,
    LongNetViT,
)
from dilated_attention_pytorch.models import ImageEmbedding, TileEmbedding
from dilated_attention_pytorch.parallel import ContextParallel

PATTERN: dict[str, Any] = {"segment_lengths": (8, 40), "dilation_rates": (1, 4)}
CONFIG = LongNetEncoderConfig(embed_dim=16, num_layers=2, num_heads=4, ffn_dim=24, **PATTERN)
ROWS = 41
HIDDEN = torch.arange(ROWS) >= torch.tensor([[ROWS], [30]])
"""The second row of a batch is shorter."""
BOUNDS = torch.tensor([0, 17, 18, ROWS])


def drawn(model: nn.Module) -> nn.Module:
    """In float64, every parameter drawn, alike on all ranks."""
    model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def compare(
    model: nn.Module,
    inputs: Sequence[Tensor],
    run: Callable[[ContextParallel | None], Tensor],
    parallel: ContextParallel,
    cut: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, float]:
    """Largest difference of the output and of all gradients, summed over the ranks, from those of one device.

    ``cut`` takes this rank's part of the output; None: every rank has the whole, and its loss counts for each.
    """
    leaves = [*model.parameters(), *inputs]
    torch.manual_seed(1)
    alone = run(None)
    weights = torch.randn_like(alone)
    expected = torch.autograd.grad((alone * weights).sum(), leaves)
    torch.manual_seed(1 + parallel.rank)  # what documents have in common is drawn by rank 0
    mine = run(parallel)
    share, wanted = (weights / parallel.world, alone) if cut is None else (cut(weights), cut(alone))
    found = [parallel.add_up(grad) for grad in torch.autograd.grad((mine * share).sum(), leaves)]
    assert mine.shape == wanted.shape
    errors = torch.stack([(a - b).abs().max() for a, b in zip(found, expected, strict=True)])
    largest = torch.stack([grad.abs().max() for grad in expected]).max()
    return {"output": float((mine - wanted).detach().abs().max()), "gradients": float(errors.max() / largest)}


def encoder(
    mesh: DeviceMesh, make: Callable[..., ContextParallel], options: dict[str, Any], strategy: str, layout: str
) -> dict[str, float]:
    """Rows, padded or packed in one; with drop path, xPos, checkpoints, zero keys."""
    torch.manual_seed(0)
    options, packed = dict(options), options.get("packed", False)
    options.pop("packed", None)
    model, parallel = drawn(LongNetEncoder(replace(CONFIG, **options))), make(mesh, strategy, layout)
    model.train()
    x, hidden = leaf(1 if packed else 2, ROWS, 16), None if packed else HIDDEN
    bounds = BOUNDS if packed else None

    def run(over: ContextParallel | None) -> Tensor:
        if over is None:
            return model(x, key_padding_mask=hidden, cu_seqlens=bounds)
        mask = None if hidden is None else over.shard(hidden, 1)
        states = list(model.iter_states(over.shard(x, 1), key_padding_mask=mask, cu_seqlens=bounds, parallel=over))
        assert len(states) == 3
        torch.manual_seed(1 + over.rank)
        return model(over.shard(x, 1), key_padding_mask=mask, cu_seqlens=bounds, parallel=over)

    return compare(model, [x], run, parallel, lambda t: parallel.shard(t, 1))


def slides(
    mesh: DeviceMesh, make: Callable[..., ContextParallel], options: dict[str, Any], strategy: str, layout: str
) -> dict[str, float]:
    """Embeddings of slides, of all layers, on every rank, from the tiles of each."""
    torch.manual_seed(0)
    packed, pool = options["packed"], options["global_pool"]
    config = replace(CONFIG, padding=options.get("padding", "mask"))
    model = drawn(LongNetViT(config, TileEmbedding(6, 16, slide_ngrids=20), global_pool=pool))
    parallel, x = make(mesh, strategy, layout), leaf(1 if packed else 2, ROWS, 6)
    coords = torch.randint(20 * 256, (x.shape[0], ROWS, 2))
    hidden, bounds = (None, torch.tensor([0, 17, 17, ROWS])) if packed else (HIDDEN, None)

    def run(over: ContextParallel | None) -> Tensor:
        options: dict[str, Any] = {"cu_seqlens": bounds, "all_layer_embed": True}
        if over is None:
            return torch.stack(model(x, coords, key_padding_mask=hidden, **options))
        mine = LongNetViT.tiles_of_rank(over, ROWS, cu_seqlens=bounds)
        mask = None if hidden is None else hidden[:, mine]
        return torch.stack(model(x[:, mine], coords[:, mine], key_padding_mask=mask, parallel=over, **options))

    def last(over: ContextParallel | None) -> Tensor:  # the encoder's own norm takes part in this one alone
        if over is None:
            return model(x, coords, key_padding_mask=hidden, cu_seqlens=bounds)[0]
        mine = LongNetViT.tiles_of_rank(over, ROWS, cu_seqlens=bounds)
        mask = None if hidden is None else hidden[:, mine]
        return model(x[:, mine], coords[:, mine], key_padding_mask=mask, cu_seqlens=bounds, parallel=over)[0]

    assert model.encoder.layer_norm is not None
    found = compare(model, [x], last, parallel)
    model.encoder.layer_norm = None  # without a gradient from states
    of_all = compare(model, [x], run, parallel)
    return {name: max(value, of_all[name]) for name, value in found.items()}


def image(mesh: DeviceMesh, make: Callable[..., ContextParallel], strategy: str, layout: str) -> dict[str, float]:
    """The logits of an image, on every rank, from the patches of each; and this rank's patches."""
    torch.manual_seed(0)
    model = drawn(LongNetViT(CONFIG, ImageEmbedding(28, 4, in_chans=2, embed_dim=16), num_classes=3))
    parallel, x = make(mesh, strategy, layout), leaf(2, 2, 28, 20)

    def run(over: ContextParallel | None) -> Tensor:
        return model.classify(x, parallel=over)

    found = compare(model, [x], run, parallel)
    patches = parallel.unshard(model(x, parallel=parallel), 1)
    found["patches"] = float((patches - model(x)).detach().abs().max())
    return found


def encoder_decoder(
    mesh: DeviceMesh, make: Callable[..., ContextParallel], options: dict[str, Any], strategy: str, layout: str
) -> dict[str, float]:
    """Target rows of the encoder-decoder; a source of another length is sharded by itself."""
    torch.manual_seed(0)
    options = dict(options)
    rows, batch_first = options.pop("source", ROWS), options.get("batch_first", True)
    model = drawn(LongNet(16, 4, 1, 2, 24, **PATTERN, **options))
    parallel, around = make(mesh, strategy, layout), make(mesh, strategy, layout)
    src, tgt = leaf(2, rows, 16), leaf(2, ROWS, 16)
    hidden = torch.arange(rows) >= torch.tensor([[rows], [rows - 6]])
    dim = 1 if batch_first else 0

    def turn(x: Tensor) -> Tensor:
        return x if batch_first else x.transpose(0, 1)

    def run(over: ContextParallel | None) -> Tensor:
        source, target, mask, where = turn(src), turn(tgt), hidden, {}
        if over is not None:
            source, mask = around.shard(source, dim), around.shard(mask, 1)
            target = over.shard(target, dim)
            where = {"parallel": over} if rows == ROWS else {"parallel": over, "src_parallel": around}
        masks = {"src_key_padding_mask": mask, "memory_key_padding_mask": mask}
        return model(source, target, tgt_is_causal=True, **masks, **where)

    return compare(model, [src, tgt], run, parallel, lambda t: parallel.shard(t, dim))


def layers(mesh: DeviceMesh, make: Callable[..., ContextParallel], strategy: str, layout: str) -> dict[str, float]:
    """The layers by themselves: an encoder layer, and a decoder layer over a sharded memory and one that is whole."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"d_model": 16, "nhead": 4, "dim_feedforward": 24, "dropout": 0.0, "batch_first": True}
    model = nn.ModuleList([
        DilatedTransformerEncoderLayer(**sizes, **PATTERN, xpos_scale_base=64.0),
        DilatedTransformerDecoderLayer(**sizes, **PATTERN),
        DilatedTransformerDecoderLayer(**sizes, **PATTERN),
    ])  # fmt: skip
    model, parallel, around = drawn(model), make(mesh, strategy, layout), make(mesh, strategy, layout)
    x, memory, short = leaf(2, ROWS, 16), leaf(2, 23, 16), leaf(2, 5, 16)

    def run(over: ContextParallel | None) -> Tensor:
        if over is None:
            return model[2](model[1](model[0](x), memory), short)
        rows = model[0](over.shard(x, 1), parallel=over)
        rows = model[1](rows, around.shard(memory, 1), parallel=over, memory_parallel=around)
        return model[2](rows, short, parallel=over)

    return compare(model, [x, memory, short], run, parallel, lambda t: parallel.shard(t, 1))


def refused(mesh: DeviceMesh, make: Callable[..., ContextParallel], what: str) -> None:
    """Calls that cannot be computed over ranks, to raise on all of them."""
    parallel, around = make(mesh, "ring", "contiguous"), make(mesh, "ring", "contiguous")
    x = torch.randn(1, ROWS, 16)
    if what in ("lengths", "whole"):
        model = LongNet(16, 4, 1, 1, 24, **PATTERN, cross_attention="dilated")
        target = parallel.shard(x, 1)
        if what == "whole":
            model.decode(target, x, parallel=parallel)
        model(around.shard(x[:, 2:], 1), target, parallel=parallel, src_parallel=around)
    if what == "rows":
        parallel.length = ROWS
        LongNetEncoder(CONFIG)(x, parallel=parallel)
    model = LongNetViT(CONFIG, TileEmbedding(6, 16), ordering="hilbert" if what == "ordering" else None)
    parallel.length = ROWS + 1
    model(torch.randn(1, ROWS, 6), torch.zeros(1, ROWS, 2), parallel=parallel)


TASKS = {
    "encoder": encoder,
    "slides": slides,
    "image": image,
    "encoder_decoder": encoder_decoder,
    "layers": layers,
    "refused": refused,
}
