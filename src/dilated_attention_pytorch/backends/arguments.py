"""Checks of the arguments that every attention of the library shares: what is wrong, what is allowed, what to do."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

_PLAIN = frozenset({bool, int, float, type(None)})
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def checked_tensors(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool,
    scale: float | None,
    dropout_p: float,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    key_start: int | Tensor,
) -> dict[str, Any]:
    """The arguments as operators take them, under autocast in its dtype, or the ValueError that says what is wrong."""
    for name, given in (("query", query), ("key", key), ("value", value)):
        _check_type(name, given, Tensor)
    for name, optional in (("key_padding_mask", key_padding_mask), ("cu_seqlens", cu_seqlens)):
        _check_type(name, optional, (Tensor, type(None)))
    query, key, value = _autocast(query, key, value)
    options = (is_causal, scale, dropout_p, key_start)
    signature = None
    if key_padding_mask is None and cu_seqlens is None and not torch.compiler.is_compiling():
        signature = _signature((query, key, value), options)
    if signature is None or signature not in _passed:
        _check_tensors(query, key, value)
        _check_options(query, is_causal, scale, dropout_p)
        _check_rows(query, key, key_padding_mask, cu_seqlens, key_start)
        _remember(signature)
    per_row = isinstance(key_start, Tensor)
    return {
        "query": query,
        "key": key,
        "value": value,
        "key_padding_mask": key_padding_mask,
        "cu_seqlens": cu_seqlens,
        "key_starts": key_start if per_row else None,
        "key_start": 0 if per_row else key_start,
        "is_causal": is_causal,
        "scale": scale,
        "dropout_p": dropout_p,
    }


_passed: set[Hashable] = set()
"""Signatures of calls that have passed every check: equal ones pass without."""
_MOST_PASSED = 4096


def _signature(tensors: Sequence[Tensor], options: Sequence[object]) -> Hashable | None:
    """All that the checks look at, or None where an option is something unusual."""
    types = tuple(map(type, options))  # True and 1 are equal, and not both allowed
    if not _PLAIN.issuperset(types):
        return None
    return (*((t.shape, t.dtype, t.device, t.layout) for t in tensors), *options, types)


def _remember(signature: Hashable | None) -> None:
    if signature is not None:
        if len(_passed) >= _MOST_PASSED:
            _passed.clear()
        _passed.add(signature)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What autocast does for PyTorch's own attention: casts floating tensors but float64."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.layout != torch.strided:
            raise ValueError(f"{name} has layout {tensor.layout}; give a dense tensor")
        if tensor.dim() != 4:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; give (batch, rows, heads, head dim)")
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{name} has dtype {tensor.dtype}; give float64, float32, bfloat16 or float16")
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, query is {query.dtype} on {query.device}; "
                "give all three one dtype and one device"
            )
        if 0 in tensor.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; every size must be at least 1")
    if key.shape[:3] != value.shape[:3] or key.shape[0] != query.shape[0] or key.shape[3] != query.shape[3]:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} do not fit; give "
            "(B, N_q, H, D), (B, N, H_kv, D) and (B, N, H_kv, D_v)"
        )
    if query.shape[2] % key.shape[2]:
        raise ValueError(
            f"query has {query.shape[2]} heads, key has {key.shape[2]}; the query's must be a multiple of the key's"
        )
    if query.shape[1] > key.shape[1]:
        raise ValueError(
            f"query has {query.shape[1]} rows, key has {key.shape[1]}; query rows are the last rows of the key, "
            "so there can be no more of them"
        )


def _check_type(name: str, given: object, allowed: type | tuple[type, ...]) -> None:
    if not isinstance(given, allowed):
        raise ValueError(f"{name} is of type {type(given).__name__}; give a torch.Tensor")


def _check_options(query: Tensor, is_causal: bool, scale: float | None, dropout_p: float) -> None:
    if not isinstance(is_causal, bool):
        raise ValueError(f"is_causal is {is_causal!r}; give True or False")
    if scale is not None and not (isinstance(scale, (int, float)) and abs(scale) < 1e38):
        raise ValueError(f"scale is {scale!r}; give a finite number below 1e38, or None for 1 / sqrt({query.shape[3]})")
    if not (isinstance(dropout_p, (int, float)) and 0.0 <= dropout_p < 1.0):
        raise ValueError(f"dropout_p is {dropout_p!r}; give a probability of at least 0 and below 1")


def _check_rows(
    query: Tensor, key: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, key_start: int | Tensor
) -> None:
    batch, rows = key.shape[:2]
    if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) != (batch, rows)):
        raise ValueError(
            f"key_padding_mask is {mask.dtype} of shape {tuple(mask.shape)}; give bool of shape ({batch}, {rows}), "
            "True where a key is to be ignored"
        )
    if mask is not None and mask.device != query.device and query.device.type != "meta":
        raise ValueError(f"key_padding_mask is on {mask.device}, query is on {query.device}; move it there")
    for name, tensor in (("cu_seqlens", cu_seqlens), ("key_start", key_start)):
        if isinstance(tensor, Tensor) and tensor.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name} has dtype {tensor.dtype}; give int64")
    if cu_seqlens is not None:
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
            raise ValueError(f"cu_seqlens has shape {tuple(cu_seqlens.shape)}; give (documents + 1,), at least 2")
        if batch != 1:
            raise ValueError(f"cu_seqlens packs documents in one row, and the batch has {batch}; give batch 1")
        if isinstance(key_start, Tensor) or key_start != 0:
            raise ValueError("cu_seqlens starts every document at position 0; leave key_start at 0")
    if isinstance(key_start, Tensor):
        if tuple(key_start.shape) != (batch,):
            raise ValueError(f"key_start has shape {tuple(key_start.shape)}; give an int or shape ({batch},)")
    elif isinstance(key_start, int) and not -(2**62) < key_start < 2**62:
        raise ValueError(f"key_start is {key_start}; give a position between -2**62 and 2**62")
    elif isinstance(key_start, bool) or not isinstance(key_start, (int, torch.SymInt)):
        raise ValueError(f"key_start is {key_start!r}; give an int or an int64 tensor of shape ({batch},)")
