"""Generation on a GPU: one decode kernel a layer and step, and the logits of one pass over the whole text."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from dilated_attention_pytorch.models import LongNetLM, LongNetLMConfig

pytestmark = pytest.mark.gpu
CONFIG = LongNetLMConfig(
    context_length=512, embed_dim=256, num_layers=3, num_heads=4, segment_lengths=(64, 200, 400),
    dilation_rates=(1, 2, 4), ngram_sizes=(2,), short_convolution=3,
)  # fmt: skip


def build(dtype: torch.dtype, device: str = "cuda") -> LongNetLM:
    torch.manual_seed(0)
    return LongNetLM(CONFIG).to(device, dtype).eval()


@pytest.mark.parametrize("rows", [399, 400, 1000])
@torch.no_grad()
def test_a_step_launches_one_decode_kernel_a_layer(rows: int):
    model, tokens = build(torch.bfloat16), torch.randint(256, (2, rows + 2), device="cuda")
    cache = model.make_cache(key_start=torch.tensor([0, -7]))
    model(tokens[:, :rows], cache=cache)
    model(tokens[:, rows : rows + 1], cache=cache)  # compiles what is not compiled yet
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        model(tokens[:, rows + 1 :], cache=cache)
        torch.cuda.synchronize()
    names = [e.name for e in recorded.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert sum("decode_kernel" in name for name in names) == CONFIG.num_layers
    assert not any("forward_kernel" in name or "fmha" in name or "flash" in name for name in names)


@torch.no_grad()
def test_logits_with_a_cache_are_those_of_one_pass():
    """Prompt and 300 steps, past the longest segment, two texts of which one is padded at the left."""
    tokens, start = torch.randint(256, (2, 750), generator=torch.Generator().manual_seed(1)), torch.tensor([0, -9])
    gold = build(torch.float64, "cpu")(tokens, key_start=start)
    model = build(torch.float32)
    cache = model.make_cache(key_start=start)
    parts = [model(part, cache=cache) for part in tokens.cuda().split([450] + [1] * 300, dim=1)]
    assert cache.layers[0].attention.rows <= 400
    found = torch.cat(parts, dim=1).cpu().double()
    for row, padding in enumerate((0, 9)):
        torch.testing.assert_close(found[row, padding:], gold[row, padding:], rtol=1e-3, atol=1e-3)
