"""The fused kernels in plain Triton, for every GPU that Triton supports: every option, no partial results in memory."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from ..kernels import has_triton, interpreted
from .problem import Problem
from .tables import (
    LONGEST,
    branch_table,
    capability,
    cell_table,
    covered,
    hold_for_replays,
    longest_position,
    pairs,
    tiles,
)

_LARGEST_DIM = 256
_ROWS = 64
"""Rows that one program of a kernel without products takes."""
DECODED_ROWS = 8
"""Query rows up to which the keys of each are shared among programs."""


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Rows of a tile, rows of a block that it meets, and how the compiler shall spread them."""

    block: int
    others: int
    warps: int
    stages: int


def unsupported(problem: Problem, *, backward: bool = False, grad_lse: bool = False) -> str | None:
    """Why this backend cannot compute the problem, or None."""
    if not has_triton():
        return "Triton is not installed"
    kind = torch.device(problem.device).type
    if kind != "cuda" and not (kind == "cpu" and interpreted()):
        return f"Triton has no kernels for {kind} tensors"
    if kind == "cpu" and problem.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies the bits of bfloat16 numbers as integers"
    if problem.part is not None:
        return "the kernels count heads and dropout from 0, not as part of a larger problem"
    if problem.dtype == torch.float64:
        return "the kernels accumulate in float32, too little for float64"
    if kind == "cuda" and torch.version.hip is None and capability(problem.device) < (8, 0):
        return "the kernels need compute capability 8.0 or later"
    if (
        kind == "cuda"
        and problem.dtype.itemsize == 2
        and _padded(problem.shape.value_dim) < _padded(problem.shape.head_dim)
    ):
        return "with a value dim narrower than the head dim Triton 3.6 gives wrong sums in half precision"
    largest = max(problem.shape.head_dim, problem.shape.value_dim)
    if largest > _LARGEST_DIM:
        return f"a head dim of {largest} does not fit a tile; at most {_LARGEST_DIM}"
    if longest_position(problem) > LONGEST:
        return f"the kernels count positions up to 2^30, and they reach {longest_position(problem)}"
    if problem.options.scale <= 0:
        return f"the kernels need a positive scale, not {problem.options.scale}: they look for the largest score first"
    return None


def peak_bytes(problem: Problem, *, backward: bool = False) -> int:
    """Predicted bytes allocated beyond the inputs at the peak, the result included."""
    shape, size = problem.shape, problem.dtype.itemsize
    rows, keys = shape.batch * shape.query_rows * shape.heads, shape.batch * shape.key_rows * shape.kv_heads
    if not backward:
        return rows * (shape.value_dim * size + 4)
    deltas, own = 1, 0
    if problem.options.mixing_grad == "detached":
        deltas, own = len(problem.pattern.branches), rows * (shape.value_dim * size + 4)
    gradients = rows * shape.head_dim * size + keys * (shape.head_dim + shape.value_dim) * size
    return max(gradients, own) + deltas * rows * 4


@lru_cache(maxsize=16)
def _shared_memory(device: str) -> int:
    if torch.device(device).type != "cuda":
        return 1 << 17
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 1 << 16))


@lru_cache(maxsize=64)
def _sizes(dim: int, itemsize: int, device: str, direction: Literal["forward", "query", "key"]) -> _Sizes:
    """Tile sizes that ran fastest for a padded head dim, cut down to the shared memory of the device."""
    if torch.device(device).type == "cpu":
        return _Sizes(16, 16, 4, 1)
    if itemsize == 4:
        size = _Sizes(64, 32, 4, 2) if dim <= 64 else _Sizes(64, 16, 4, 2) if dim <= 128 else _Sizes(32, 16, 4, 1)
    elif dim > 128:
        size = _Sizes(64, 32, 4 if direction == "forward" else 8, 2)
    elif direction == "forward":
        size = _Sizes(128, 64, 4 if dim <= 64 else 8, 3)
    elif direction == "query":
        size = _Sizes(128, 64, 4 if dim <= 64 else 8, 2)
    else:
        size = _Sizes(128, 64, 8, 2) if dim <= 64 else _Sizes(64, 32, 4, 2)
    resident = (1 if direction == "forward" else 2) * size.block * dim * itemsize
    while size.stages > 1 and resident + 2 * size.stages * size.others * dim * itemsize > _shared_memory(device):
        size = replace(size, stages=size.stages - 1)
    return size


