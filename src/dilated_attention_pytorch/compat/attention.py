"""Old bare attentions, ``(batch, rows, heads, head dim)`` three times: the same calls over `DilatedAttention`."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..functional import dilated_attention
from ..modules import DilatedAttention
from ..ordering import HilbertOrdering
from ..parallel import ContextParallel
from .arguments import Given, bind, bind_to, pattern_of
from .table import OldName
from .warning import warn

_FORMED_WEIGHTS = ("return_attention_weights", "return_pattern", "return_memory_stats")
_SHARDED_CALLS = ("already_split", "total_seq_len", "pre_split")
"""Call arguments of the old classes whose ranks hold and return rows of their own."""


class OldLayer(nn.Module):
    """What the old layers share: arguments of calls, what is refused, and where the sequence lives."""

    entry: ClassVar[OldName]

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
        """Arguments of a call under their new names, and ``parallel``, which the replacements take.

        Raises:
            ValueError: a dense mask or weights asked for.
        """
        parallel = kwargs.pop("parallel", None)
        given = bind_to(self.entry.call_signature(), type(self).__name__, args, kwargs)
        given.values["parallel"] = parallel
        if given.take("attn_mask") is not None:
            raise ValueError(
                f"{given.where} got a dense attention mask, which is never formed here; use is_causal, or the "
                "key_padding_mask of dilated_attention"
            )
        for name in _FORMED_WEIGHTS:
            if given.take(name):
                raise ValueError(
                    f"{given.where} got {name}=True, but weights are never formed; where one is needed, compute "
                    "exp(score - lse) with the lse of dilated_attention_with_lse"
                )
        return given

    def result(self, out: Tensor, given: Given) -> Any:
        """``out`` as the old class returned it: alone, or with None in place of weights."""
        returns = self.entry.returns
        if returns == "pair" or (returns == "pair_if_weights" and given.values.get("need_weights")):
            return out, None
        return out

    def place(self, rows: Tensor, given: Given) -> ContextParallel | None:
        """Where the sequence of an old ring lives: on this device unless ranks of a process group hold parts."""
        parallel: ContextParallel | None = given.values.get("parallel")
        world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if parallel is not None or world == 1 or "ring" not in self.entry.name.lower():
            return parallel
        if getattr(self, "ring_size", None) == 1:
            return None
        if not set(_SHARDED_CALLS) & set(self.entry.call_signature().names):
            warn(
                f"{given.where} gives every one of {world} ranks the whole sequence, and each computes all of it; "
                "to share the work, cut it with ContextParallel.shard and pass parallel=",
                UserWarning,
            )
            return None
        parallel = ContextParallel(_mesh(rows.device.type, world))
        own_rows = self.entry.call.startswith("x_local") or any(given.values.get(name) for name in _SHARDED_CALLS)
        given.values["whole"] = not own_rows
        if own_rows:
            parallel.length = given.values.get("total_seq_len") or rows.shape[1] * world
        return parallel

    def rows_of_rank(self, tensors: list[Tensor], given: Given, parallel: ContextParallel | None) -> list[Tensor]:
        """The tensors, cut where the old class was given the whole sequence and cut it itself."""
        if parallel is None or not given.values.get("whole"):
            return tensors
        return [parallel.shard(tensor, 1) for tensor in tensors]


class OldBase(OldLayer):
    """Old base classes: they keep their settings, and whoever derives from them writes ``forward``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        given = bind(self.entry, args, kwargs)
        for name, value in given.values.items():
            setattr(self, name, value)


class OldAttention(OldLayer):
    """An old class of bare attention over `DilatedAttention`, its `replacement`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        given = bind(self.entry, args, kwargs)
        lengths, rates = pattern_of(given)
        self.replacement = DilatedAttention(
            lengths,
            rates,
            is_causal=bool(given.take("is_causal", False)),
            scale=given.take("scale"),
            dropout=given.take("dropout", 0.0),
        )
        self.segment_lengths, self.dilation_rates = list(lengths), list(rates)
        self.dropout = self.replacement.dropout
        self.ring_size = given.take("ring_size")
        self.use_hilbert = self.entry.kind == "hilbert_attention" and given.take("use_hilbert", True)
        given.close(quiet=("device", "dtype", "embed_dim", "num_heads"))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Query, key, value ``(B, N, H, D)`` to ``(B, N, H, D)``, with the old arguments and ``parallel``."""
        given = self.call(args, kwargs)
        if given.take("need_weights") and self.entry.returns == "tensor":
            raise ValueError(f"{given.where} got need_weights=True, but weights are never formed; leave it False")
        tensors = [given.need(name) for name in ("query", "key", "value")]
        options = {"is_causal": bool(given.take("is_causal", False)) or self.replacement.is_causal}
        parallel = self.place(tensors[0], given)
        tensors = self.rows_of_rank(tensors, given, parallel)
        return self.result(attend(self.replacement, tensors, self.use_hilbert, parallel, options), given)

    def extra_repr(self) -> str:
        """The new spelling."""
        return f"use {self.entry.use}"


