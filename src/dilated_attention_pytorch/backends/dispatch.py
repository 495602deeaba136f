"""Which backend computes a problem: an explicit choice or a reason, never a silent fallback."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from . import reference, sdpa
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


BACKENDS: dict[str, Backend] = {"sdpa": sdpa, "reference": reference}
"""Every backend, the one that auto prefers first."""


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
    for candidate, backend in BACKENDS.items():
        reason = backend.unsupported(problem, grad_lse=grad_lse)
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
    fused = any(kernel.device == kind for kernel in KERNELS)
    return tuple(name for name in BACKENDS if name != "sdpa" or fused)
