"""The log-sum-exp algebra: partial results of one softmax over a union of keys, and how they join.

A partial is (out, lse) over some of a row's keys. Two partials over disjoint keys, or over the parts of a multiset,
join to exactly what one softmax over all of them gives: lse = log(exp(a) + exp(b)), and out is the mean of both
outs, weighted by exp(lse_i - lse). That is LongNet's equation 10, and also how ring steps and streamed chunks join.
An empty partial is (0, -inf), the neutral element.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Where partials of this dtype are joined: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def merge_(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> None:
    """Join the partial (other_out, other_lse) into (out, lse) in place.

    ``out`` (..., D) and ``lse`` (...) may be strided views; ``other_out`` is cast to the dtype of ``out``. Where both
    are empty the row stays empty.
    """
    # Of the difference, not exp(other_lse - joined): the rounding of the joined lse would be the weight's error.
    weight = torch.sigmoid(other_lse - lse).nan_to_num_(nan=0.0)  # -inf - -inf: an empty row stays as it is
    out.lerp_(other_out.to(out.dtype), weight.unsqueeze(-1))
    lse.copy_(torch.logaddexp(lse, other_lse))


def add_zero_keys_(out: Tensor, lse: Tensor, count: int | Tensor) -> None:
    """Join ``count`` keys of zeros with values of zeros in place: a partial with out 0 and lse log(count).

    A count for each row is a tensor that broadcasts to ``lse``.
    """
    # A number is filled in on the device: copying it there would synchronise.
    zeros = count.to(lse.dtype).log() if isinstance(count, Tensor) else lse.new_full((), math.log(count))
    out.mul_(torch.sigmoid(lse - zeros).nan_to_num_(nan=0.0).unsqueeze(-1).to(out.dtype))
    lse.copy_(torch.logaddexp(lse, zeros))
