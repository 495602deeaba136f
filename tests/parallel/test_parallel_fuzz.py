"""Random calls over random strategies, layouts and worlds: bound B, and bytes and messages as the formula says."""

from __future__ import annotations

import random

import pytest
import torch

from dilated_attention_pytorch.testing import Case

from .test_attention import check

STRATEGIES = (
    "auto",
    "ring",
    "gather",
    "ulysses",
    "hybrid 2x2 ring",
    "hybrid 2x2 gather",
    "hybrid 1x4 ring",
    "hybrid 4x1 ring",
)
RANKS_OF_HEADS = {"hybrid 2x2 ring": 2, "hybrid 2x2 gather": 2, "hybrid 1x4 ring": 4}
LAYOUTS = ("contiguous", "contiguous", "heads_first", "packed", "strided_rows", "columns")


def draw(rng: random.Random) -> tuple[Case, str, str, int]:
    """A case that a dense oracle can check, and how it is spread over ranks."""
    strategy = rng.choice(STRATEGIES)
    world = 4 if strategy.startswith("hybrid") else rng.randint(1, 4)
    sharing = world if strategy == "ulysses" else RANKS_OF_HEADS.get(strategy, 1)
    kv_heads, group = rng.choice([(k, g) for k in (1, 2, 3, 4) for g in (1, 2, 3, 4) if sharing <= k * g <= 8])
    rows = rng.randint(4, 60)
    lengths = tuple(rng.randint(1, 90) for _ in range(rng.randint(1, 4)))
    packed, padding = rng.random() < 0.25, rng.choice(("mask", "mask", "zeros"))
    batch = 1 if packed else rng.randint(1, 2)
    hidden = rng.choice((None, None, "suffix", "random"))
    if padding == "zeros":
        hidden = None if packed else hidden and "suffix"
    start = 0 if packed else rng.choice((0, rng.randint(-rows, 90), "each"))
    return (
        Case(
            seed=rng.randrange(2**31),
            key_rows=rows,
            segment_lengths=lengths,
            dilation_rates=tuple(rng.randint(1, min(length, rng.choice((2, 4, 12)))) for length in lengths),
            batch=batch,
            kv_heads=kv_heads,
            group=group,
            head_dim=rng.choice((8, 16)),
            value_dim=rng.choice((None, None, 4)),
            dtype=rng.choice((torch.float32, torch.float32, torch.bfloat16, torch.float64)),
            is_causal=rng.random() < 0.5,
            scale=rng.choice((None, None, 0.5)),
            dropout_p=rng.choice((0.0, 0.0, 0.0, 0.3)),
            hidden=tuple(rng.randint(0, rows) for _ in range(batch)) if hidden == "suffix" else hidden,
            cuts=tuple(sorted(rng.randint(0, rows) for _ in range(rng.randint(0, 4)))) if packed else None,
            key_start=tuple(rng.randint(-rows, 40) for _ in range(batch)) if start == "each" else start,
            head_offsets=rng.choice(("contiguous", "interleaved")),
            padding=padding,
            mixing_grad=rng.choice(("exact", "exact", "detached")),
            layouts=tuple(rng.choice(LAYOUTS) for _ in range(4)),
            grad_lse=rng.random() < 0.3,
        ),
        strategy,
        rng.choice(("contiguous", "zigzag")),
        world,
    )


def run(pool, count: int) -> None:
    rng = random.Random()
    for _ in range(count):
        case, strategy, layout, world = draw(rng)
        try:
            check(case, pool.run("attend", world, case, strategy, layout))
        except AssertionError as error:
            raise AssertionError(f"{strategy}, {layout}, world {world}, {case}: {error}") from error


def test_bound_b_and_bytes_of_random_calls(pool):
    run(pool, 60)


@pytest.mark.full
@pytest.mark.timeout(7200)
def test_bound_b_and_bytes_of_random_calls_at_length(pool):
    run(pool, 1000)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_a_ring_of_four_errs_hardly_more_than_one_rank(pool, layout):
    from .test_attention import assemble, expected

    squares = {1: torch.zeros(5, dtype=torch.float64), 4: torch.zeros(5, dtype=torch.float64)}
    for seed in range(3):
        case = Case(
            seed=seed, key_rows=300, segment_lengths=(64, 512), dilation_rates=(1, 2), kv_heads=2, head_dim=32,
            is_causal=layout == "zigzag",
        )  # fmt: skip
        gold = expected(case)[0]
        for world, total in squares.items():
            got = assemble(pool.run("attend", world, case, "ring", layout), case)
            total += torch.stack([(got[name].double() - gold[name]).square().mean() for name in gold])
    ratio = (squares[4] / squares[1]).sqrt()
    assert (ratio <= 1.25).all(), f"root mean square errors of out, lse, dq, dk, dv: {ratio.tolist()} times world 1's"


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_pieces_of_several_documents_far_apart(pool, layout):
    """The reference backend numbers segments of all pieces at once; a later document may begin at a lower number."""
    case = Case(
        seed=1, key_rows=15, segment_lengths=(1, 3), dilation_rates=(1, 1), cuts=(14,), kv_heads=2, dropout_p=0.3
    )
    check(case, pool.run("attend", 2, case, "gather", layout))
