"""Orders of a grid compared: locality, recall of dense attention, accuracy of a small model, and time.

python benchmarks/ordering.py [--seeds 5] [--epochs 20] [--output benchmarks/results/ordering.json]

Images and digits are those that scikit-learn brings along; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path

import torch
from sklearn.datasets import load_digits, load_sample_images
from torch.nn import functional as F

from common import ROOT, cpu_medians, save
from dilated_attention_pytorch import LongNetEncoderConfig, LongNetViT
from dilated_attention_pytorch.models import ImageEmbedding
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


def end_to_end() -> dict[str, float]:
    """Seconds of a forward of 64 x 64 patches with and without an ordering, permutation included; medians."""
    models = {}
    for order in (None, "hilbert"):
        torch.manual_seed(0)
        config = LongNetEncoderConfig(
            embed_dim=256, num_layers=4, num_heads=8, segment_lengths=(256, 1024, 4096), dilation_rates=(1, 4, 8)
        )
        models[str(order)] = LongNetViT(config, ImageEmbedding(512, 8, embed_dim=256), ordering=order).eval()
    image = torch.randn(1, 3, 512, 512)

    def run(model: LongNetViT) -> None:
        with torch.no_grad():
            model(image)

    functions = {name: lambda model=model: run(model) for name, model in models.items()}
    return {name: statistics.median(times) for name, times in cpu_medians(functions, repeats=9).items()}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/ordering.json")
    arguments = parser.parse_args()
    results: dict[str, object] = {"locality": locality(), "recall": recall(), "end_to_end_seconds": end_to_end()}
    save(arguments.output, results)
    trained = accuracy(arguments.seeds, arguments.epochs)
    by_order = {name: [100 * row["accuracy"] for row in trained if row["order"] == name] for name in ORDERS}
    results["accuracy"] = {
        "runs": trained,
        "percent": {
            name: {"mean": statistics.mean(values), "standard_error": statistics.stdev(values) / len(values) ** 0.5}
            for name, values in by_order.items()
        },
    }
    save(arguments.output, results)


if __name__ == "__main__":
    main()
