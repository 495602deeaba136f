"""An ordering of the whole sequence, which is then sharded over ranks."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("strategy", ["ring", "gather", "ulysses"])
def test_the_permutation_is_global_then_sharded(pool, strategy: str, layout: str):
    for kind, found in pool.run("under_ordering", 3, (7, 11), strategy, layout):
        assert kind == "done", found
        assert len(found["errors"]) == 4
        assert all(error < 1e-12 for error in found["errors"]), found
