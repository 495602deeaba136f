"""Sharded attention over real gloo processes against the dense oracle, and what travels against a count of pairs."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
import torch

from dilated_attention_pytorch.patterns import DilatedPattern
from dilated_attention_pytorch.testing import (
    RESULTS,
    Case,
    error_bound,
    largest_summands,
    max_error,
    multiplicity,
    oracle,
    results,
)

CASES = {
    "inside": {"key_rows": 64, "segment_lengths": (8, 16), "dilation_rates": (1, 2)},
    "across": {"key_rows": 60, "segment_lengths": (16, 60), "dilation_rates": (1, 4)},
    "straddling": {"key_rows": 61, "segment_lengths": (9, 25, 100), "dilation_rates": (1, 3, 5)},
    "whole": {"key_rows": 43, "segment_lengths": (50,), "dilation_rates": (1,)},
    "causal": {"key_rows": 61, "segment_lengths": (9, 25, 100), "dilation_rates": (1, 3, 5), "is_causal": True},
    "grouped": {
        "key_rows": 50, "segment_lengths": (12, 60), "dilation_rates": (1, 4), "kv_heads": 2, "group": 3,
    },
    "interleaved": {
        "key_rows": 50, "segment_lengths": (7, 60), "dilation_rates": (2, 3), "head_offsets": "interleaved",
        "grad_lse": True,
    },
    "packed": {"key_rows": 70, "segment_lengths": (8, 40), "dilation_rates": (1, 2), "cuts": (3, 40, 41, 65)},
    "packed_causal": {
        "key_rows": 70, "segment_lengths": (8, 40), "dilation_rates": (1, 2), "cuts": (3, 40), "is_causal": True,
    },
    "evicted": {"key_rows": 40, "segment_lengths": (16, 64), "dilation_rates": (1, 2), "key_start": 29},
    "left_padding": {"key_rows": 40, "segment_lengths": (16, 64), "dilation_rates": (1, 2), "key_start": -13},
    "zeros": {"key_rows": 47, "segment_lengths": (10, 64), "dilation_rates": (1, 4), "padding": "zeros"},
    "value_dim": {"key_rows": 30, "segment_lengths": (12, 64), "dilation_rates": (1, 4), "value_dim": 12},
    "bfloat16": {
        "key_rows": 61, "segment_lengths": (9, 25, 100), "dilation_rates": (1, 3, 5), "dtype": torch.bfloat16,
    },
    "few_rows": {"key_rows": 4, "segment_lengths": (3, 9), "dilation_rates": (1, 2), "batch": 1},
    "masked": {
        "key_rows": 45, "segment_lengths": (7, 45), "dilation_rates": (1, 2), "hidden": "random", "is_causal": True,
    },
    "masked_rows": {
        "key_rows": 41, "segment_lengths": (7, 45), "dilation_rates": (2, 3), "hidden": (41, 30), "grad_lse": True,
    },
    "masked_zeros": {
        "key_rows": 47, "segment_lengths": (10, 64), "dilation_rates": (1, 4), "padding": "zeros", "hidden": (5, 33),
    },
    "starts": {
        "key_rows": 44, "segment_lengths": (10, 64), "dilation_rates": (1, 3), "key_start": (-9, 17),
        "is_causal": True,
    },
    "dropout": {"key_rows": 46, "segment_lengths": (9, 64), "dilation_rates": (1, 3), "dropout_p": 0.4},
    "dropout_grouped": {
        "key_rows": 46, "segment_lengths": (9, 64), "dilation_rates": (1, 3), "dropout_p": 0.4, "kv_heads": 2,
        "group": 2, "hidden": "random", "is_causal": True, "dtype": torch.float64,
    },
    "detached": {
        "key_rows": 46, "segment_lengths": (9, 30, 64), "dilation_rates": (1, 3, 2), "mixing_grad": "detached",
    },
    "everything": {
        "key_rows": 46, "segment_lengths": (9, 64), "dilation_rates": (1, 3), "mixing_grad": "detached",
        "dropout_p": 0.3, "padding": "zeros", "hidden": (9, 20), "key_start": (3, -5), "kv_heads": 1, "group": 4,
    },
}  # fmt: skip


def assemble(answers, case):
    """The results of all ranks as whole tensors, in the dtypes of the results."""
    for rank, (status, answer) in enumerate(answers):
        assert status == "done", f"rank {rank}: {answer}"
    whole = {}
    for i, name in enumerate(RESULTS):
        dtype = torch.promote_types(case.dtype, torch.float32) if name == "lse" else case.dtype
        parts = [answer["results"][i] for _, answer in answers]
        joined = np.empty((parts[0].shape[0], case.key_rows, *parts[0].shape[2:]))
        for part, (_, answer) in zip(parts, answers, strict=True):
            joined[:, answer["rows"]] = part
        tensor = torch.from_numpy(joined).to(dtype)
        whole[name] = tensor.transpose(1, 2) if name == "lse" else tensor
    return whole


@cache
def expected(case):
    """Results in float64, the bounds for them, and the largest terms of their sums."""
    torch.default_generator.manual_seed(case.seed)
    seed = int(torch.randint(2**62, (1,))) if case.dropout_p else None
    tensors, options = case.tensors(), case.options() | {"seed": seed}
    exact = [t.double() for t in tensors]
    gold, eager = (results(partial(oracle, **options), t, grad_lse=case.grad_lse) for t in (exact, tensors))
    return gold, eager, partial(largest_summands, exact, grad_lse=case.grad_lse, **options)


def check(case, answers):
    got = assemble(answers, case)
    gold, eager, summands = expected(case)
    for index, name in enumerate(RESULTS):
        dtype = got[name].dtype
        error, bound = max_error(got[name], gold[name]), error_bound(gold[name], eager[name], dtype)
        if not error <= bound:
            bound = error_bound(gold[name], eager[name], dtype, summand=summands()[index])
        assert error <= bound, f"{name}: {error:.3g} > {bound:.3g}"
    for rank, (_, answer) in enumerate(answers):
        assert max_error(torch.from_numpy(answer["unsharded"]), got["out"].double()) == 0
        exchange = answer["exchange"]
        assert exchange.lines()[0] == f"ranks    {exchange.strategy}, rank {rank} of {len(answers)}"
        assert answer["forward"] == (exchange.bytes_forward, exchange.messages_forward)
        if not case.grad_lse:  # whose gradient the formula leaves out
            backward = exchange.bytes_backward, exchange.messages_backward
            assert answer["total"] == tuple(map(sum, zip(answer["forward"], backward, strict=True)))
        assert answer["leased"] == 0


# (strategy, layout, worlds); random calls draw from all combinations, and the long campaign has every one.
RUNS = {
    "ring": (("ring", "contiguous", (1, 4)), ("ring", "zigzag", (3,))),
    "gather": (("gather", "contiguous", (2,)), ("gather", "zigzag", (4,))),
    "ulysses": (("ulysses", "contiguous", (3,)), ("ulysses", "zigzag", (4,))),
    "hybrid": (("hybrid 2x2 ring", "zigzag", (4,)), ("hybrid 2x2 gather", "contiguous", (4,))),
}
EVERY = ("ring", "gather", "ulysses", "hybrid 2x2 ring", "hybrid 2x2 gather", "hybrid 1x4 ring", "hybrid 4x1 ring")


def case_of(options):
    return Case(**{"seed": 2, "kv_heads": 4, "batch": 1 if "cuts" in options else 2, **options})


@pytest.mark.parametrize("strategy", RUNS)
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_bound_b_and_bytes_of_every_option(pool, options, strategy):
    case = case_of(options)
    for name, layout, worlds in RUNS[strategy]:
        for world in worlds:
            check(case, pool.run("attend", world, case, name, layout))


@pytest.mark.full
@pytest.mark.parametrize("strategy", EVERY)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_bound_b_everywhere(pool, options, layout, strategy):
    case = case_of(options)
    for world in (4,) if strategy.startswith("hybrid") else (1, 2, 3, 4):
        check(case, pool.run("attend", world, case, strategy, layout))


def expected_bytes(case, answers, itemsize):
    """What each rank has to send: every active row that another rank's row attends to, once a key head and branch."""
    q, k, v = case.tensors()[:3]
    sent = [0] * len(answers)
    owner = np.empty(case.key_rows, dtype=int)
    for rank, (_, answer) in enumerate(answers):
        owner[answer["rows"]] = rank
    group = q.shape[2] // k.shape[2]
    pattern = DilatedPattern(case.segment_lengths, case.dilation_rates, case.head_offsets)
    position, document = torch.arange(case.key_rows) + case.key_start, torch.zeros(case.key_rows)
    shown = multiplicity(pattern, q.shape[2], position, document, case.key_rows, is_causal=case.is_causal).numpy()
    for m in shown:
        for target in range(len(answers)):
            for source in range(len(answers)):
                if target == source:
                    continue
                met = m[:, owner == target][:, :, owner == source].any(1)
                by_key_head = met.reshape(k.shape[2], group, -1).any(1)
                sent[source] += int(by_key_head.sum()) * k.shape[0] * (k.shape[3] + v.shape[3]) * itemsize
    return sent


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("name", ["inside", "across", "straddling", "causal", "grouped", "whole"])
def test_what_travels_is_what_is_needed(pool, name, layout):
    case = Case(**{"seed": 2, "kv_heads": 4, "batch": 2, **CASES[name]})
    for world in (2, 4):
        for strategy in ("ring", "gather"):
            answers = pool.run("attend", world, case, strategy, layout)
            sent = expected_bytes(case, answers, 4)
            assert [answer["forward"][0] for _, answer in answers] == sent
            # Backward: keys and values once more, and their gradients home, in float32.
            assert sum(answer["total"][0] for _, answer in answers) == 3 * sum(sent)
            if name == "inside" and layout == "contiguous":
                assert sum(sent) == 0
                assert all(answer["total"][1] == 0 for _, answer in answers)


