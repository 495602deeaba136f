"""How often `ContentTopK` keeps the block of a needle: one key that holds 40 % of a query's dense weight.

    python benchmarks/sparse_needle.py [--draws 100] [--rows 65536] [--output FILE]

Keys are normal in 64 dimensions; the query is as long as makes scores scatter by 1.6, and the needle is a key of
ordinary norm (8) that points as far towards the query as gives it its weight. Blocks of 64. Writes for each pooling the
share of draws in which the needle's block is among the first ``keep``, and prints a Markdown table.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from common import ROOT, save
from dilated_attention_pytorch import ContentTopK

DIM, BLOCK, WEIGHT, SPREAD = 64, 64, 0.4, 1.6
KEEPS = (1, 4, 8, 16, 32, 64)
POOLINGS = {
    "mean": ContentTopK(1, pooling="mean", block_size=BLOCK),
    "moments": ContentTopK(1, pooling="moments", block_size=BLOCK),
    "min_max": ContentTopK(1, pooling="min_max", block_size=BLOCK),
    **{
        f"sub_means, {parts}": ContentTopK(1, pooling="sub_means", block_size=BLOCK, sub_blocks=parts)
        for parts in (4, 8, 16, 32)
    },
}


def draw(rows: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(query (D,), keys (rows, D), row of the needle)."""
    keys = torch.randn(rows, DIM, generator=generator)
    query = torch.randn(DIM, generator=generator)
    query *= SPREAD * DIM**0.5 / query.norm()
    needle = int(torch.randint(rows, (1,), generator=generator))
    scores = keys @ query / DIM**0.5
    scores[needle] = -torch.inf
    wanted = float(scores.logsumexp(0)) + torch.tensor(WEIGHT / (1 - WEIGHT)).log().item()
    cosine = wanted / float(query.norm())  # of a key of norm sqrt(D)
    assert cosine < 1
    aside = torch.randn(DIM, generator=generator)
    aside -= aside @ query * query / query.norm() ** 2
    along = query / query.norm() * cosine + aside / aside.norm() * (1 - cosine**2) ** 0.5
    keys[needle] = along * DIM**0.5
    weight = float((keys @ query / DIM**0.5).softmax(0)[needle])
    assert abs(weight - WEIGHT) < 1e-3
    return query, keys, needle


def main() -> None:
    """Draw, rank, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--rows", type=int, default=65536)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/sparse_needle.json")
    given = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    better: dict[str, list[int]] = {name: [] for name in POOLINGS}
    for _ in range(given.draws):
        query, keys, needle = draw(given.rows, generator)
        blocks = keys.view(1, -1, BLOCK, DIM)
        for name, content in POOLINGS.items():
            summaries = content.summaries(blocks, None, torch.float32)
            scores = content.scores(query[None, None], summaries, DIM**-0.5)[0, 0]
            better[name].append(int((scores > scores[needle // BLOCK]).sum()))
    results = [
        {
            "pooling": name,
            "cost": POOLINGS[name].summaries(torch.zeros(1, 1, BLOCK, DIM), None, torch.float32).shape[2] / BLOCK,
            "recall": {str(keep): sum(rank < keep for rank in ranks) / len(ranks) for keep in KEEPS},
        }
        for name, ranks in better.items()
    ]
    save(given.output, {"draws": given.draws, "rows": given.rows, "block_size": BLOCK, "poolings": results}, quiet=True)
    print("| pooling | " + " | ".join(map(str, KEEPS)) + " | cost |")
    for found in results:
        shares = " | ".join(f"{share:.2f}" for share in found["recall"].values())
        print(f"| {found['pooling']} | {shares} | {found['cost'] * BLOCK:.0f}/{BLOCK} |")


if __name__ == "__main__":
    main()
