"""Hugging Face's attention masks as the two arguments that say where a document lies in its row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Padding(NamedTuple):
    """Where the documents of a batch begin and end; see :func:`dilated_attention`.

    ``key_start`` is an int where it is the same for every batch row, else int64 ``(B,)`` on the CPU, for it steers
    which calls are made. ``key_padding_mask`` is bool ``(B, N)``, None without padding at the end.
    """

    key_start: int | Tensor = 0
    key_padding_mask: Tensor | None = None


def read_padding(attention_mask: Tensor | None, batch: int, rows: int) -> Padding:
    """The padding that ``attention_mask (B, N)`` describes, not 0 for tokens and 0 for padding; None is no padding.

    Padding may lie before and after the tokens of a row. A row of padding alone is allowed; its outputs are 0 before
    the last projection.

    Raises:
        ValueError: a mask of another shape than ``(batch, rows)``, or with padding between tokens.

    >>> read_padding(torch.tensor([[0, 0, 1], [1, 1, 1]]), 2, 3)
    Padding(key_start=tensor([-2,  0]), key_padding_mask=None)
    """
    if attention_mask is None:
        return Padding()
    if tuple(attention_mask.shape) != (batch, rows):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; give (batch, keys), here ({batch}, {rows}), with "
            "1 for tokens and 0 for padding: dilated attention takes no other mask"
        )
    tokens = attention_mask != 0
    count = tokens.sum(-1)
    row = torch.arange(rows, device=tokens.device)
    first = torch.where(tokens, row, rows).amin(-1)
    end = torch.where(tokens, row + 1, 0).amax(-1)
    before, after, held = torch.stack((first, end, count)).tolist()  # the one wait for the device
    for index, (start, stop, kept) in enumerate(zip(before, after, held, strict=True)):
        if kept and stop - start != kept:
            raise ValueError(
                f"attention_mask hides {stop - start - kept} keys between tokens of row {index}; dilated attention "
                "takes padding at the left or at the right of a row. In generation, pad prompts at the left "
                "(tokenizer.padding_side = 'left')"
            )
    key_start = torch.tensor([-start for start in before])
    hidden = None
    if any(0 < stop < rows for stop in after):
        hidden = row >= end.masked_fill(count == 0, rows)[:, None]
    return Padding(before[0] * -1 if len(set(before)) == 1 else key_start, hidden)
