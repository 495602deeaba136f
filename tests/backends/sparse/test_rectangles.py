"""Rectangles that the Hopper kernels read: expanded pair by pair, they are the pairs of the plan."""

from __future__ import annotations

import pytest
import torch

from dilated_attention_pytorch import BlockList, ContentTopK, DilatedBlocks, GlobalLocal, LocalWindow, RandomBlocks
from dilated_attention_pytorch.backends.sparse.problem import SparseProblem
from dilated_attention_pytorch.backends.sparse.rectangles import COLUMNS, FOREIGN, ROWS
from dilated_attention_pytorch.patterns.blocks import tiles_of
from dilated_attention_pytorch.types import Document, Options, Shape

LIST = BlockList.from_mask(torch.rand(2, 9, 9, generator=torch.Generator().manual_seed(1)) < 0.4, block_size=64)
PATTERNS = {
    "local 64": LocalWindow(128, 64),
    "local 128": LocalWindow(128, 128),
    "global 64": GlobalLocal(64, 1, (300,), 64),
    "random 64": RandomBlocks(3, 1, 64),
    "random 128": RandomBlocks(2, 1, 128),
    "dilated 64": DilatedBlocks((192, 576), (1, 3), 64),
    "list 64": LIST,
    "content 128": ContentTopK(2),
    "content 128, first and local": ContentTopK(1, always_local=1, always_first=1),
}
PLACES = {
    "one": (1, 576, 576, (Document(0, 1, 0, 576, 0, 576),)),
    "ragged": (1, 533, 533, (Document(0, 1, 0, 533, 0, 533),)),
    "packed": (1, 500, 500, tuple(Document(0, 1, *row, 0, row[1]) for row in ((0, 70), (70, 300), (370, 130)))),
    "chunk": (2, 200, 500, (Document(0, 2, 0, 500, 0, 500),)),
    "left": (2, 400, 400, (Document(0, 1, 100, 300, 0, 300), Document(1, 1, 3, 397, 0, 397))),
    "evicted": (1, 300, 300, (Document(0, 1, 0, 300, 77, 377),)),
}  # fmt: skip


def problem(pattern, place, heads, kv_heads, is_causal):
    batch, queries, keys, documents = PLACES[place]
    shape, options = Shape(batch, queries, keys, heads, kv_heads, 64, 64), Options(is_causal, 1.0, 0.0, "mask", "exact")
    if isinstance(pattern, ContentTopK):
        pattern = pattern.bound([choice(pattern, shape, documents)])
    return SparseProblem(pattern, shape, options, documents, torch.bfloat16, "cpu")


def choice(content, shape, documents):
    """Blocks at random that a tile does not see anyhow, some of them none, at a tile's first row."""
    draw, size = torch.Generator().manual_seed(2), content.block_size
    found = torch.full((shape.batch, shape.heads, shape.query_rows, content.keep), -1, dtype=torch.int32)
    tiles = tiles_of(shape, documents, size, is_causal=False, device="cpu")
    for (batch, row, position, _), total, low in zip(
        tiles.queries.tiles.tolist(), tiles.queries.total.tolist(), tiles.first_block.tolist(), strict=True
    ):
        own = position // size
        others = [j for j in range(max(low, content.always_first), total) if abs(j - own) > content.always_local]
        for head in range(shape.heads):
            number = int(torch.randint(content.keep + 1, (1,), generator=draw))
            order = torch.randperm(len(others), generator=draw)[:number]
            found[batch, head, row, : len(order)] = torch.tensor(others, dtype=torch.int32)[order]
    return found


def pairs_of_plan(given):
    """(H, B * Nq, B * Nk) int64: how often the plan shows each pair, with the causal mask."""
    plan, shape = given.plan, given.shape
    rows, keys = shape.batch * shape.query_rows, shape.batch * shape.key_rows
    found = torch.zeros(shape.heads, rows, keys, dtype=torch.int64)
    where, other = torch.full((rows,), -(1 << 40)), torch.full((keys,), 1 << 40)
    for table, positions, per_batch in (
        (plan.query_tiles, where, shape.query_rows),
        (plan.key_tiles, other, shape.key_rows),
    ):
        for batch, row, position, count in table.tolist():
            start = batch * per_batch + row
            positions[start : start + count] = torch.arange(position, position + count)
    for head in range(shape.heads):
        pointer = plan.row_pointer[head if plan.per_head else 0].tolist()
        for tile, (batch, row, _, count) in enumerate(plan.query_tiles.tolist()):
            for column in plan.columns[pointer[tile] : pointer[tile + 1]].tolist():
                other_batch, key_row, _, key_count = plan.key_tiles[column].tolist()
                start, key_start = batch * shape.query_rows + row, other_batch * shape.key_rows + key_row
                found[head, start : start + count, key_start : key_start + key_count] += 1
    if given.options.is_causal:
        found *= where[:, None] >= other
    return found


