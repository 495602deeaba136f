"""What "auto" tries, and in which order: a pure function, so every device can be asked about on any machine."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dilated_attention_pytorch.backends import gluon
from dilated_attention_pytorch.backends.dispatch import BACKENDS, preference
from dilated_attention_pytorch.backends.ops import make_problem

LONGNET = [2048, 4096, 8192], [1, 2, 4]


def problem(rows: int = 32768, *, device: str = "cuda", dim: int = 128, dtype: torch.dtype = torch.bfloat16, **options):
    query = torch.empty(1, rows, 16, dim, device="meta", dtype=dtype)
    settings = {"is_causal": False, "dropout_p": 0.0, "padding": "mask", "mixing_grad": "exact", **options}
    mask = settings.pop("mask", None)
    return make_problem(
        query, query, query, mask, None, None, *LONGNET, 0, settings["is_causal"], None, settings["dropout_p"],
        "contiguous", settings["padding"], settings["mixing_grad"], device=device,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "backward", "first"),
    [
        ({"device": "cpu"}, False, "sdpa"),
        ({}, False, "gluon"),
        ({"is_causal": True}, True, "gluon"),
        ({"rows": 2048}, False, "gluon"),
        ({"rows": 2048}, True, "gluon"),
        ({"rows": 8}, False, "triton"),
        ({"rows": 32768, "dim": 64, "is_causal": True}, True, "gluon"),
    ],
)
def test_the_fastest_comes_first(given, backward, first):
    order = preference(problem(**given), backward=backward)
    assert order[0] == first
    assert order[-1] == "reference"
    assert set(order) <= set(BACKENDS)


def test_masks_go_to_a_kernel_that_needs_no_copies():
    masked = problem(mask=torch.zeros(1, 32768, dtype=torch.bool))
    assert preference(masked) == ("gluon", "triton", "sdpa", "reference")
    assert preference(problem()) == ("gluon", "sdpa", "triton", "reference")
    assert preference(problem(rows=2048)) == ("gluon", "triton", "sdpa", "reference")
    assert preference(problem(device="cpu", mask=torch.zeros(1, 32768, dtype=torch.bool))) == ("sdpa", "reference")


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gluon, "unavailable", lambda device="cuda": None)


@pytest.mark.usefixtures("hopper")
def test_what_the_hopper_kernels_refuse():
    assert gluon.unsupported(problem()) is None
    assert gluon.unsupported(problem(), backward=True) is None
    for given, backward, reason in (
        ({"dtype": torch.float32}, False, "take bfloat16 and float16, not torch.float32"),
        ({"dim": 80}, False, "equal head dims"),
        ({"mask": torch.zeros(1, 32768, dtype=torch.bool)}, False, "no key_padding_mask"),
        ({"dropout_p": 0.1}, False, "no dropout"),
        ({"mixing_grad": "detached"}, True, 'mixing_grad="exact" alone'),
        ({"rows": 70}, False, "need 512 rows for a rate of 4, or a multiple of it, not 70"),
    ):
        assert reason in (gluon.unsupported(problem(**given), backward=backward) or "")
    assert gluon.unsupported(problem(padding="zeros")) is None
    assert gluon.unsupported(problem(mixing_grad="detached")) is None
    negative = problem()
    negative = replace(negative, options=replace(negative.options, scale=-1.0))
    assert "positive scale" in (gluon.unsupported(negative) or "")


@pytest.mark.usefixtures("hopper")
def test_deterministic_algorithms_leave_the_backward_kernel_out():
    torch.use_deterministic_algorithms(True)
    try:
        assert "any order" in (gluon.unsupported(problem(), backward=True) or "")
        assert gluon.unsupported(problem()) is None
    finally:
        torch.use_deterministic_algorithms(False)


def test_without_the_tested_triton_or_a_gpu_the_reason_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gluon, "_triton_version", lambda: "9.9")
    assert "tested with Triton 3.6, not 9.9" in (gluon.unsupported(problem()) or "")
    monkeypatch.setattr(gluon, "_triton_version", lambda: "3.6")
    if not torch.cuda.is_available():
        assert "need a Hopper GPU" in (gluon.unsupported(problem()) or "")
