"""Which backend computes a problem: an explicit choice or a reason, never a silent fallback."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ..kernels import has_triton
from . import gluon, reference, sdpa, triton
from .problem import Problem

P = TypeVar("P", contravariant=True)


class Computes(Protocol[P]):
    """What a backend module of problems P provides."""

    def unsupported(self, problem: P, *, backward: bool = False, grad_lse: bool = False) -> str | None: ...

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        problem: P,
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
        problem: P,
        *,
        mask: Tensor | None = None,
        seed: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class Backend(Computes[Problem], Protocol):
    """What a backend module provides."""

    def peak_bytes(self, problem: Problem, *, backward: bool = False) -> int: ...


_MANY_CALLS = 64
"""Launches of vendor kernels and merges that cost more than one launch of a slower kernel."""

BACKENDS: dict[str, Backend] = {"gluon": gluon, "sdpa": sdpa, "triton": triton, "reference": reference}
"""Every backend."""


_FEW_ROWS = 1 << 16
"""(batch, row, head) triples up to which a launch of one kernel costs less than what it computes."""


def preference(problem: Problem, *, backward: bool = False) -> tuple[str, ...]:
    """The backends that "auto" tries, the fastest first: a pure function of the problem, from runs on an H200.

    The Hopper kernels are the fastest where they run, in both directions (forward, N = 2048, H = 16, D = 64: 0.06 ms,
    plain Triton 0.11), but for decoding, where plain Triton shares the keys of a row. Else, with few rows one launch of
    plain Triton is done sooner than the many calls of the vendor's kernels; with more of them those, on views, beat it,
    unless they have to copy every tensor (masks, zero keys, unequal head dims) or to be called very often.
    """
    if torch.device(problem.device).type != "cuda":
        return "sdpa", "reference"
    shape, options = problem.shape, problem.options
    if shape.query_rows <= triton.DECODED_ROWS and not backward:
        return "triton", "gluon", "sdpa", "reference"
    rows = shape.batch * shape.query_rows * shape.heads
    awkward = (
        rows <= (2 if backward else 1) * _FEW_ROWS
        or problem.has_mask
        or (options.padding == "zeros" and not options.is_causal)
        or shape.head_dim != shape.value_dim
        or shape.head_dim % 8 != 0
        or len(problem.plan.calls) > _MANY_CALLS
    )
    return ("gluon", "triton", "sdpa", "reference") if awkward else ("gluon", "sdpa", "triton", "reference")


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
    check_name(name, BACKENDS)


def choose(name: str, problem: Problem, *, backward: bool = False, grad_lse: bool = False) -> Choice:
    """The backend for ``name``: itself, or with "auto" the first one that supports the problem.

    ``backward`` asks for the backward pass, ``grad_lse`` for one with a gradient of the lse.

    Raises:
        ValueError: an unknown name, or a backend asked for by name that cannot compute the problem.
    """
    check_backend(name)
    return _choose(name, problem, backward, grad_lse, torch.are_deterministic_algorithms_enabled())


@lru_cache(maxsize=1024)
def _choose(name: str, problem: Problem, backward: bool, grad_lse: bool, deterministic: bool) -> Choice:
    """``deterministic`` is torch's setting, which `unsupported` reads."""
    preferred = preference(problem, backward=backward) if name == "auto" else ()
    return Choice(*select(name, BACKENDS, preferred, problem, backward=backward, grad_lse=grad_lse))


def check_name(name: str, backends: Mapping[str, object]) -> None:
    """Raise ValueError for a name that is neither "auto" nor one of ``backends``."""
    if not isinstance(name, str) or (name != "auto" and name not in backends):
        raise ValueError(f"backend is {name!r}; choose one of {', '.join(map(repr, ('auto', *backends)))}")


def select(
    name: str,
    backends: Mapping[str, Computes[P]],
    preferred: Sequence[str],
    problem: P,
    *,
    backward: bool,
    grad_lse: bool,
) -> tuple[str, tuple[tuple[str, str], ...]]:
    """The backend for ``name``: itself, or with "auto" the first of ``preferred`` that supports the problem.

    With it (backend, reason) for each that was tried in vain; ValueError for a named one that cannot compute it.
    """
    if name != "auto":
        reason = backends[name].unsupported(problem, backward=backward, grad_lse=grad_lse)
        if reason:
            raise ValueError(f"backend {name!r} cannot compute this: {reason}; use backend='auto' or 'reference'")
        return name, ()
    skipped: list[tuple[str, str]] = []
    for candidate in preferred:
        reason = backends[candidate].unsupported(problem, backward=backward, grad_lse=grad_lse)
        if reason is None:
            return candidate, tuple(skipped)
        skipped.append((candidate, reason))
    raise AssertionError("the reference backend takes every problem")


def available_backends(device: str | torch.device = "cpu") -> tuple[str, ...]:
    """Names of the backends that run on ``device``, the fastest first.

    >>> available_backends("cpu")
    ('sdpa', 'reference')
    """
    from .vendor import KERNELS

    if not isinstance(device, (str, torch.device)):
        raise ValueError(f"device is {device!r}; give a name such as 'cuda', or a torch.device")
    kind = torch.device(device).type
    absent = {
        "sdpa": all(kernel.device != kind for kernel in KERNELS),
        "gluon": kind != "cuda" or gluon.unavailable() is not None,
        "triton": kind != "cuda" or not has_triton(),
    }
    return tuple(name for name in BACKENDS if not absent.get(name, False))