class FullAttention(OldLayer):
    """Old rings without a pattern: one segment that is the whole sequence."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        given = bind(self.entry, args, kwargs)
        self.dropout = given.take("dropout", 0.0)
        given.close(quiet=("device", "dtype"))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Query, key, value ``(B, N, H, D)`` to ``(B, N, H, D)``."""
        given = self.call(args, kwargs)
        query, key, value = (given.need(name) for name in ("query", "key", "value"))
        dropout = self.dropout if self.training else 0.0
        causal = bool(given.take("is_causal", False))
        out = dilated_attention(query, key, value, (key.shape[1],), (1,), is_causal=causal, dropout_p=dropout)
        return self.result(out, given)


class DynamicAttention(OldLayer):
    """Segments by the length of the sequence: see `geometric_pattern`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        given = bind(self.entry, args, kwargs)
        self.bounds = bounds_of(given)
        self.dropout = given.take("dropout", 0.0)
        given.close(quiet=("device", "dtype"))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Query, key, value ``(B, N, H, D)`` to ``(B, N, H, D)``."""
        given = self.call(args, kwargs)
        if given.take("need_weights"):
            raise ValueError(f"{given.where} got need_weights=True, but weights are never formed; leave it False")
        query, key, value = (given.need(name) for name in ("query", "key", "value"))
        pattern = geometric_pattern(key.shape[1], *self.bounds)
        dropout = self.dropout if self.training else 0.0
        causal = bool(given.take("is_causal", False))
        return self.result(dilated_attention(query, key, value, *pattern, is_causal=causal, dropout_p=dropout), given)


def attend(
    attention: nn.Module,
    tensors: list[Tensor],
    use_hilbert: bool,
    parallel: ContextParallel | None,
    options: dict[str, Any],
) -> Tensor:
    """Attention in the order of the rows, or in that of a curve over the square they fill.

    Raises:
        ValueError: a curve with is_causal, or over a sharded sequence.
    """
    if not use_hilbert:
        return attention(*tensors, parallel=parallel, **options)
    if parallel is not None:
        raise ValueError("a Hilbert order moves rows between ranks; order the sequence before it is cut")
    ordering = square_ordering(tensors[1].shape[1])
    ordering.check(is_causal=options["is_causal"])
    return ordering.invert(attention(*(ordering.apply(tensor) for tensor in tensors), **options))


@lru_cache(maxsize=4)
def _mesh(device: str, world: int) -> DeviceMesh:
    return init_device_mesh(device, (world,))


@lru_cache(maxsize=16)
def square_ordering(rows: int) -> HilbertOrdering:
    """The curve over rows laid out line by line in a square, of which the last lines may be missing."""
    side = math.isqrt(rows - 1) + 1
    index = torch.arange(rows)
    return HilbertOrdering.from_coordinates(torch.stack((index // side, index % side), 1))


def bounds_of(given: Given) -> tuple[int, int, tuple[int, ...]]:
    """Smallest and largest segment of the old dynamic classes, and segments given for all lengths."""
    settings = given.take("selector_config")
    smallest = given.take("min_segment_size", getattr(settings, "min_segment_size", None) if settings else None)
    largest = given.take("max_segment_size", getattr(settings, "max_segment_size", None) if settings else None)
    return smallest or 512, largest or 65536, tuple(given.take("fallback_segments") or ())


def geometric_pattern(rows: int, smallest: int, largest: int, fixed: tuple[int, ...] = ()) -> tuple[Any, Any]:
    """Segments that double from the smallest up to the rows, five at most, and rates that double with them.

    >>> geometric_pattern(4096, 512, 65536)
    ((512, 1024, 2048, 4096), (1, 2, 4, 8))
    """
    lengths = fixed or tuple(smallest << i for i in range(5) if smallest << i <= min(rows, largest)) or (rows,)
    return lengths, tuple(min(1 << i, length) for i, length in enumerate(lengths))
