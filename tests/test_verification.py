"""`verify`: passes what is right and fails what is wrong."""

from __future__ import annotations

import pytest
import torch

from dilated_attention_pytorch import verify
from dilated_attention_pytorch.backends import sdpa

SHAPE = (2, 130, 4, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"padding": "zeros", "mixing_grad": "detached"},
        {"key_padding_mask": torch.arange(130).expand(2, -1) % 3 == 0},
        {"key_start": torch.tensor([-7, 5])},
        {"dropout_p": 0.25},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_every_option_verifies(dtype, options):
    found = verify(SHAPE, SHAPE, SHAPE, [32, 128], [1, 4], dtype=dtype, **options)
    assert found.passed, str(found)
    assert found.backend == ("reference" if "dropout_p" in options else "sdpa")
    assert [check.name for check in found.checks] == ["out", "lse", "dq", "dk", "dv"]
    assert all(check.bound < 1 for check in found.checks)


@pytest.mark.parametrize(("index", "wrong"), [(0, "dq"), (1, "dk"), (2, "dv")])
def test_a_wrong_gradient_fails_by_name(monkeypatch, index, wrong):
    right = sdpa.backward

    def backward(*args, **kwargs):
        grads = list(right(*args, **kwargs))
        grads[index][0, 3, 1, 2] += 0.01
        return tuple(grads)

    monkeypatch.setattr(sdpa, "backward", backward)
    found = verify(SHAPE, SHAPE, SHAPE, [32, 128], [1, 4])
    assert not found.passed
    assert [check.name for check in found.checks if not check.passed] == [wrong]
    assert "FAILED" in str(found)


def test_nan_fails(monkeypatch):
    right = sdpa.forward

    def forward(*args, **kwargs):
        out, lse = right(*args, **kwargs)
        out[1, 129, 3, 15] = torch.nan
        return out, lse

    monkeypatch.setattr(sdpa, "forward", forward)
    found = verify(SHAPE, SHAPE, SHAPE, [32, 128], [1, 4])
    assert not found.checks[0].passed


def test_given_tensors_are_used():
    q, k, v = (torch.full(SHAPE, 0.5) for _ in range(3))
    v[0, 0, 0, 0] = torch.inf  # reaches out, so that no finite bound can hold
    assert not verify(q, k, v, [32], [1]).passed
    v[0, 0, 0, 0] = 0.5
    assert verify(q, k, v, [32], [1]).passed


def test_the_generator_of_the_caller_is_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    verify(SHAPE, SHAPE, SHAPE, [32], [1], dropout_p=0.5)
    assert torch.equal(before, torch.get_rng_state())
