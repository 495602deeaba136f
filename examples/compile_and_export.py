"""Hand a model to torch.compile and torch.export, and check that what comes back computes the same.

torch.export gives one program for every length: exported once, saved, loaded, run on texts of other lengths. Loading
needs this package, for the program calls its operator. ONNX has no such operator: torch.onnx.export stops there.

python examples/compile_and_export.py [--compiler inductor]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from dilated_attention_pytorch import LongNetLM, LongNetLMConfig

SHORTEST, LONGEST = 8, 1 << 20


def build() -> LongNetLM:
    """A small model; its weights do not matter here."""
    torch.manual_seed(0)
    config = LongNetLMConfig(
        context_length=256,
        embed_dim=64,
        num_layers=1,
        num_heads=4,
        segment_lengths=(32, 128, 512),
        dilation_rates=(1, 2, 4),
        ngram_sizes=(2, 3),
        short_convolution=3,
    )
    return LongNetLM(config).eval()


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


def compile_model(model: LongNetLM, *, compiler: str) -> float:
    """Compile for any length, without graph breaks; the largest difference over three lengths, gradients too."""
    compiled = torch.compile(model, dynamic=True, fullgraph=True, backend=compiler)
    worst = 0.0
    for length in (100, 300, 77):
        tokens = torch.randint(256, (2, length))
        gradients = []
        for run in (model, compiled):
            model.zero_grad()
            out = run(tokens)
            out.square().mean().backward()
            gradients.append((out.detach(), model.embedding.weight.grad))
        worst = max(worst, *(difference(found, gold) for gold, found in zip(*gradients, strict=True)))
    return worst


def export_model(model: LongNetLM, path: Path) -> float:
    """Export for any batch and length, save to ``path`` and load; the largest difference over three shapes."""
    sizes = {0: torch.export.Dim("batch", max=1024), 1: torch.export.Dim("length", min=SHORTEST, max=LONGEST)}
    program = torch.export.export(model, (torch.randint(256, (2, 100)),), dynamic_shapes={"tokens": sizes})
    torch.export.save(program, path)
    loaded = torch.export.load(path).module()
    worst = 0.0
    with torch.no_grad():
        for shape in ((1, 1000), (3, SHORTEST), (2, 129)):
            tokens = torch.randint(256, shape)
            worst = max(worst, difference(loaded(tokens), model(tokens)))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compiler", default="aot_eager", help="inductor (needs a C++ compiler), aot_eager, ...")
    options = parser.parse_args()
    model, started = build(), time.perf_counter()
    print(
        f"torch.compile ({options.compiler}): largest difference {compile_model(model, compiler=options.compiler):.1e}"
    )
    with tempfile.TemporaryDirectory() as folder:
        print(
            f"torch.export, saved and loaded: largest difference {export_model(model, Path(folder) / 'model.pt2'):.1e}"
        )
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
