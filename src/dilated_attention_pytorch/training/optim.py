"""The optimizers, AdamW and for hidden matrices Muon if asked for, and the learning rate of every step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from ..models.blocks import Block
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


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix update has all its singular values near 1 (Jordan et al., 2024, "Muon").

    The update is scaled to the root mean square of AdamW's, so that both take the same learning rate and weight
    decay (arXiv 2502.16982, section 2.2). torch.optim.Muon computes in bfloat16, which takes tens of times as
    long on a CPU without such instructions; here the matrices are orthogonalised in their own dtype.

    Args:
        params: matrices.
        lr, weight_decay: as AdamW's.
        momentum: of the average of gradients, which the update looks ahead of as Nesterov's does.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], *, lr: float, weight_decay: float, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient; closures are not supported."""
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if not state:
                    state["momentum"] = torch.zeros_like(matrix)
                average = state["momentum"].lerp_(matrix.grad, 1 - momentum)
                update = _orthogonalize_whole(matrix.grad.lerp(average, momentum))
                matrix.mul_(1 - rate * group["weight_decay"])
                matrix.add_(update, alpha=-0.2 * rate * math.sqrt(max(matrix.shape)))


def _orthogonalize_whole(update: Tensor) -> Tensor:
    """`orthogonalize` of a matrix, also if ranks hold shards of it: its singular vectors are those of the whole."""
    if not isinstance(update, DTensor):
        return orthogonalize(update)
    # Every rank computes the same from the same, so each can cut out its shard.
    whole = DTensor.from_local(orthogonalize(update.full_tensor()), update.device_mesh, [Replicate()])
    return whole.redistribute(update.device_mesh, update.placements)


def orthogonalize(matrix: Tensor, *, iterations: int = 5) -> Tensor:
    """A matrix with the singular vectors of ``matrix`` and singular values of about 0.7 to 1.2.

    Newton-Schulz iterations with the coefficients of Jordan et al.: they raise small singular values fastest and
    do not converge to 1, which an optimizer does not need.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=1e-7)  # no singular value above 1
    for _ in range(iterations):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.T if tall else x


def make_optimizers(model: nn.Module, training: TrainingConfig) -> tuple[torch.optim.Optimizer, ...]:
    """AdamW (beta 0.9, 0.95) that decays matrices; norms and biases stay undecayed.

    With "muon" it keeps embedding, output and vectors, and the linear layers between them go to `Muon`.
    """
    rate, decay = training.learning_rate, training.weight_decay
    hidden: set[Tensor] = set()
    if training.optimizer == "muon":
        inside = [module for block in model.modules() if isinstance(block, Block) for module in block.modules()]
        hidden = {module.weight for module in inside if isinstance(module, nn.Linear)}
    parameters = [p for p in model.parameters() if p.requires_grad]
    others = [p for p in parameters if p not in hidden]
    groups = [
        {"params": [p for p in others if p.dim() >= 2], "weight_decay": decay},
        {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
    ]
    # One pass over memory a step: large embeddings are bound by it.
    adam = torch.optim.AdamW([g for g in groups if g["params"]], lr=rate, betas=(0.9, 0.95), fused=True)
    if not hidden:
        return (adam,)
    return adam, Muon([p for p in parameters if p in hidden], lr=rate, weight_decay=decay)
