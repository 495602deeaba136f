"""The bounded cache of a LongNet model, as an object that generate() of the transformers library can carry along."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from ...models.model_cache import ModelCache


class LongNetCache(Cache):
    """A :class:`ModelCache` in the form of a transformers cache: it holds at most one longest segment a layer.

    generate() makes it by itself; give one as ``past_key_values`` to go on with a text later. It is empty until the
    first forward pass, which tells where the prompts begin.

    Args:
        rollback: how many of the last tokens :meth:`crop` can always take back (assisted generation needs some).
    """

    def __init__(self, *, rollback: int = 0) -> None:
        super().__init__(layers=[])
        self.rollback = rollback
        self.state: ModelCache | None = None

    def __repr__(self) -> str:
        return f"LongNetCache(length={self.get_seq_length()}, nbytes={0 if self.state is None else self.state.nbytes})"

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far, padding at the left included."""
        return 0 if self.state is None else self.state.length

    @property
    def is_initialized(self) -> bool:
        """Whether a forward pass has filled it."""
        return self.state is not None

    @property
    def is_compileable(self) -> bool:
        """False: which rows it holds changes from step to step."""
        return False

    @property
    def is_croppable(self) -> bool:
        """Whether the last tokens can be taken back."""
        return self.rollback > 0

    def reset(self) -> None:
        """Forget everything."""
        self.state = None

    def crop(self, tokens_to_remove: int) -> None:
        """Take ``-tokens_to_remove`` of the last tokens back; a positive number is the length to keep.

        Raises:
            ValueError: more than ``rollback`` tokens, and some of what is needed then is dropped already.
        """
        if self.state is not None and tokens_to_remove:
            self.state.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace batch row i by batch row ``beam_idx[i]``."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the batch rows ``indices``, int64 of any length."""
        if self.state is not None:
            self.state.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each batch row ``repeats`` times."""
        if self.state is not None:
            self.state.select(torch.arange(len(self.state.next_position)).repeat_interleave(repeats))

    def update(self, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Refused: the layers of a LongNet model fill the cache themselves.

        Raises:
            ValueError: always; models of other kinds take transformers' own caches.
        """
        raise ValueError("LongNetCache serves LongNet models alone; give other models transformers' DynamicCache")
