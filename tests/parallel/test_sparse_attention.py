"""Block-sparse attention over real gloo processes against the dense oracle; what travels, against a count of pairs."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache, partial

import pytest
import torch

from dilated_attention_pytorch import (
    BlockList,
    ContentTopK,
    DilatedBlocks,
    DilatedPattern,
    GlobalLocal,
    Hierarchical,
    LocalWindow,
    RandomBlocks,
    Union,
)
from dilated_attention_pytorch.backends.sparse.selection import sparse_select
from dilated_attention_pytorch.sparse_testing import SparseCase, dense, multiset, summands
from dilated_attention_pytorch.testing import RESULTS, error_bound, max_error, results

from .test_attention import assemble

LOCAL = LocalWindow(16, 16)
BIG = Union((GlobalLocal(0, 1, block_size=16), RandomBlocks(1, seed=3, block_size=16)))
CASES = {
    "local": {},
    "causal": {"is_causal": True, "grad_lse": True},
    "straddling": {"key_rows": 101, "pattern": LocalWindow(32, 32), "is_causal": True},
    "global": {"pattern": GlobalLocal(16, 1, (70,), 16), "is_causal": True},
    "per_head": {"pattern": BIG, "kv_heads": 2, "group": 2, "grad_lse": True},
    "per_head_causal": {"pattern": BIG, "kv_heads": 4, "is_causal": True, "key_rows": 97},
    "dilated_blocks": {"pattern": DilatedBlocks((32, 64), (1, 2), 16), "kv_heads": 4, "is_causal": True},
    "hierarchical": {"pattern": Hierarchical(((16, 16), (64, 32)), 16)},
    "packed": {"cuts": (9, 9, 31, 64), "pattern": BIG},
    "packed_causal": {"cuts": (9, 40, 77), "is_causal": True},
    "left_padding": {"key_start": (-20, -3), "batch": 2, "is_causal": True, "pattern": BIG},
    "evicted": {"key_start": 37, "is_causal": True},
    "masked": {"hidden": "random", "batch": 2, "is_causal": True, "pattern": BIG},
    "masked_rows": {"hidden": (96, 30), "batch": 2, "grad_lse": True},
    "value_dim": {"value_dim": 12},
    "bfloat16": {"dtype": torch.bfloat16, "pattern": GlobalLocal(16, 1, block_size=16)},
    "float64": {"dtype": torch.float64, "pattern": BIG, "is_causal": True},
    "few_rows": {"key_rows": 5},
}  # fmt: skip
SHAPE = {"seed": 3, "key_rows": 96, "kv_heads": 2, "head_dim": 8, "batch": 1, "pattern": LOCAL}


def case_of(name):
    return SparseCase(**{**SHAPE, **CASES[name]})


def pairs(case):
    """(B, H, N, N) int64: how often each row attends to each key row."""
    options = case.sparse_options()
    where = {name: options.get(name) for name in ("key_padding_mask", "cu_seqlens")}
    heads = case.kv_heads * case.group
    return multiset(
        case.pattern, heads, case.batch, case.key_rows, case.key_rows, is_causal=case.is_causal,
        key_start=options["key_start"], **where,
    )  # fmt: skip


def check(case, answers, counts):
    """Bound B of the dense oracle on ``counts``."""
    got = assemble(answers, case)
    tensors, hidden = case.tensors(), case.sparse_options().get("key_padding_mask")
    oracle = partial(dense, counts=counts, scale=case.scale, hidden=hidden)
    exact = [t.double() for t in tensors]
    gold, eager = (results(oracle, inputs, grad_lse=case.grad_lse) for inputs in (exact, tensors))
    for name in RESULTS:
        error, bound = max_error(got[name], gold[name]), error_bound(gold[name], eager[name], got[name].dtype)
        if not error <= bound:
            terms = summands(exact, gold, counts, case, hidden=hidden)
            bound = error_bound(gold[name], eager[name], got[name].dtype, summand=terms[name])
        assert error <= bound, f"{name}: {error:.3g} > {bound:.3g}"
    assert all(answer["leased"] == 0 for _, answer in answers)


def needed_rows(case, answers, counts):
    """[source][target]: rows of blocks of one key head that the target needs of the source, counted pair by pair.

    A block travels whole, but for rows that nobody is to see: those of a block that has a pair.
    """
    group = case.group
    owner = torch.empty(case.key_rows, dtype=torch.int64)
    for rank, (_, answer) in enumerate(answers):
        owner[torch.from_numpy(answer["rows"])] = rank
    options = case.sparse_options()
    unmasked = multiset(
        case.pattern, counts.shape[1], case.batch, case.key_rows, case.key_rows, is_causal=case.is_causal,
        key_start=options["key_start"], cu_seqlens=options.get("cu_seqlens"),
    )  # fmt: skip
    world = len(answers)
    found = [[0] * world for _ in range(world)]
    by_heads = unmasked.unflatten(1, (-1, group)).any(2)  # (B, G, N, N)
    if not case.pattern.per_head:
        by_heads = by_heads[:, :1].expand_as(by_heads)
    for target in range(world):
        met = by_heads[:, :, owner == target].any(2)  # (B, G, N)
        for source in range(world):
            if source != target:
                found[source][target] = int(met[..., owner == source].sum())
    return found


RUNS = (
    (("gather", "contiguous", 2), ("ring", "zigzag", 3)),
    (("ring", "contiguous", 4), ("gather", "zigzag", 4), ("auto", "contiguous", 1)),
)  # random calls draw from all combinations


@pytest.mark.parametrize("name", CASES)
def test_equal_to_the_oracle_and_bytes_are_those_of_the_needed_blocks(pool, name):
    case = case_of(name)
    counts = pairs(case)
    for strategy, layout, world in RUNS[list(CASES).index(name) % 2]:
        answers = pool.run("attend_sparse", world, case, strategy, layout)
        check(case, answers, counts)
        needed, itemsize = needed_rows(case, answers, counts), case.dtype.itemsize
        width = case.head_dim + (case.value_dim or case.head_dim)
        # The mask of a row travels once where its key heads do, and with each of them where they do not.
        masks = 0 if case.hidden is None else 1 if case.pattern.per_head else 1 / case.kv_heads
        for rank, (_, answer) in enumerate(answers):
            away = sum(needed[rank])
            assert answer["forward"] == round(away * (width + masks) * itemsize), f"{strategy} {layout} {world}"
            home = sum(row[rank] for row in needed) * width * itemsize
            assert answer["backward"] == answer["forward"] + home


@pytest.mark.parametrize("pooling", ["mean", "sub_means", "min_max", "moments"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["both", "causal"])
def test_content_selects_over_ranks_what_it_selects_on_one_device(pool, pooling, is_causal):
    """Blocks straddle ranks; one device's result, in float64, is itself tested against loops."""
    from dilated_attention_pytorch import sparse_attention_with_lse

    content = ContentTopK(1, always_first=1, pooling=pooling, block_size=16)
    for pattern, runs in ((content, (RUNS[0][1], RUNS[1][2])), (Union((content, LocalWindow(16, 16))), RUNS[1][:2])):
        case = SparseCase(
            seed=4, key_rows=86, kv_heads=1, group=2, head_dim=8, batch=2, pattern=pattern, is_causal=is_causal,
            dtype=torch.float64, hidden="random", grad_lse=True,
        )  # fmt: skip
        attend = partial(sparse_attention_with_lse, pattern=pattern, **case.sparse_options())
        expected = results(attend, case.tensors(), grad_lse=True)
        for strategy, layout, world in runs:
            answers = pool.run("attend_sparse", world, case, strategy, layout)
            got = assemble(answers, case)
            for name in RESULTS:
                torch.testing.assert_close(got[name], expected[name], rtol=1e-9, atol=1e-9, msg=f"{name} {strategy}")