def test_ranks_that_were_asked_for_different_things_all_say_so(pool):
    case = Case(seed=1, key_rows=40, segment_lengths=(16, 64), dilation_rates=(1, 2), kv_heads=4)
    for other, word in ((replace(case, is_causal=True), "options"), (replace(case, head_dim=16), "shape")):
        answers = pool.run("attend", 3, [case, case, other], "ring", "contiguous")
        for status, answer in answers:
            assert status == "raised"
            assert f"rank 2 has {word}" in answer
    check(case, pool.run("attend", 3, case, "ring", "contiguous"))


def refused(pool, case, word, *, strategy="ring", backend="auto"):
    for status, answer in pool.run("attend", 4, case, strategy, "contiguous", backend):
        assert status == "raised"
        assert word in answer


def test_what_does_not_go_with_parallel_is_refused_before_anything_is_sent(pool):
    case = Case(seed=1, key_rows=40, segment_lengths=(16, 64), dilation_rates=(1, 2), kv_heads=4)
    refused(pool, replace(case, key_rows=2), "2 rows for 4 ranks")
    refused(pool, replace(case, kv_heads=3), "3 query heads for 4 ranks", strategy="ulysses")
    refused(pool, replace(case, kv_heads=2), "2 query heads for 4 ranks", strategy="hybrid 1x4 ring")
    refused(pool, replace(case, dropout_p=0.1), "backend 'sdpa' cannot compute this", backend="sdpa")
    refused(pool, replace(case, padding="zeros", hidden="random"), "an unmasked key after a masked one")
    packed = replace(case, padding="zeros", hidden=(3,), cuts=(20,))
    refused(pool, packed, "takes no key_padding_mask")
    check(case, pool.run("attend", 4, case, "ring", "contiguous"))


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("tied", [False, True], ids=["plain", "tied_and_checkpointed"])
def test_a_language_model_computes_the_same_over_ranks(pool, layout, tied):
    for world in (2, 3):
        for rank, (status, answer) in enumerate(pool.run("train", world, layout, tied)):
            assert status == "done", f"rank {rank}: {answer}"
            assert answer["logits"] < 1e-12
            assert answer["gradients"] < 1e-10


@pytest.mark.parametrize("strategy", ["ring", "gather", "ulysses"])
def test_plan_and_receive_buffers_recur_from_the_second_step_on(pool, strategy):
    case = Case(seed=1, key_rows=60, segment_lengths=(16, 60), dilation_rates=(1, 2), kv_heads=4)
    for status, answer in pool.run("repeat", 4, case, strategy):
        assert status == "done", answer
        assert answer["planned"] == 1
        assert answer["misses"][0] > 0
        assert len(set(answer["misses"][1:])) == 1
        assert answer["leased"] == 0
