"""GigaPath's slide encoder (12 layers, 768 wide, 16 heads), ours and the original: time and memory.

    python benchmarks/slide_encoder.py [--tiles 10000,45680,100000,500000] [--original FOLDER] [--output FILE]
    python benchmarks/slide_encoder.py --device cpu --tiles 5000 --output FILE

Random weights and features; bfloat16 autocast on a GPU, float32 on the CPU. A training step is a forward and a backward
pass of one slide. One model is on the device at a time: a peak counts its weights, gradients and the slide's features,
as everything that lives there. FOLDER holds the package `gigapath` as its repository has it; flash-attn is not asked
for, its function is put together from PyTorch's flash kernel (the same algorithm), and fairscale, timm and
huggingface_hub from what the encoder needs of them. Errors are norms of differences of embeddings over the norm of
those that ours gives in float32.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import ROOT, save
from dilated_attention_pytorch import LongNetEncoderConfig, LongNetViT
from dilated_attention_pytorch.models import TileEmbedding
from dilated_attention_pytorch.models.gigapath import gigapath_segment_lengths
from peers import stand_in, stand_in_for_flash_attn

CHANNELS, GRID = 1536, 1000
LONGEST_TRAINED = 100_000
"""Tiles up to which training steps, and embeddings in float32, are measured."""
LONGEST_RECOMPUTED = 50_000
"""Tiles up to which training with activation checkpointing is measured."""


def ours(*, checkpointing: bool = False, layers: int = 12) -> LongNetViT:
    """The encoder with fresh weights."""
    config = LongNetEncoderConfig(
        embed_dim=768, num_layers=layers, num_heads=16, segment_lengths=gigapath_segment_lengths(),
        dilation_rates=(1, 2, 4, 8, 16), padding="zeros", drop_path_rate=0.1, dropout=0.25,
        activation_checkpointing=checkpointing,
    )  # fmt: skip
    return LongNetViT(config, TileEmbedding(CHANNELS, 768, slide_ngrids=GRID))


def _drop_path(x: Tensor, rate: float = 0.0, training: bool = False) -> Tensor:
    """timm's: whole entries of the batch are dropped."""
    if rate == 0.0 or not training:
        return x
    kept = torch.rand(x.shape[0], *[1] * (x.dim() - 1), device=x.device) >= rate
    return x * (kept / (1 - rate)).to(x.dtype)


