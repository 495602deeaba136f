"""A key/value cache of one attention layer that holds what the longest segment needs, however long the text.

A row attends within its own segments alone, so rows before the earliest of the segments that the next row lies in are
never read again. What is kept is at most one longest segment, and attention over it is that over the whole text, by
the definition of ``key_start``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

_FIRST_ROWS = 256


class CachedRows(NamedTuple):
    """What :func:`dilated_attention` takes: key, value ``(B, rows, H_kv, D)``, key_start int64 ``(B,)`` on the CPU."""

    key: Tensor
    value: Tensor
    key_start: Tensor


@lru_cache(maxsize=1024)
def needed_rows(segment_lengths: tuple[int, ...], starts: tuple[int, ...], length: int) -> int:
    """How many of the last of ``length`` rows a later row can attend to, in any batch row.

    ``starts`` are the positions of the first of the rows, one for each batch row.

    >>> needed_rows((4, 6), (0,), 11)  # the next row, 11, lies in segments that begin at 8 and at 6
    5
    >>> needed_rows((4, 6), (0,), 12)
    0
    """
    most = 0
    for start in set(starts):
        position = start + length
        if position > 0:  # rows of left padding are never read
            first = min(position // w * w for w in segment_lengths)
            most = max(most, min(position - first, length))
    return most


def read_starts(key_start: int | Tensor) -> tuple[int, ...]:
    """``key_start`` as host integers: one that holds for every batch row, or one for each."""
    if not isinstance(key_start, Tensor):
        return (int(key_start),)
    if key_start.dim() != 1 or key_start.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"key_start is {key_start.dtype} of shape {tuple(key_start.shape)}; give an int, or int64 of shape (B,)"
        )
    return tuple(key_start.tolist())


def one_start_each(starts: tuple[int, ...], batch: int) -> tuple[int, ...]:
    """``starts`` for ``batch`` rows, or a ValueError where they are those of another number of rows."""
    if len(starts) == 1:
        return starts * batch
    if len(starts) != batch:
        raise ValueError(f"the batch has {batch} rows, and key_start was given for {len(starts)}; give one for each")
    return starts


class KeyValueCache:
    """Keys and values of one layer, appended in place, without the rows that no later row attends to.

    Buffers grow by doubling to one longest segment (and ``rollback`` rows), then stay. Where the batch has documents at
    different positions (left padding), a row is dropped when no document needs it.

    Args:
        segment_lengths: of every branch of the layer.
        key_start: position in the document of the first row to come, an int, or int64 ``(B,)``: minus the number of
            padding rows for prompts padded at the left.
        rollback: how many of the last rows :meth:`crop` can always take back.

    Raises:
        ValueError: segment lengths or a rollback that make no sense, or a key_start of another shape or dtype.

    >>> from dilated_attention_pytorch import dilated_attention
    >>> lengths, rates = (4, 12), (1, 2)
    >>> query, key, value = torch.randn(3, 1, 40, 2, 8)
    >>> cache, outs = KeyValueCache(lengths), []
    >>> for n in range(40):  # token by token
    ...     k, v, key_start = cache.update(key[:, n : n + 1], value[:, n : n + 1])
    ...     q = query[:, n : n + 1]
    ...     outs.append(dilated_attention(q, k, v, lengths, rates, key_start=key_start, is_causal=True))
    >>> whole = dilated_attention(query, key, value, lengths, rates, is_causal=True)
    >>> torch.allclose(torch.cat(outs, dim=1), whole, atol=1e-5), cache.length, cache.rows
    (True, 40, 4)
    """

    def __init__(self, segment_lengths: Sequence[int], *, key_start: int | Tensor = 0, rollback: int = 0) -> None:
        self.segment_lengths = tuple(segment_lengths)
        if not self.segment_lengths or min(self.segment_lengths) < 1:
            raise ValueError(f"segment_lengths is {self.segment_lengths}; give at least one, each at least 1")
        if rollback < 0:
            raise ValueError(f"rollback is {rollback}; give a number of rows, at least 0")
        self.rollback = rollback
        self._buffers: tuple[Tensor, Tensor] | None = None
        self.reset(key_start)

    def reset(self, key_start: int | Tensor = 0) -> None:
        """Forget all rows; the next one is at position ``key_start``. Buffers stay."""
        self._starts = read_starts(key_start)
        self._length = self._first = self._last = 0

    @property
    def length(self) -> int:
        """Rows appended so far, the dropped ones included."""
        return self._length

    @property
    def starts(self) -> tuple[int, ...]:
        """Position of the first row ever given, for every batch row, or one for all."""
        return self._starts

    @property
    def rows(self) -> int:
        """Rows held now."""
        return self._last - self._first

    @property
    def max_rows(self) -> int:
        """Rows that the buffers never exceed."""
        return max(self.segment_lengths) + self.rollback

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return 0 if self._buffers is None else sum(buffer.nbytes for buffer in self._buffers)

    @property
    def next_position(self) -> Tensor:
        """Position in its document of the next row: int64 ``(B,)`` on the CPU, ``(1,)`` before B is known."""
        return torch.tensor([start + self._length for start in self._starts])

    def update(self, key: Tensor, value: Tensor) -> CachedRows:
        """Append ``key (B, n, H_kv, D)`` and ``value (B, n, H_kv, D_v)``, the same n >= 1 positions of every batch row.

        Returns:
            All rows that the n new ones attend to, themselves included, for the call of :func:`dilated_attention` whose
            query is the n new rows. The tensors may be the cache's own: use them before the next update.

        Where autograd records, gradients reach the rows of this call; earlier ones are constants.

        Raises:
            ValueError: tensors that do not fit each other or what is held.
        """
        self._check(key, value)
        self._starts = one_start_each(self._starts, key.shape[0])
        new, first_row = key.shape[1], self._length - self.rows
        key_start = torch.tensor([start + first_row for start in self._starts])
        recorded = torch.is_grad_enabled() and (key.requires_grad or value.requires_grad)
        if self.rows and not recorded and self.rows + new <= self.max_rows:
            self._make_room(key, value, self.rows + new)
            self._length, self._last = self._length + new, self._last + new
            for held, given in zip(self._held(), (key, value), strict=True):
                held[:, -new:] = given.detach()
            whole = CachedRows(*self._held(), key_start)
            self._first = max(self._first, self._last - self._kept())  # after a crop fewer are held than kept
            return whole
        if self.rows:
            key, value = (torch.cat(pair, dim=1) for pair in zip(self._held(), (key, value), strict=True))
        self._length += new
        self._first = self._last = 0
        if kept := min(self._kept(), key.shape[1]):
            self._make_room(key, value, kept)
            self._last = kept
            for held, given in zip(self._held(), (key, value), strict=True):
                held.copy_(given[:, -kept:].detach())
        return CachedRows(key, value, key_start)

    def _held(self) -> tuple[Tensor, Tensor]:
        """Views of the held rows of both buffers."""
        assert self._buffers is not None
        key, value = self._buffers
        return key[:, self._first : self._last], value[:, self._first : self._last]

    def _kept(self) -> int:
        """Rows to keep of those given so far: what the next row needs, and what `crop` may take back."""
        earlier = max(0, self._length - self.rollback)
        return needed_rows(self.segment_lengths, self._starts, earlier) + self._length - earlier

    def _make_room(self, key: Tensor, value: Tensor, rows: int) -> None:
        """Let ``rows`` (at most `max_rows`), of which the held ones come first, fit into the buffers."""
        capacity = 0
        if self._buffers is not None and self._buffers[0].shape[0] == key.shape[0]:
            capacity = self._buffers[0].shape[1]
        if self._first + rows <= capacity:
            return
        held = self._held() if self.rows else None
        # A buffer that is not full size yet is moved only when half of it gets free: else moves would be frequent.
        if capacity < self.max_rows and rows > capacity // 2:
            capacity = min(self.max_rows, max(2 * capacity, 2 * rows, _FIRST_ROWS))
            self._buffers = (
                key.new_empty(key.shape[0], capacity, *key.shape[2:]),
                value.new_empty(value.shape[0], capacity, *value.shape[2:]),
            )
        elif held is not None and self._first < self.rows:  # source and target overlap
            held = (held[0].clone(), held[1].clone())
        self._first, self._last = 0, self.rows
        if held is not None:
            for target, source in zip(self._held(), held, strict=True):
                target.copy_(source)

    def select(self, indices: Tensor) -> None:
        """Replace batch row i by batch row ``indices[i]``, int64 of any length: beam search, or a smaller batch."""
        if len(self._starts) > 1:
            self._starts = tuple(self._starts[i] for i in indices.tolist())
        if self._buffers is None:
            return
        chosen = [held.index_select(0, indices.to(held.device)) for held in self._held()]
        if len(indices) != self._buffers[0].shape[0]:
            key, value = self._buffers
            self._buffers = (
                key.new_empty(len(indices), *key.shape[1:]),
                value.new_empty(len(indices), *value.shape[1:]),
            )
        for target, source in zip(self._held(), chosen, strict=True):
            target.copy_(source)

    def check_crop(self, length: int) -> None:
        """Raise the ValueError of ``crop(length)``, if it has one; ``length`` is at least 0."""
        first_row = self._length - self.rows
        if length and length - needed_rows(self.segment_lengths, self._starts, length) < first_row:
            raise ValueError(
                f"rows before {first_row} of {self._length} are dropped, and row {length} needs some of them; make the "
                f"cache with rollback={self._length - length} or more to crop that far"
            )

    def crop(self, length: int) -> None:
        """Keep the first ``length`` of all rows appended; a negative number takes so many of the last ones back.

        Raises:
            ValueError: the rows that the next row would need then are dropped already. The last ``rollback`` rows can
                always be taken back.
        """
        length = max(0, self._length + length) if length < 0 else min(length, self._length)
        self.check_crop(length)
        if length == 0:
            self._length = self._first = self._last = 0
            return
        self._last = max(self._first, self._last - (self._length - length))
        self._length = length

    def _check(self, key: Tensor, value: Tensor) -> None:
        if key.dim() != 4 or value.dim() != 4 or key.shape[:3] != value.shape[:3] or 0 in key.shape[:2]:
            raise ValueError(
                f"key {tuple(key.shape)} and value {tuple(value.shape)} do not fit; give (B, n, H_kv, D) and "
                "(B, n, H_kv, D_v), n at least 1"
            )
        for name, new, held in zip(("key", "value"), (key, value), self._buffers or (), strict=False):
            fits = new.shape[2:] == held.shape[2:] and new.dtype == held.dtype and new.device == held.device
            if not fits or (self._length and new.shape[0] != held.shape[0]):
                raise ValueError(
                    f"{name} is {new.dtype} {tuple(new.shape)} on {new.device}, the cache holds {held.dtype} "
                    f"{(held.shape[0], 'n', *held.shape[2:])} on {held.device}; give the same, or make a new cache"
                )
