"""`HilbertOrdering`: apply and invert, documents, class tokens, gradients, attention under an ordering, errors."""

from __future__ import annotations

import copy
import pickle
from itertools import pairwise

import pytest
import torch

from dilated_attention_pytorch import (
    GlobalLocal,
    HilbertOrdering,
    LocalWindow,
    dilated_attention,
    hilbert_order,
    hilbert_order_from_coordinates,
    sparse_attention,
)
from dilated_attention_pytorch.ordering import ordering as module


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


POINTS = torch.randint(0, 9, (3, 20, 2), generator=torch.Generator().manual_seed(5))
HIDDEN = torch.arange(20) >= torch.tensor([20, 7, 0])[:, None]
PACKED = torch.randint(0, 9, (11, 3), generator=torch.Generator().manual_seed(6))


def expected_positions(body: list[int], skip_first: int, bounds: list[int]) -> list[int]:
    """Where each row comes from, put together with lists: the rows skipped, then the body, document by document."""
    positions, taken = [], 0
    skipped = [row for first, last in pairwise(bounds) for row in range(first, first + skip_first)]
    left = [row for row in range(bounds[-1]) if row not in skipped]
    for first, last in pairwise(bounds):
        count = last - first - skip_first
        positions += list(range(first, first + skip_first)) + [left[row] for row in body[taken : taken + count]]
        taken += count
    return positions


