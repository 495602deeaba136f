"""The picture of how much attention the tiles of a slide receive. matplotlib loads when drawing."""

from __future__ import annotations

import io
import math

import torch
from torch import Tensor

MOST_CELLS = 4096
"""Cells along a side of the picture; a slide that spans more has several grid cells in one of them."""


def rasterise(values: Tensor, coords: Tensor, tile_size: int) -> Tensor:
    """Values of tiles as a picture ``(height, width)`` of the part of the slide they span, NaN where there is none.

    The first coordinate goes to the right and the second down; tiles that fall on one cell give their mean.

    >>> rasterise(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([[256, 0], [512, 256], [600, 300]]), 256)
    tensor([[1., nan],
            [nan, 3.]])
    """
    cells = torch.div(coords, tile_size, rounding_mode="floor").long()
    cells = cells - cells.amin(0)
    cells //= int(cells.max()) // MOST_CELLS + 1
    width, height = (cells.amax(0) + 1).tolist()
    flat = cells[:, 1] * width + cells[:, 0]
    total = values.new_zeros(height * width).index_add(0, flat, values)
    return (total / torch.bincount(flat, minlength=height * width)).view(height, width)


def heat_map(received: Tensor, coords: Tensor, *, tile_size: int, title: str) -> bytes:
    """A PNG of ``received (layers, tiles)`` over ``coords (tiles, 2)``: the mean over the layers.

    Colours are the ratio to the mean over the tiles on a logarithmic scale, cut at the 1st and 99th percentile: a few
    tiles that receive most of the attention would leave the others in one colour.
    """
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    mean = received.double().mean(0)
    ratio = (mean / mean.mean().clamp(min=1e-300)).clamp(min=1e-6)
    picture = rasterise(ratio, coords, tile_size)
    # Not torch.quantile, which refuses more than 2**24 values.
    ranked = ratio.sort().values
    low, high = (float(ranked[round(share * (len(ranked) - 1))]) for share in (0.01, 0.99))
    if not low < high:
        low, high = 0.5 * low, 2.0 * low
    height, width = picture.shape
    tall = min(max(height / width, 0.3), 2.0)
    figure = Figure(figsize=(7.5, 5.4 * tall + 1.0), dpi=150, layout="constrained")
    axes = figure.subplots()
    left, top = (coords.amin(0) // tile_size * tile_size).tolist()
    right, bottom = ((coords.amax(0) // tile_size + 1) * tile_size).tolist()
    colors = colormaps["viridis"].with_extremes(bad="white")
    image = axes.imshow(
        picture.numpy(), cmap=colors, norm=LogNorm(low, high), interpolation="nearest",
        extent=(left, right, bottom, top),
    )  # fmt: skip
    ticks = torch.logspace(math.log10(low), math.log10(high), 5).tolist()
    bar = figure.colorbar(
        image, ax=axes, extend="both", shrink=0.85, label="attention received, 1 = the mean over the tiles (log scale)"
    )
    bar.set_ticks(ticks, labels=[f"{tick:.2g}" for tick in ticks], minor=False)
    bar.ax.minorticks_off()
    axes.set_xlabel("first coordinate (pixels)")
    axes.set_ylabel("second coordinate (pixels)")
    layers, tiles = received.shape
    text = f"{title}\n{tiles:,} tiles, mean over {layers} layers and all heads"
    axes.set_title(text, fontsize=9, parse_math=False)  # a name of a file may hold a $
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()
