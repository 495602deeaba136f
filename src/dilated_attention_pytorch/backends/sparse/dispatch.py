"""Which backend computes a block-sparse problem: an explicit choice or a reason, never a silent fallback."""

from __future__ import annotations

import torch

from ..dispatch import Computes, check_name, select
from . import gluon, reference, sdpa, triton
from .problem import SparseProblem

SPARSE_BACKENDS: dict[str, Computes[SparseProblem]] = {
    "gluon": gluon, "sdpa": sdpa, "triton": triton, "reference": reference
}  # fmt: skip
"""Every backend of block-sparse attention."""


def preference(device: str) -> tuple[str, ...]:
    """The backends that "auto" tries, the fastest first."""
    return ("gluon", "triton", "sdpa", "reference") if torch.device(device).type == "cuda" else ("sdpa", "reference")


def check_sparse_backend(name: str) -> None:
    """Raise ValueError for a name that no backend of block-sparse attention has."""
    check_name(name, SPARSE_BACKENDS)


def choose_sparse(
    name: str, problem: SparseProblem, *, backward: bool = False, grad_lse: bool = False
) -> tuple[str, tuple[tuple[str, str], ...]]:
    """The backend for ``name``, and (backend, reason) for each that "auto" tried in vain; see `dispatch.select`."""
    check_sparse_backend(name)
    preferred = preference(problem.device)
    return select(name, SPARSE_BACKENDS, preferred, problem, backward=backward, grad_lse=grad_lse)
