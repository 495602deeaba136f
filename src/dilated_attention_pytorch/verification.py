"""Check an installation on the user's own shapes: the backend that runs against the formula in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .backends import reference
from .backends.dispatch import choose
from .explanation import as_shape, describe
from .functional import dilated_attention_with_lse
from .testing import error_bound, max_error


@dataclass(frozen=True)
class Check:
    """One quantity: its largest error against the oracle and the bound that it has to keep."""

    name: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the bound (NaN is not)."""
        return self.error <= self.bound


@dataclass(frozen=True)
class Verification:
    """What `verify` found; ``str()`` is a table."""

    backend: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def __str__(self) -> str:
        rows = [f"{c.name:<6}{c.error:>12.3e}{c.bound:>12.3e}  {'ok' if c.passed else 'FAILED'}" for c in self.checks]
        return "\n".join([f"backend {self.backend}", f"{'':<6}{'max error':>12}{'bound':>12}", *rows])


def verify(
    query: Tensor | Sequence[int],
    key: Tensor | Sequence[int],
    value: Tensor | Sequence[int],
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
    seed: int = 0,
    **options: Any,
) -> Verification:
    """Run a backend forward and backward and compare out, lse and the gradients with the float64 reference.

    The bound is twice the error of an eager implementation in the same dtype (the reference with its products taken
    in that dtype) plus four units in the last place of the largest value.

    Args:
        query, key, value: tensors, or shapes (B, N_q, H, D), (B, N, H_kv, D), (B, N, H_kv, D_v) to draw normal
            numbers for.
        segment_lengths, dilation_rates, backend: as for `dilated_attention`; "auto" checks the backend it picks.
        device, dtype: of the drawn tensors.
        seed: of the drawn tensors, of the incoming gradients and of dropout.
        **options: every other option of `dilated_attention`.

    Returns:
        A `Verification`; print it, or look at ``.passed``.

    Raises:
        ValueError: whatever `dilated_attention` would raise for the same arguments.

    >>> verify((1, 200, 4, 16), (1, 200, 4, 16), (1, 200, 4, 16), [64, 256], [1, 4]).passed
    True
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: Sequence[int], like: Tensor | None = None) -> Tensor:
        drawn = torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
        return drawn.to(device=like.device, dtype=like.dtype) if like is not None else drawn.to(device, dtype)

    given = {"query": query, "key": key, "value": value}
    q, k, v = (t if isinstance(t, Tensor) else draw(as_shape(name, t)) for name, t in given.items())
    problem = describe(q, k, v, segment_lengths, dilation_rates, **options)
    choice = choose(backend, problem)
    with torch.random.fork_rng(devices=[q.device] if q.device.type == "cuda" else []):
        torch.manual_seed(seed)
        dropout_seed = int(torch.randint(2**62, (1,), device=q.device)) if problem.options.dropout_p else None
        torch.manual_seed(seed)
        leaves = tuple(t.detach().requires_grad_() for t in (q, k, v))
        out, lse = dilated_attention_with_lse(
            leaves[0], leaves[1], leaves[2], segment_lengths, dilation_rates, backend=choice.name, **options
        )
    grad_out = draw(out.shape, out)
    grad_lse = draw(lse.shape, lse).masked_fill(lse == -torch.inf, 0) if lse.requires_grad else None
    outputs, grads = ([out, lse], [grad_out, grad_lse]) if grad_lse is not None else ([out], [grad_out])
    actual = [out.detach(), lse.detach(), *torch.autograd.grad(outputs, leaves, grads)]

    def oracle(dtype: torch.dtype, products: torch.dtype | None) -> list[Tensor]:
        a, b, c = (t.detach().to(dtype) for t in (q, k, v))
        mask, into_lse = options.get("key_padding_mask"), None if grad_lse is None else grad_lse.transpose(1, 2)
        result, result_lse = reference.forward(a, b, c, problem, mask=mask, seed=dropout_seed, matmul_dtype=products)
        gradients = reference.backward(
            grad_out.to(dtype), into_lse, a, b, c, result, result_lse, problem,
            mask=mask, seed=dropout_seed, matmul_dtype=products,
        )  # fmt: skip
        return [result, result_lse.transpose(1, 2), *gradients]

    gold, eager = oracle(torch.float64, None), oracle(q.dtype, q.dtype)
    checks = [
        Check(name, max_error(a, g), error_bound(g, e, q.dtype))
        for name, a, g, e in zip(("out", "lse", "dq", "dk", "dv"), actual, gold, eager, strict=True)
    ]
    return Verification(choice.name, tuple(checks))
