"""A GPU: GigaPath's slide encoder (12 layers, 768 wide, 16 heads), ours and the original, time and memory.

    python benchmarks/slide_encoder.py [--tiles 10000,45680,100000,500000] [--original FOLDER] [--output FILE]

Random weights and features, bfloat16 autocast. A training step is a forward and a backward pass of one slide. FOLDER
holds the package `gigapath` as its repository has it; flash-attn is not asked for, its function is put together from
PyTorch's flash kernel (the same algorithm), and fairscale, timm and huggingface_hub from what the encoder needs of
them. Errors are norms of differences of embeddings over the norm of those that ours gives in float32.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from triton.testing import do_bench

from common import ROOT, save
from dilated_attention_pytorch import LongNetEncoderConfig, LongNetViT
from dilated_attention_pytorch.models import TileEmbedding
from dilated_attention_pytorch.models.gigapath import gigapath_segment_lengths

CHANNELS, GRID = 1536, 1000


def ours(*, checkpointing: bool = False, layers: int = 12) -> LongNetViT:
    """The encoder with fresh weights."""
    config = LongNetEncoderConfig(
        embed_dim=768, num_layers=layers, num_heads=16, segment_lengths=gigapath_segment_lengths(),
        dilation_rates=(1, 2, 4, 8, 16), padding="zeros", drop_path_rate=0.1, dropout=0.25,
        activation_checkpointing=checkpointing,
    )  # fmt: skip
    return LongNetViT(config, TileEmbedding(CHANNELS, 768, slide_ngrids=GRID))


def _stand_in(name: str, **content: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(content)
    sys.modules[name] = module
    return module


def _flash(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    return_attn_probs: bool = False,
) -> tuple[Tensor, Tensor, None]:  # fmt: skip
    """flash_attn_func of flash-attn, (B, N, H, D), by PyTorch's kernel."""
    views = (x.transpose(1, 2) for x in (q, k, v))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        *views, dropout_p, causal, False, scale=softmax_scale
    )
    return out.transpose(1, 2), lse, None


def _drop_path(x: Tensor, rate: float = 0.0, training: bool = False) -> Tensor:
    """timm's: whole entries of the batch are dropped."""
    if rate == 0.0 or not training:
        return x
    kept = torch.rand(x.shape[0], *[1] * (x.dim() - 1), device=x.device) >= rate
    return x * (kept / (1 - rate)).to(x.dtype)


def original(folder: Path) -> nn.Module:
    """The slide encoder of the package in ``folder``, with fresh weights."""
    _stand_in("flash_attn")
    _stand_in("flash_attn.flash_attn_interface", flash_attn_func=_flash)
    _stand_in("fairscale")
    _stand_in("fairscale.nn", checkpoint_wrapper=lambda module, *_: module, wrap=lambda module, *_: module)
    _stand_in("huggingface_hub")
    _stand_in("timm", models=_stand_in("timm.models"))
    _stand_in("timm.models.layers", drop_path=_drop_path)
    _stand_in("timm.models.registry", register_model=lambda function: function)
    sys.path[:0] = [str(folder), str(folder / "gigapath")]  # it imports its copy of torchscale by that name
    import numpy
    from gigapath.slide_encoder import gigapath_slide_enc12l768d

    for name, module in list(sys.modules.items()):
        if name.endswith("torchscale.architecture.config"):  # evaluates numpy's text of a number, as of numpy 2
            module.__dict__["np"] = numpy
    return gigapath_slide_enc12l768d(in_chans=CHANNELS, global_pool=False)


@contextlib.contextmanager
def peak() -> Iterator[dict[str, float]]:
    """GiB at the peak within the block, all that lives on the device counted."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    found: dict[str, float] = {}
    yield found
    torch.cuda.synchronize()
    found["gib"] = torch.cuda.max_memory_allocated() / 2**30


def measure(model: nn.Module, features: Tensor, coords: Tensor, *, training: bool) -> dict[str, Any]:
    """Median milliseconds and peak memory of a pass, or why there is none."""

    def forward() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return model(features, coords)[0]

    def step() -> None:
        model.zero_grad(set_to_none=True)
        forward().float().square().sum().backward()

    def inference() -> None:
        with torch.no_grad():
            forward()

    model.train(training)
    run: Callable[[], None] = step if training else inference
    try:
        with peak() as found:
            run()
        return {"ms": float(do_bench(run, warmup=200, rep=1500, return_mode="median")), "peak_gib": found["gib"]}
    except torch.OutOfMemoryError as error:
        return {"out_of_memory": str(error).split(". ")[0]}
    finally:
        model.zero_grad(set_to_none=True)


def slide(tiles: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Features and corners of tiles that fill a part of the grid."""
    features = torch.randn(1, tiles, CHANNELS, device="cuda", generator=generator)
    side = int(tiles**0.5) + 1
    number = torch.arange(tiles, device="cuda")
    return features, 256 * torch.stack((number // side, number % side), -1)[None].float()


def main() -> None:
    """Measure and write after each number of tiles, so that a stop loses nothing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", default="10000,45680,100000,500000")
    parser.add_argument("--original", type=Path)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/slide_encoder.json")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    generator = torch.Generator("cuda").manual_seed(0)
    models: dict[str, nn.Module] = {"ours": ours(), "ours, checkpointing": ours(checkpointing=True)}
    if arguments.original:
        models["original"] = original(arguments.original)
        weights = {name: value for name, value in models["original"].state_dict().items() if name != "pos_embed"}
    else:
        weights = models["ours"].state_dict()
    for name, model in models.items():
        model.load_state_dict(weights, strict=name != "original")
        model.to("cuda")
    results = []
    for tiles in map(int, arguments.tiles.split(",")):
        features, coords = slide(tiles, generator)
        row: dict[str, Any] = {"tiles": tiles}
        embeddings = {}
        for name, model in models.items():
            if name != "ours, checkpointing":
                row[f"{name}: forward"] = measure(model, features, coords, training=False)
                model.eval()
                with (
                    torch.no_grad(),
                    torch.autocast("cuda", torch.bfloat16),
                    contextlib.suppress(torch.OutOfMemoryError),
                ):
                    embeddings[name] = model(features, coords)[0].double()
            if tiles <= 100_000:
                row[f"{name}: training step"] = measure(model, features, coords, training=True)
        if tiles <= 100_000:
            with torch.no_grad():
                exact = models["ours"].eval()(features, coords)[0].double()
            row["errors"] = {name: float((e - exact).norm() / exact.norm()) for name, e in embeddings.items()}
        for what in ("forward", "training step"):
            pair = [row.get(f"{name}: {what}", {}).get("ms") for name in ("original", "ours")]
            if None not in pair:
                row[f"{what}: original over ours"] = pair[0] / pair[1]
        results.append(row)
        save(arguments.output, results, quiet=True)
        print(row, flush=True)


if __name__ == "__main__":
    main()
