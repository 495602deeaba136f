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


_SCATTERED = 0.4
"""Share of their products' pairs below which the Hopper kernels, at twice the rate, are no faster than plain Triton."""


def preference(device: str, fill: float = 1.0) -> tuple[str, ...]:
    """The backends that "auto" tries, the fastest first.

    ``fill`` is the share of the pairs of the Hopper kernels' products that the lists show: blocks of 64 that lie far
    from each other are a quarter of a tile each.
    """
    if torch.device(device).type != "cuda":
        return "sdpa", "reference"
    return ("triton", "gluon", "sdpa", "reference") if fill < _SCATTERED else ("gluon", "triton", "sdpa", "reference")


def check_sparse_backend(name: str) -> None:
    """Raise ValueError for a name that no backend of block-sparse attention has."""
    check_name(name, SPARSE_BACKENDS)


def choose_sparse(
    name: str, problem: SparseProblem, *, backward: bool = False, grad_lse: bool = False
) -> tuple[str, tuple[tuple[str, str], ...]]:
    """The backend for ``name``, and (backend, reason) for each that "auto" tried in vain; see `dispatch.select`."""
    check_sparse_backend(name)
    fill = 1.0
    if name == "auto" and problem.pattern.block_size == 64 and gluon.unsupported(problem) is None:
        fill = problem.listed.forward_lists.fill
    preferred = preference(problem.device, fill)
    return select(name, SPARSE_BACKENDS, preferred, problem, backward=backward, grad_lse=grad_lse)