GRID = hilbert_order(5, 6).tolist()
TWO = hilbert_order(2, 4).tolist() + [8 + cell for cell in hilbert_order(4, 3).tolist()]
LENGTHS = (4, 0, 7)
THREE = hilbert_order_from_coordinates(PACKED[:4]).tolist()
THREE += [4 + row for row in hilbert_order_from_coordinates(PACKED[4:]).tolist()]
ORDERINGS = {
    "grid": (HilbertOrdering((5, 6)), GRID, 0, [0, 30]),
    "class token": (HilbertOrdering((5, 6), skip_first=1), GRID, 1, [0, 31]),
    "box": (HilbertOrdering((2, 3, 4), skip_first=2), hilbert_order(2, 3, 4).tolist(), 2, [0, 26]),
    "same documents": (
        HilbertOrdering((5, 6), skip_first=1, cu_seqlens=[0, 31, 62]), GRID + [30 + row for row in GRID], 1, [0, 31, 62]
    ),
    "documents": (
        HilbertOrdering([(2, 4), (4, 3)], skip_first=1, cu_seqlens=torch.tensor([0, 9, 22])), TWO, 1, [0, 9, 22]
    ),
    "points": (
        HilbertOrdering.from_coordinates(POINTS[0], skip_first=1),
        hilbert_order_from_coordinates(POINTS[0]).tolist(), 1, [0, 21],
    ),
    "packed points": (
        HilbertOrdering.from_coordinates(PACKED, skip_first=2, cu_seqlens=[0, 6, 8, 17]), THREE, 2, [0, 6, 8, 17]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ORDERINGS)
def test_apply_takes_the_rows_and_invert_puts_them_back(name: str):
    ordering, body, skip_first, bounds = ORDERINGS[name]
    positions = expected_positions(body, skip_first, bounds)
    assert ordering.rows == len(positions)
    assert ordering.positions().tolist() == positions
    for x, dim in (
        (normal(2, ordering.rows, 3), 1),
        (normal(ordering.rows, 3), 0),
        (normal(ordering.rows), -1),
        (normal(2, 4, ordering.rows, 3, dtype=torch.bfloat16).transpose(1, 3), 2),
        (torch.arange(2 * ordering.rows).view(2, -1), 1),
    ):
        moved = ordering.apply(x, dim)
        assert torch.equal(moved, x.movedim(dim, 0)[positions].movedim(0, dim))
        assert not torch.equal(moved, x)
        assert torch.equal(ordering.invert(moved, dim), x)
        assert torch.equal(ordering.apply(ordering.invert(x, dim), dim), x)


@pytest.mark.parametrize("skip_first", [0, 1])
def test_a_batch_of_points_has_an_order_for_each_entry(skip_first: int):
    ordering = HilbertOrdering.from_coordinates(POINTS, key_padding_mask=HIDDEN, skip_first=skip_first)
    order = hilbert_order_from_coordinates(POINTS, key_padding_mask=HIDDEN)
    x = normal(3, 20 + skip_first, 4)
    rows = [x[entry, skip_first:][order[entry]] for entry in range(3)]
    expected = torch.cat((x[:, :skip_first], torch.stack(rows)), 1)
    assert torch.equal(ordering.apply(x), expected)
    assert torch.equal(ordering.invert(expected), x)
    heads = x[:, None].expand(3, 2, -1, -1)
    assert torch.equal(ordering.apply(heads, dim=2), expected[:, None].expand(3, 2, -1, -1))
    assert torch.equal(ordering.apply(x[..., 0], dim=-1), expected[..., 0])


@pytest.mark.parametrize("name", ["class token", "documents", "packed points"])
def test_derivatives(name: str):
    ordering = ORDERINGS[name][0]
    x = normal(2, ordering.rows, 2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ordering.apply(x).square(), x)
    assert torch.autograd.gradgradcheck(lambda x: ordering.invert(x).pow(3), x)
    grad = normal(2, ordering.rows, 2, dtype=torch.float64, seed=1)
    (found,) = torch.autograd.grad(ordering.apply(x), x, grad)
    assert torch.equal(found, ordering.invert(grad))


@pytest.mark.parametrize(("shape", "skip_first"), [((12, 10), 0), ((6, 9), 1), ((4, 4, 6), 1)])
def test_attention_under_an_ordering_is_attention_on_permuted_rows(shape, skip_first):
    ordering = HilbertOrdering(shape, skip_first=skip_first)
    index = [*range(skip_first), *(skip_first + cell for cell in hilbert_order(*shape).tolist())]
    back = [index.index(row) for row in range(len(index))]
    leaves = [normal(2, ordering.rows, 4, 8, seed=seed).requires_grad_() for seed in range(3)]
    pattern, grad = ((16, 64, 128), (1, 2, 4)), normal(2, ordering.rows, 4, 8, seed=9)
    out = ordering.invert(dilated_attention(*map(ordering.apply, leaves), *pattern))
    expected = dilated_attention(*(leaf[:, index] for leaf in leaves), *pattern)[:, back]
    assert torch.equal(out, expected)
    for one, other in zip(*(torch.autograd.grad(o, leaves, grad) for o in (out, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    # It is another function than attention on the rows as they are, but for one segment of all rows.
    assert not torch.allclose(out, dilated_attention(*leaves, *pattern), atol=1e-3)
    whole = (ordering.rows,), (1,)
    torch.testing.assert_close(
        ordering.invert(dilated_attention(*map(ordering.apply, leaves), *whole)), dilated_attention(*leaves, *whole)
    )


@pytest.mark.parametrize("pattern", [LocalWindow(32, 16), GlobalLocal(16, 16, block_size=16)], ids=repr)
def test_block_sparse_attention_under_an_ordering_sees_what_is_near_on_the_curve(pattern):
    """Against dense attention on the rows as they are, under a mask written in places on the curve."""
    ordering = HilbertOrdering((8, 16))
    place = torch.empty(128, dtype=torch.int64).scatter_(0, hilbert_order(8, 16), torch.arange(128))
    block = place // 16
    near = (block[:, None] - block).abs() <= pattern.window // 16
    if isinstance(pattern, GlobalLocal):
        near |= (block[:, None] == 0) | (block == 0)
    leaves = [normal(2, 128, 4, 8, dtype=torch.float64, seed=seed).requires_grad_() for seed in range(3)]
    out = ordering.invert(sparse_attention(*map(ordering.apply, leaves), pattern))
    q, k, v = (leaf.transpose(1, 2) for leaf in leaves)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=near).transpose(1, 2)
    torch.testing.assert_close(out, expected)
    grad = normal(2, 128, 4, 8, dtype=torch.float64, seed=9)
    for one, other in zip(*(torch.autograd.grad(o, leaves, grad) for o in (out, expected)), strict=True):
        torch.testing.assert_close(one, other)


def test_attention_with_padding_and_documents():
    ordering = HilbertOrdering.from_coordinates(POINTS, key_padding_mask=HIDDEN)
    x = normal(3, 20, 2, 8)
    out = ordering.invert(dilated_attention(*[ordering.apply(x)] * 3, [8], [1], key_padding_mask=HIDDEN))
    alone = HilbertOrdering.from_coordinates(POINTS[1, :7])
    expected = alone.invert(dilated_attention(*[alone.apply(x[1:2, :7])] * 3, [8], [1]))
    torch.testing.assert_close(out[1:2, :7], expected)

    packed = HilbertOrdering([(3, 4), (5, 2)], cu_seqlens=[0, 12, 22])
    x, cuts = normal(1, 22, 2, 8), torch.tensor([0, 12, 22])
    out = packed.invert(dilated_attention(*[packed.apply(x)] * 3, [4], [1], cu_seqlens=cuts))
    for grid, part, found in zip([(3, 4), (5, 2)], x.split([12, 10], 1), out.split([12, 10], 1), strict=True):
        one = HilbertOrdering(grid)
        torch.testing.assert_close(found, one.invert(dilated_attention(*[one.apply(part)] * 3, [4], [1])))


@pytest.mark.parametrize(
    "ordering",
    [
        HilbertOrdering((1, 8)),
        HilbertOrdering((7, 1), skip_first=1),
        HilbertOrdering((1, 1, 8)),
        HilbertOrdering([(1, 3), (5, 1)], cu_seqlens=[0, 3, 8]),
        HilbertOrdering(permutation=torch.arange(8)),
        HilbertOrdering(permutation=torch.arange(8).expand(2, 8)),
        HilbertOrdering.from_coordinates(torch.zeros(8, 2)),
    ],
    ids=repr,
)
def test_an_order_that_moves_nothing_costs_nothing(ordering: HilbertOrdering):
    x = normal(2, 8, 3)
    assert ordering.is_identity
    assert ordering.apply(x) is x
    assert ordering.invert(x) is x
    assert ordering.positions().flatten()[:8].tolist() == list(range(8))
    assert not HilbertOrdering((2, 4)).is_identity


def test_the_index_is_computed_once_and_the_cache_is_bounded(monkeypatch: pytest.MonkeyPatch):
    module._CACHE.clear()
    calls = []

    def counted(*shape: int, device: torch.device) -> torch.Tensor:
        calls.append(shape)
        return hilbert_order(*shape, device=device)

    monkeypatch.setattr(module, "hilbert_order", counted)
    for _ in range(3):
        HilbertOrdering((4, 6), skip_first=1).apply(normal(1, 25, 2))
        HilbertOrdering((4, 6), skip_first=1).invert(normal(1, 25, 2))
    assert calls == [(4, 6)]
    for width in range(2, 40):
        HilbertOrdering((2, width)).positions()
    assert len(module._CACHE) == module._CACHE_SIZE
    points = HilbertOrdering.from_coordinates(POINTS[0])
    assert points.positions() is points.positions()


def test_an_index_first_used_in_inference_mode_serves_training():
    module._CACHE.clear()
    for ordering in (HilbertOrdering((3, 5)), HilbertOrdering.from_coordinates(POINTS[0, :15])):
        with torch.inference_mode():
            ordering.apply(normal(1, 15, 2))
    with torch.inference_mode():
        made_there = HilbertOrdering.from_coordinates(POINTS[0, :15])
    for ordering in (HilbertOrdering((3, 5)), made_there):
        x = normal(1, 15, 2).requires_grad_()
        ordering.apply(x).sum().backward()
        assert torch.equal(x.grad, torch.ones_like(x))


def test_compiles_into_one_graph():
    ordering = HilbertOrdering((4, 6), skip_first=1)
    x = normal(2, 25, 4).requires_grad_()

    def double(x: torch.Tensor) -> torch.Tensor:
        return ordering.invert(ordering.apply(x) * 2)

    compiled = torch.compile(double, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), 2 * x)
    (grad,) = torch.autograd.grad(compiled(x).sum(), x)
    assert torch.equal(grad, torch.full_like(x, 2))


def test_equality_copies_and_a_permutation_of_its_own():
    given = torch.tensor([2, 0, 1])
    ordering = HilbertOrdering(permutation=given)
    assert ordering == HilbertOrdering(permutation=torch.tensor([2, 0, 1]))
    assert ordering != HilbertOrdering(permutation=torch.tensor([1, 0, 2]))
    assert HilbertOrdering([4, 6]) == HilbertOrdering((4, 6)) != HilbertOrdering((4, 6), skip_first=1)
    assert len({HilbertOrdering((4, 6)), HilbertOrdering((4, 6)), HilbertOrdering((6, 4))}) == 2
    assert (ordering == 3) is False
    given.zero_()
    assert ordering.positions().tolist() == [2, 0, 1]
    for same in (copy.deepcopy(ordering), pickle.loads(pickle.dumps(ordering))):
        assert same == ordering
        assert torch.equal(same.apply(normal(1, 3, 2)), ordering.apply(normal(1, 3, 2)))


def test_causal_attention_is_refused():
    ordering = HilbertOrdering((4, 4), skip_first=1)
    ordering.check(is_causal=False)
    with pytest.raises(
        ValueError, match=r"HilbertOrdering\(\(4, 4\), skip_first=1\) with is_causal=True.*give is_causal"
    ):
        ordering.check(is_causal=True)


P = torch.tensor([1, 0, 2, 3])


@pytest.mark.parametrize(
    ("make", "fragments"),
    [
        (lambda: HilbertOrdering(), ("either a shape or a permutation",)),
        (lambda: HilbertOrdering((2, 2), P), ("either a shape or a permutation",)),
        (lambda: HilbertOrdering((2,)), ("(2,)", "(height, width)")),
        (lambda: HilbertOrdering("44"), ("'44'", "(height, width)")),
        (lambda: HilbertOrdering(4), ("4", "(height, width)")),
        (lambda: HilbertOrdering((2, 2), skip_first=-1), ("skip_first is -1", "at least 0")),
        (lambda: HilbertOrdering((2, 2), skip_first=True), ("skip_first is True", "integer")),
        (lambda: HilbertOrdering([(2, 2), (3, 3)]), ("2 grids", "cu_seqlens")),
        (lambda: HilbertOrdering([(2, 2), (3, 3)], cu_seqlens=[0, 4, 12]), ("[4, 8]", "[4, 9]", "agree")),
        (lambda: HilbertOrdering((2, 2), cu_seqlens=[0, 4, 9]), ("[4, 5]", "[4, 4]")),
        (lambda: HilbertOrdering((2, 2), cu_seqlens=[0]), ("[0]", "at least 2")),
        (lambda: HilbertOrdering((2, 2), cu_seqlens=[0.0, 4.0]), ("[0.0, 4.0]", "integers")),
        (lambda: HilbertOrdering((2, 2), cu_seqlens=[4, 0]), ("[4, 0]", "start at 0")),
        (lambda: HilbertOrdering(permutation=P, skip_first=3, cu_seqlens=[0, 2, 6]), ("[0, 2, 6]", "3 rows skipped")),
        (lambda: HilbertOrdering(permutation=[1, 0]), ("list", "torch.Tensor")),
        (lambda: HilbertOrdering(permutation=P.float()), ("float32", "int64")),
        (lambda: HilbertOrdering(permutation=P[:, None, None]), ("(4, 1, 1)", "(B, N)")),
        (lambda: HilbertOrdering(permutation=torch.tensor([0, 0, 1])), ("each of 0 to 2 once",)),
        (lambda: HilbertOrdering(permutation=P + 1), ("each of 0 to 3 once",)),
        (lambda: HilbertOrdering(permutation=P, cu_seqlens=[0, 1, 4]), ("from one document to another",)),
        (lambda: HilbertOrdering(permutation=P, cu_seqlens=[0, 2, 5]), ("(4,)", "ask for (5,)")),
        (lambda: HilbertOrdering.from_coordinates(PACKED, cu_seqlens=[0, 12]), ("(11, 3)", "12 rows")),
        (lambda: HilbertOrdering.from_coordinates([[0, 0]], cu_seqlens=[0, 1]), ("list", "1 rows")),
        (
            lambda: HilbertOrdering.from_coordinates(PACKED, cu_seqlens=[0, 11], key_padding_mask=HIDDEN[0]),
            ("key_padding_mask and cu_seqlens",),
        ),
        (lambda: HilbertOrdering((2, 2)).apply(normal(1, 5, 2)), ("(1, 5, 2)", "5 rows", "4 in dimension 1")),
        (lambda: HilbertOrdering((2, 2)).invert(normal(4, 2), 2), ("dim is 2", "(4, 2)")),
        (lambda: HilbertOrdering((2, 2)).apply([1, 2, 3, 4]), ("list", "torch.Tensor")),
        (
            lambda: HilbertOrdering(permutation=torch.stack((P, P))).apply(normal(3, 4, 2)),
            ("(3, 4, 2)", "2 x 4 rows", "batch in dimension 0"),
        ),
        (lambda: HilbertOrdering(permutation=torch.stack((P, P))).apply(normal(4, 2), 0), ("batch in dimension 0",)),
    ],
)
def test_wrong_input(make, fragments):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the fragments are checked below
        make()
    assert all(fragment in str(caught.value) for fragment in fragments), caught.value
