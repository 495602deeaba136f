"""The dense oracle of block-sparse attention as the fixture `oracle`."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dilated_attention_pytorch.sparse_testing import SparseCase, chosen_multiset, dense, multiset, sparse_violations


class Oracle:
    """What tests of backends take from there."""

    Case = SparseCase
    replace = staticmethod(replace)
    multiset = staticmethod(multiset)
    chosen_multiset = staticmethod(chosen_multiset)
    dense = staticmethod(dense)
    violations = staticmethod(sparse_violations)


@pytest.fixture(scope="session")
def oracle() -> type[Oracle]:
    """The dense oracle and its cases."""
    return Oracle