@pytest.mark.parametrize("is_causal", [False, True], ids=["both", "causal"])
def test_bytes_of_a_choice_by_content_are_those_of_summaries_marks_and_needed_blocks(pool, is_causal):
    world, size, blocks, dim = 3, 16, 9, 8
    content = ContentTopK(2, always_first=1, block_size=size)
    case = SparseCase(
        seed=6, key_rows=size * blocks, kv_heads=2, group=2, head_dim=dim, batch=2, pattern=content,
        is_causal=is_causal, dtype=torch.float64,
    )  # fmt: skip
    query, key = case.tensors()[:2]
    selected = sparse_select(query, key, None, None, None, content.code, 0, is_causal, None)  # (B, H, N, keep)
    owner = torch.arange(blocks) // (blocks // world)
    shown = torch.zeros(case.batch, 4, blocks, blocks, dtype=torch.bool)  # which blocks a block's rows list
    for own in range(blocks):
        chosen = selected[:, :, own * size : (own + 1) * size].flatten(2).long()
        shown[:, :, own].scatter_(-1, chosen.clamp(min=0), chosen >= 0)
        shown[:, :, own, 0] |= chosen[..., 0] >= -1
        shown[:, :, own, own] = True
    shown = shown.unflatten(1, (2, 2)).any(2)  # of key heads
    answers = pool.run("attend_sparse", world, case, "gather", "contiguous")
    for source, (status, answer) in enumerate(answers):
        assert status == "done", answer
        expected = 0
        for target in range(world):
            if target == source:
                continue
            mine = owner == source
            rows = int(shown[:, :, owner == target][..., mine].any(2).sum()) * size
            # Sums of all key heads and one mark, of both batch entries; causal: to later ranks alone.
            summaries = 2 * int(mine.sum()) * (2 * dim + 1) * 8 * (target > source or not is_causal)
            marks = 2 * 2 * int((owner == target).sum())
            expected += rows * 2 * dim * 8 + summaries + marks
        assert answer["forward"] == expected


