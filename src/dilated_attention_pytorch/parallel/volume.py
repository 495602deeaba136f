"""How many rows ranks exchange, as a formula: sums over segments that several pieces share, no list of pairs.

Whoever holds a piece of a segment sends its active rows once, for each key head, to every rank that holds a later
piece of the segment (any other piece, without a causal mask) with an active row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from ..patterns import DilatedPattern
from .shard import Piece, active_rows


@dataclass(frozen=True)
class Volume:
    """What one branch makes each rank send, once; rows count for each key head and batch entry."""

    sent: tuple[int, ...]
    received: tuple[int, ...]
    targets: tuple[int, ...]
    """The ranks it sends to, as bits of one number."""
    sources: tuple[int, ...]
    """The ranks it receives from."""
    pairs: tuple[int, ...]
    """(query, key) pairs, of every query head, of different pieces."""


@lru_cache(maxsize=64)
def volumes(
    pattern: DilatedPattern, heads: int, kv_heads: int, held: tuple[tuple[Piece, ...], ...], is_causal: bool
) -> tuple[Volume, ...]:
    """One `Volume` for each branch; ``held`` are the pieces of every rank."""
    documents: dict[int, list[tuple[int, Piece]]] = {}
    for rank, pieces in enumerate(held):
        for piece in pieces:
            documents.setdefault(piece.document, []).append((rank, piece))
    lines = [sorted(found, key=lambda item: item[1].position) for found in documents.values()]
    branches = range(len(pattern.branches))
    return tuple(_volume(pattern, heads, kv_heads, lines, len(held), is_causal, i) for i in branches)


def _shared_segments(pieces: list[tuple[int, Piece]], w: int) -> Iterator[tuple[int, list[tuple[int, Piece]]]]:
    """(first position, its pieces in order) of every segment that lies in more than one piece."""
    first = 0
    for segment in sorted({piece.position // w for _, piece in pieces[1:] if piece.position % w}):
        while pieces[first][1].end <= segment * w:
            first += 1
        last = first
        while last < len(pieces) and pieces[last][1].position < (segment + 1) * w:
            last += 1
        yield segment * w, pieces[first:last]


def _volume(
    pattern: DilatedPattern,
    heads: int,
    kv_heads: int,
    documents: list[list[tuple[int, Piece]]],
    world: int,
    is_causal: bool,
    branch: int,
) -> Volume:
    w, r = pattern.segment_lengths[branch], pattern.dilation_rates[branch]
    offsets: dict[int, tuple[int, set[int]]] = {}  # offset: its query heads, their key heads
    for head in range(heads):
        offset = pattern.head_offset(head, r, heads)
        count, keys = offsets.get(offset, (0, set()))
        offsets[offset] = count + 1, keys | {head * kv_heads // heads}
    sent, received, targets, sources, pairs = ([0] * world for _ in range(5))
    for pieces in documents:
        for start, members in _shared_segments(pieces, w):
            batches = members[0][1].batches
            # Offsets with as many active rows in each piece, as most have, count together.
            alike: dict[tuple[tuple[int, int], ...], tuple[int, int]] = {}
            for offset, (query_heads, key_heads) in offsets.items():
                residue = (start + offset) % r
                rows_of = [(rank, active_rows(piece, start, w, residue, r)[1]) for rank, piece in members]
                active = tuple(item for item in rows_of if item[1])
                queries, weight = alike.get(active, (0, 0))
                alike[active] = queries + query_heads * batches, weight + len(key_heads) * batches
            for active, (queries, weight) in alike.items():
                everything = sum(rows for _, rows in active)
                # How many of the active pieces, from the first on, a rank's last piece sees.
                seen = {rank: index if is_causal else len(active) for index, (rank, _) in enumerate(active)}
                own = dict.fromkeys(seen, 0)
                before, asked, asking = 0, len(seen), sum(1 << rank for rank in seen)
                given = 0  # the ranks of the pieces so far, as bits
                for index, (rank, rows) in enumerate(active):
                    if is_causal and seen[rank] == index:  # its last piece: what it needs lies before
                        received[rank] += (before - own[rank]) * weight
                        sources[rank] |= given & ~(1 << rank)
                        asked, asking = asked - 1, asking & ~(1 << rank)
                    others = asked - (seen[rank] > index)
                    sent[rank] += rows * others * weight
                    targets[rank] |= asking & ~(1 << rank)
                    pairs[rank] += rows * (before if is_causal else everything - rows) * queries
                    before, own[rank], given = before + rows, own[rank] + rows, given | 1 << rank
                if not is_causal:
                    for rank in seen:
                        received[rank] += (everything - own[rank]) * weight
                        sources[rank] |= given & ~(1 << rank)
    return Volume(tuple(sent), tuple(received), tuple(targets), tuple(sources), tuple(pairs))
