"""The examples in docstrings are true."""

from __future__ import annotations

import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["cluster", "shard", "ulysses"])
def test_examples_of_docstrings(name):
    found = doctest.testmod(importlib.import_module(f"dilated_attention_pytorch.parallel.{name}"))
    assert found.attempted > 0
    assert found.failed == 0
