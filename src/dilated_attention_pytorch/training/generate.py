"""Text from a byte-level model, one byte after the other."""

from __future__ import annotations

import torch
from torch import nn

from .corpus import SEPARATOR


@torch.no_grad()
def generate(
    model: nn.Module,
    prompt: bytes,
    *,
    max_bytes: int,
    context_length: int,
    temperature: float = 0.8,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> bytes:
    """Continue ``prompt`` by up to ``max_bytes`` bytes, drawn from the model's distribution.

    Each byte takes a forward pass over the last ``context_length`` bytes. Generation ends early at the
    separator that begins a new document, which is not returned.

    Args:
        temperature: the logits are divided by it; 0 takes the most probable byte.

    Raises:
        ValueError: an empty prompt, or a negative temperature.
    """
    if not prompt:
        raise ValueError("prompt is empty; give at least one byte")
    if not temperature >= 0:
        raise ValueError(f"temperature is {temperature!r}; give a number of at least 0")
    was_training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(max_bytes):
        window = torch.tensor([tokens[-context_length:]], device=device)
        logits = model(window)[0, -1].double().cpu()
        if temperature:
            probabilities = torch.softmax(logits / temperature, dim=0)
            token = int(torch.multinomial(probabilities, 1, generator=generator))
        else:
            token = int(logits.argmax())
        if token == SEPARATOR:
            break
        tokens.append(token)
    model.train(was_training)
    return bytes(tokens[len(prompt) :])


def printable(text: bytes) -> str:
    """Bytes as text that is safe to show: malformed UTF-8 and control characters become U+FFFD."""
    decoded = text.decode("utf-8", errors="replace").replace("\r\n", "\n").replace("\r", "\n")
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in decoded)
