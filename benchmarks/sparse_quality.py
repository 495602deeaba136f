"""Recall and error of block-sparse patterns on the activations of the model that `make demo` trains.

    python benchmarks/sparse_quality.py [--run runs/demo] [--rows 4096] [--output FILE]

Writes and prints, as a Markdown table, for each pattern its work and, over all layers and heads, the recall of
attention weight (mean and least head) and the relative output error (mean).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from common import ROOT, save
from dilated_attention_pytorch import ContentTopK, DilatedAttention, LongNetLM, LongNetLMConfig, get_pattern
from dilated_attention_pytorch.benchmarking.quality import measure_quality
from dilated_attention_pytorch.patterns import GlobalLocal, Hierarchical, LocalWindow, RandomBlocks, Union
from dilated_attention_pytorch.training.checkpoint import newest_checkpoint

BLOCK = 64
PATTERNS = {
    "local window, 128 each side": LocalWindow(128, BLOCK),
    "local window, 512 each side": LocalWindow(512, BLOCK),
    "Longformer: 256 each side, 1 global block": get_pattern("longformer"),
    "BigBird: 3 window, 2 global, 3 random blocks": get_pattern("bigbird"),
    "hierarchical: 256 at 64, 4096 at 512": Hierarchical(((256, 64), (4096, 512)), BLOCK),
    "window 128, 4 random blocks": Union((LocalWindow(128, BLOCK), RandomBlocks(4, block_size=BLOCK))),
    "128 local, 128 first": GlobalLocal(128, 128, block_size=BLOCK),
    **{
        f"content, 4 blocks by {pooling}, 1 local, 1 first": ContentTopK(4, 1, 1, pooling, BLOCK)
        for pooling in ("mean", "sub_means")
    },
}


def activations(folder: Path, rows: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """query, key and value of every layer, on the last ``rows`` bytes of the corpus."""
    checkpoint, _ = newest_checkpoint(folder / "checkpoints")
    given = dict(checkpoint.records["run"]["model"])
    config = LongNetLMConfig(**{name: tuple(v) if isinstance(v, list) else v for name, v in given.items()})
    model = LongNetLM(config).eval()
    model.load_state_dict(dict(checkpoint.tensors["model"]))
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for module in model.modules():
        if isinstance(module, DilatedAttention):
            module.register_forward_pre_hook(lambda _, given: found.append(given[:3]))
    text = torch.frombuffer(bytearray((folder / "data" / "corpus.bin").read_bytes()), dtype=torch.uint8)
    with torch.no_grad():
        model(text[-rows:].long()[None])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="folder of the trained model")
    parser.add_argument("--rows", type=int, default=4096, help="tokens of the sequence")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/sparse_quality.json")
    given = parser.parse_args()
    layers = activations(given.run, given.rows)
    print("| pattern | work | recall, mean | recall, least head | output error, mean |")
    print("| --- | --- | --- | --- | --- |")
    results = []
    for name, pattern in PATTERNS.items():
        found = [measure_quality(*layer, pattern, is_causal=True) for layer in layers]
        recall, error = torch.cat([f.recall for f in found]), torch.cat([f.error for f in found])
        row = {
            "name": name,
            "pattern": repr(pattern),
            "work": sum(f.work for f in found) / len(found),
            "recall_mean": float(recall.mean()),
            "recall_least": float(recall.min()),
            "error_mean": float(error.mean()),
        }
        results.append(row)
        numbers = " | ".join(f"{row[key]:.3f}" for key in ("work", "recall_mean", "recall_least", "error_mean"))
        print(f"| {name} | {numbers} |")
    save(given.output, {"rows": given.rows, "patterns": results}, quiet=True)


if __name__ == "__main__":
    main()