def _padded(dim: int) -> int:
    return max(16, 1 << (dim - 1).bit_length())


def _unit(tensor: Tensor) -> int:
    """Elements of 16 bytes, the widest load."""
    return 16 // tensor.element_size()


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy with rows that start at multiples of 16 bytes, padded with zeros.

    Narrower loads would be slow; and Triton 3.6 overwrites a 16-bit operand that it cannot load asynchronously while
    the matrix unit still reads it.
    """
    unit = _unit(tensor)
    steps = [stride for size, stride in zip(tensor.shape[:3], tensor.stride()[:3], strict=True) if size > 1]
    if tensor.stride(3) == 1 and not any(n % unit for n in (tensor.shape[3], *steps)) and tensor.data_ptr() % 16 == 0:
        return tensor
    return torch.nn.functional.pad(tensor, (0, -tensor.shape[3] % unit)).contiguous()


def _shared(problem: Problem, mask: Tensor | None, seed: int | None, aligned: list[Tensor]) -> dict[str, Any]:
    """Arguments that every kernel takes; ``aligned`` are query, key, value and in the backward pass grad_out."""
    shape, options = problem.shape, problem.options
    dim, value_dim = aligned[0].shape[3], aligned[2].shape[3]
    hidden = aligned[0] if mask is None else mask.contiguous().view(torch.uint8)
    dropout = seed is not None
    return {
        "hidden": hidden,
        "hidden_batch": shape.key_rows,
        "branches": branch_table(problem.pattern, problem.device),
        "num_branches": len(problem.pattern.branches),
        "num_heads": shape.heads,
        "group": shape.heads // shape.kv_heads,
        "query_rows_total": shape.query_rows,
        "first_query": shape.key_rows - shape.query_rows,
        "scale_log2": options.scale * math.log2(math.e),
        "seed": seed or 0,
        "drop_below": round(options.dropout_p * 2**32) if dropout else 0,
        "keep_scale": 1 / (1 - options.dropout_p) if dropout else 1.0,
        "D": dim,
        "PADDED": _padded(dim),
        "DV": value_dim,
        "PADDED_V": _padded(value_dim),
        "CAUSAL": options.is_causal,
        "interleaved": int(problem.pattern.head_offsets == "interleaved"),
        "HIDDEN": mask is not None,
        "DROPOUT": dropout,
        "PRECISION": "tf32x3" if problem.dtype == torch.float32 else "tf32",
        # In units of 16 bytes: Triton sees that a product with a constant is aligned, of an argument only so for 16.
        "UNIT": _unit(aligned[0]),
        **{
            f"{name}_{axis}": tensor.stride(i) // _unit(tensor) if tensor.shape[i] > 1 else 0
            for name, tensor in zip("qkvg", aligned, strict=False)
            for i, axis in enumerate(("batch", "row", "head"))
        },
    }


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    problem: Problem,
    *,
    mask: Tensor | None = None,
    seed: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(out (B, Nq, H, Dv), lse (B, Nq, H))."""
    return _forward(query, key, value, problem, mask, seed)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    problem: Problem,
    mask: Tensor | None,
    seed: int | None,
    *,
    first_branch: int = 0,
) -> tuple[Tensor, Tensor]:
    """``first_branch`` is what dropout counts branches from, where the problem is one branch of another."""
    from ..kernels.forward import forward_kernel

    shape = problem.shape
    aligned = [_aligned(t) for t in (query, key, value)]
    dim, value_dim = aligned[0].shape[3], aligned[2].shape[3]
    whole = covered(problem, "query")
    out = _result((*query.shape[:3], value_dim), query, whole)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    if not whole:
        lse.fill_(-torch.inf)
    common = _shared(problem, mask, seed, aligned) | {
        "out": out,
        "lse": lse,
        "first_branch": first_branch,
    }
    if shape.query_rows <= DECODED_ROWS:
        _decode(aligned, problem, common)
    else:
        size = _sizes(_padded(max(dim, value_dim)), problem.dtype.itemsize, problem.device, "forward")
        cells, stride = tiles(problem, size.block, "query")
        table = cells.device
        if len(table):
            _hold(table, common["branches"])
            forward_kernel[(len(table) * stride * shape.heads,)](
                *aligned, cells=table, num_cells=len(table), stride=stride, BLOCK=size.block, KEYS=size.others,
                num_warps=size.warps, num_stages=size.stages, **common,
            )  # fmt: skip
    add_zero_keys_(out, lse, problem)
    return _narrow(out, shape.value_dim), lse


