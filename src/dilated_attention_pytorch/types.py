"""The vocabulary every other module shares: frozen records of integers, no tensors but in AttentionOutput.

Shape letters: B batch, N rows (Nq of the query, Nk of the key), H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from torch import Tensor

HeadOffsets = Literal["contiguous", "interleaved"]
Padding = Literal["mask", "zeros"]
MixingGrad = Literal["exact", "detached"]


class AttentionOutput(NamedTuple):
    """Attention with its normaliser: ``out (B, N, H, D_v)`` and ``lse (B, H, N)``.

    ``lse`` is the natural log-sum-exp of the scaled scores over the multiset of keys, float32 (float64 for float64
    inputs). A row without any key has ``out`` 0 and ``lse`` -inf.
    """

    out: Tensor
    lse: Tensor


@dataclass(frozen=True, slots=True)
class Branch:
    """One branch of dilated attention: segments of ``segment_length`` rows, every ``dilation_rate``-th row active."""

    segment_length: int
    dilation_rate: int


@dataclass(frozen=True, slots=True)
class Document:
    """Consecutive key rows that form one document, in one batch row or, alike, in ``batches`` rows of the batch.

    ``position`` is the position in the document of key row ``row``, never negative; ``length`` is the length that
    ``padding="zeros"`` pads (rows under a suffix mask lie beyond it).
    """

    batch: int
    batches: int
    row: int
    rows: int
    position: int
    length: int


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one call of the operator."""

    batch: int
    query_rows: int
    key_rows: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True)
class Options:
    """What changes the result besides the tensors and the pattern."""

    is_causal: bool
    scale: float
    dropout_p: float
    padding: Padding
    mixing_grad: MixingGrad


@dataclass(frozen=True, slots=True)
class Call:
    """One fused attention over affine views: ``outer * inner`` independent problems of query_len x key_len.

    Problem (i, j) takes batch ``batch + i*outer_batch``, query head ``head + j*inner_head``, and as its rows
    ``row + i*outer_row + j*inner_row + dilation_rate * (0, 1, 2, ...)`` for the query's and the key's first ``row``.
    """

    branch: int
    dilation_rate: int
    query_len: int
    key_len: int
    is_causal: bool
    zero_keys: int
    """Keys of zeros that ``padding="zeros"`` adds to every problem of the call."""
    outer: int
    outer_batch: int
    outer_row: int
    inner: int
    inner_row: int
    inner_head: int
    inner_kv_head: int
    batch: int
    query_row: int
    key_row: int
    head: int
    kv_head: int

    @property
    def rows(self) -> int:
        """(batch, row, head) triples whose output this call contributes to."""
        return self.outer * self.inner * self.query_len

    @property
    def pairs(self) -> int:
        """Attended (query, key) pairs, zero keys left out."""
        n, m = self.query_len, self.key_len
        return self.outer * self.inner * (n * (n + 1) // 2 if self.is_causal else n * m)


@dataclass(frozen=True)
class Plan:
    """The fused calls that compute a pattern on one shape, branch by branch."""

    shape: Shape
    calls: tuple[Call, ...]

    @cached_property
    def pairs(self) -> int:
        """Attended (query, key) pairs of all calls: the useful work."""
        return sum(call.pairs for call in self.calls)

    @cached_property
    def covers_first(self) -> int:
        """How many leading calls touch every (batch, row, head) exactly once: 0, or those of a rate-1 branch."""
        shape, covered = self.shape, 0
        for n, call in enumerate(self.calls, 1):
            covered += call.rows
            if call.branch != self.calls[0].branch or call.dilation_rate != 1:
                return 0
            if covered == shape.batch * shape.query_rows * shape.heads:
                # A causal rectangle and its square touch the same rows, so the count alone is no proof.
                return n if len({(c.query_row, c.batch, c.head) for c in self.calls[:n]}) == n else 0
        return 0
