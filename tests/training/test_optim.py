"""The optimizer's groups and the schedule."""

from __future__ import annotations

import math

import pytest
import torch

from dilated_attention_pytorch.models import LongNetLM, LongNetLMConfig
from dilated_attention_pytorch.training.config import Optimizer, TrainingConfig
from dilated_attention_pytorch.training.optim import Muon, learning_rate, make_optimizers, orthogonalize


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_only_matrices_decay(optimizer: Optimizer):
    config = LongNetLMConfig(
        context_length=16, embed_dim=16, num_layers=1, num_heads=2, segment_lengths=(16,), dilation_rates=(1,)
    )
    model = LongNetLM(config)
    training = TrainingConfig(steps=1, batch_size=1, learning_rate=0.5, weight_decay=0.1, optimizer=optimizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers = make_optimizers(model, training)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for each in optimizers:
        each.step()  # a zero gradient leaves the decay alone: p * (1 - 0.5 * 0.1)
    for name, parameter in model.named_parameters():
        factor = 0.95 if parameter.dim() >= 2 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor, msg=name)


def test_muon_takes_the_linear_layers_inside_blocks_and_nothing_twice():
    model = LongNetLM(LongNetLMConfig.preset("demo"))
    optimizers = make_optimizers(model, TrainingConfig(steps=1, batch_size=1, learning_rate=0.5, optimizer="muon"))
    names = {parameter: name for name, parameter in model.named_parameters()}
    adam, muon = ([names[p] for group in o.param_groups for p in group["params"]] for o in optimizers)
    assert sorted(adam + muon) == sorted(names.values())
    linear = ("attention.in_proj", "attention.out_proj", "feed_forward.in_proj", "feed_forward.out_proj")
    layers = range(model.config.num_layers)
    assert set(muon) == {f"blocks.{layer}.{name}.weight" for layer in layers for name in linear}


@pytest.mark.parametrize("shape", [(12, 12), (8, 30), (30, 8)])
def test_orthogonalizing_keeps_directions_and_evens_sizes(shape: tuple[int, int]):
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    inner = left.T @ orthogonalize(matrix) @ right.T
    assert (inner - inner.diag().diag()).abs().max() < 1e-9
    assert inner.diag().min() > 0.3
    assert inner.diag().max() < 1.3
    assert not orthogonalize(torch.zeros(4, 3)).any()


def test_muon_averages_gradients_and_looks_ahead():
    matrix = torch.nn.Parameter(torch.zeros(3, 6, dtype=torch.float64))
    optimizer = Muon([matrix], lr=0.1, weight_decay=0.0, momentum=0.9)
    gradients = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected, average = torch.zeros(3, 6, dtype=torch.float64), torch.zeros(3, 6, dtype=torch.float64)
    for gradient in gradients:
        matrix.grad = gradient.clone()
        optimizer.step()
        average = 0.9 * average + 0.1 * gradient
        expected -= 0.1 * 0.2 * math.sqrt(6) * orthogonalize(0.1 * gradient + 0.9 * average)
    torch.testing.assert_close(matrix.detach(), expected)
    # The root mean square of a step is about that of AdamW's, 0.2 times the rate.
    assert (matrix.detach() / 2).square().mean().sqrt() < 0.1 * 0.2 * 1.3


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