def add_zero_keys_(out: Tensor, lse: Tensor, problem: Problem) -> None:
    """Join the zero keys of ``padding="zeros"`` to a finished (out, lse), in place; most rows have none."""
    from ..kernels.zero_keys import zero_keys_kernel

    found = zero_keys_arguments(problem, out.shape[3])
    if found is not None:
        grid, arguments = found
        _hold(*arguments[:2])
        zero_keys_kernel[(grid,)](out, lse, *arguments)


@lru_cache(maxsize=64)
def zero_keys_arguments(problem: Problem, value_dim: int) -> tuple[int, tuple[Any, ...]] | None:
    """Programs of the zero keys' kernel and its arguments behind (out, lse), or None where there are no zero keys."""
    pattern, shape, documents = problem.pattern, problem.shape, problem.documents
    if problem.options.padding != "zeros" or problem.options.is_causal:
        return None
    if all(d.length % w == 0 and w % r == 0 for d in documents for w, r in pairs(pattern)):
        return None
    table = cell_table(pattern, shape, documents, _ROWS, "query", problem.device).device
    branches = branch_table(pattern, problem.device)
    arguments = (
        table, branches, len(table), 1, int(pattern.head_offsets == "interleaved"), len(pattern.branches), shape.heads,
        shape.query_rows, value_dim, _padded(value_dim), _ROWS,
    )  # fmt: skip
    return len(table) * shape.heads, arguments


def _hold(*tables: Tensor) -> None:
    if tables[0].is_cuda:
        hold_for_replays(*tables)


def _narrow(tensor: Tensor, dim: int) -> Tensor:
    """Without the columns that `_aligned` added."""
    return tensor if tensor.shape[3] == dim else tensor[..., :dim].contiguous()


