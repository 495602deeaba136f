"""The bounded key/value cache: attention over what it returns is that over every row ever given."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dilated_attention_pytorch import DilatedPattern, dilated_attention
from dilated_attention_pytorch.models.cache import KeyValueCache, needed_rows
from dilated_attention_pytorch.testing import max_error, multiplicity, oracle

PATTERNS = {
    "multiples": ((8, 32), (1, 4)),
    "no multiples": ((7, 12, 25), (1, 3, 5)),
    "one": ((10,), (2,)),
    "long": ((5, 1000), (1, 3)),
}


def make(batch: int, rows: int, heads: int = 4, kv_heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (batch, rows, heads, 8), (batch, rows, kv_heads, 8), (batch, rows, kv_heads, 6)
    query, key, value = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return query, key, value


def attend(cache: KeyValueCache, tensors: tuple[Tensor, ...], first: int, last: int, rates: tuple[int, ...]) -> Tensor:
    """The outputs of rows first to last, whose keys and values join the cache."""
    query, key, value = (tensor[:, first:last] for tensor in tensors)
    rows = cache.update(key, value)
    return dilated_attention(
        query, rows.key, rows.value, cache.segment_lengths, rates, key_start=rows.key_start, is_causal=True
    )


def chunks(total: int, *, longest: int) -> list[tuple[int, int]]:
    """Most of one row, some of several, some longer than a segment."""
    ends = [0]
    while ends[-1] < total:
        ends.append(min(total, ends[-1] + random.choice([1, 1, 1, 1, random.randint(2, longest)])))
    return list(pairwise(ends))


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize(("starts", "rollback"), [((0,), 0), ((-3, 0, -17), 3), ((40, 5), 0)])
def test_attention_over_the_cache_is_that_over_everything(name: str, starts: tuple[int, ...], rollback: int):
    lengths, rates = PATTERNS[name]
    total = 80
    tensors = make(len(starts), total)
    key_start = torch.tensor(starts)
    expected = oracle(*tensors, lengths, rates, is_causal=True, key_start=key_start).out
    for longest in (3, 50):
        cache = KeyValueCache(lengths, key_start=key_start, rollback=rollback)
        outs = []
        for first, last in chunks(total, longest=longest):
            outs.append(attend(cache, tensors, first, last, rates))
            assert cache.length == last
            assert cache.rows <= min(cache.max_rows, last)
            assert cache.next_position.tolist() == [start + last for start in starts]
        assert max_error(torch.cat(outs, dim=1), expected) < 1e-12
        assert cache.nbytes <= cache.max_rows * len(starts) * 2 * (8 + 6) * 8


@pytest.mark.parametrize("name", PATTERNS)
def test_no_row_is_kept_that_no_later_row_reads(name: str):
    lengths, _ = PATTERNS[name]
    pattern = DilatedPattern(lengths, (1,) * len(lengths))
    total = 90
    for starts in ((0,), (-9, 4), (-5, -20, 0)):
        seen = []
        for start in starts:
            position = torch.arange(total) + start
            m = multiplicity(pattern, 1, position, torch.zeros_like(position), total, is_causal=True)
            seen.append(m.any(0)[0])
        for length in range(1, 55):
            read = torch.stack([m[length:, :length].any(0) for m in seen]).any(0).nonzero()
            first = int(read.min()) if len(read) else length
            assert needed_rows(lengths, starts, length) == length - first


def test_buffers_stay_where_they_are():
    cache = KeyValueCache((16, 64))
    key = torch.randn(2, 1, 3, 8)
    places, sizes = set(), set()
    for n in range(1000):
        rows = cache.update(key, key)
        if n > 1:  # the first row of a segment has nothing before it, and is returned as given
            places.add(rows.key.untyped_storage().data_ptr() if rows.key is not key else 0)
            sizes.add(cache.nbytes)
    assert len(places - {0}) == 1
    assert sizes == {2 * 64 * key.nbytes}


def test_rows_go_with_their_batch_row():
    lengths, rates = PATTERNS["no multiples"]
    tensors, starts = make(3, 60), torch.tensor([0, -5, -11])
    indices = torch.tensor([2, 0, 0, 1])
    cache = KeyValueCache(lengths, key_start=starts)
    attend(cache, tensors, 0, 41, rates)
    cache.select(indices)
    chosen = tuple(tensor[indices] for tensor in tensors)
    outs = torch.cat([attend(cache, chosen, n, n + 1, rates) for n in range(41, 60)], dim=1)
    expected = oracle(*chosen, lengths, rates, is_causal=True, key_start=starts[indices]).out
    assert max_error(outs, expected[:, 41:]) < 1e-12


@pytest.mark.parametrize("name", PATTERNS)
def test_rows_taken_back_leave_no_trace(name: str):
    lengths, rates = PATTERNS[name]
    first, second = make(2, 80), make(2, 80)
    starts = torch.tensor([0, -6])
    for length in (1, 3, 24, 26, 71):
        for back in (1, 4):
            cache = KeyValueCache(lengths, key_start=starts, rollback=4)
            for n in range(length):
                cache.update(first[1][:, n : n + 1], first[2][:, n : n + 1])
            cache.crop(-back if length > 50 else max(0, length - back))
            kept = max(0, length - back)
            assert cache.length == kept
            joined = tuple(torch.cat((a[:, :kept], b[:, kept:]), 1) for a, b in zip(first, second, strict=True))
            outs = torch.cat([attend(cache, joined, n, n + 1, rates) for n in range(kept, kept + 8)], dim=1)
            whole = tuple(tensor[:, : kept + 8] for tensor in joined)
            expected = oracle(*whole, lengths, rates, is_causal=True, key_start=starts).out
            assert max_error(outs, expected[:, kept:]) < 1e-12


def test_a_crop_that_needs_dropped_rows_is_refused():
    cache = KeyValueCache((10,))
    key = torch.randn(1, 25, 1, 4)
    cache.update(key, key)
    cache.crop(21)
    cache.crop(100)
    assert (cache.length, cache.rows) == (21, 1)
    with pytest.raises(ValueError, match=r"rows before 20 of 21 are dropped.*rollback=2"):
        cache.crop(19)
    assert cache.length == 21
    cache.crop(20)  # row 20 begins a segment
    assert (cache.length, cache.rows) == (20, 0)
    cache.crop(0)
    assert cache.length == 0


def test_reset_begins_anew_with_another_batch():
    lengths, rates = PATTERNS["multiples"]
    cache = KeyValueCache(lengths)
    attend(cache, make(3, 50), 0, 50, rates)
    cache.reset(torch.tensor([-2, 0]))
    tensors = make(2, 40)
    outs = torch.cat([attend(cache, tensors, n, n + 1, rates) for n in range(40)], dim=1)
    expected = oracle(*tensors, lengths, rates, is_causal=True, key_start=torch.tensor([-2, 0])).out
    assert max_error(outs, expected) < 1e-12


def test_gradients_reach_the_rows_of_the_call():
    lengths, rates = PATTERNS["no multiples"]
    query, key, value = make(1, 40)
    cache = KeyValueCache(lengths)
    cache.update(key[:, :30], value[:, :30])
    leaves = [tensor[:, 30:].clone().requires_grad_() for tensor in (query, key, value)]
    rows = cache.update(*leaves[1:])
    options = {"key_start": rows.key_start, "is_causal": True}
    dilated_attention(leaves[0], rows.key, rows.value, lengths, rates, **options).square().sum().backward()
    wholes = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    oracle(*wholes, lengths, rates, is_causal=True).out[:, 30:].square().sum().backward()
    for leaf, whole in zip(leaves, wholes, strict=True):
        assert max_error(leaf.grad, whole.grad[:, 30:]) < 1e-11
    assert not cache.update(key[:, :1], value[:, :1]).key.requires_grad


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ((2, 1, 3, 4), (2, 1, 3, 4), "the batch has 2 rows, and key_start was given for 3"),
        ((3, 1, 3, 4), (3, 2, 3, 4), "do not fit"),
        ((3, 0, 3, 4), (3, 0, 3, 4), "n at least 1"),
        ((3, 3, 4), (3, 3, 4), "do not fit"),
    ],
)
def test_wrong_rows_are_refused(key: tuple[int, ...], value: tuple[int, ...], message: str):
    cache = KeyValueCache((8,), key_start=torch.tensor([0, -1, -2]))
    with pytest.raises(ValueError, match=message):
        cache.update(torch.zeros(key), torch.zeros(value))
    assert cache.length == 0


def test_rows_of_another_kind_are_refused():
    cache = KeyValueCache((8,))
    cache.update(torch.zeros(2, 3, 1, 4), torch.zeros(2, 3, 1, 4))
    for shape, dtype in (((2, 1, 2, 4), None), ((2, 1, 1, 4), torch.float64), ((1, 1, 1, 4), None)):
        rows = torch.zeros(shape, dtype=dtype)
        with pytest.raises(ValueError, match="the cache holds"):
            cache.update(rows, rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"segment_lengths": ()}, "at least one"),
        ({"segment_lengths": (0,)}, "each at least 1"),
        ({"segment_lengths": (4,), "rollback": -1}, "rollback is -1"),
        ({"segment_lengths": (4,), "key_start": torch.zeros(1, 1, dtype=torch.int64)}, r"int64 of shape \(B,\)"),
        ({"segment_lengths": (4,), "key_start": torch.zeros(2)}, "key_start is torch.float32"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        KeyValueCache(**arguments)