def original(folder: Path) -> nn.Module:
    """The slide encoder of the package in ``folder``, with fresh weights."""
    stand_in_for_flash_attn()
    stand_in("fairscale")
    stand_in("fairscale.nn", checkpoint_wrapper=lambda module, *_: module, wrap=lambda module, *_: module)
    stand_in("huggingface_hub")
    stand_in("timm", models=stand_in("timm.models"))
    stand_in("timm.models.layers", drop_path=_drop_path)
    stand_in("timm.models.registry", register_model=lambda function: function)
    sys.path[:0] = [str(folder), str(folder / "gigapath")]  # it imports its copy of torchscale by that name
    import numpy
    from gigapath import pos_embed, slide_encoder

    def positions(width: int, grid: int, cls_token: bool) -> numpy.ndarray[Any, Any]:
        """Its table of positions, from sines of one row and one column instead of each tile's."""
        axis = pos_embed.get_1d_sincos_pos_embed_from_grid(width // 2, numpy.arange(grid, dtype=numpy.float32))
        axis = axis.astype(numpy.float32)
        table = numpy.concatenate([numpy.tile(axis, (grid, 1)), numpy.repeat(axis, grid, 0)], 1)
        return numpy.concatenate([numpy.zeros([1, width], numpy.float32), table]) if cls_token else table

    slide_encoder.get_2d_sincos_pos_embed = positions

    for name, module in list(sys.modules.items()):
        if name.endswith("torchscale.architecture.config"):  # evaluates numpy's text of a number, as of numpy 2
            module.__dict__["np"] = numpy
    return slide_encoder.gigapath_slide_enc12l768d(in_chans=CHANNELS, global_pool=False)


def timed(function: Callable[[], object], device: str, repeats: int) -> list[float]:
    """Milliseconds of every call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def measure(run: Callable[[], object], device: str, budget_ms: float) -> dict[str, Any]:
    """Median milliseconds and, on a GPU, peak memory of a pass, or why there is none."""
    try:
        timed(run, device, 1)  # compiles
        if device == "cpu":
            return {"ms": timed(run, device, 1)[0]}
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        first = timed(run, device, 1)[0]
        peak = torch.cuda.max_memory_allocated() / 2**30
        times = timed(run, device, min(max(2, int(budget_ms / first)), 30))
        return {"ms": statistics.median(times), "repeats": len(times), "peak_gib": peak}
    except torch.OutOfMemoryError as error:
        return {"out_of_memory": str(error).split(". ")[0]}


def slide(tiles: int, device: str) -> tuple[Tensor, Tensor]:
    """Features and corners of tiles that fill a part of the grid."""
    features = torch.randn(1, tiles, CHANNELS, device=device, generator=torch.Generator(device).manual_seed(tiles))
    side = int(tiles**0.5) + 1
    number = torch.arange(tiles, device=device)
    return features, 256 * torch.stack((number // side, number % side), -1)[None].float()


def passes(model: nn.Module, name: str, tiles: int, device: str, budget_ms: float) -> tuple[dict[str, Any], Tensor]:
    """What is measured of a model on one slide, and its embedding."""
    features, coords = slide(tiles, device)

    def forward() -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            return model(features, coords)[0]

    def step() -> None:
        model.zero_grad(set_to_none=True)
        forward().float().square().sum().backward()

    found = {}
    model.eval()
    with torch.no_grad():
        if "checkpointing" not in name:
            found[f"{name}: forward"] = measure(forward, device, budget_ms)
        embedding = forward().double().cpu()
    if tiles <= LONGEST_TRAINED and device == "cuda":
        model.train()
        found[f"{name}: training step"] = measure(step, device, budget_ms)
        model.zero_grad(set_to_none=True)
    return found, embedding


def main() -> None:
    """Measure model by model and write after each slide, so that a stop loses nothing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", default="10000,45680,100000,500000")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--original", type=Path)
    parser.add_argument("--budget-ms", type=float, default=2000, help="time for repeats of one measurement")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/slide_encoder.json")
    arguments = parser.parse_args()
    device, tiles = arguments.device, [int(number) for number in arguments.tiles.split(",")]
    torch.manual_seed(0)
    weights = None
    models: dict[str, nn.Module] = {}
    if arguments.original:
        models["original"] = original(arguments.original)
        weights = {name: value for name, value in models["original"].state_dict().items() if name != "pos_embed"}
    models = {"ours": ours(), "ours, checkpointing": ours(checkpointing=True), **models}
    rows: dict[int, dict[str, Any]] = {number: {"tiles": number} for number in tiles}
    embeddings: dict[int, dict[str, Tensor]] = {number: {} for number in tiles}
    for name, model in models.items():
        model.load_state_dict(weights or models["ours"].state_dict(), strict=name != "original")
        model.to(device)
        for number in tiles:
            if name == "ours, checkpointing" and (number > LONGEST_RECOMPUTED or device == "cpu"):
                continue
            found, embeddings[number][name] = passes(model, name, number, device, arguments.budget_ms)
            if name == "ours" and device == "cuda" and number <= LONGEST_TRAINED:
                with torch.no_grad():
                    embeddings[number]["exact"] = model.eval()(*slide(number, device))[0].double().cpu()
            rows[number] |= found
            summarise(rows[number], embeddings[number])
            save(arguments.output, list(rows.values()), quiet=True)
            print({"tiles": number, **found}, flush=True)
        model.to("cpu")
    save(arguments.output, list(rows.values()))


def summarise(row: dict[str, Any], embeddings: dict[str, Tensor]) -> None:
    """Ratios and errors of what has been measured so far."""
    exact = embeddings.get("exact")
    if exact is not None:
        row["errors"] = {
            name: float((e - exact).norm() / exact.norm()) for name, e in embeddings.items() if name != "exact"
        }
    for what in ("forward", "training step"):
        pair = [row.get(f"{name}: {what}", {}).get("ms") for name in ("original", "ours")]
        if None not in pair:
            row[f"{what}: original over ours"] = pair[0] / pair[1]


if __name__ == "__main__":
    main()
