"""Train a language model with nothing but PyTorch: a loop, AdamW, and the text that the model goes on with.

The text is a module of Python's standard library. In a minute on a CPU the model learns what code looks like, not
what it means; `dilated-attention train` does the rest (checkpoints, held-out text, schedules).

python examples/train_plain_loop.py [--steps 60] [--context 1024]
"""

from __future__ import annotations

import argparse
import math
import textwrap
from pathlib import Path

import torch
from torch import Tensor

from dilated_attention_pytorch import LongNetLM, LongNetLMConfig


def text_to_learn() -> Tensor:
    """A module of the standard library as bytes."""
    return torch.tensor(list(Path(textwrap.__file__).read_bytes()))


def train(text: Tensor, *, steps: int, context: int, seed: int = 0) -> tuple[LongNetLM, list[float]]:
    """A model after ``steps`` steps, each on a random window of ``context`` bytes, and its losses in bits per byte."""
    torch.manual_seed(seed)
    config = LongNetLMConfig(
        context_length=context,
        embed_dim=96,
        num_layers=2,
        num_heads=4,
        segment_lengths=(context // 8, context // 2, context),  # each four times, then twice as far ...
        dilation_rates=(1, 2, 4),  # ... at a coarser step
        norm="pre-rms",
        ngram_sizes=(2, 3),
        short_convolution=4,
    )
    model = LongNetLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps, pct_start=0.1)
    losses = []
    for _ in range(steps):
        start = int(torch.randint(len(text) - context, ()))
        window = text[start : start + context + 1][None]
        loss = model.loss(window[:, :-1], window[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item() / math.log(2))
    return model, losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--context", type=int, default=1024)
    options = parser.parse_args()
    model, losses = train(text_to_learn(), steps=options.steps, context=options.context)
    print(f"bits per byte: {losses[0]:.2f} at first, {sum(losses[-10:]) / len(losses[-10:]):.2f} in the last steps")
    prompt = b"    def "
    print(prompt.decode(), end="")
    for token in model.stream([list(prompt)], max_new_tokens=200, temperature=0.7, generator=0):
        print(bytes(token.tolist()).decode("ascii", errors="replace"), end="", flush=True)
    print()


if __name__ == "__main__":
    main()
