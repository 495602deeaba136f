"""What holds for every test: how many threads it takes, where GPU tests run, and how pairs are counted."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch


def pytest_configure(config: pytest.Config) -> None:
    """One torch thread a process, here and in child processes: tests are small, and workers share the cores."""
    os.environ["OMP_NUM_THREADS"] = "1"  # read by torch on import
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests marked ``gpu`` on a machine without a CUDA device."""
    import torch

    if torch.cuda.is_available():
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


@pytest.fixture
def counts() -> Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """How many pairs a pattern has, row by row and key by key."""
    return _counts


def _counts(
    lengths: tuple[int, ...],
    rates: tuple[int, ...],
    position: torch.Tensor,
    document: torch.Tensor,
    hidden: torch.Tensor,
    marked: torch.Tensor,
    asking: torch.Tensor | None = None,
    *,
    heads: int,
    is_causal: bool,
    head_offsets: str = "contiguous",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(H, N) each: keys of a row, marked ones among them, and rows that see a key; left padding takes no part.

    Args:
        lengths, rates: the pattern.
        position, document: of each row (N,); a negative position is left padding.
        hidden: keys that nobody sees, (N,) bool.
        marked: the keys counted apart.
        asking: the rows counted for a key; all.
        heads, is_causal, head_offsets: as in the call.
    """
    import torch  # not before pytest_configure

    total, inside, seen = (torch.zeros(heads, len(position), dtype=torch.int64) for _ in range(3))
    for w, r in zip(lengths, rates, strict=True):
        _, segment = torch.unique(document * (1 << 40) + position.clamp(min=0) // w, return_inverse=True)

        def upto(weight: torch.Tensor, segment: torch.Tensor = segment) -> tuple[torch.Tensor, torch.Tensor]:
            """Sum of a weight over a row's segment, whole and up to the row itself."""
            sums = torch.zeros(int(segment.max()) + 1, dtype=torch.int64).index_add_(0, segment, weight)
            return sums[segment], weight.cumsum(0) - (sums.cumsum(0) - sums)[segment]

        for head in range(heads):
            offset = head // -(-heads // r) if head_offsets == "contiguous" else head % r
            active = (position >= 0) & (position % w % r == offset)
            keys, some = (active & ~hidden).long(), (active & ~hidden & marked).long()
            rows = (active & asking).long() if asking is not None else active.long()
            whole, below = upto(rows)
            total[head] += active.long() * upto(keys)[is_causal]
            inside[head] += active.long() * upto(some)[is_causal]
            seen[head] += keys * (whole - below + rows if is_causal else whole)
    return total, inside, seen


@pytest.fixture
def branch_by_branch(monkeypatch):
    """Launches cost nothing, so branches have launches of their own that add to what is there."""
    from dilated_attention_pytorch.backends import tables
    from dilated_attention_pytorch.patterns import tiles

    monkeypatch.setattr(tiles, "_MERGE", 0)
    monkeypatch.setattr(tiles, "_LAUNCH", 0)
    for cached in (tiles.branch_groups, tables.groups):
        cached.cache_clear()
    yield
    for cached in (tiles.branch_groups, tables.groups):
        cached.cache_clear()
