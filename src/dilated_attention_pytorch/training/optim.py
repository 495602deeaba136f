"""AdamW with weight decay on matrices only, and the learning rate of every step."""

from __future__ import annotations

import math

import torch
from torch import nn

from .config import TrainingConfig


def learning_rate(step: int, training: TrainingConfig) -> float:
    """Learning rate of optimizer step ``step`` (from 0): linear warm-up to the peak, then a cosine.

    >>> t = TrainingConfig(steps=101, batch_size=1, learning_rate=1.0, warmup_steps=10, final_fraction=0.1)
    >>> [round(learning_rate(step, t), 3) for step in (0, 4, 9, 10, 55, 100)]
    [0.1, 0.5, 1.0, 1.0, 0.55, 0.1]
    """
    warmup = min(training.warmup_steps, training.steps // 10)
    if step < warmup:
        return training.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, training.steps - 1 - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return training.learning_rate * (training.final_fraction + (1 - training.final_fraction) * cosine)


def make_optimizer(model: nn.Module, training: TrainingConfig) -> torch.optim.AdamW:
    """AdamW (beta 0.9, 0.95) that decays matrices; norms and biases stay undecayed."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": training.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=training.learning_rate, betas=(0.9, 0.95))
