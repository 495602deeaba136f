"""An ordering: a permutation of the rows of a sequence, put on at the boundary of a model and taken off again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .coordinates import Curve, order_from_coordinates
from .hilbert import checked_shape, hilbert_order
from .permutation import inverse_of, permute_rows

_CACHE_SIZE = 16
_CACHE: OrderedDict[tuple[Any, ...], tuple[Tensor, Tensor]] = OrderedDict()
"""(index, inverse) of the grids used last, by grid and device."""


@dataclass(frozen=True, eq=False)
class HilbertOrdering:
    """Rows of a sequence in the order of a Hilbert curve, so that a segment of rows is a compact region.

    Attention with an ordering is attention on permuted rows: ``ordering.invert(attend(ordering.apply(x)))``. Positions
    that go with the rows, for a rotary embedding say, are permuted like them; `positions` are the original ones.

    Args:
        shape: the grid whose cells the rows are in row-major order, (height, width) or (depth, height, width); with
            ``cu_seqlens`` one for every document, or a tuple of grids, one a document.
        permutation: or, in place of a grid, the order itself: (N,) or (B, N) int64, as from
            `hilbert_order_from_coordinates`. It is for the rows that are left without those skipped, and with
            ``cu_seqlens`` it must leave every row in its document.
        skip_first: rows at the start (of every document) that stay there, 1 for a class token.
        cu_seqlens: where documents begin and end in the sequence, the rows skipped counted.

    Raises:
        ValueError: what does not fit, with what would.

    Orderings are equal where their arguments are. The index of a grid is computed once for a device (the last 16 are
    kept). Not for causal attention, see `check`.

    >>> ordering = HilbertOrdering((2, 3), skip_first=1)
    >>> x = torch.arange(7.0)[None, :, None]  # (batch, rows, channels)
    >>> ordering.apply(x).flatten().tolist()
    [0.0, 1.0, 2.0, 4.0, 5.0, 6.0, 3.0]
    >>> torch.equal(ordering.invert(ordering.apply(x)), x)
    True
    """

    shape: tuple[int, ...] | tuple[tuple[int, ...], ...] | None = None
    permutation: Tensor | None = None
    skip_first: int = 0
    cu_seqlens: tuple[int, ...] | None = None
    is_identity: bool = field(init=False, repr=False)
    """Whether no row moves."""
    _grids: tuple[tuple[int, ...], ...] = field(init=False, repr=False)
    _indices: dict[torch.device, tuple[Tensor, Tensor]] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        if (self.shape is None) == (self.permutation is None):
            raise ValueError("give either a shape or a permutation")
        object.__setattr__(self, "cu_seqlens", _checked_bounds(self.cu_seqlens, self.skip_first))
        if self.permutation is None:
            grids = self._checked_grids()
            identity = all(sum(size > 1 for size in grid) <= 1 for grid in grids)
        else:
            permutation = self._checked_permutation(self.permutation)
            grids, identity = (), torch.equal(permutation, _numbers_like(permutation))
            object.__setattr__(self, "permutation", permutation)
        object.__setattr__(self, "_grids", grids)
        object.__setattr__(self, "is_identity", identity)

    @classmethod
    def from_coordinates(
        cls,
        coordinates: Tensor,
        *,
        curve: Curve = "hilbert",
        bits: int | None = None,
        key_padding_mask: Tensor | None = None,
        skip_first: int = 0,
        cu_seqlens: Tensor | Sequence[int] | None = None,
    ) -> HilbertOrdering:
        """The ordering of points by `hilbert_order_from_coordinates`, or by another curve to compare it with.

        ``coordinates`` and ``key_padding_mask`` have no entries for rows skipped. With ``cu_seqlens`` (which counts
        them) coordinates are (N, 2) or (N, 3), and every document is ordered, and scaled, for itself.

        >>> HilbertOrdering.from_coordinates(torch.tensor([[1, 0], [0, 0]])).permutation
        tensor([1, 0])
        """
        bounds = _checked_bounds(cu_seqlens, skip_first)
        if bounds is None:
            order = order_from_coordinates(coordinates, curve=curve, bits=bits, key_padding_mask=key_padding_mask)
            return cls(permutation=order, skip_first=skip_first)
        if key_padding_mask is not None:
            raise ValueError("both key_padding_mask and cu_seqlens are given; packed documents have no padding")
        lengths = [last - first - skip_first for first, last in pairwise(bounds)]
        shape = tuple(coordinates.shape) if isinstance(coordinates, Tensor) else type(coordinates).__name__
        if shape not in ((sum(lengths), 2), (sum(lengths), 3)):
            raise ValueError(
                f"coordinates is {shape}; cu_seqlens ask for {sum(lengths)} rows of 2 or 3, without skipped ones"
            )
        orders, first = [], 0
        for part in coordinates.split(lengths):
            orders.append(order_from_coordinates(part, curve=curve, bits=bits) + first)
            first += len(part)
        return cls(permutation=torch.cat(orders), skip_first=skip_first, cu_seqlens=bounds)

    def apply(self, x: Tensor, dim: int = 1) -> Tensor:
        """``x`` with the rows of dimension ``dim`` in the order of the curve; ``x`` itself where nothing moves.

        Differentiable any number of times; the gradient goes through the inverse, without additions.

        Raises:
            ValueError: another number of rows or, for permutations of a batch, another batch (dimension 0).
        """
        return self._moved(x, dim, back=False)

    def invert(self, x: Tensor, dim: int = 1) -> Tensor:
        """What `apply` did, undone."""
        return self._moved(x, dim, back=True)

    def positions(self, device: torch.device | str | None = None) -> Tensor:
        """(rows,) or (B, rows) int64: where the rows of ``apply(x)`` are in x, not to be written to."""
        return self._index(torch.device(device or "cpu"))[0]

    def check(self, *, is_causal: bool) -> None:
        """Raise ValueError if attention is causal: rows in the order of a curve have no past."""
        if is_causal:
            raise ValueError(
                f"ordering={self!r} with is_causal=True: along a curve through space a row has no past; "
                "give is_causal=False, or ordering=None"
            )

    @property
    def rows(self) -> int:
        """Rows of the sequence, those skipped counted."""
        if self.cu_seqlens is not None:
            return self.cu_seqlens[-1]
        body = torch.Size(self._grids[0]).numel() if self.permutation is None else self.permutation.shape[-1]
        return self.skip_first + body

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, HilbertOrdering):
            return NotImplemented
        if (mine := self.permutation) is None or (its := other.permutation) is None:
            same = self.permutation is other.permutation
        else:
            same = mine is its or (mine.device == its.device and torch.equal(mine, its))
        return same and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        order = self.permutation
        parts = [repr(self.shape) if order is None else f"permutation=<{' x '.join(map(str, order.shape))} rows>"]
        parts += [f"skip_first={self.skip_first}"] * (self.skip_first > 0)
        parts += [f"cu_seqlens={self.cu_seqlens}"] * (self.cu_seqlens is not None)
        return f"HilbertOrdering({', '.join(parts)})"

    def _key(self) -> tuple[Any, ...]:
        return self._grids, self.skip_first, self.cu_seqlens

    def _moved(self, x: Tensor, dim: int, *, back: bool) -> Tensor:
        if not isinstance(x, Tensor):
            raise ValueError(f"x is of type {type(x).__name__}; give a torch.Tensor")
        if not -x.dim() <= dim < x.dim():
            raise ValueError(f"dim is {dim}; x has shape {tuple(x.shape)}")
        dim %= x.dim()
        if x.shape[dim] != self.rows:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, so {x.shape[dim]} rows; {self!r} is for {self.rows} in dimension {dim}"
            )
        order = self.permutation
        if order is not None and order.dim() == 2 and (dim == 0 or x.shape[0] != order.shape[0]):
            raise ValueError(f"x has shape {tuple(x.shape)}; {self!r} is for a batch in dimension 0, rows behind it")
        if self.is_identity:
            return x
        index, inverse = self._index(x.device)
        return permute_rows(x, inverse, index, dim) if back else permute_rows(x, index, inverse, dim)

    def _index(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(index, inverse) for all rows, from the cache."""
        if self.permutation is not None:
            if device not in self._indices:
                self._indices[device] = self._build(device)
            return self._indices[device]
        key = (*self._key(), device)
        if key in _CACHE:
            _CACHE.move_to_end(key)
            return _CACHE[key]
        found = self._build(device)
        if type(found[0]) is Tensor:  # none that a tracer made
            _CACHE[key] = found
            while len(_CACHE) > _CACHE_SIZE:
                _CACHE.popitem(last=False)
        return found

    def _build(self, device: torch.device) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(False):  # for autograd saves it, whoever asked first
            if self.permutation is not None:
                body = self.permutation.to(device)
            else:
                orders, first = [], 0
                for grid in self._grids:
                    orders.append(hilbert_order(*grid, device=device) + first)
                    first += len(orders[-1])
                body = torch.cat(orders)
            index = body
            if self.skip_first:
                bounds = self.cu_seqlens or (0, self.rows)
                parts = [torch.arange(first + self.skip_first, last, device=device) for first, last in pairwise(bounds)]
                left = torch.cat(parts)
                index = torch.arange(self.rows, device=device).expand(*body.shape[:-1], -1).contiguous()
                index[..., left] = left[body]
            return index, inverse_of(index)

    def _checked_grids(self) -> tuple[tuple[int, ...], ...]:
        """The grid of every document."""
        shape: Any = self.shape
        several = (
            isinstance(shape, (tuple, list)) and shape != () and all(isinstance(grid, (tuple, list)) for grid in shape)
        )
        grids = tuple(checked_shape(grid) for grid in shape) if several else (checked_shape(shape),)
        object.__setattr__(self, "shape", grids if several else grids[0])
        bounds = self.cu_seqlens
        if bounds is None:
            if several:
                raise ValueError(
                    f"the shape is {len(grids)} grids; give cu_seqlens, where their documents begin and end"
                )
            return grids
        if not several:
            grids *= len(bounds) - 1
        lengths = [last - first for first, last in pairwise(bounds)]
        expected = [self.skip_first + torch.Size(grid).numel() for grid in grids]
        if lengths != expected:
            raise ValueError(
                f"by cu_seqlens documents have {lengths} rows, by grids and skip_first {expected}; these must agree"
            )
        return grids

    def _checked_permutation(self, given: Tensor) -> Tensor:
        if not isinstance(given, Tensor):
            raise ValueError(f"permutation is of type {type(given).__name__}; give a torch.Tensor")
        if given.dtype not in (torch.int32, torch.int64) or given.dim() not in (1, 2):
            raise ValueError(f"permutation is {tuple(given.shape)} {given.dtype}; give int64 of shape (N,) or (B, N)")
        # A copy, so that nobody changes it later; and no inference tensor, for autograd saves it.
        with torch.inference_mode(False):
            permutation = given.detach().to(torch.int64, copy=True)
        if not torch.equal(permutation.sort(-1).values, _numbers_like(permutation)):
            raise ValueError(f"permutation does not have each of 0 to {given.shape[-1] - 1} once")
        if self.cu_seqlens is not None:
            lengths = [last - first - self.skip_first for first, last in pairwise(self.cu_seqlens)]
            if permutation.dim() != 1 or len(permutation) != sum(lengths):
                raise ValueError(
                    f"permutation has shape {tuple(given.shape)}; cu_seqlens and skip_first ask for ({sum(lengths)},)"
                )
            numbers = torch.arange(len(lengths), device=permutation.device)
            document = numbers.repeat_interleave(torch.tensor(lengths, device=permutation.device))
            if not torch.equal(document[permutation], document):
                raise ValueError("permutation moves rows from one document to another; cu_seqlens keeps them apart")
        return permutation


def _numbers_like(permutation: Tensor) -> Tensor:
    """0, 1, 2, ... in each row."""
    return torch.arange(permutation.shape[-1], device=permutation.device).expand_as(permutation)


def _checked_bounds(given: Any, skip_first: int) -> tuple[int, ...] | None:
    """cu_seqlens as a tuple, or the ValueError that says what is wrong with them or with skip_first."""
    if isinstance(skip_first, bool) or not isinstance(skip_first, int) or skip_first < 0:
        raise ValueError(f"skip_first is {skip_first!r}; give an integer of at least 0")
    if given is None:
        return None
    bounds = tuple(given.tolist()) if isinstance(given, Tensor) and given.dim() == 1 else given
    if not isinstance(bounds, Sequence) or len(bounds) < 2 or not all(type(bound) is int for bound in bounds):
        raise ValueError(f"cu_seqlens is {given!r}; give at least 2 integers")
    if bounds[0] != 0 or any(last < first + skip_first for first, last in pairwise(bounds)):
        raise ValueError(
            f"cu_seqlens is {list(bounds)}; it must start at 0, and every document have the {skip_first} rows skipped"
        )
    return tuple(bounds)
