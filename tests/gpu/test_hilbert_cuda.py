"""Orders and the kernel that moves rows, on a GPU."""

from __future__ import annotations

import pytest
import torch

from dilated_attention_pytorch import HilbertOrdering, hilbert_order, hilbert_order_from_coordinates
from dilated_attention_pytorch.kernels.hilbert.triton import permute_rows

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("shape", [(63, 100), (64, 64), (7, 12, 9), (16, 16, 16)])
def test_orders_are_those_of_the_cpu(shape):
    assert torch.equal(hilbert_order(*shape, device="cuda").cpu(), hilbert_order(*shape))
    points = torch.rand(3, 5000, len(shape), generator=torch.Generator().manual_seed(1))
    hidden = torch.arange(5000) >= torch.tensor([5000, 4000, 10])[:, None]
    for given in (points, (points * 500).long()):
        found = hilbert_order_from_coordinates(given.cuda(), key_padding_mask=hidden.cuda())
        assert torch.equal(found.cpu(), hilbert_order_from_coordinates(given, key_padding_mask=hidden))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_apply_invert_and_gradient(dtype):
    ordering = HilbertOrdering((37, 50), skip_first=1)
    x = torch.randn(2, 1851, 96, device="cuda", dtype=dtype, requires_grad=True)
    moved = ordering.apply(x)
    assert torch.equal(moved, x[:, ordering.positions("cuda")])
    assert torch.equal(ordering.invert(moved), x)
    grad = torch.randn_like(moved)
    assert torch.equal(torch.autograd.grad(moved, x, grad)[0], ordering.invert(grad))


def test_offsets_beyond_31_bits():
    rows, columns = 1 << 20, 2050 + 1  # bytes, in words of one
    x = torch.randint(0, 255, (1, rows, columns), device="cuda", dtype=torch.uint8)
    index = torch.randperm(rows, device="cuda")
    found = permute_rows(x, index, 1)
    for part in torch.arange(rows, device="cuda").split(1 << 17):
        assert torch.equal(found[0, part], x[0, index[part]])
