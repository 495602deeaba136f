"""What a model remembers between calls: logits of one pass, whole reorders and crops, rows of a stream."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dilated_attention_pytorch.models import LongNetLM, LongNetLMConfig
from dilated_attention_pytorch.models.model_cache import RecentRows
from dilated_attention_pytorch.testing import max_error

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "context_length": 64,
    "embed_dim": 32,
    "num_layers": 2,
    "num_heads": 4,
    "segment_lengths": (12, 40),
    "dilation_rates": (1, 3),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "local": {"norm": "pre-rms", "ngram_sizes": (2, 4), "ngram_buckets": 64, "short_convolution": 3, "num_kv_heads": 2},
}


def build(**options: Any) -> LongNetLM:
    torch.manual_seed(0)
    return LongNetLM(LongNetLMConfig(**{**SIZES, **options}), dtype=torch.float64)


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("starts", [0, 7, -5, (0, -5)])
def test_logits_with_a_cache_are_those_of_one_pass(name: str, starts: int | tuple[int, ...]):
    model = build(**VARIANTS[name]).eval()
    tokens = draw(2, 130)
    key_start = torch.tensor(starts) if isinstance(starts, tuple) else starts
    cache = model.make_cache(key_start=key_start)
    with torch.no_grad():
        parts = [model(part, cache=cache) for part in tokens.split([3, 1, 1, 50, 1, 1, 7, 66], dim=1)]
        expected = model(tokens, key_start=key_start)
    shown = torch.ones(2, 130, dtype=torch.bool)
    for row, start in enumerate(starts if isinstance(starts, tuple) else (starts, starts)):
        shown[row, : max(0, -start)] = False  # padding
    assert max_error(torch.cat(parts, dim=1)[shown], expected[shown]) < 1e-10
    assert cache.length == 130


@pytest.mark.parametrize("name", VARIANTS)
def test_a_cache_is_reordered_and_cropped_as_a_whole(name: str):
    model = build(**VARIANTS[name]).eval()
    tokens, order = draw(3, 60), torch.tensor([2, 2, 0, 1])
    cache = model.make_cache(key_start=torch.tensor([0, -4, -9]), rollback=5)
    with torch.no_grad():
        model(tokens[:, :45], cache=cache)
        model(draw(3, 5, seed=9), cache=cache)
        cache.crop(45)
        cache.select(order)
        logits = model(tokens[order, 45:], cache=cache)
        expected = model(tokens[order], key_start=torch.tensor([0, -4, -9])[order])[:, 45:]
    assert max_error(logits, expected) < 1e-10
    with pytest.raises(ValueError, match="rollback"):
        cache.crop(-30)
    assert cache.length == 60
    cache.reset()
    with torch.no_grad():
        assert max_error(model(tokens, cache=cache), model(tokens)) < 1e-10


@pytest.mark.parametrize("name", ["key_padding_mask", "cu_seqlens", "key_start"])
def test_a_cache_takes_no_other_argument(name: str):
    model = build()
    given = {"key_padding_mask": torch.zeros(1, 4).bool(), "cu_seqlens": torch.tensor([0, 4]), "key_start": 3}
    with pytest.raises(ValueError, match="cache= goes with no other argument"):
        model(draw(1, 4), cache=model.make_cache(), **{name: given[name]})


@pytest.mark.parametrize("count", [0, 1, 3])
def test_recent_rows_are_the_last_of_the_stream(count: int):
    stream = torch.arange(40).view(2, 20)
    recent, seen = RecentRows(count, rollback=2), 0
    for size in (1, 1, 2, 5, 1, 1):
        joined = recent.extend(stream[:, seen : seen + size])
        assert torch.equal(joined, stream[:, max(0, seen - count) : seen + size])
        seen += size
    recent.select(torch.tensor([1, 1, 0]))
    recent.crop(9)
    assert torch.equal(recent.extend(stream[[1, 1, 0], 9:10]), stream[[1, 1, 0], 9 - count : 10])
    if count:
        assert recent.nbytes <= (count + 2) * 3 * 8
        with pytest.raises(ValueError, match="rollback=9"):
            recent.crop(1)
    recent.reset()
    assert torch.equal(recent.extend(stream), stream)


def test_rows_of_another_batch_are_refused_and_nothing_is_changed():
    recent = RecentRows(2)
    recent.extend(torch.tensor([[1, 2, 3], [4, 5, 6]]))
    with pytest.raises(ValueError, match="the batch has 1 rows, the cache holds 2"):
        recent.extend(torch.tensor([[7]]))
    recent.crop(3)
    assert recent.extend(torch.tensor([[7], [8]])).tolist() == [[2, 3, 7], [5, 6, 8]]
