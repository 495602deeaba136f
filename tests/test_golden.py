"""torchscale's own numbers: what its attention computes, through both backends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dilated_attention_pytorch import dilated_attention

GOLDEN = Path(__file__).parent / "golden"
CASES: list[dict[str, Any]] = json.loads((GOLDEN / "torchscale_attention.json").read_text())
TENSORS = load_file(GOLDEN / "torchscale_attention.safetensors")
TOLERANCE = 2e-6  # of the largest golden value

cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
backends = pytest.mark.parametrize("backend", ["reference", "sdpa"])


def run(case: dict[str, Any], **options: Any) -> dict[str, torch.Tensor]:
    inputs = [TENSORS[f"{case['name']}/{name}"].clone().requires_grad_() for name in ("q", "k", "v")]
    pattern = case["segment_lengths"], case["dilation_rates"]
    out = dilated_attention(*inputs, *pattern, is_causal=case["is_causal"], **options)
    grads = torch.autograd.grad(out, inputs, TENSORS[f"{case['name']}/grad_out"])
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *grads), strict=True))


def relative_error(case: dict[str, Any], name: str, actual: torch.Tensor) -> float:
    gold = TENSORS[f"{case['name']}/{name}"].double()
    assert torch.isfinite(actual).all()
    return float((actual.double() - gold).abs().max() / gold.abs().max())


@cases
@backends
def test_output_and_gradients(case, backend):
    found = run(case, padding="zeros", mixing_grad="detached", backend=backend)
    for name, actual in found.items():
        assert relative_error(case, name, actual) <= TOLERANCE, name


@cases
@backends
def test_output_does_not_depend_on_mixing_grad(case, backend):
    found = run(case, padding="zeros", mixing_grad="exact", backend=backend)
    assert relative_error(case, "out", found["out"]) <= TOLERANCE


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case["is_causal"] or case["name"] == "dividing"],
    ids=lambda case: case["name"],
)
@backends
def test_padding_is_nothing_where_torchscale_has_none_to_see(case, backend):
    found = run(case, padding="mask", mixing_grad="detached", backend=backend)
    for name, actual in found.items():
        assert relative_error(case, name, actual) <= TOLERANCE, name


@pytest.mark.parametrize(
    "case", [case for case in CASES if case["name"] == "ragged_tail"], ids=lambda case: case["name"]
)
def test_padding_counts_where_it_is_seen(case):
    found = run(case, padding="mask", mixing_grad="detached")
    assert relative_error(case, "out", found["out"]) > 0.01
