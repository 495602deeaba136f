"""A step of generation after contexts of 4K to 256K tokens: its time, the bytes of the cache, the kernels it launches.

    python benchmarks/generation.py [--preset base] [--backend auto] [--contexts 4096,...] [--steps 60] [--output FILE]

All contexts are filled first and then take turns, one step each, so that drift of the machine meets all alike. They end
where the last step of a context fills its segments, which is when a step reads most. Weights are random: they change
neither what is read nor when.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import ROOT, save
from dilated_attention_pytorch import LongNetLM, LongNetLMConfig
from dilated_attention_pytorch.models.model_cache import ModelCache

PREFILL_ROWS = 8192


@torch.no_grad()
def filled(model: LongNetLM, rows: int) -> tuple[ModelCache, Tensor]:
    """The cache after ``rows`` random tokens, and the token that follows, (1, 1)."""
    device = model.embedding.weight.device
    prompt = torch.randint(model.config.vocab_size, (1, rows), generator=torch.Generator().manual_seed(rows))
    cache = model.make_cache()
    for part in prompt.to(device).split(PREFILL_ROWS, dim=1):
        logits = model(part, cache=cache)[:, -1:]
    return cache, logits.argmax(-1)


@torch.no_grad()
def step(model: LongNetLM, cache: ModelCache, token: Tensor) -> tuple[Tensor, float]:
    """The next token, greedily, and the seconds until it is known on the host."""
    started = time.perf_counter()
    token = model(token, cache=cache).argmax(-1)
    token.cpu()
    return token, time.perf_counter() - started


def launches(model: LongNetLM, cache: ModelCache, token: Tensor) -> dict[str, Any]:
    """How many kernels a step launches, and how many of them are the decode kernel of this library, with its time."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        step(model, cache, token)
    on_device = [e for e in recorded.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [e for e in on_device if not e.name.startswith(("Memcpy", "Memset"))]
    decoding = [e for e in kernels if "decode_kernel" in e.name]
    return {
        "kernels": len(kernels),
        "decode_kernels": len(decoding),
        "decode_microseconds": sum(e.device_time for e in decoding),
    }


def measure(model: LongNetLM, contexts: Sequence[int], *, steps: int) -> dict[str, Any]:
    """What the module's docstring says, for every context."""
    taken = steps + 2 + model.embedding.weight.is_cuda  # two to warm up, one to profile
    states = {context: filled(model, context - taken) for context in contexts}
    times: dict[int, list[float]] = {context: [] for context in contexts}
    counted: dict[int, dict[str, Any]] = {}
    for context, (cache, token) in states.items():
        for _ in range(2):
            token, _ = step(model, cache, token)
        states[context] = cache, token
        if token.is_cuda:
            counted[context] = launches(model, cache, token)
    for _ in range(steps):
        for context, (cache, token) in states.items():
            token, seconds = step(model, cache, token)
            times[context].append(seconds)
            states[context] = cache, token
    config = model.config
    width = 2 * config.kv_heads * config.head_dim * model.embedding.weight.itemsize
    found = [
        {
            "context": context,
            "step_milliseconds": 1e3 * statistics.median(times[context]),
            "cache_rows": states[context][0].layers[0].attention.rows,
            "key_value_bytes": sum(layer.attention.nbytes for layer in states[context][0].layers),
            "cache_bytes": states[context][0].nbytes,
            **counted.get(context, {}),
        }
        for context in contexts
    ]
    medians = [entry["step_milliseconds"] for entry in found]
    return {
        "layers": config.num_layers,
        "key_value_bytes_bound": config.num_layers * width * max(config.segment_lengths),
        "contexts": found,
        "slowest_over_fastest": max(medians) / min(medians),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="base")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--contexts", default=",".join(str(4096 << n) for n in range(7)))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/generation.json")
    given = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    model = LongNetLM(LongNetLMConfig.preset(given.preset, backend=given.backend), device=device, dtype=dtype).eval()
    contexts = [int(context) for context in given.contexts.split(",")]
    results = measure(model, contexts, steps=given.steps)
    save(given.output, {"preset": given.preset, "backend": given.backend, "dtype": str(dtype), **results})


if __name__ == "__main__":
    main()
