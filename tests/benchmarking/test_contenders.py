"""Who takes part, what each computes, and the reasons of those who cannot."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch

from dilated_attention_pytorch import DilatedPattern, dilated_attention
from dilated_attention_pytorch.benchmarking import CONTENDERS, Setting, choose_contenders
from dilated_attention_pytorch.benchmarking.contenders import pattern_mask

SETTING = Setting(1, 4, 8, torch.float32, torch.device("cpu"), False, DilatedPattern((12, 40), (1, 3)))


def run(name: str, setting: Setting, length: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    function, shape = CONTENDERS[name].prepare(setting, length)
    inputs = list(torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)).unbind())
    return inputs, function(*inputs)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", ["ours", "ours-sdpa", "ours-reference"])
def test_ours_is_dilated_attention(name: str, is_causal: bool):
    setting = replace(SETTING, is_causal=is_causal)
    assert CONTENDERS[name].absent(setting) is None
    inputs, out = run(name, setting, 50)
    expected = dilated_attention(*inputs, (12, 40), (1, 3), is_causal=is_causal, backend="reference")
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("is_causal", [False, True])
def test_dense_is_softmax_attention(is_causal: bool):
    setting = replace(SETTING, is_causal=is_causal)
    assert CONTENDERS["dense-flash"].absent(setting) is None
    (query, key, value), out = run("dense-flash", setting, 50)
    scores = query @ key.transpose(-1, -2) / 8**0.5
    if is_causal:
        scores = scores.masked_fill(~torch.ones(50, 50, dtype=torch.bool).tril(), -torch.inf)
    torch.testing.assert_close(out, scores.softmax(-1) @ value)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("offsets", ["contiguous", "interleaved"])
def test_the_mask_of_flex_is_the_union_of_the_branches(is_causal: bool, offsets: str):
    heads, length, pattern = 4, 50, DilatedPattern((12, 40), (2, 3), offsets)
    expected = torch.zeros(heads, length, length, dtype=torch.bool)
    for w, r in zip(pattern.segment_lengths, pattern.dilation_rates, strict=True):
        for head in range(heads):
            kept = [n for n in range(length) if n % w % r == pattern.head_offset(head, r, heads)]
            for i in kept:
                for j in kept:
                    expected[head, i, j] |= i // w == j // w and (j <= i or not is_causal)
    zeros = torch.zeros(heads, length, length, dtype=torch.int64)
    head, row = torch.arange(heads)[:, None, None], torch.arange(length)
    found = pattern_mask(pattern, heads, is_causal=is_causal)(zeros, zeros + head, zeros + row[:, None], zeros + row)
    assert torch.equal(found, expected)


def test_the_work_is_four_and_ten_head_dims_a_pair():
    dense = SETTING.flops("dense", 50)
    assert dense == (4 * 8 * 4 * 50 * 50, 10 * 8 * 4 * 50 * 50)
    pairs = 0
    for w, r in zip((12, 40), (1, 3), strict=True):
        for head in range(4):
            offset = SETTING.pattern.head_offset(head, r, 4)
            for first in range(0, 50, w):
                pairs += sum(n % w % r == offset for n in range(first, min(first + w, 50))) ** 2
    assert SETTING.flops("ours", 50) == SETTING.flops("other", 50) == (4 * 8 * pairs, 10 * 8 * pairs)
    assert replace(SETTING, is_causal=True).flops("dense", 50)[0] == 4 * 8 * 4 * 50 * 51 // 2


@pytest.mark.parametrize(
    ("name", "fragment"),
    [
        ("ours-triton", "does not run on cpu"),
        ("ours-gluon", "does not run on cpu"),
        ("torchscale", "not installed"),
        ("dense-cudnn", "CUDA only"),
        ("flex", "CUDA only"),
    ],
)
def test_who_cannot_run_on_a_cpu_says_why(name: str, fragment: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torchscale", None)  # importing it fails, installed or not
    assert fragment in CONTENDERS[name].absent(SETTING)


def test_a_package_of_torchscale_without_dilated_attention_is_absent(monkeypatch: pytest.MonkeyPatch):
    package = ModuleType("torchscale")
    package.__path__ = []
    monkeypatch.setitem(sys.modules, "torchscale", package)
    assert "No module named 'torchscale.component'" in CONTENDERS["torchscale"].absent(SETTING)


def test_torchscale_is_called_without_its_linear_layers(monkeypatch: pytest.MonkeyPatch):
    class DilatedAttention(torch.nn.Module):
        def __init__(self, args: SimpleNamespace, embed_dim: int, num_heads: int, self_attention: bool) -> None:
            super().__init__()
            assert (args.segment_length, args.dilated_ratio) == ([12, 40], [1, 3])
            assert (embed_dim, num_heads, self_attention) == (32, 4, True)
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                setattr(self, name, torch.nn.Linear(embed_dim, embed_dim))

        def forward(self, query, key, value, is_causal):
            assert is_causal
            return self.out_proj(self.q_proj(query) + self.k_proj(key) * self.v_proj(value)), None

    names = ("torchscale", "torchscale.component", "torchscale.component.dilated_attention")
    modules = {name: ModuleType(name) for name in (*names, "torchscale.component.flash_attention")}
    modules["torchscale.component.dilated_attention"].DilatedAttention = DilatedAttention
    flash = modules["torchscale.component.flash_attention"]
    flash.flash_attn_func = None
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    setting = replace(SETTING, is_causal=True)
    assert "needs CUDA and flash-attn" in CONTENDERS["torchscale"].absent(setting)
    flash.flash_attn_func = print
    assert "bfloat16" in CONTENDERS["torchscale"].absent(setting)
    assert CONTENDERS["torchscale"].absent(replace(setting, dtype=torch.bfloat16)) is None
    (query, key, value), out = run("torchscale", setting, 10)
    assert query.shape == (1, 10, 32)
    assert torch.equal(out, query + key * value)


def test_unknown_and_missing_names_are_refused():
    with pytest.raises(ValueError, match="contender 'fast' is unknown; choose from ours, "):
        choose_contenders(["ours", "fast"])
    with pytest.raises(ValueError, match="no contender is named"):
        choose_contenders([])
    assert [c.name for c in choose_contenders(["flex", "ours", "flex"])] == ["flex", "ours"]
    assert all(name == contender.name for name, contender in CONTENDERS.items())
