"""Which backend computes a block-sparse problem: an explicit choice or a reason, never a silent fallback."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from . import reference, sdpa, triton
from .problem import SparseProblem


class SparseBackend(Protocol):
    """What a backend module provides."""

    def unsupported(self, problem: SparseProblem, *, backward: bool = False, grad_lse: bool = False) -> str | None: ...

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        problem: SparseProblem,
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
        problem: SparseProblem,
        *,
        mask: Tensor | None = None,
        seed: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


SPARSE_BACKENDS: dict[str, SparseBackend] = {"sdpa": sdpa, "triton": triton, "reference": reference}
"""Every backend of block-sparse attention."""


def preference(device: str) -> tuple[str, ...]:
    """The backends that "auto" tries, the fastest first."""
    return ("triton", "sdpa", "reference") if torch.device(device).type == "cuda" else ("sdpa", "reference")


def check_sparse_backend(name: str) -> None:
    """Raise ValueError for a name that no backend of block-sparse attention has."""
    if not isinstance(name, str) or (name != "auto" and name not in SPARSE_BACKENDS):
        raise ValueError(f"backend is {name!r}; choose one of {', '.join(map(repr, ('auto', *SPARSE_BACKENDS)))}")


def choose_sparse(name: str, problem: SparseProblem, *, backward: bool = False, grad_lse: bool = False) -> str:
    """The backend for ``name``: itself, or with "auto" the first one that supports the problem.

    Raises:
        ValueError: an unknown name, or a backend asked for by name that cannot compute the problem.
    """
    check_sparse_backend(name)
    if name != "auto":
        reason = SPARSE_BACKENDS[name].unsupported(problem, backward=backward, grad_lse=grad_lse)
        if reason:
            raise ValueError(f"backend {name!r} cannot compute this: {reason}; use backend='auto' or 'reference'")
        return name
    passed = passed_over(problem, backward=backward, grad_lse=grad_lse)
    return preference(problem.device)[len(passed)]


def passed_over(
    problem: SparseProblem, *, backward: bool = False, grad_lse: bool = False
) -> tuple[tuple[str, str], ...]:
    """(backend, reason) for each that "auto" tries in vain; the next one computes the problem."""
    found: list[tuple[str, str]] = []
    for candidate in preference(problem.device):
        reason = SPARSE_BACKENDS[candidate].unsupported(problem, backward=backward, grad_lse=grad_lse)
        if reason is None:
            return tuple(found)
        found.append((candidate, reason))
    raise AssertionError("the reference backend takes every problem")
