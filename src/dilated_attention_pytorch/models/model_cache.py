"""What a decoder-only model remembers of the text so far: a bounded cache a layer, and the last few rows besides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .cache import KeyValueCache


class RecentRows:
    """The last rows of a stream ``(B, n, ...)``, for what reads a few rows back: n-grams, short convolutions.

    Args:
        count: how many rows back are read.
        rollback: how many of the last rows :meth:`crop` can always take back.

    >>> recent = RecentRows(2)
    >>> recent.extend(torch.tensor([[1, 2, 3]]))
    tensor([[1, 2, 3]])
    >>> recent.extend(torch.tensor([[4]]))
    tensor([[2, 3, 4]])
    """

    def __init__(self, count: int, *, rollback: int = 0) -> None:
        self.count, self.rollback = count, rollback
        self.reset()

    def reset(self) -> None:
        """Forget all rows."""
        self._held: Tensor | None = None
        self._length = 0

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return 0 if self._held is None else self._held.nbytes

    def extend(self, rows: Tensor) -> Tensor:
        """``rows (B, n, ...)`` with up to ``count`` rows before them, as many as there are.

        Raises:
            ValueError: another B than before; nothing is changed.
        """
        if self._held is not None and self._held.shape[0] != rows.shape[0]:
            raise ValueError(
                f"the batch has {rows.shape[0]} rows, the cache holds {self._held.shape[0]}; give as many, or make a "
                "new cache"
            )
        self._length += rows.shape[1]
        if not self.count:
            return rows
        held = rows if self._held is None else torch.cat((self._held, rows), 1)
        # A copy, lest a view keep all rows of a long prompt alive.
        self._held = held[:, -self.count - self.rollback :].detach().clone()
        return held[:, -self.count - rows.shape[1] :]

    def select(self, indices: Tensor) -> None:
        """Replace batch row i by batch row ``indices[i]``."""
        if self._held is not None:
            self._held = self._held.index_select(0, indices.to(self._held.device))

    def check_crop(self, length: int) -> None:
        """Raise the ValueError of ``crop(length)``, if it has one."""
        held = 0 if self._held is None else self._held.shape[1]
        taken = self._length - length
        if taken > 0 and held - taken < min(self.count, length) > 0:
            raise ValueError(
                f"only {held} of {self._length} rows are held; make the cache with rollback={taken} or more to take "
                f"{taken} rows back"
            )

    def crop(self, length: int) -> None:
        """Keep the first ``length`` rows of the stream, at least 0; a ValueError where dropped ones are needed."""
        self.check_crop(length)
        if self._held is not None and length < self._length:
            self._held = self._held[:, : self._held.shape[1] - (self._length - length)]
        self._length = min(length, self._length)


class LayerCache(NamedTuple):
    """What one layer remembers: keys and values, and the projections that its short convolution reads."""

    attention: KeyValueCache
    projected: RecentRows


class ModelCache:
    """What :class:`LongNetLM` remembers between calls; made by :meth:`LongNetLM.make_cache`.

    Args:
        segment_lengths: of every branch, the same in all layers.
        num_layers: layers.
        token_rows: tokens before its own that an embedding reads.
        projected_rows: rows before its own that a projection in a layer reads.
        key_start, rollback: as for :class:`KeyValueCache`.
    """

    def __init__(
        self,
        segment_lengths: Sequence[int],
        *,
        num_layers: int,
        token_rows: int = 0,
        projected_rows: int = 0,
        key_start: int | Tensor = 0,
        rollback: int = 0,
    ) -> None:
        self.tokens = RecentRows(token_rows, rollback=rollback)
        self.layers = tuple(
            LayerCache(
                KeyValueCache(segment_lengths, key_start=key_start, rollback=rollback),
                RecentRows(projected_rows, rollback=rollback),
            )
            for _ in range(num_layers)
        )

    @property
    def length(self) -> int:
        """Rows seen so far, padding at the left included."""
        return self.layers[0].attention.length

    @property
    def next_position(self) -> Tensor:
        """Position in its document of the next token: int64 ``(B,)`` on the CPU, ``(1,)`` before B is known."""
        return self.layers[0].attention.next_position

    @property
    def padded(self) -> bool:
        """Whether a batch row began with padding at the left."""
        return min(self.layers[0].attention.starts) < 0

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        layers = sum(layer.attention.nbytes + layer.projected.nbytes for layer in self.layers)
        return layers + self.tokens.nbytes

    def reset(self, key_start: int | Tensor = 0) -> None:
        """Forget everything; the next token is at position ``key_start``."""
        self.tokens.reset()
        for layer in self.layers:
            layer.attention.reset(key_start)
            layer.projected.reset()

    def select(self, indices: Tensor) -> None:
        """Replace batch row i by batch row ``indices[i]``, int64 of any length: beam search, or a smaller batch."""
        indices = indices.cpu()
        self.tokens.select(indices)
        for layer in self.layers:
            layer.attention.select(indices)
            layer.projected.select(indices)

    def crop(self, length: int) -> None:
        """Keep the first ``length`` rows; a negative number takes so many of the last ones back.

        Raises:
            ValueError: what the next row would need then is dropped already; nothing is changed.
        """
        length = max(0, self.length + length) if length < 0 else min(length, self.length)
        parts = [self.tokens, *(part for layer in self.layers for part in layer)]
        for part in parts:
            part.check_crop(length)
        for part in parts:
            part.crop(length)
