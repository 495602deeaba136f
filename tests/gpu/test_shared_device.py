"""Several processes that share a GPU's time, each of which has to find the same result in every call."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import torch

from dilated_attention_pytorch import GlobalLocal, dilated_attention_with_lse, sparse_attention_with_lse

pytestmark = pytest.mark.gpu

PROCESSES, SECONDS = 3, 6


def compare(backend: str, seed: int) -> tuple[int, list[str]]:
    """Calls, and those whose output or log-sum-exp differs from the first's in any bit."""
    torch.manual_seed(seed)
    long = [torch.randn(2, 32768, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    short = [torch.randn(8, 8192, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    window = GlobalLocal(window=512, num_global_tokens=128, block_size=128)
    cases = {
        "one segment": lambda: dilated_attention_with_lse(*long, (32768,), (1,), is_causal=True, backend=backend),
        "branches": lambda: dilated_attention_with_lse(*short, (512, 2048, 8192), (1, 2, 4), backend=backend),
        "causal branches": lambda: dilated_attention_with_lse(
            *short, (512, 2048, 8192), (1, 2, 4), is_causal=True, backend=backend
        ),
        "blocks": lambda: sparse_attention_with_lse(*short, window, is_causal=True, backend=backend),
    }
    first = {name: [t.clone() for t in call()] for name, call in cases.items()}
    torch.cuda.synchronize()
    calls, wrong, start = 0, [], time.monotonic()
    while time.monotonic() - start < SECONDS:
        for name, call in cases.items():
            # Memory that is handed out again holds NaN, so that what was never written shows.
            poison = [torch.full_like(t, torch.nan) for t in (*long, *short)]
            del poison
            found, calls = call(), calls + 1
            if not all(torch.equal(a, b) for a, b in zip(found, first[name], strict=True)):
                lost = int(torch.isnan(found[0]).sum())
                wrong.append(f"{name}, call {calls} of process {seed}: {lost} numbers were never written")
    return calls, wrong


@pytest.mark.timeout(300)
@pytest.mark.parametrize("backend", ["gluon", "triton"])
def test_every_call_gives_the_same_bits(backend):
    from dilated_attention_pytorch.backends import gluon

    if backend == "gluon" and (reason := gluon.unavailable()):
        pytest.skip(reason)
    started = [
        subprocess.Popen([sys.executable, __file__, backend, str(seed)], stdout=subprocess.PIPE, text=True)
        for seed in range(PROCESSES)
    ]
    found = [json.loads(process.communicate(timeout=250)[0].splitlines()[-1]) for process in started]
    assert all(calls > 20 for calls, _ in found)
    assert not (wrong := [line for _, lines in found for line in lines]), "\n".join(wrong)


if __name__ == "__main__":
    print(json.dumps(compare(sys.argv[1], int(sys.argv[2]))))