def test_explicit_lists(pool):
    shown = torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(1)) < 0.4
    case = replace(case_of("local"), pattern=shown.numpy())
    listed = replace(case, pattern=BlockList.from_mask(shown, block_size=16))
    check(listed, pool.run("attend_sparse", 3, case, "gather", "contiguous"), pairs(listed))
    other = replace(case, pattern=~case.pattern)
    for status, answer in pool.run("attend_sparse", 3, [case, case, other], "gather", "contiguous"):
        assert status == "raised"
        assert "rank 2 has lists" in answer


def test_multiplicity_joins_members_over_ranks(pool):
    members = (LOCAL, DilatedPattern((32, 96), (1, 3)))
    case = replace(case_of("causal"), pattern=Union(members, multiplicity=True), kv_heads=4)
    for strategy in ("gather", "ring"):
        check(case, pool.run("attend_sparse", 3, case, strategy, "contiguous"), pairs(case))


@cache
def calls(seed: int):
    rng = random.Random(seed)
    size = rng.choice((16, 16, 32))
    pattern = rng.choice(
        (
            LocalWindow(size * rng.randint(0, 2), size),
            GlobalLocal(size * rng.randint(0, 1), rng.randint(1, 40), (rng.randint(0, 90),), size),
            Hierarchical(((size * rng.randint(0, 2), size), (size * 4, size * 2)), size),
            RandomBlocks(rng.randint(1, 3), rng.randrange(99), size),
            DilatedBlocks((size * 2, size * 4), (1, rng.randint(1, 4)), size),
            Union((LocalWindow(size, size), RandomBlocks(1, rng.randrange(99), size))),
        )
    )
    rows, packed = rng.randint(4, 110), rng.random() < 0.3
    batch = 1 if packed else rng.randint(1, 2)
    return (
        SparseCase(
            seed=rng.randrange(2**31),
            pattern=pattern,
            key_rows=rows,
            batch=batch,
            kv_heads=rng.randint(1, 3),
            group=rng.randint(1, 2),
            head_dim=rng.choice((8, 16)),
            value_dim=rng.choice((None, None, 4)),
            dtype=rng.choice((torch.float32, torch.float32, torch.bfloat16, torch.float64)),
            is_causal=rng.random() < 0.5,
            hidden=rng.choice((None, None, "random")),
            cuts=tuple(sorted(rng.randint(0, rows) for _ in range(rng.randint(0, 4)))) if packed else None,
            key_start=0 if packed else rng.choice((0, rng.randint(-rows, 60))),
            layouts=tuple(rng.choice(("contiguous", "packed", "heads_first", "strided_rows")) for _ in range(4)),
            grad_lse=rng.random() < 0.3,
        ),
        rng.choice(("gather", "ring")),
        rng.choice(("contiguous", "zigzag")),
        rng.randint(1, 4),
    )


@pytest.mark.parametrize(
    "count", [30, pytest.param(1000, marks=[pytest.mark.full, pytest.mark.timeout(7200)])], ids=["some", "many"]
)
def test_bound_b_of_random_calls(pool, count):
    for _ in range(count):
        seed = random.randrange(2**31)
        case, strategy, layout, world = calls(seed)
        try:
            check(case, pool.run("attend_sparse", world, case, strategy, layout), pairs(case))
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {strategy}, {layout}, world {world}, {case}: {error}") from error


def test_what_does_not_go_with_ranks_is_refused_before_anything_is_sent(pool):
    case = case_of("local")

    def refused(other, word, *, strategy="gather", backend="auto", world=2):
        for status, answer in pool.run("attend_sparse", world, other, strategy, "contiguous", backend):
            assert status == "raised"
            assert word in answer

    refused(replace(case, dropout_p=0.1), "takes no dropout_p")
    refused(case, "divides heads", strategy="ulysses")
    refused(case, "divides heads", strategy="hybrid 2x2 ring", world=4)
    refused(replace(case, pattern=Union((LOCAL, DilatedPattern((32,), (2,))))), "give multiplicity=True")
    refused(replace(case, pattern=ContentTopK(1, block_size=16), is_causal=True), "whole ones", backend="sdpa")
    refused(case, "cannot compute this", backend="gluon")
    check(case, pool.run("attend_sparse", 2, case, "gather", "contiguous"), pairs(case))
