"""Fine-tune a slide encoder, with a classifier behind it, on features of tiles.

The slides here are SYNTHETIC: tiles of random features on a random part of a grid, and in slides of class 1 a small
round region whose tiles differ from the others. Only the place and the difference tell the classes apart, so the
example shows that the parts work together, and nothing about pathology. With your own data, replace `synthetic_slide`,
and give GigaPath's checkpoint as --weights.

python examples/classify_slides.py [--weights slide_encoder.pth] [--steps 60]
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dilated_attention_pytorch import LongNetEncoderConfig, LongNetViT
from dilated_attention_pytorch.models import TileEmbedding

TILE = 256  # pixels along a side


class SlideClassifier(nn.Module):
    """A slide encoder and one linear layer on its embedding."""

    def __init__(self, encoder: LongNetViT, width: int, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, classes)

    def forward(self, features: Tensor, coords: Tensor, padding: Tensor) -> Tensor:
        """Logits (slides, classes) of features (slides, tiles, channels)."""
        (embedding,) = self.encoder(features, coords, key_padding_mask=padding)
        return self.head(embedding)


def small_encoder(channels: int) -> LongNetViT:
    """An encoder that trains in seconds on a CPU; tiles are seen along a Hilbert curve."""
    config = LongNetEncoderConfig(
        embed_dim=64, num_layers=2, num_heads=4, segment_lengths=(32, 128), dilation_rates=(1, 4), padding="zeros"
    )
    return LongNetViT(config, TileEmbedding(channels, 64, slide_ngrids=64), global_pool=True, ordering="hilbert")


def synthetic_slide(label: int, channels: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Features (tiles, channels) and corners in pixels (tiles, 2) of a made-up slide."""
    tiles = int(torch.randint(60, 140, (), generator=generator))
    cells = torch.randperm(16 * 16, generator=generator)[:tiles]
    places = torch.stack((cells // 16, cells % 16), dim=-1)
    features = torch.randn(tiles, channels, generator=generator)
    if label:
        centre = places[torch.randint(tiles, (), generator=generator)]
        features[(places - centre).float().norm(dim=-1) < 4, :4] += 2.0
    return features, places * TILE


def batch(labels: Tensor, channels: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Slides of different length in one batch: features, corners, and where there is no tile."""
    slides = [synthetic_slide(int(label), channels, generator) for label in labels]
    features = nn.utils.rnn.pad_sequence([slide[0] for slide in slides], batch_first=True)
    coords = nn.utils.rnn.pad_sequence([slide[1] for slide in slides], batch_first=True)
    lengths = torch.tensor([len(slide[0]) for slide in slides])
    return features, coords, torch.arange(features.shape[1]) >= lengths[:, None]


def main(arguments: list[str] | None = None) -> float:
    """Train, and return the accuracy on slides that were not trained on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", help="checkpoint of GigaPath's slide encoder; by default a small fresh encoder")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    if options.weights:
        encoder = LongNetViT.from_gigapath(options.weights, global_pool=True, activation_checkpointing=True)
    else:
        encoder = small_encoder(channels=16)
    channels, width = encoder.patch_embed.in_chans, encoder.encoder.config.embed_dim
    model = SlideClassifier(encoder, width, classes=2).train()
    rate = 2e-5 if options.weights else 1e-3
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    for step in range(options.steps):
        labels = torch.randint(2, (8,), generator=generator)
        loss = F.cross_entropy(model(*batch(labels, channels, generator)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 9:
            print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)
    model.eval()
    labels = torch.arange(64) % 2
    with torch.no_grad():
        parts = labels.split(8)
        right = [(model(*batch(part, channels, generator)).argmax(-1) == part).float().mean() for part in parts]
    accuracy = float(torch.stack(right).mean())
    print(f"accuracy on 64 other synthetic slides: {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
