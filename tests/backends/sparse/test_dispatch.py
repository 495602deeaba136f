"""What "auto" takes: a pure function of the device and of how well lists fill the Hopper kernels' tiles."""

from __future__ import annotations

import pytest
import torch

from dilated_attention_pytorch import GlobalLocal, LocalWindow, RandomBlocks, sparse_attention
from dilated_attention_pytorch.backends.sparse.dispatch import preference
from dilated_attention_pytorch.backends.sparse.problem import SparseProblem
from dilated_attention_pytorch.types import Document, Options, Shape


def fill_of(pattern):
    shape, options = Shape(1, 16384, 16384, 2, 2, 64, 64), Options(False, 1.0, 0.0, "mask", "exact")
    documents = (Document(0, 1, 0, 16384, 0, 16384),)
    return SparseProblem(pattern, shape, options, documents, torch.bfloat16, "cpu").forward_lists.fill


def test_scattered_blocks_go_to_plain_triton_and_windows_to_the_hopper_kernels():
    assert preference("cpu") == ("sdpa", "reference")
    for pattern, first in (
        (LocalWindow(1024, 64), "gluon"),
        (GlobalLocal(1024, 64, block_size=64), "gluon"),
        (RandomBlocks(4, block_size=64), "triton"),
        (RandomBlocks(4, block_size=128), "gluon"),
    ):
        assert preference("cuda", fill_of(pattern))[0] == first
    # Of a window of 64 + 64 blocks the two at its ends are halves; a block alone is a quarter.
    assert fill_of(LocalWindow(4096, 64)) == pytest.approx(64.5 / 65.5, abs=0.02)
    assert fill_of(RandomBlocks(1, block_size=64)) == pytest.approx(0.25, abs=0.02)
    assert fill_of(RandomBlocks(1, block_size=128)) == 1


def test_the_hopper_kernels_say_what_they_lack():
    x = torch.randn(1, 70, 2, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="backend 'gluon' cannot compute this"):
        sparse_attention(x, x, x, LocalWindow(64, 64), backend="gluon")
