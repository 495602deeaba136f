"""The formula block by block: the size of a block changes nothing, and memory does not grow with N x N."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from dilated_attention_pytorch import dilated_attention_with_lse
from dilated_attention_pytorch.backends import reference
from dilated_attention_pytorch.testing import Case, oracle, results

OPTIONS = {
    "causal": {"is_causal": True},
    "grouped": {"kv_heads": 2, "group": 3, "value_dim": 5},
    "mask": {"hidden": "random", "grad_lse": True},
    "zeros": {"padding": "zeros", "mixing_grad": "detached"},
    "dropout": {"dropout_p": 0.4, "is_causal": True, "grad_lse": True},
    "dropout_zeros": {"dropout_p": 0.4, "padding": "zeros", "hidden": (3, 30)},
    "starts": {"key_start": (-20, 33), "query_rows": 30},
}


@pytest.mark.parametrize("block", [1, 7, 64])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_blocks_of_any_size_give_the_formula(monkeypatch, block, options):
    monkeypatch.setattr(reference, "BLOCK", block)
    base = {"seed": 1, "key_rows": 40, "segment_lengths": (9, 32, 64), "dilation_rates": (1, 3, 5), "batch": 2}
    case = Case(**{**base, "dtype": torch.float64, "kv_heads": 2, **options})
    attend = partial(dilated_attention_with_lse, backend="reference", **case.options())
    torch.manual_seed(6)
    seed = int(torch.randint(2**62, (1,)))
    torch.manual_seed(6)
    found = results(attend, case.tensors(), grad_lse=case.grad_lse)
    gold = results(partial(oracle, seed=seed, **case.options()), case.tensors(), grad_lse=case.grad_lse)
    for name, expected in gold.items():
        torch.testing.assert_close(found[name], expected, atol=1e-12, rtol=0)


def test_no_temporary_is_as_large_as_the_square_of_the_length():
    rows, widest = 4096, 0
    x = torch.randn(1, rows, 2, 8)

    class Widest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal widest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                widest = max(widest, result.numel())
            return result

    with Widest():
        reference_out = dilated_attention_with_lse(x, x, x, (128, rows), (1, 16), backend="reference").out
    # A block of 512 rows sees at most 256 keys of the dilated branch, and 512 + 128 of the dense one.
    assert widest <= 2 * reference.BLOCK * (reference.BLOCK + 2 * 128)
    torch.testing.assert_close(
        reference_out, dilated_attention_with_lse(x, x, x, (128, rows), (1, 16), backend="sdpa").out
    )
