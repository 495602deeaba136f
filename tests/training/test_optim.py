"""The optimizer's groups and the schedule."""

from __future__ import annotations

import math

import pytest
import torch

from dilated_attention_pytorch.models import LongNetLM, LongNetLMConfig
from dilated_attention_pytorch.training.config import TrainingConfig
from dilated_attention_pytorch.training.optim import learning_rate, make_optimizer


def test_only_matrices_decay():
    config = LongNetLMConfig(
        context_length=16, embed_dim=16, num_layers=1, num_heads=2, segment_lengths=(16,), dilation_rates=(1,)
    )
    model = LongNetLM(config)
    training = TrainingConfig(steps=1, batch_size=1, learning_rate=0.5, weight_decay=0.1)
    optimizer = make_optimizer(model, training)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # a zero gradient leaves the decay alone: p * (1 - 0.5 * 0.1)
    for name, parameter in model.named_parameters():
        factor = 0.95 if parameter.dim() >= 2 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor, msg=name)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 100), (2, 0), (7, 3), (1000, 50), (1000, 500)])
def test_the_rate_rises_to_the_peak_and_falls_to_its_end(steps: int, warmup: int):
    training = TrainingConfig(steps=steps, batch_size=1, learning_rate=2e-3, warmup_steps=warmup)
    rates = [learning_rate(step, training) for step in range(steps)]
    assert max(rates) == pytest.approx(2e-3)
    assert all(rate > 0 for rate in rates)
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert top <= steps // 10  # a warm-up never takes over a short run
    if steps > 1:
        assert rates[-1] == pytest.approx(2e-4)
    middle = (min(warmup, steps // 10) + steps - 1) / 2
    if middle == int(middle) and steps > 2:
        assert rates[int(middle)] == pytest.approx(2e-3 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2))))
