"""Philox against its published vectors, and the dropout masks made of it."""

from __future__ import annotations

import pytest
import torch

from dilated_attention_pytorch import dilated_attention
from dilated_attention_pytorch.backends.philox import keep_mask, philox


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [  # the known answers that come with Random123, for ten rounds of philox4x32
        ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0xA4093822, 0x299F31D0),
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(key, counter, expected):
    words = philox(key[0] | key[1] << 32, tuple(torch.tensor(c) for c in counter))
    assert tuple(int(w) for w in words) == expected


def test_masks_are_independent_of_how_rows_are_blocked():
    rows, heads = torch.arange(50), torch.arange(6).reshape(2, 3)
    whole = keep_mask(7, 0.3, branch=1, batch_heads=heads, query_rows=rows, key_rows=rows)
    assert whole.shape == (2, 3, 50, 50)
    part = keep_mask(7, 0.3, branch=1, batch_heads=heads[1:], query_rows=rows[5:9], key_rows=rows[3::4])
    assert torch.equal(part, whole[1:, :, 5:9, 3::4])


@pytest.mark.parametrize("dropout_p", [0.0, 0.1, 0.5, 0.9])
def test_the_share_that_is_dropped(dropout_p):
    rows = torch.arange(300)
    kept = keep_mask(11, dropout_p, branch=0, batch_heads=torch.arange(4), query_rows=rows, key_rows=rows).double()
    noise = (dropout_p * (1 - dropout_p) / kept.numel()) ** 0.5
    assert abs(1 - float(kept.mean()) - dropout_p) <= 5 * noise


@pytest.mark.parametrize("change", [{"branch": 1}, {"batch_heads": torch.tensor([1])}, {"seed": 12}])
def test_other_branches_heads_and_seeds_draw_other_masks(change):
    rows = torch.arange(200)
    base = {"seed": 11, "branch": 0, "batch_heads": torch.tensor([0])}
    a, b = (
        keep_mask(g["seed"], 0.5, branch=g["branch"], batch_heads=g["batch_heads"], query_rows=rows, key_rows=rows)
        for g in (base, {**base, **change})
    )
    agreement = float((a == b).double().mean())
    assert abs(agreement - 0.5) < 0.02


def test_dropout_follows_torch_manual_seed():
    x = torch.randn(1, 60, 4, 8)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(dilated_attention(x, x, x, [16, 64], [1, 4], dropout_p=0.5))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_dropout_keeps_the_mean():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 64, 2, 8).unbind()
    clean = dilated_attention(q, k, v, [64], [1])
    mean = torch.stack([dilated_attention(q, k, v, [64], [1], dropout_p=0.2) for _ in range(200)]).mean(0)
    assert float((mean - clean).abs().mean()) < 0.02
