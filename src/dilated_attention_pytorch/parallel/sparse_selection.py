"""`ContentTopK` over ranks: summaries of key blocks travel first, then each rank selects for its own query rows.

Rows of a block that lies on several ranks go to each of them, so that all sum it up alike; whoever holds a block's
first row sends its summary to the ranks with a query that may select it. What a rank then wants of the others it tells
them in one byte for each fragment and list of heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends.sparse.selection import choose_blocks
from ..backends.sparse.tiled import Layout as Rows
from ..merge import accumulator_dtype
from ..patterns.blocks import spread
from ..patterns.content import ContentTopK
from .fragments import Flat, Fragments, Layout, Listed, Shipped, shipped, tiles_of_rank
from .rounds import Exchanges, Lines, Round
from .sparse_attention import pack


@dataclass(frozen=True, eq=False)
class _Some:
    """Tiles, or marks, that travel."""

    index: Tensor

    @property
    def rows(self) -> int:
        """How many."""
        return len(self.index)


def _completed(
    layout: Layout, lines: Lines, tensors: list[Tensor], fragments: Fragments
) -> tuple[list[Tensor], Fragments]:
    """(1, rows, heads, D) of this rank's rows and those of other ranks in its blocks, and where fragments lie there.

    The last column of a fragment's ``row`` is then a flat row; those that this rank has no row of are left out.
    """
    rank, world = layout.rank, len(layout.held)
    batch, own_rows = tensors[0].shape[:2]
    flat = [tensor.flatten(0, 1) for tensor in tensors]
    on = torch.zeros(world, len(layout.tiles.keys), dtype=torch.bool, device=fragments.rank.device)
    on[fragments.rank, fragments.tile] = True  # which ranks have rows of a tile
    own = fragments.take((fragments.rank == rank).nonzero()[:, 0])
    place = [own.batch * own_rows + own.row]
    have = [own]
    if bool((on.sum(0) > 1).any()):  # every rank knows

        def sent(source: int, target: int) -> Shipped:
            wanted = on[target, fragments.tile] & (fragments.rank == source)
            return shipped(wanted[None], fragments, source, layout.rows(source))

        peers = [r for r in range(world) if r != rank]
        outgoing, incoming = {r: sent(rank, r) for r in peers}, {r: sent(r, rank) for r in peers}
        moved = Round(*({r: s for r, s in found.items() if s.rows} for found in (outgoing, incoming)))
        widths = [tensor.shape[2] * tensor.shape[3] for tensor in tensors]
        size, one = sum(widths) * tensors[0].element_size(), Flat(batch, own_rows, 1)
        before = batch * own_rows
        with Exchanges(lines, (moved,), size, tensors[0].device, lambda s: pack(s, one, *tensors)) as rounds:
            for _, received in rounds:
                for peer, shipment in moved.incoming.items():
                    parts = received[peer].view(tensors[0].dtype).split([shipment.rows * width for width in widths])
                    flat = [
                        torch.cat([found, part.view(-1, *found.shape[1:])])
                        for found, part in zip(flat, parts, strict=True)
                    ]
                    place.append(shipment.start + before)
                    have.append(fragments.take(shipment.fragment))
                    before += shipment.rows
                del received
    every = Fragments(*(torch.cat([getattr(one, name) for one in have]) for name in own.__dataclass_fields__))
    joined = Fragments(every.tile, every.rank, every.batch, torch.cat(place), every.position, every.rows)
    return [tensor.unsqueeze(0) for tensor in flat], joined


def _rows_of(tiles: Tensor, placed: Fragments, block_size: int, total: int) -> Rows:
    """Where the rows of ``tiles`` lie among flat rows, and which are there."""
    slot = torch.full((total,), -1, dtype=torch.int64, device=tiles.device)
    known = torch.unique(tiles)
    slot[known] = torch.arange(len(known), device=tiles.device)
    mine = placed.take((slot[placed.tile] >= 0).nonzero()[:, 0])
    rows = torch.zeros(len(known), block_size, dtype=torch.int64, device=tiles.device)
    exists = torch.zeros_like(rows, dtype=torch.bool)
    item, row = spread(mine.row, mine.rows)
    step = mine.position[item] % block_size + row - mine.row[item]
    rows[slot[mine.tile[item]], step] = row
    exists[slot[mine.tile[item]], step] = True
    return Rows(rows[slot[tiles]], exists[slot[tiles]])


def select_over_ranks(
    content: ContentTopK,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    layout: Layout,
    lines: Lines,
    scale: float,
) -> Tensor:
    """(B, H, n, keep) int32: blocks of their document that this rank's query rows select, -1 for none."""
    rank, world, fragments, size = layout.rank, len(layout.held), layout.fragments, content.block_size
    local, mine = tiles_of_rank(layout.tiles, fragments, rank)
    tensors = [key] if local.queries.is_causal else [key, query]
    if mask is not None:
        tensors.append(mask[:, :, None, None].to(key.dtype))
    found, placed = _completed(layout, lines, tensors, fragments)
    total = len(layout.tiles.keys)
    first = fragments.of_tiles[0]
    owner = fragments.rank[first]  # of every tile
    owned = (owner == rank).nonzero()[:, 0]
    rows = _rows_of(owned, placed, size, total)
    exists = rows.exists
    if mask is not None:
        exists = exists & (found[-1][0, :, 0, 0] == 0)[rows.rows]
    acc = accumulator_dtype(key.dtype)
    summaries = content.summaries(rows.tiled(found[0]), exists, acc)  # (G, owned, parts, D)
    known = summaries.new_zeros(summaries.shape[0], total, *summaries.shape[2:])
    filled = torch.zeros(total, dtype=torch.bool, device=key.device)
    known[:, owned], filled[owned] = summaries, exists.any(1)

    # A tile goes to the ranks with a query of its document that may select it; causal: a later one.
    block, document = layout.tiles.queries.block, layout.tiles.first_tile
    reach = torch.full((world, total), -1, dtype=torch.int64, device=key.device)
    asked = block if local.queries.is_causal else torch.full_like(block, 1 << 40)
    reach.view(-1).scatter_reduce_(
        0, fragments.rank * total + document[fragments.tile], asked[fragments.tile], reduce="amax"
    )  # fmt: skip
    sees = reach[:, document] > block

    def travelling(source: int, target: int) -> _Some:
        return _Some(((owner == source) & sees[target]).nonzero()[:, 0])

    def packed(some: _Some) -> Tensor:
        flags = filled[some.index].to(acc)[:, None]
        return torch.cat([known[:, some.index].transpose(0, 1).flatten(1), flags], 1).reshape(-1)

    peers = [r for r in range(world) if r != rank]
    moved = Round({r: travelling(rank, r) for r in peers}, {r: travelling(r, rank) for r in peers})
    width = summaries.shape[0] * summaries.shape[2] * summaries.shape[3] + 1
    with Exchanges(lines, (moved,), width * known.element_size(), key.device, packed) as rounds:
        for _, received in rounds:
            for peer, some in moved.incoming.items():
                part = received[peer].view(acc).view(-1, width)
                known[:, some.index] = part[:, :-1].unflatten(1, (known.shape[0], *known.shape[2:])).transpose(0, 1)
                filled[some.index] = part[:, -1] != 0
            del received
    selection = torch.full(
        (query.shape[0], query.shape[2], query.shape[1], content.keep), -1, dtype=torch.int32, device=query.device
    )  # fmt: skip
    if len(mine):
        asking = query.flatten(0, 1).unsqueeze(0) if local.queries.is_causal else found[1]
        if local.queries.is_causal:  # of its own rows alone; not causal, of all rows of its blocks
            places = mine.batch * query.shape[1] + mine.row
            steps = torch.arange(size, device=query.device) - (mine.position % size)[:, None]
            own = Rows(places[:, None] + steps, (steps >= 0) & (steps < mine.rows[:, None]))
        else:
            own = _rows_of(mine.tile, placed, size, total)
        choose_blocks(selection, content, asking, own, local, known, filled, scale)
    return selection


def ask_ranks(lines: Lines, rank: int, world: int, mine: Listed) -> dict[int, Tensor]:
    """What each other rank wants of this one, (owners, fragments): a byte for each fragment of its own, both ways."""
    held = [(mine.keys.rank == r).nonzero()[:, 0] for r in range(world)]
    peers = [r for r in range(world) if r != rank]
    # A shipment to a peer is marks of the peer's fragments; one from a peer, marks of this rank's.
    moved = Round({r: _Some(held[r]) for r in peers}, {r: _Some(held[rank]) for r in peers})
    found = {}
    with Exchanges(
        lines, (moved,), mine.owners, mine.key.device, lambda some: mine.wanted[:, some.index].to(torch.uint8).view(-1)
    ) as rounds:
        for _, received in rounds:
            for peer in peers:
                theirs = torch.zeros_like(mine.wanted)
                theirs[:, held[rank]] = received[peer].view(mine.owners, -1) != 0
                found[peer] = theirs
            del received
    return found
