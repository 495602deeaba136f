"""What `explain` says of a streamed call, against what the call then moves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dilated_attention_pytorch import Streaming, dilated_attention_with_lse, explain
from dilated_attention_pytorch.testing import Case

ODD = {"seed": 4, "key_rows": 301, "segment_lengths": (9, 25, 100), "dilation_rates": (1, 3, 5), "kv_heads": 4}
CASES = {
    "plain": {},
    "inside chunks": {"segment_lengths": (4, 8), "dilation_rates": (1, 2), "key_rows": 320},
    "causal": {"is_causal": True},
    "grouped, bfloat16": {"kv_heads": 2, "group": 3, "dtype": torch.bfloat16},
    "packed": {"cuts": (3, 40, 155)},
    "last rows": {"query_rows": 120, "value_dim": 12},
    "whole batch rows": {"batch": 5, "key_rows": 30},
    "detached": {"mixing_grad": "detached"},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bytes_chunks_and_tiles_are_those_of_the_call(name):
    case = Case(**{**ODD, **CASES[name]})
    streaming = Streaming("cpu", memory_budget=1 << 20, chunk=64)
    query, key, value, grad_out, _ = case.tensors()
    leaves = [t.requires_grad_() for t in (query, key, value)]
    found = explain(*leaves, parallel=streaming, **case.options())
    assert streaming.moved.chunks == 0
    out, _ = dilated_attention_with_lse(*leaves, parallel=streaming, **case.options())
    forward = replace(streaming.moved)
    out.backward(grad_out)
    moved = streaming.moved
    for told, counts in (
        (found.streamed.forward, (forward.chunks, forward.tiles, forward.bytes_in, forward.bytes_out)),
        (
            found.streamed.backward,
            (
                moved.chunks - forward.chunks,
                moved.tiles - forward.tiles,
                moved.bytes_in - forward.bytes_in,
                moved.bytes_out - forward.bytes_out,
            ),
        ),
    ):
        assert (told.chunks, told.tiles, told.bytes_in, told.bytes_out) == counts
        assert told.chunks > 1
        assert told.rows <= 64
        assert 0 < told.peak_bytes <= 1 << 20
        assert str(told) in str(found)


def test_shapes_are_enough_and_pairs_are_those_of_the_whole():
    shape = (1, 5000, 4, 16)
    streaming = Streaming("cpu", memory_budget=1 << 20)
    found = explain(shape, shape, shape, (64, 8192), (1, 16), parallel=streaming)
    whole = explain(shape, shape, shape, (64, 8192), (1, 16))
    assert (found.pairs, found.dense_pairs) == (whole.pairs, whole.dense_pairs)
    assert found.peak_bytes_forward == found.streamed.forward.peak_bytes <= 1 << 20
    assert found.to_dict()["streamed"]["forward"]["chunks"] == found.streamed.forward.chunks > 2
    with pytest.raises(ValueError, match="memory_budget is 10 bytes, and this call needs"):
        explain(shape, shape, shape, (64, 8192), (1, 16), parallel=Streaming("cpu", memory_budget=10))
