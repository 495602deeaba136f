"""Old block-sparse classes: their settings become patterns, and the numbers are those of sparse_attention."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from dilated_attention_pytorch import (
    ContentTopK,
    DilatedBlocks,
    GlobalLocal,
    Hierarchical,
    LocalWindow,
    MultiheadSparseAttention,
    sparse_attention,
)
from dilated_attention_pytorch.compat.resolve import old, resolve
from dilated_attention_pytorch.compat.table import OldName, load

ROWS, HEADS, WIDTH = 96, 2, 16
VALUES: dict[str, Any] = {
    "segment_lengths": [32, 96],
    "dilation_rates": [1, 2],
    "embed_dim": WIDTH,
    "num_heads": HEADS,
    "dim": WIDTH,
    "heads": HEADS,
    "head_dim": WIDTH // HEADS,
    "block_size": 16,
}


def entries(*kinds: str) -> list[OldName]:
    return [entry for entry in load().names if entry.kind in kinds]


def label(entry: OldName) -> str:
    return f"{entry.modules[0] or 'package'}.{entry.name}"


def config(**fields: Any) -> Any:
    cls = old("SparsePatternConfig", "sparse.block_sparse_attention")
    return cls(**{"pattern_type": "local_window", "window_size": 64, "block_size": 16, **fields})


def made(entry: OldName) -> Any:
    given = {name: VALUES[name] for name in entry.signature().names if name in VALUES and name != "block_size"}
    if "config" in given or (entry.signature().names[:1] == ("config",) and entry.group == "block_ring"):
        ring = old("RingAttentionConfig", "ring.base.ring_config")([32, 96], [1, 2])
        return resolve(entry)(ring, block_size=16, pattern_type="dilated")
    name = next((n for n in ("sparse_config", "sparse_pattern_config") if n in entry.signature().names), None)
    if name and entry.kind in ("sparse", "sparse_multihead"):
        given[name] = config()
    elif "distributed_config" in entry.signature().names:
        given["distributed_config"] = old("DistributedSparseConfig")(pattern_type="node_local", block_size=16)
    else:
        given["block_size"] = 16
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return resolve(entry)(**given)


def same(actual: Any, expected: Any, *inputs: Tensor) -> None:
    found = []
    for function in (actual, expected):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        out = function(*leaves)
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        found.append([out, *torch.autograd.grad((out * weight).sum(), leaves)])
    for mine, theirs in zip(*found, strict=True):
        assert torch.isfinite(mine).all()
        assert mine.abs().max() > 0
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


PATTERNS = {
    "block_ring": DilatedBlocks((32, 96), (1, 2), block_size=16),
    "block_dilated": DilatedBlocks((32, 96), (1, 2), block_size=16),
    "block_hierarchical": Hierarchical(((128, 64), (512, 256), (1 << 30, 1024)), block_size=16),
    "block_adaptive": ContentTopK(6, block_size=16),
}
LOCAL = LocalWindow(32, block_size=16)


@pytest.mark.parametrize("entry", entries("sparse", "sparse_hierarchical", "sparse_adaptive"), ids=label)
def test_bare_attention(entry: OldName):
    attention = made(entry)
    pattern = PATTERNS.get(entry.group, LOCAL)
    if "distributed_config" in entry.signature().names:
        pattern = LocalWindow(128, block_size=16)  # 256 rows in all by default
    assert attention.replacement.pattern == pattern
    x = [torch.randn(1, ROWS, HEADS, 8, dtype=torch.float64) for _ in range(3)]
    same(attention, lambda q, k, v: sparse_attention(q, k, v, pattern), *x)


@pytest.mark.parametrize("entry", entries("sparse_multihead"), ids=label)
def test_attention_with_projections(entry: OldName):
    attention = made(entry).double()
    pattern = LOCAL if "sparse_config" in entry.signature().names else LocalWindow(128, block_size=16)
    new = MultiheadSparseAttention(WIDTH, HEADS, pattern=pattern).double()
    new.load_state_dict(attention.replacement.state_dict())

    def old_call(x: Tensor) -> Tensor:
        result = attention(x, x, x)
        if entry.returns == "pair":
            assert result[1] is None
            return result[0]
        return result

    same(old_call, lambda x: new(x, x, x)[0], torch.randn(2, ROWS, WIDTH, dtype=torch.float64))


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({}, LocalWindow(32, block_size=16)),
        ({"window_size": 256, "block_size": 64}, LocalWindow(128, block_size=64)),
        ({"pattern_type": "global_local", "global_tokens": 20}, GlobalLocal(32, 20, block_size=16)),
        ({"pattern_type": "dilated_sparse"}, DilatedBlocks((32, 96), (1, 2), block_size=16)),
        ({"pattern_type": old("PatternType").LOCAL_WINDOW}, LocalWindow(32, block_size=16)),
        ({"pattern_type": "hierarchical"}, PATTERNS["block_hierarchical"]),
        ({"pattern_type": "content_adaptive"}, PATTERNS["block_adaptive"]),
    ],
)
def test_settings_become_patterns(fields: dict[str, Any], pattern: Any):
    cls = old("BlockSparseRingDilatedAttention")
    assert cls([32, 96], [1, 2], sparse_config=config(**fields)).replacement.pattern == pattern


def test_a_block_size_that_does_not_exist_becomes_the_next_smaller_with_a_warning():
    with pytest.warns(UserWarning, match="blocks of 256 rows; blocks have 16, 32, 64 or 128, taken are 128"):
        attention = old("BlockSparseAttention")(config(block_size=256, window_size=512))
    assert attention.replacement.pattern == LocalWindow(256, block_size=128)


def test_unknown_pattern_and_weights_asked_for_raise():
    with pytest.raises(ValueError, match="pattern_type is 'spiral'; choose one of"):
        old("BlockSparseAttention")(config(pattern_type="spiral"))
    x = torch.randn(1, 32, 1, 8)
    with pytest.raises(ValueError, match="return_attention_weights=True, but weights are never formed"):
        old("BlockSparseAttention")(config())(x, x, x, return_attention_weights=True)
