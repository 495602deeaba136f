"""The fused kernels for Hopper GPUs: tensor memory accelerator, warp specialisation, one persistent launch.

They use Triton's experimental Gluon, so they run on the devices and Triton versions that they were tested on, and
nowhere else; `triton` and `sdpa` stand behind them.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..patterns.tiles import branch_groups, class_stride, part_of
from .problem import Problem
from .tables import LONGEST, capability, covered, groups, longest_position, outside
from .triton import zero_keys_arguments

if TYPE_CHECKING:
    from ..kernels.launch import Launch

TRITON_VERSIONS = ("3.6",)
"""Triton versions on which the kernels passed every test."""
HEAD_DIMS = (48, 64, 96, 128)
_BLOCK = 128
_BRANCHES = 8


@lru_cache(maxsize=1)
def _triton_version() -> str | None:
    try:
        return ".".join(version("triton").split(".")[:2])
    except PackageNotFoundError:
        return None


def unavailable(device: str = "cuda") -> str | None:
    """Why the kernels do not run on this device with the installed Triton, or None."""
    found = _triton_version()
    if found not in TRITON_VERSIONS:
        return f"the kernels are tested with Triton {', '.join(TRITON_VERSIONS)}, not {found or 'its absence'}"
    if torch.device(device).type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return f"the kernels need a Hopper GPU, not {device}"
    major, minor = capability(device)
    if (major, minor) != (9, 0):
        return f"the kernels need compute capability 9.0 (Hopper), not {major}.{minor}"
    return None


def unsupported(problem: Problem, *, backward: bool = False, grad_lse: bool = False) -> str | None:
    """Why this backend cannot compute the problem (or its backward pass), or None."""
    reason = unavailable(problem.device)
    if reason:
        return reason
    shape, options, pattern = problem.shape, problem.options, problem.pattern
    if problem.dtype not in (torch.bfloat16, torch.float16):
        return f"the kernels take bfloat16 and float16, not {problem.dtype}"
    if shape.head_dim not in HEAD_DIMS or shape.value_dim != shape.head_dim:
        return f"the kernels take equal head dims of {HEAD_DIMS}, not {shape.head_dim} and {shape.value_dim}"
    if len(pattern.branches) > _BRANCHES:
        return f"the kernels take at most {_BRANCHES} branches, not {len(pattern.branches)}"
    if problem.has_mask:
        return "the kernels take no key_padding_mask"
    if problem.part is not None:
        return "the kernels count heads from 0, not as part of a larger problem"
    if options.dropout_p:
        return "the kernels take no dropout"
    if options.scale <= 0:
        return f"the kernels need a positive scale, not {options.scale}"
    if backward and options.mixing_grad != "exact":
        return 'the backward kernel takes mixing_grad="exact" alone'
    if backward and torch.are_deterministic_algorithms_enabled():
        return "the backward kernel adds dQ in any order, and torch.use_deterministic_algorithms is on"
    # Strided rows are read through views of the whole batch, which need some length where a rate does not divide it.
    longest = longest_position(problem)
    if longest > LONGEST:
        return f"the kernels count positions up to 2^30, and they reach {longest}"
    parts = branch_groups(pattern, _BLOCK, longest, is_causal=options.is_causal)
    rates = {*pattern.dilation_rates, *(class_stride(part_of(pattern, part), _BLOCK, longest) for part in parts)}
    for rows in {shape.batch * shape.query_rows, shape.batch * shape.key_rows}:
        for rate in rates:
            if rows < rate or (rows % rate and rows // rate < _BLOCK):
                return f"the kernels need {_BLOCK * rate} rows for a rate of {rate}, or a multiple of it, not {rows}"
    if shape.batch * shape.key_rows + _BLOCK * max(rates) >= 2**31:
        return f"the kernels count rows in 32 bits, and there are {shape.batch * shape.key_rows}"
    return None


def peak_bytes(problem: Problem, *, backward: bool = False) -> int:
    """Predicted bytes allocated beyond the inputs at the peak, the result included."""
    shape = problem.shape
    rows, keys = shape.batch * shape.query_rows * shape.heads, shape.batch * shape.key_rows * shape.kv_heads
    if not backward:
        return rows * (shape.value_dim * 2 + 4)
    # Besides: (lse, delta) of every row, and float32 sums of dQ for a few heads at a time.
    return int((rows + 2 * keys) * shape.head_dim * 2 * 1.25)


@lru_cache(maxsize=256)
def _even(shape: torch.Size, strides: tuple[int, ...]) -> bool:
    """Whether rows are evenly spaced over the batch and, if the first does, start at multiples of 16 bytes."""
    steps = [stride for size, stride in zip(shape[1:3], strides[1:3], strict=True) if size > 1]
    even = shape[0] == 1 or strides[0] == shape[1] * strides[1]
    return strides[3] == 1 and even and all(step and step % 8 == 0 for step in steps)


def _ready(tensor: Tensor) -> Tensor:
    """The tensor, or a copy whose rows are evenly spaced over the batch and start at multiples of 16 bytes."""
    fits = _even(tensor.shape, tensor.stride()) and tensor.data_ptr() % 16 == 0
    return tensor if fits else tensor.contiguous()


@lru_cache(maxsize=64)
def _zero_keys(problem: Problem) -> Launch | None:
    """The launch of (out, lse) that adds zero keys, or None where there are none."""
    from ..kernels.launch import Address, Launch
    from ..kernels.zero_keys import zero_keys_kernel

    found = zero_keys_arguments(problem, problem.shape.value_dim)
    if found is None:
        return None
    grid, arguments = found
    return Launch(zero_keys_kernel, grid, (Address(0), Address(1), *arguments), torch.device(problem.device))


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    problem: Problem,
    *,
    mask: Tensor | None = None,
    seed: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(out (B, Nq, H, D), lse (B, Nq, H))."""
    from ..kernels import hopper_forward

    out, lse = hopper_forward.forward(
        _ready(query),
        _ready(key),
        _ready(value),
        groups=groups(problem, _BLOCK, "query"),
        interleaved=problem.pattern.head_offsets == "interleaved",
        is_causal=problem.options.is_causal,
        scale=problem.options.scale,
    )
    zero_keys = _zero_keys(problem)
    if zero_keys is not None:
        zero_keys(out, lse)
    if not covered(problem, "query"):  # rows in no document belong to no tile
        absent = outside(problem, query.device)
        out.masked_fill_(absent[:, :, None, None], 0)
        lse.masked_fill_(absent[:, :, None], -torch.inf)
    return out, lse


def backward(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value from the final (out, lse); ``grad_lse`` is (B, Nq, H)."""
    from ..kernels import hopper_backward

    return hopper_backward.backward(
        _ready(grad_out),
        grad_lse,
        _ready(query),
        _ready(key),
        _ready(value),
        out,
        lse,
        groups=groups(problem, _BLOCK, "key"),
        interleaved=problem.pattern.head_offsets == "interleaved",
        is_causal=problem.options.is_causal,
        scale=problem.options.scale,
    )
