"""A block-sparse pattern as a picture: which key blocks each query block sees, head by head (BigBird, figure 1)."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from .pattern_picture import COLORS, DPI

if TYPE_CHECKING:
    from torch import Tensor

MOST_BLOCKS = 512
"""Blocks of a side: of more, single blocks would not be seen."""


def parts_of(pattern: Any) -> list[tuple[str, Any]]:
    """What a pattern is made of, with names: the blocks of all parts together are those of the pattern.

    >>> from dilated_attention_pytorch import get_pattern
    >>> [name for name, part in parts_of(get_pattern("bigbird"))]
    ['window of 64', 'global', '3 random']
    """
    from ..patterns import DilatedBlocks, GlobalLocal, Hierarchical, LocalWindow, RandomBlocks, Union

    size = pattern.block_size
    match pattern:
        case Union():
            return [part for member in pattern.patterns for part in parts_of(member)]
        case GlobalLocal():
            everywhere = GlobalLocal(0, pattern.num_global_tokens, pattern.global_indices, size)
            return [*parts_of(LocalWindow(pattern.window, size)), ("global", everywhere)]
        case LocalWindow():
            return [(f"window of {pattern.window:,}", pattern)]
        case Hierarchical():
            return [
                (f"{window:,} at {stride:,}", Hierarchical(((window, stride),), size))
                for window, stride in pattern.levels
            ]
        case DilatedBlocks():
            return [
                (
                    f"segments of {length:,}, rate {rate:,}",
                    DilatedBlocks((length,), (rate,), size, pattern.head_offsets),
                )
                for length, rate in zip(pattern.segment_lengths, pattern.dilation_rates, strict=True)
            ]
        case RandomBlocks():
            return [(f"{pattern.num_blocks} random", pattern)]
    raise ValueError(f"{type(pattern).__name__} has no picture that knows nothing of the tensors")


def seen_blocks(pattern: Any, *, blocks: int, heads: int, is_causal: bool) -> Tensor:
    """(H, blocks, blocks) int64: 1 + the first of `parts_of` that shows a key block (column) to a query block (row).

    0 where none does; one matrix where all heads see alike.

    >>> from dilated_attention_pytorch import GlobalLocal
    >>> seen_blocks(GlobalLocal(0, 1, block_size=64), blocks=3, heads=2, is_causal=False)
    tensor([[[1, 2, 2],
             [2, 1, 0],
             [2, 0, 1]]])
    """
    import torch

    from ..patterns.formula import block_mask

    found = torch.zeros(heads if pattern.per_head else 1, blocks, blocks, dtype=torch.int64)
    for number, (_, part) in enumerate(parts_of(pattern), 1):
        for head in range(len(found)):
            mask = block_mask(part, head, heads, blocks, is_causal=is_causal)
            found[head][mask & (found[head] == 0)] = number
    return found


def shares(seen: Tensor, *, is_causal: bool) -> list[str]:
    """A line for each matrix: how many blocks, of how many that exist."""
    blocks = seen.shape[1]
    exist = blocks * (blocks + 1) // 2 if is_causal else blocks * blocks
    counts = (seen > 0).sum((1, 2)).tolist()
    names = ["every head"] if len(counts) == 1 else [f"head {n}" for n in range(len(counts))]
    return [
        f"{name}: {n:,} of {exist:,} blocks, {100 * n / exist:.1f} %" for name, n in zip(names, counts, strict=True)
    ]


def picture(pattern: Any, seen: Tensor, *, title: str) -> bytes:
    """A PNG with a panel for each head, the parts of the pattern in colours of their own."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    names = [name for name, _ in parts_of(pattern)]
    colors = [COLORS[n % len(COLORS)] for n in range(len(names))]
    panels, blocks, _ = seen.shape
    columns = min(panels, 4)
    rows = -(-panels // columns)
    side = 4.5 if panels == 1 else 3.0
    figure = Figure(figsize=(side * columns + 0.6, side * rows + 1.2), dpi=DPI, layout="constrained")
    grid: Any = figure.subplots(rows, columns, squeeze=False)
    for n, axes in enumerate(grid.flat):
        axes.set(xticks=[], yticks=[])
        if n >= panels:
            axes.set_axis_off()
            continue
        axes.imshow(
            seen[n].numpy(), cmap=ListedColormap(["white", *colors]), vmin=-0.5, vmax=len(names) + 0.5,
            interpolation="nearest",
        )  # fmt: skip
        if blocks <= 64:
            for border in range(1, blocks):
                axes.axhline(border - 0.5, color="#dddddd", linewidth=0.3)
                axes.axvline(border - 0.5, color="#dddddd", linewidth=0.3)
        axes.set_title("every head" if panels == 1 else f"head {n}", fontsize=9)
        axes.set_xlabel("key block", fontsize=8)
        axes.set_ylabel("query block", fontsize=8)
    patches = [Patch(color=color, label=name) for color, name in zip(colors, names, strict=True)]
    figure.legend(handles=patches, loc="outside lower center", ncols=min(len(names), columns + 1), fontsize=8)
    figure.suptitle(title, fontsize=10)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()