def _decode(aligned: list[Tensor], problem: Problem, common: dict[str, Any]) -> None:
    """Few query rows: programs that share a row's keys fill the device where tiles of rows cannot."""
    from ..kernels.decode import decode_kernel

    shape, device = problem.shape, aligned[0].device
    table = cell_table(problem.pattern, shape, problem.documents, 1, "query", problem.device).device
    tasks = len(table) * shape.heads
    if not tasks:
        return
    _hold(table, common["branches"])
    keys = 64 if common["PADDED"] * aligned[0].element_size() <= 256 else 32
    longest = longest_position(problem)
    blocks = sum(-(-min(w, longest) // r // keys) for w, r in pairs(problem.pattern))
    wanted = max(1, min(blocks // 2, 4 * _processors(problem.device) // tasks, 64))
    splits = 1 << (wanted.bit_length() - 1)
    decode_kernel[(tasks * splits,)](
        *aligned, parts=torch.empty(tasks * splits, common["PADDED_V"] + 2, dtype=torch.float32, device=device),
        tickets=_tickets(1 << (tasks - 1).bit_length(), device), cells=table, num_cells=len(table),
        stride=1, KEYS=keys, SPLITS=splits, num_warps=4, num_stages=2, **common,
    )  # fmt: skip


@lru_cache(maxsize=16)
def _processors(device: str) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.startswith("cuda") else 2


def _tickets(count: int, device: torch.device) -> Tensor:
    """Counters that every launch leaves at zero; one set a stream, since launches of one stream never overlap."""
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():  # replays of several graphs may overlap: each has its own
        return torch.zeros(count, dtype=torch.int32, device=device)
    return _kept_tickets(count, device, torch.cuda.current_stream(device).cuda_stream)


@lru_cache(maxsize=64)
def _kept_tickets(count: int, device: torch.device, stream: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int32, device=device)


def _result(size: tuple[int, ...], like: Tensor, whole: bool) -> Tensor:
    make = torch.empty if whole else torch.zeros
    return make(size, dtype=like.dtype, device=like.device)


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
    from ..kernels.backward import key_kernel, query_kernel

    shape = problem.shape
    if problem.options.mixing_grad == "exact":
        delta = _delta(out, grad_out, grad_lse)
        branch_stride = 0
    else:
        # Each branch is differentiated with its own output; the weights exp(branch lse - lse) are constants, so
        # that P is the same and only delta differs.
        alone = [problem.branch(i) for i in range(len(problem.pattern.branches))]
        parts = (_forward(query, key, value, p, mask, seed, first_branch=i)[0] for i, p in enumerate(alone))
        delta = torch.stack([_delta(part, grad_out, grad_lse) for part in parts])
        branch_stride = delta.stride(0)
    aligned = [_aligned(t) for t in (query, key, value, grad_out)]
    by_key = covered(problem, "key")
    dq = _result(tuple(aligned[0].shape), query, covered(problem, "query"))
    dk, dv = (_result(tuple(t.shape), t, by_key) for t in aligned[1:3])
    common = {
        **_shared(problem, mask, seed, aligned),
        "lse": lse,
        "delta": delta,
        "delta_branch": branch_stride,
        "scale": problem.options.scale,
    }
    dim, size = max(dq.shape[3], dv.shape[3]), problem.dtype.itemsize
    sizes = _sizes(_padded(dim), size, problem.device, "query")
    cells, stride = tiles(problem, sizes.block, "query")
    table = cells.device
    if len(table):
        _hold(table, common["branches"])
        query_kernel[(len(table) * stride * shape.heads,)](
            *aligned[:3], grad_out=aligned[3], grad_query=dq, cells=table, num_cells=len(table), stride=stride,
            BLOCK=sizes.block, KEYS=sizes.others, num_warps=sizes.warps, num_stages=sizes.stages, **common,
        )  # fmt: skip
    sizes = _sizes(_padded(dim), size, problem.device, "key")
    cells, stride = tiles(problem, sizes.block, "key")
    table = cells.device
    if len(table):
        _hold(table)
        key_kernel[(len(table) * stride * shape.kv_heads,)](
            *aligned[:3], grad_out=aligned[3], grad_key=dk, grad_value=dv, cells=table, num_cells=len(table),
            key_rows_total=shape.key_rows, stride=stride, BLOCK=sizes.block, QUERIES=sizes.others,
            num_warps=sizes.warps, num_stages=sizes.stages, **common,
        )  # fmt: skip
    dq, dk, dv = (_narrow(t, like.shape[3]) for t, like in ((dq, query), (dk, key), (dv, value)))
    return dq, dk, dv


def _delta(out: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Tensor:
    """delta = rowsum(dO * O) - dLSE, (B, Nq, H) float32."""
    from ..kernels.backward import delta_kernel

    delta = torch.empty(out.shape[:3], dtype=torch.float32, device=out.device)
    if grad_out.stride(3) != 1:
        grad_out = grad_out.contiguous()
    rows = delta.numel()
    delta_kernel[(-(-rows // _ROWS),)](
        out, grad_out, delta if grad_lse is None else grad_lse.contiguous(), delta, rows, *grad_out.stride()[:3],
        out.shape[1], out.shape[2], DV=out.shape[3], PADDED_V=_padded(out.shape[3]), BLOCK=_ROWS,
        HAS_LSE=grad_lse is not None,
    )  # fmt: skip
    return delta
