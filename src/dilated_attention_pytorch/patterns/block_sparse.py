"""Block-sparse patterns in closed form: which key blocks each query block sees, as arithmetic progressions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..types import HeadOffsets
from .blocks import BLOCK_SIZES, Entries, QueryBlocks, Run, entries_of_runs
from .codes import attach, register
from .dilated import DilatedPattern


def check_integer(name: str, value: object, least: int) -> None:
    """Raise ValueError unless ``value`` is an integer of at least ``least`` that fits 62 bits."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**62:
        raise ValueError(f"{name} is {value!r}; give an integer of at least {least}")


def check_block_size(block_size: object) -> None:
    """Raise ValueError for a block size that no backend computes."""
    if block_size not in BLOCK_SIZES or isinstance(block_size, bool):
        raise ValueError(f"block_size is {block_size!r}; choose one of {', '.join(map(str, BLOCK_SIZES))}")


def check_whole_blocks(name: str, tokens: Any, block_size: int, least: int = 0) -> None:
    """Raise ValueError unless ``tokens`` is a multiple of ``block_size``."""
    check_integer(name, tokens, least)
    if tokens % block_size:
        raise ValueError(f"{name} is {tokens}, no multiple of block_size {block_size}; give whole blocks")


def _window(query: QueryBlocks, blocks: int) -> Run:
    return Run(query.block - blocks, 1, 2 * blocks + 1)


