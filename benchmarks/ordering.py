"""Orders of a grid compared: locality, recall of dense attention, accuracy of a small model, and what an order costs.

    python benchmarks/ordering.py [--parts value,time] [--seeds 5] [--epochs 20] [--results FOLDER]

``value`` writes ordering.json; its images and digits are those that scikit-learn brings along. ``time`` runs on the GPU
if there is one and writes ordering_gpu.json or ordering_cpu.json. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from common import ROOT, save
from dilated_attention_pytorch import (
    HilbertOrdering,
    LongNetEncoder,
    LongNetEncoderConfig,
    LongNetViT,
    hilbert_order,
)
from dilated_attention_pytorch.models import ImageEmbedding
from dilated_attention_pytorch.models.gigapath import gigapath_segment_lengths
from dilated_attention_pytorch.ordering import GRID_ORDERS
from dilated_attention_pytorch.ordering.locality import attended_distance, neighbours_inside

ORDERS = ("raster", "snake", "morton", "hilbert")


def locality() -> list[dict[str, object]]:
    """Distances of attended pairs and neighbours kept, on grids that are powers of two and others."""
    found = []
    for shape, segments, rates in (
        ((64, 64), (256, 1024, 4096), (1, 4, 16)),
        ((60, 90), (256, 1024, 5400), (1, 4, 16)),
        ((16, 16, 16), (256, 1024, 4096), (1, 4, 16)),
    ):
        for name in ORDERS:
            order = GRID_ORDERS[name](*shape)
            branches = {
                f"{w}/{r}": attended_distance(order, shape, [w], [r]) for w, r in zip(segments, rates, strict=True)
            }
            found.append(
                {
                    "shape": shape,
                    "order": name,
                    "attended_distance": attended_distance(order, shape, segments, rates),
                    "attended_distance_by_branch": branches,
                    "neighbours_inside": neighbours_inside(order, shape, segments[0]),
                }
            )
    return found


def patches(image: torch.Tensor, side: int) -> tuple[torch.Tensor, tuple[int, int]]:
    """Whitened principal components (N, 32) of the patches of (height, width, 3), of length 1, and their grid."""
    height, width = image.shape[0] // side, image.shape[1] // side
    cut = image[: height * side, : width * side].reshape(height, side, width, side, 3).transpose(1, 2)
    flat = cut.reshape(height * width, -1).double()
    flat = flat - flat.mean(0)
    left, _, _ = torch.linalg.svd(flat, full_matrices=False)
    return F.normalize(left[:, :32], dim=-1), (height, width)


def recall() -> list[dict[str, object]]:
    """The share of dense softmax mass on the keys that a head attends to, all orders at the same number of pairs.

    Attention by content alone: queries and keys are the same features of a patch, sharpened until a row's entropy is
    that of a given number of keys, in the median.
    """
    from sklearn.datasets import load_sample_images

    found = []
    segments, rates, heads = (256, 1024, 4240), (1, 4, 16), 16
    for image, name in zip(load_sample_images().images, ("china", "flower"), strict=True):
        features, shape = patches(torch.tensor(image), 8)
        cosine = features @ features.T
        for keys in (16, 256):
            low, high = 0.1, 200.0
            for _ in range(30):  # bisection on the sharpness
                sharpness = math.sqrt(low * high)
                log_p = torch.log_softmax(cosine[::16] * sharpness, -1)
                entropy = float(-(log_p.exp() * log_p).sum(-1).median())
                low, high = (low, sharpness) if entropy < math.log(keys) else (sharpness, high)
            mass = torch.softmax(cosine * sharpness, -1)
            shuffled = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
            for order_name in (*ORDERS, "random"):
                order = shuffled if order_name == "random" else GRID_ORDERS[order_name](*shape)
                moved, row = mass[order][:, order], torch.arange(len(features))
                kept = []
                for head in range(heads):
                    attends = torch.zeros_like(moved, dtype=torch.bool)
                    for w, r in zip(segments, rates, strict=True):
                        active = row % w % r == head // -(-heads // r)
                        segment = torch.where(active, row // w, -1)
                        attends |= (segment[:, None] == segment) & active
                    kept.append(float((moved * attends).sum(-1).mean()))
                found.append(
                    {
                        "image": name,
                        "grid": shape,
                        "keys_by_entropy": keys,
                        "order": order_name,
                        "recall": statistics.mean(kept),
                    }
                )
    return found


def accuracy(seeds: int, epochs: int) -> list[dict[str, object]]:
    """Test accuracy on scikit-learn's digits of a LongNetViT on single pixels, under each order."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    found = []
    for seed in range(seeds):
        split = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        train, test = split[:1437], split[1437:]
        for order in ORDERS:
            torch.manual_seed(seed)  # the same start and the same batches for every order
            config = LongNetEncoderConfig(
                embed_dim=32, num_layers=2, num_heads=4, segment_lengths=(16, 64), dilation_rates=(1, 4), dropout=0.1
            )
            embed = ImageEmbedding(8, 1, in_chans=1, embed_dim=32)
            model = LongNetViT(config, embed, num_classes=10, ordering=order)
            optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
            steps = epochs * math.ceil(len(train) / 96)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
            for _ in range(epochs):
                for batch in train[torch.randperm(len(train))].split(96):
                    loss = F.cross_entropy(model.classify(images[batch]), labels[batch])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
            model.eval()
            with torch.no_grad():
                logits = model.classify(images[test])
            found.append(
                {
                    "seed": seed,
                    "order": order,
                    "accuracy": float((logits.argmax(-1) == labels[test]).double().mean()),
                    "loss": float(F.cross_entropy(logits, labels[test])),
                }
            )
            print(found[-1], flush=True)
    return found


