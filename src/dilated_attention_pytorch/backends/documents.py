"""Where documents lie in the rows of a batch: from key_start, cu_seqlens and masks to integers on the host."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

from torch import Tensor

from ..types import Document, Shape


def _document(batch: int, batches: int, rows: int, start: int, masked: int = 0) -> Document | None:
    """Rows whose first has position ``start``; rows before position 0 are left padding, in no document."""
    skip = max(0, -start)
    if skip >= rows:
        return None
    return Document(batch, batches, skip, rows - skip, start + skip, start + rows - masked)


@lru_cache(maxsize=64)
def _packed(bounds: tuple[int, ...], rows: int) -> tuple[Document, ...]:
    if bounds[0] != 0 or bounds[-1] != rows or any(a > b for a, b in pairwise(bounds)):
        shown = list(bounds) if len(bounds) <= 8 else [*bounds[:4], "...", *bounds[-2:]]
        raise ValueError(f"cu_seqlens is {shown}; it must start at 0, never decrease, and end at the {rows} key rows")
    return tuple(Document(0, 1, a, b - a, 0, b - a) for a, b in pairwise(bounds) if b > a)


def read_documents(
    shape: Shape,
    *,
    key_start: int,
    key_starts: Tensor | None,
    cu_seqlens: Tensor | None,
    suffix_mask: Tensor | None,
) -> tuple[Document, ...]:
    """The documents of every batch row.

    ``suffix_mask`` is the key padding mask where ``padding="zeros"`` needs each row's own length.

    Raises:
        ValueError: cu_seqlens that do not cover the row, a mask for "zeros" that is no suffix.
    """
    if cu_seqlens is not None:
        if suffix_mask is not None and bool(suffix_mask.any()):
            raise ValueError('padding="zeros" with cu_seqlens takes no key_padding_mask; pack only real tokens')
        return _packed(tuple(cu_seqlens.tolist()), shape.key_rows)
    masked = [0] * shape.batch
    if suffix_mask is not None:
        masked = suffix_mask.sum(1).tolist()
        if bool((suffix_mask[:, :-1] & ~suffix_mask[:, 1:]).any()):
            row = int((suffix_mask[:, :-1] & ~suffix_mask[:, 1:]).any(1).nonzero()[0])
            raise ValueError(
                f'padding="zeros" needs a key_padding_mask that hides a suffix of each row, and row {row} has an '
                'unmasked key after a masked one; use padding="mask"'
            )
    starts = [key_start] * shape.batch if key_starts is None else key_starts.tolist()
    return documents_of(shape, starts, masked)


def documents_of(shape: Shape, starts: Sequence[int], masked: Sequence[int]) -> tuple[Document, ...]:
    """One document a batch row, from the position of its first row and the rows masked at its end."""
    if len(set(zip(starts, masked, strict=True))) == 1:
        found = [_document(0, shape.batch, shape.key_rows, starts[0], masked[0])]
    else:
        found = [_document(b, 1, shape.key_rows, starts[b], masked[b]) for b in range(shape.batch)]
    return tuple(document for document in found if document is not None)