@register
@dataclass(frozen=True)
class LocalWindow:
    """A sliding window (Longformer, arXiv 2004.05150, section 3.1; Sparse Transformer, arXiv 1904.10509).

    Query block i sees the key blocks j with ``|i - j| <= window / block_size``: between ``window`` and
    ``window + block_size - 1`` tokens to each side. Causal: those with j <= i, and in block i itself the keys that
    are not after the query.

    Args:
        window: tokens to each side, a multiple of ``block_size`` (0: the block itself).
        block_size: tokens of a block: 16, 32, 64 or 128.

    >>> LocalWindow(1024, block_size=64)
    LocalWindow(window=1024, block_size=64)
    """

    window: int
    block_size: int = 128
    code: str = field(init=False, repr=False, compare=False)
    per_head = False

    def __post_init__(self) -> None:
        check_block_size(self.block_size)
        check_whole_blocks("window", self.window, self.block_size)
        attach(self)

    def entries(self, query: QueryBlocks) -> Entries:
        """See `blocks.BlockPattern`."""
        return entries_of_runs(query, [_window(query, self.window // self.block_size)])


@register
@dataclass(frozen=True)
class GlobalLocal:
    """A sliding window and global tokens (Longformer, section 3.1; BigBird, arXiv 2007.14062, section 2).

    Global tokens attend to all and are attended by all. Whole blocks are global: those that hold one of the first
    ``num_global_tokens`` positions of a document, or one of ``global_indices``.

    Args:
        window: tokens to each side of a block, as for `LocalWindow`.
        num_global_tokens: how many of a document's first tokens are global, rounded up to whole blocks.
        global_indices: positions of further global tokens, in every document that is long enough.
        block_size: tokens of a block: 16, 32, 64 or 128.

    >>> GlobalLocal(512, num_global_tokens=1, global_indices=(4096,), block_size=64).global_blocks
    (0, 64)
    """

    window: int
    num_global_tokens: int = 0
    global_indices: tuple[int, ...] = ()
    block_size: int = 128
    code: str = field(init=False, repr=False, compare=False)
    per_head = False

    def __post_init__(self) -> None:
        check_block_size(self.block_size)
        check_whole_blocks("window", self.window, self.block_size)
        check_integer("num_global_tokens", self.num_global_tokens, 0)
        if isinstance(self.global_indices, (str, bytes)) or not hasattr(self.global_indices, "__iter__"):
            raise ValueError(f"global_indices is {self.global_indices!r}; give a tuple of positions")
        object.__setattr__(self, "global_indices", tuple(self.global_indices))
        for index in self.global_indices:
            check_integer("an entry of global_indices", index, 0)
        if not self.num_global_tokens and not self.global_indices:
            raise ValueError("there are no global tokens; give num_global_tokens or global_indices, or use LocalWindow")
        attach(self)

    @property
    def global_blocks(self) -> tuple[int, ...]:
        """The blocks of a document that are global, in ascending order."""
        first = range(-(-self.num_global_tokens // self.block_size))
        return tuple(sorted({*first, *(index // self.block_size for index in self.global_indices)}))

    def entries(self, query: QueryBlocks) -> Entries:
        """See `blocks.BlockPattern`."""
        first = -(-self.num_global_tokens // self.block_size)
        others = [block for block in self.global_blocks if block >= first]
        is_global = query.block < first
        if others:
            is_global = is_global | torch.isin(query.block, torch.tensor(others, device=query.block.device))
        local = self.window // self.block_size
        # A window that is the whole document makes one run of both, so that nothing is listed twice.
        everywhere = torch.where(is_global, 0, query.block - local)
        start = torch.zeros_like(query.block)
        # The first blocks before the window: so lists are in order, and need no sorting.
        runs = [Run(start, 1, torch.where(is_global, 0, everywhere.clamp(min=0, max=first)))] if first else []
        runs += [Run(everywhere, 1, torch.where(is_global, query.limit, 2 * local + 1))]
        runs += [Run(start + block, 1, (~is_global).long()) for block in others]
        return entries_of_runs(query, runs)


@register
@dataclass(frozen=True)
class DilatedBlocks:
    """LongNet's dilated pattern (arXiv 2307.02486, section 3.1) on blocks in place of tokens.

    Branch i cuts a document into segments and keeps, for each head, every ``dilation_rates[i]``-th block of a
    segment, from the head's offset on; a kept query block sees the kept key blocks of its segment. Unlike
    `DilatedPattern`, a pair that two branches show counts once.

    Args:
        segment_lengths: tokens of a segment of every branch, multiples of ``block_size``.
        dilation_rates: one rate a branch, in blocks: 1 to the blocks of a segment.
        block_size: tokens of a block: 16, 32, 64 or 128.
        head_offsets: "contiguous" or "interleaved", as for `DilatedPattern`.

    >>> DilatedBlocks((2048, 8192), (1, 4), block_size=64).per_head
    True
    """

    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    block_size: int = 128
    head_offsets: HeadOffsets = "contiguous"
    code: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_block_size(self.block_size)
        lengths = self.segment_lengths
        if isinstance(lengths, (list, tuple)):
            for length in lengths:
                check_whole_blocks("segment length", length, self.block_size, 1)
            lengths = tuple(length // self.block_size for length in lengths)
        pattern = DilatedPattern(lengths, self.dilation_rates, self.head_offsets)
        object.__setattr__(self, "segment_lengths", tuple(self.segment_lengths))
        object.__setattr__(self, "dilation_rates", pattern.dilation_rates)
        attach(self)

    @property
    def per_head(self) -> bool:
        """Whether heads have lists of their own: where some rate is above 1."""
        return max(self.dilation_rates) > 1

    def entries(self, query: QueryBlocks) -> Entries:
        """See `blocks.BlockPattern`."""
        return entries_of_runs(query, self._runs(query))

    def _runs(self, query: QueryBlocks) -> Iterator[Run]:
        lengths = tuple(length // self.block_size for length in self.segment_lengths)
        pattern = DilatedPattern(lengths, self.dilation_rates, self.head_offsets)
        heads = query.heads if self.per_head else 1
        for length, rate in zip(lengths, self.dilation_rates, strict=True):
            offsets = [pattern.head_offset(head, rate, query.heads) for head in range(heads)]
            offset = torch.tensor(offsets, device=query.block.device)[:, None]
            kept = query.block % length % rate == offset
            number = (length - offset + rate - 1) // rate
            yield Run(query.block // length * length + offset, rate, torch.where(kept, number, 0))


@register
@dataclass(frozen=True)
class Hierarchical:
    """Wide windows seen coarsely, narrow ones finely (strided attention, arXiv 1904.10509, section 4.2).

    At level (window, stride), query block i sees the key blocks j with ``|i - j| <= window / block_size`` whose
    distance ``i - j`` is a multiple of ``stride / block_size``. A pair that several levels show counts once.

    Args:
        levels: (window, stride) of every level, in tokens, multiples of ``block_size``.
        block_size: tokens of a block: 16, 32, 64 or 128.

    >>> Hierarchical(levels=((1024, 128), (8192, 1024), (65536, 8192))).block_size
    128
    """

    levels: tuple[tuple[int, int], ...]
    block_size: int = 128
    code: str = field(init=False, repr=False, compare=False)
    per_head = False

    def __post_init__(self) -> None:
        check_block_size(self.block_size)
        if not isinstance(self.levels, (list, tuple)) or not self.levels:
            raise ValueError(f"levels is {self.levels!r}; give at least one (window, stride)")
        for level in self.levels:
            if not isinstance(level, (list, tuple)) or len(level) != 2:
                raise ValueError(f"levels has {level!r}; give pairs (window, stride)")
            check_whole_blocks("window", level[0], self.block_size)
            check_whole_blocks("stride", level[1], self.block_size, 1)
        object.__setattr__(self, "levels", tuple((window, stride) for window, stride in self.levels))
        attach(self)

    def entries(self, query: QueryBlocks) -> Entries:
        """See `blocks.BlockPattern`."""
        runs = []
        for window, stride in self.levels:
            step = stride // self.block_size
            reach = window // stride
            runs.append(Run(query.block - reach * step, step, 2 * reach + 1))
        return entries_of_runs(query, runs)


def mixed(word: Tensor) -> Tensor:
    """The finaliser of MurmurHash3 on int64 tensors that hold 32-bit words: every bit of the input moves every bit."""
    word = (word ^ (word >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    word = (word ^ (word >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
    return word ^ (word >> 16)


@register
@dataclass(frozen=True)
class RandomBlocks:
    """A few key blocks at random for every query block and head (BigBird, arXiv 2007.14062, section 2).

    Draw s of query block i of head h is an integer hash of (seed, h, i, s): the same on every device, at every
    length when causal (then among blocks 0 to i; else among those of the document). Draws that repeat a block count
    it once, so a block sees up to ``num_blocks``.

    Args:
        num_blocks: draws for every query block.
        seed: of the hash, an integer from 0.
        block_size: tokens of a block: 16, 32, 64 or 128.

    >>> RandomBlocks(3, seed=1) == RandomBlocks(3, seed=1)
    True
    """

    num_blocks: int
    seed: int = 0
    block_size: int = 128
    code: str = field(init=False, repr=False, compare=False)
    per_head = True

    def __post_init__(self) -> None:
        check_block_size(self.block_size)
        check_integer("num_blocks", self.num_blocks, 1)
        check_integer("seed", self.seed, 0)
        attach(self)

    def entries(self, query: QueryBlocks) -> Entries:
        """See `blocks.BlockPattern`."""
        index, device = query.block, query.block.device
        word = mixed(mixed(torch.tensor(self.seed & 0xFFFFFFFF)) ^ (self.seed >> 32 & 0xFFFFFFFF)).to(device)
        by_head = mixed(word ^ torch.arange(query.heads, device=device))[:, None]
        by_block = mixed(by_head ^ (index & 0xFFFFFFFF))[..., None]
        draw = mixed(by_block ^ torch.arange(self.num_blocks, device=device))  # (H, T, draws)
        column = draw * query.limit[:, None] >> 32
        row = torch.arange(query.heads * len(index), device=device).repeat_interleave(self.num_blocks)
        return Entries(row, column.reshape(-1))
