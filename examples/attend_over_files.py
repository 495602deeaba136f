"""A CPU attends over query, key and value in memory-mapped files, in less memory than any of them takes.

    python examples/attend_over_files.py [--rows 65536] [--budget-mib 4] [--folder DIR]

Writes three files of random numbers, attends over them forward and backward, and checks rows of the result against
the definition in float64, from the rows that they attend to alone.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from dilated_attention_pytorch import DilatedPattern, Streaming, dilated_attention

HEADS, HEAD_DIM = 4, 32


def write(path: Path, rows: int, *, seed: int, part: int = 8192) -> None:
    """Normal random numbers (rows, heads, head dim) in float32, a part at a time."""
    generator = torch.Generator().manual_seed(seed)
    with path.open("wb") as file:
        for first in range(0, rows, part):
            numbers = torch.randn(min(part, rows - first), HEADS, HEAD_DIM, generator=generator)
            file.write(numbers.numpy().tobytes())


def read(path: Path, rows: int) -> Tensor:
    """The file as a tensor (1, rows, heads, head dim): pages are read when they are used."""
    flat = torch.from_file(str(path), shared=False, size=rows * HEADS * HEAD_DIM, dtype=torch.float32)
    return flat.view(1, rows, HEADS, HEAD_DIM)


def expected_row(query: Tensor, key: Tensor, value: Tensor, pattern: DilatedPattern, row: int, head: int) -> Tensor:
    """The definition for one row of one head, in float64."""
    scores, values = [], []
    for w, r in zip(pattern.segment_lengths, pattern.dilation_rates, strict=True):
        offset = pattern.head_offset(head, r, HEADS)
        if row % w % r == offset:
            first = row // w * w
            keys = slice(first + offset, min(first + w, key.shape[1]), r)
            scores.append(key[0, keys, head].double() @ query[0, row, head].double() / HEAD_DIM**0.5)
            values.append(value[0, keys, head].double())
    return torch.softmax(torch.cat(scores), 0) @ torch.cat(values)


def main(arguments: list[str] | None = None) -> float:
    """Run the example; the largest error among the rows that are checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=65536)
    parser.add_argument("--budget-mib", type=float, default=4)
    parser.add_argument("--folder", type=Path, default=None, help="where the files go; by default a temporary folder")
    given = parser.parse_args(arguments)
    pattern = DilatedPattern.geometric(given.rows, first_segment=256, ratio=4)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        paths = [Path(folder) / name for name in ("query", "key", "value")]
        for seed, path in enumerate(paths):
            write(path, given.rows, seed=seed)
        query, key, value = (read(path, given.rows).requires_grad_() for path in paths)
        streaming = Streaming("cpu", memory_budget=int(given.budget_mib * 2**20))
        out = dilated_attention(query, key, value, pattern.segment_lengths, pattern.dilation_rates, parallel=streaming)
        mib = paths[0].stat().st_size / 2**20
        print(f"3 files of {mib:.1f} MiB, {given.budget_mib} MiB of memory: {streaming.moved.chunks} chunks")
        print(f"segments {pattern.segment_lengths}, rates {pattern.dilation_rates}")
        generator = torch.Generator().manual_seed(3)
        worst = 0.0
        with torch.no_grad():
            for row in torch.randint(given.rows, (20,), generator=generator).tolist():
                for head in range(HEADS):
                    difference = out[0, row, head] - expected_row(query, key, value, pattern, row, head)
                    worst = max(worst, float(difference.abs().max()))
        print(f"largest error of 20 rows against float64: {worst:.2g}")
        out.square().mean().backward()
        assert all(t.grad is not None and bool(t.grad.isfinite().all()) for t in (query, key, value))
        print(f"gradients of query, key and value: {3 * mib:.1f} MiB in host memory")
    return worst


if __name__ == "__main__":
    main()