def add(found, row, key_row, shown):
    """Count pairs; those beyond the tensors must not be shown."""
    inside = found[row : row + shown.shape[0], key_row : key_row + shown.shape[1]]
    inside += shown[: inside.shape[0], : inside.shape[1]]
    assert not shown[inside.shape[0] :].any()
    assert not shown[:, inside.shape[1] :].any()


def byte(value, number):
    return value >> 8 * number & 255


KINDS = [(name, causal) for name in PATTERNS for causal in (False, True) if not (causal and "content" in name)]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("name", "is_causal"), KINDS)
def test_rectangles_are_the_pairs_of_the_plan(name, place, is_causal):
    given = problem(PATTERNS[name], place, 2, 1 if is_causal else 2, is_causal)
    expected = pairs_of_plan(given)
    found, seen = torch.zeros_like(expected), set()
    lists = given.forward_lists
    column, row = torch.arange(128), torch.arange(128)[:, None]
    counts = []
    for first_row, packed, first, count in lists.tiles.tolist():
        rows, head = packed % 256, packed // 256
        seen.add((head, first_row))
        counts.append(count)
        for key_row, ahead, keys, members in lists.records[first : first + count].tolist():
            flags, low, high, top, bottom = keys >> 16, byte(keys, 0), byte(keys, 1), byte(members, 0), byte(members, 1)
            shown = torch.ones(128, 128, dtype=torch.bool)
            if flags:
                shown = (row >= top) & (row < bottom) & torch.ones_like(column).bool()
            if flags & COLUMNS:
                shown &= (column >= low) & (column <= ((ahead + row).clamp(max=high) if is_causal else high))
            assert flags & FOREIGN or key_row + 128 <= expected.shape[2]
            assert flags & ROWS or bottom >= rows
            if flags & FOREIGN:
                assert not shown[:, high + 1 :].any()
            add(found[head], first_row, key_row, shown[:rows])
    assert torch.equal(found, expected)
    assert lists.work.blocks.reshape(-1).tolist() == counts
    assert len(lists.work.blocks) == 2
    assert len(seen) == len(lists.tiles) == 2 * len({first for _, first in seen})
    assert 0 < lists.fill <= 1


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("name", "is_causal"), KINDS)
def test_transposed_rectangles_are_the_pairs_of_the_plan(name, place, is_causal):
    given = problem(PATTERNS[name], place, 2, 1 if is_causal else 2, is_causal)
    expected = pairs_of_plan(given)
    found = torch.zeros_like(expected)
    lists, count = given.backward_lists, len(given.backward_lists.tiles)
    assert sorted(lists.tiles[:, 0].tolist()) == lists.tiles[:, 0].tolist()
    by_head = lists.segments.view(-1, count, 4)[..., 1:3].sum(-1).expand(2, count)
    assert lists.work.blocks.tolist() == by_head.unflatten(0, (1 if is_causal else 2, -1)).sum(1).tolist()
    for owner in range(len(lists.segments) // count):
        heads = [owner] if len(lists.segments) > count else range(2)
        for place_of, (key_row, _rows, position, _) in enumerate(lists.tiles.tolist()):
            first, masked, clean, _ = lists.segments[owner * count + place_of].tolist()
            records = lists.records[first : first + masked + clean].tolist()
            for number, (query_row, query_position, packed, _) in enumerate(records):
                high, left, right = byte(packed, 0), byte(packed, 1), packed >> 16
                shown = torch.ones(64, 128, dtype=torch.bool)
                if number < masked:
                    shown[high:] = False
                    shown[:, :left] = False
                    shown[:, right:] = False
                    if is_causal:
                        shown &= position + torch.arange(128) <= query_position + torch.arange(64)[:, None]
                for head in heads:
                    add(found[head], query_row, key_row, shown)
    assert torch.equal(found, expected)
