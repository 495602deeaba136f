"""The Hopper kernels' own source, interpreted on the CPU, against the dense oracle in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from dilated_attention_pytorch import ContentTopK, DilatedPattern, GlobalLocal, LocalWindow, RandomBlocks
from dilated_attention_pytorch.patterns import tiles
from dilated_attention_pytorch.sparse_testing import SparseCase, chosen_multiset, sparse_violations
from dilated_attention_pytorch.testing import Case, violations

CASES = {
    "ragged": {"key_rows": 601, "segment_lengths": (128, 300, 2000), "dilation_rates": (1, 2, 4)},
    "interleaved": {
        "key_rows": 450, "segment_lengths": (128, 300), "dilation_rates": (1, 3), "head_offsets": "interleaved",
    },
    "grouped": {
        "key_rows": 450, "segment_lengths": (200, 400), "dilation_rates": (1, 3), "kv_heads": 1, "group": 3,
    },
    "packed": {"key_rows": 540, "segment_lengths": (128, 256), "dilation_rates": (1, 4), "cuts": (5, 150, 500)},
    "chunk": {
        "key_rows": 500, "query_rows": 400, "segment_lengths": (128, 450), "dilation_rates": (1, 3), "key_start": 77,
    },
    "left_padding": {
        "key_rows": 400, "segment_lengths": (128, 300), "dilation_rates": (1, 2), "key_start": (-150, -2), "batch": 2,
    },
    "long_runs": {"key_rows": 1100, "segment_lengths": (512, 1024), "dilation_rates": (1, 2)},
    "short_and_sparse": {"key_rows": 1024, "segment_lengths": (48, 512), "dilation_rates": (1, 8)},
}  # fmt: skip


@pytest.mark.usefixtures("interpreted_hopper")
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_bound_b(case, is_causal):
    sizes = {"seed": 5, "kv_heads": 2, "grad_lse": True, **case, "is_causal": is_causal}
    head_dim = 128 if is_causal else 48
    assert not violations(Case(**sizes, head_dim=head_dim, dtype=torch.bfloat16), ("gluon",))


@pytest.mark.usefixtures("interpreted_hopper", "branch_by_branch")
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("name", ["ragged", "interleaved", "packed", "short_and_sparse"])
def test_bound_b_of_several_launches(name, is_causal):
    case = CASES[name]
    pattern = DilatedPattern(case["segment_lengths"], case["dilation_rates"])
    assert len(tiles.branch_groups(pattern, 128, case["key_rows"], is_causal=is_causal)) > 1
    sizes = {"seed": 5, "kv_heads": 2, "grad_lse": True, **case, "is_causal": is_causal}
    assert not violations(Case(**sizes, head_dim=64, dtype=torch.bfloat16), ("gluon",))


@pytest.mark.usefixtures("interpreted_hopper", "lagging")
@pytest.mark.parametrize("head_dim", [64, 128])
def test_nothing_is_overwritten_before_the_slowest_warp_group_has_read_it(head_dim):
    case = {"key_rows": 400, "segment_lengths": (128, 300), "dilation_rates": (1, 2), "kv_heads": 1}
    for is_causal in (False, True):
        assert not violations(
            Case(seed=5, **case, head_dim=head_dim, is_causal=is_causal, dtype=torch.bfloat16), ("gluon",)
        )


BLOCKS = {
    "local_64": {"pattern": LocalWindow(128, 64)},
    "global_128": {"pattern": GlobalLocal(128, 1, (300,), 128), "kv_heads": 1, "group": 3},
    "random_per_head": {"pattern": RandomBlocks(2, 1, 128), "kv_heads": 2, "group": 2},
    "packed": {"pattern": GlobalLocal(64, 1, block_size=64), "cuts": (5, 300, 390)},
    "chunk": {"pattern": LocalWindow(128, 64), "query_rows": 300, "key_start": 77},
}


@pytest.mark.usefixtures("interpreted_hopper")
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("case", BLOCKS.values(), ids=BLOCKS)
def test_bound_b_of_blocks(case, is_causal):
    sizes = {
        "seed": 5, "key_rows": 450, "kv_heads": 2, "grad_lse": True, "head_dim": 128 if is_causal else 48, **case,
    }  # fmt: skip
    assert not sparse_violations(SparseCase(**sizes, is_causal=is_causal, dtype=torch.bfloat16), ("gluon",))


CHOICES = {
    "content": {"pattern": ContentTopK(2)},
    "content_grouped": {"pattern": ContentTopK(1, always_first=1), "kv_heads": 1, "group": 2, "key_start": -70},
    "content_packed": {"pattern": ContentTopK(1, always_local=1), "cuts": (5, 300, 390)},
}


@pytest.mark.usefixtures("interpreted_hopper")
@pytest.mark.parametrize("case", CHOICES.values(), ids=CHOICES)
def test_bound_b_of_blocks_chosen_by_content(case):
    case = SparseCase(
        **{"seed": 5, "key_rows": 601, "kv_heads": 2, "grad_lse": True, "head_dim": 64, **case}, dtype=torch.bfloat16
    )  # fmt: skip
    assert not sparse_violations(case, ("gluon",), counts=partial(chosen_multiset, case))


@pytest.mark.usefixtures("interpreted_hopper")
@pytest.mark.parametrize("pattern", [GlobalLocal(0, 1), LocalWindow(128, 128)], ids=["one heavy tile", "even"])
def test_some_heads_at_a_time(pattern, monkeypatch):
    """Sums of dQ of some heads at a time, or of more where one tile would take longer than all others."""
    from dilated_attention_pytorch.kernels import hopper_sparse_backward

    monkeypatch.setattr(hopper_sparse_backward, "_ONE_PASS", 0)
    monkeypatch.setattr(hopper_sparse_backward, "_heads_per_pass", lambda *_: 1)
    case = SparseCase(
        seed=5, key_rows=601, kv_heads=3, head_dim=64, pattern=pattern, is_causal=True, dtype=torch.bfloat16
    )
    assert not sparse_violations(case, ("gluon",))