def times(functions: dict[str, Callable[[], object]], device: str, *, repeats: int) -> dict[str, dict[str, float]]:
    """Median and least milliseconds of each function, run in turn so that drift of the machine meets all alike."""
    found: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(repeats):
        for name, function in functions.items():
            if device == "cpu":
                start = time.perf_counter()
                function()
                found[name].append(1e3 * (time.perf_counter() - start))
                continue
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            torch.cuda.synchronize()
            events[0].record()
            function()
            events[1].record()
            events[1].synchronize()
            found[name].append(events[0].elapsed_time(events[1]))
    return {name: {"median": statistics.median(ms), "least": min(ms)} for name, ms in found.items()}


def orders(device: str) -> dict[str, dict[str, float]]:
    """Milliseconds of computing an order, which an ordering does once for a grid and a device."""
    shapes = ((1024, 1024), (1000, 777), (128, 128, 128), (101, 67, 83))
    functions = {
        " x ".join(map(str, shape)): lambda shape=shape: hilbert_order(*shape, device=device) for shape in shapes
    }
    return times(functions, device, repeats=15)


def permutation(device: str) -> dict[str, object]:
    """Milliseconds of moving rows along the curve, in a random order, and by PyTorch, beside a copy; all allocate.

    "milliseconds" are those of a call that finds the device idle, so that the host's share counts; on a GPU
    "device_milliseconds" leave it out.
    """
    side, dtype = (1024, torch.bfloat16) if device == "cuda" else (256, torch.float32)
    x = torch.randn(1, side * side, 768, device=device, dtype=dtype)
    ordering = HilbertOrdering((side, side))
    index = ordering.positions(device)
    shuffled = HilbertOrdering(permutation=torch.randperm(side * side))
    functions: dict[str, Callable[[], object]] = {
        "copy": x.clone,
        "hilbert": lambda: ordering.apply(x),
        "inverse": lambda: ordering.invert(x),
        "random": lambda: shuffled.apply(x),
        "index_select": lambda: x.index_select(1, index),
    }
    found: dict[str, object] = {"shape": list(x.shape), "dtype": str(dtype)}
    if device == "cuda":
        from triton.testing import do_bench

        on_device = {
            name: float(do_bench(function, warmup=25, rep=100, return_mode="median"))
            for name, function in functions.items()
        }
        found |= {
            "device_milliseconds": on_device,
            "copy_over_hilbert_on_device": on_device["copy"] / on_device["hilbert"],
        }
    found["milliseconds"] = times(functions, device, repeats=50 if device == "cuda" else 9)
    return found


def encoder(device: str, *, training: bool) -> dict[str, object]:
    """Milliseconds of an encoder with and without an ordering: both permutations, and what they do to attention.

    On a GPU the size of GigaPath's slide encoder under bfloat16 autocast, on a CPU a small one in float32.
    """
    torch.manual_seed(0)
    if device == "cuda":
        side, width, layers, heads, branches = 256, 768, 12, 16, (tuple(gigapath_segment_lengths()), (1, 2, 4, 8, 16))
    else:
        side, width, layers, heads, branches = 64, 256, 4, 8, ((256, 1024, 4096), (1, 4, 8))
    segments, rates = branches
    config = LongNetEncoderConfig(
        embed_dim=width, num_layers=layers, num_heads=heads, segment_lengths=segments, dilation_rates=rates
    )
    model = LongNetEncoder(config, device=device).train(training)
    x = torch.randn(1, side * side, width, device=device)

    def run(ordering: HilbertOrdering | None) -> None:
        with torch.set_grad_enabled(training):
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                out: Tensor = model(x, ordering=ordering)
            if training:
                model.zero_grad(set_to_none=True)
                out.float().square().sum().backward()

    curve = HilbertOrdering((side, side))
    functions: dict[str, Callable[[], object]] = {"as given": lambda: run(None), "hilbert": lambda: run(curve)}
    found = times(functions, device, repeats=12 if device == "cuda" else 9)
    return {
        "rows": side * side, "width": width, "layers": layers, "heads": heads, "segment_lengths": segments,
        "dilation_rates": rates, "training_step": training, "milliseconds": found,
        "hilbert_over_as_given": found["hilbert"]["median"] / found["as given"]["median"],
    }  # fmt: skip


def measure_value(path: Path, seeds: int, epochs: int) -> None:
    """Locality, recall, accuracy."""
    results: dict[str, object] = {"locality": locality(), "recall": recall()}
    save(path, results)
    trained = accuracy(seeds, epochs)
    by_order = {name: [100 * row["accuracy"] for row in trained if row["order"] == name] for name in ORDERS}
    results["accuracy"] = {
        "runs": trained,
        "percent": {
            name: {"mean": statistics.mean(values), "standard_error": statistics.stdev(values) / len(values) ** 0.5}
            for name, values in by_order.items()
        },
    }
    save(path, results)


def measure_time(path: Path, device: str) -> None:
    """Orders, permutations, encoders; written after each, so that a stop loses nothing."""
    results: dict[str, object] = {"milliseconds_of_orders": orders(device)}
    results["permutation"] = permutation(device)
    save(path, results, quiet=True)
    results["forward"] = encoder(device, training=False)
    save(path, results, quiet=True)
    results["training_step"] = encoder(device, training=True)
    save(path, results)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="value,time")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results", help="folder to write to")
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    if unknown := set(parts) - {"value", "time"}:
        parser.error(f"--parts has {', '.join(sorted(unknown))}; give value, time or both")
    if "value" in parts:
        measure_value(arguments.results / "ordering.json", arguments.seeds, arguments.epochs)
    if "time" in parts:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        measure_time(arguments.results / f"ordering_{'gpu' if device == 'cuda' else 'cpu'}.json", device)


if __name__ == "__main__":
    main()
