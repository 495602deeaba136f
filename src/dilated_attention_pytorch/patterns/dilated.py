"""LongNet's dilated pattern: segments and rates, and the rules that choose them for a length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from ..types import Branch, HeadOffsets


def _integers(name: str, values: Sequence[int]) -> tuple[int, ...]:
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise ValueError(f"{name} is {values!r}; give a list or tuple of integers")
    if not values:
        raise ValueError(f"{name} is empty; give at least one branch")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{name} has {value!r} of type {type(value).__name__}; give integers")
        if not 1 <= value < 2**62:
            raise ValueError(f"{name} has {value}; every entry must be at least 1 (and below 2**62)")
    return tuple(values)


@dataclass(frozen=True)
class DilatedPattern:
    """The branches of dilated attention (LongNet, arXiv 2307.02486, section 3.1).

    Branch i cuts a document into segments of ``segment_lengths[i]`` rows and keeps, for head h, the rows whose place
    in the segment is ``o(h)`` modulo ``dilation_rates[i]``. ``head_offsets`` says what o is: ``"contiguous"``,
    ``h // ceil(H / r)`` as in torchscale, or ``"interleaved"``, ``h % r`` as in the paper's formula.

    Raises:
        ValueError: lists of different length, an entry below 1, a rate above its segment length, unknown offsets.

    >>> DilatedPattern((2048, 4096), (1, 2)).branches
    (Branch(segment_length=2048, dilation_rate=1), Branch(segment_length=4096, dilation_rate=2))
    """

    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    head_offsets: HeadOffsets = "contiguous"

    def __post_init__(self) -> None:
        lengths = _integers("segment_lengths", self.segment_lengths)
        rates = _integers("dilation_rates", self.dilation_rates)
        if len(lengths) != len(rates):
            few, many = sorted((("segment_lengths", len(lengths)), ("dilation_rates", len(rates))), key=lambda x: x[1])
            noun = "entry" if few[1] == 1 else "entries"
            raise ValueError(f"{few[0]} has {few[1]} {noun}, {many[0]} has {many[1]}; give one rate a segment length")
        for w, r in zip(lengths, rates, strict=True):
            if r > w:
                raise ValueError(
                    f"dilation rate {r} is larger than its segment length {w}; a rate may be 1 to the segment length"
                )
        if self.head_offsets not in get_args(HeadOffsets):
            raise ValueError(
                f"head_offsets is {self.head_offsets!r}; choose one of {', '.join(map(repr, get_args(HeadOffsets)))}"
            )
        object.__setattr__(self, "segment_lengths", lengths)
        object.__setattr__(self, "dilation_rates", rates)

    @property
    def branches(self) -> tuple[Branch, ...]:
        """(segment length, dilation rate) of every branch, in the order given."""
        return tuple(map(Branch, self.segment_lengths, self.dilation_rates))

    def head_offset(self, head: int, rate: int, num_heads: int) -> int:
        """The offset o(h, r) of a query head: which residue of its segment it keeps."""
        return head % rate if self.head_offsets == "interleaved" else head // -(-num_heads // rate)

    @classmethod
    def geometric(
        cls,
        seq_len: int,
        *,
        rule: Literal["longnet", "gigapath"] = "longnet",
        first_segment: int | None = None,
        ratio: int = 2,
        num_branches: int | None = None,
        max_rate: int | None = None,
        head_offsets: HeadOffsets = "contiguous",
    ) -> DilatedPattern:
        """Choose segment lengths and dilation rates for sequences of up to ``seq_len`` tokens.

        ``rule="longnet"`` (LongNet, section 3.1): segment lengths and rates grow by the same ``ratio`` from
        ``first_segment`` (default 2048) and 1 until a segment holds the sequence, so that every branch costs the same
        per active row. ``rule="gigapath"``: ``num_branches`` (default 5) segment lengths at equal steps of the
        exponent from ``first_segment`` (default 1024) to the largest power of two within ``seq_len``, rates
        1, 2, 4, ... (the slide encoder of Prov-GigaPath, doi:10.1038/s41586-024-07441-w).

        Args:
            seq_len: longest sequence in tokens, at least 1.
            rule: "longnet" or "gigapath".
            first_segment: shortest segment in tokens.
            ratio: growth per branch, an integer of at least 2 (for "gigapath", of the rates alone).
            num_branches: how many branches; by default as many as reach ``seq_len`` ("longnet") or 5 ("gigapath").
            max_rate: cap on the rates, for instance the number of heads, so that no offset is left without a head.
            head_offsets: as for the class.

        >>> DilatedPattern.geometric(32768)
        DilatedPattern(segment_lengths=(2048, 4096, 8192, 16384, 32768), dilation_rates=(1, 2, 4, 8, 16), \
head_offsets='contiguous')
        >>> DilatedPattern.geometric(4096, rule="gigapath").segment_lengths
        (1024, 1448, 2048, 2896, 4096)
        """
        sizes = {
            "seq_len": seq_len,
            "first_segment": first_segment,
            "num_branches": num_branches,
            "max_rate": max_rate,
        }
        for name, value in sizes.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} is {value!r}; give an integer of at least 1")
        if isinstance(ratio, bool) or not isinstance(ratio, int) or ratio < 2:
            raise ValueError(f"ratio is {ratio!r}; give an integer of at least 2")
        if rule == "longnet":
            first = first_segment or 2048
            count, reach = 1, first
            while reach < seq_len:
                count, reach = count + 1, reach * ratio
            count = num_branches or count
            lengths = [first * ratio**i for i in range(count)]
        elif rule == "gigapath":
            count = num_branches or 5
            high = int(math.log2(seq_len))
            low = min(math.log2(first_segment or 1024), high)
            lengths = [int(2 ** (low + (high - low) * i / max(1, count - 1))) for i in range(count)]
        else:
            raise ValueError(f"rule is {rule!r}; choose 'longnet' or 'gigapath'")
        rates = [min(ratio**i, max_rate or ratio**i, w) for i, w in enumerate(lengths)]
        return cls(tuple(lengths), tuple(rates), head_offsets)
