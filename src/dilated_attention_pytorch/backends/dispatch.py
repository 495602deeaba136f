"""Which backend computes a problem: an explicit choice or a reason, never a silent fallback."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from . import reference, sdpa, triton
from .problem import Problem


class Backend(Protocol):
    """What a backend module provides."""

    def unsupported(self, problem: Problem, *, grad_lse: bool = False) -> str | None: ...

    def peak_bytes(self, problem: Problem, *, backward: bool = False) -> int: ...

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        problem: Problem,
        *,
        mask: Tensor | None = None,
        seed: int | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    def backward(
        self,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        problem: Problem,
        *,
        mask: Tensor | None = None,
        seed: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


_MANY_CALLS = 64
"""Launches of vendor kernels and merges that cost more than one launch of a slower kernel."""

BACKENDS: dict[str, Backend] = {"sdpa": sdpa, "triton": triton, "reference": reference}
"""Every backend."""


def preference(problem: Problem) -> tuple[str, ...]:
    """The backends that "auto" tries, the fastest first: a pure function of the problem.

    On a GPU the fused Triton kernels take what the vendor's cannot say (dropout) or say only by copies of every
    tensor (masks, zero keys, a gradient of the lse, grouped heads in more calls).
    """
    if torch.device(problem.device).type != "cuda":
        return "sdpa", "reference"
    shape, options = problem.shape, problem.options
    awkward = (
        problem.has_mask
        or (options.padding == "zeros" and not options.is_causal)
        or shape.head_dim != shape.value_dim
        or shape.head_dim % 8 != 0
        or len(problem.plan.calls) > _MANY_CALLS
    )
    return ("triton", "sdpa", "reference") if awkward else ("sdpa", "triton", "reference")


@dataclass(frozen=True, slots=True)
class Choice:
    """The backend that computes a problem, and why each one before it does not."""

    name: str
    skipped: tuple[tuple[str, str], ...]

    @property
    def backend(self) -> Backend:
        """The backend's functions."""
        return BACKENDS[self.name]


def check_backend(name: str) -> None:
    """Raise ValueError for a name that no backend has."""
    if not isinstance(name, str) or (name != "auto" and name not in BACKENDS):
        raise ValueError(f"backend is {name!r}; choose one of {', '.join(map(repr, ('auto', *BACKENDS)))}")


def choose(name: str, problem: Problem, *, grad_lse: bool = False) -> Choice:
    """The backend for ``name``: itself, or with "auto" the first one that supports the problem.

    ``grad_lse`` asks for a backward pass with a gradient of the lse.

    Raises:
        ValueError: an unknown name, or a backend asked for by name that cannot compute the problem.
    """
    check_backend(name)
    if name != "auto":
        reason = BACKENDS[name].unsupported(problem, grad_lse=grad_lse)
        if reason:
            raise ValueError(f"backend {name!r} cannot compute this: {reason}; use backend='auto' or 'reference'")
        return Choice(name, ())
    skipped: list[tuple[str, str]] = []
    for candidate in preference(problem):
        reason = BACKENDS[candidate].unsupported(problem, grad_lse=grad_lse)
        if reason is None:
            return Choice(candidate, tuple(skipped))
        skipped.append((candidate, reason))
    raise AssertionError("the reference backend takes every problem")


def available_backends(device: str | torch.device = "cpu") -> tuple[str, ...]:
    """Names of the backends that run on ``device``, the fastest first.

    >>> available_backends("cpu")
    ('sdpa', 'reference')
    """
    from .vendor import KERNELS

    kind = torch.device(device).type
    absent = {
        "sdpa": all(kernel.device != kind for kernel in KERNELS),
        "triton": kind != "cuda" or find_spec("triton") is None,
    }
    return tuple(name for name in BACKENDS if not absent.get(name, False))
