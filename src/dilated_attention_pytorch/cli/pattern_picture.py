"""A dilated pattern as pictures: who attends to whom, per branch and head, and how often in all (LongNet, figure 2)."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from ..patterns import DilatedPattern

MOST_ROWS = 512
"""Rows of a matrix in a picture: of more, single pairs would not be seen."""
MOST_HEADS = 8
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # told apart under colour blindness
DPI = 130


def attended(pattern: DilatedPattern, *, rows: int, heads: int, is_causal: bool) -> Tensor:
    """Which branch lets which row attend to which: bool (branches, heads, rows, rows).

    >>> from dilated_attention_pytorch import DilatedPattern
    >>> attended(DilatedPattern((4,), (2,)), rows=4, heads=2, is_causal=False)[0, 1].int()
    tensor([[0, 0, 0, 0],
            [0, 1, 0, 1],
            [0, 0, 0, 0],
            [0, 1, 0, 1]], dtype=torch.int32)
    """
    import torch

    from ..testing import multiplicity

    position = torch.arange(rows)
    return multiplicity(pattern, heads, position, torch.zeros_like(position), rows, is_causal=is_causal)


def coverage(seen: Tensor) -> list[str]:
    """A line for each branch and one for all: pairs, their share, and how many are attended more than once."""
    branches, heads, rows, _ = seen.shape
    counts = seen.sum((1, 2, 3)).tolist()
    total = seen.sum(0)
    covered, twice = int((total > 0).sum()), int((total > 1).sum())
    lines = [f"branch {n + 1}: {counts[n] / heads:,.1f} pairs a head" for n in range(branches)]
    lines.append(
        f"all: {covered / heads:,.1f} pairs a head, {100 * covered / (heads * rows * rows):.1f} % of the full matrix; "
        f"{twice / heads:,.1f} of them more than once, at most {int(total.max())} times; "
        f"{100 * float((total.sum(0) > 0).float().mean()):.1f} % of all pairs are attended by some head"
    )
    return lines


def picture(pattern: DilatedPattern, seen: Tensor, *, title: str) -> bytes:
    """A PNG with a row for each head: one panel for each branch, and one with how often each pair is attended."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    branches, heads, rows, _ = seen.shape
    most = int(seen.sum(0).max())
    columns = branches + 1
    figure = Figure(figsize=(2.3 * columns + 1.2, 2.2 * heads + 1.0), dpi=DPI, layout="constrained")
    grid: Any = figure.subplots(heads, columns, squeeze=False)
    counts = ListedColormap([(1.0, 1.0, 1.0), *(colormaps["viridis_r"](n / most)[:3] for n in range(1, most + 1))])
    image: Any = None
    for head in range(heads):
        for n, branch in enumerate(pattern.branches):
            axes, color = grid[head, n], ListedColormap(["white", COLORS[n % len(COLORS)]])
            axes.imshow(seen[n, head].numpy(), cmap=color, vmin=0, vmax=1, interpolation="nearest")
            for border in range(branch.segment_length, rows, branch.segment_length):
                axes.axhline(border - 0.5, color="#999999", linewidth=0.4)
                axes.axvline(border - 0.5, color="#999999", linewidth=0.4)
            if head == 0:
                axes.set_title(f"segments of {branch.segment_length:,}\nrate {branch.dilation_rate:,}", fontsize=9)
        image = grid[head, branches].imshow(
            seen[:, head].sum(0).numpy(), cmap=counts, vmin=-0.5, vmax=most + 0.5, interpolation="nearest"
        )
        grid[head, 0].set_ylabel(f"head {head}\nquery row", fontsize=8)
    grid[0, branches].set_title("all branches:\ntimes attended", fontsize=9)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    for axes in grid[-1]:
        axes.set_xlabel("key row", fontsize=8)
    figure.colorbar(image, ax=grid[:, -1].tolist(), ticks=range(most + 1), shrink=min(1.0, 2.0 / heads))
    figure.suptitle(title, fontsize=11)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()
