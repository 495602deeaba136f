"""Old rings in a process group of two: rows of their own, or the whole sequence with a warning."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

RANK = """
import sys, warnings
import torch
import torch.distributed as dist

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
from dilated_attention_pytorch import ContextParallel, dilated_attention
from dilated_attention_pytorch.compat.old import StandardRingAttention, RingAttentionConfig
from dilated_attention_pytorch.compat.old.ring_dilated_attention_memory_efficient import (
    RingDilatedAttentionMemoryEfficient,
)
from dilated_attention_pytorch.compat.old.ring_dilated_attention_correct import RingDilatedAttentionCorrect
from dilated_attention_pytorch.compat.old.ring_dilated_attention_v2 import RingDilatedAttentionV2

torch.manual_seed(0)
lengths, rates, mine = [8, 32], [1, 4], slice(16 * rank, 16 * rank + 16)
q, k, v = (torch.randn(1, 32, 4, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
whole = dilated_attention(q, k, v, lengths, rates, is_causal=True)
weight = torch.linspace(-1, 1, whole.numel(), dtype=whole.dtype).view_as(whole)
gold = torch.autograd.grad((whole * weight).sum(), (q, k, v))

ring = StandardRingAttention(RingAttentionConfig(lengths, rates))
local = [x.detach()[:, mine].clone().requires_grad_() for x in (q, k, v)]
out = ring(*local, is_causal=True, already_split=True)
torch.testing.assert_close(out, whole[:, mine], rtol=1e-12, atol=1e-12)
(out * weight[:, mine]).sum().backward()
for x, grad in zip(local, gold, strict=True):
    torch.testing.assert_close(x.grad, grad[:, mine], rtol=1e-12, atol=1e-12)
out = ring(q, k, v, is_causal=True)  # the old class cut the rows itself
torch.testing.assert_close(out, whole[:, mine], rtol=1e-12, atol=1e-12)

layer = RingDilatedAttentionMemoryEfficient(32, 4, lengths, rates).double()
x = torch.randn(2, 32, 32, dtype=torch.float64)
expected = layer.replacement(x, x, x)[0][:, mine]
torch.testing.assert_close(layer(x[:, mine], already_split=True), expected, rtol=1e-12, atol=1e-12)
torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    out = RingDilatedAttentionV2(lengths, rates)(q, k, v, is_causal=True)
    alone = RingDilatedAttentionV2(lengths, rates, ring_size=1)(q, k, v, is_causal=True)
assert torch.equal(out, whole) and torch.equal(alone, whole)
told = [str(w.message) for w in caught]
assert len([text for text in told if "each computes all of it" in text]) == 1, told

class_of_local_rows = RingDilatedAttentionCorrect(32, 4, lengths, rates).double()
class_of_local_rows.load_state_dict(layer.state_dict())
torch.testing.assert_close(class_of_local_rows(x[:, mine]), expected, rtol=1e-12, atol=1e-12)

cut = ContextParallel(dist.device_mesh.init_device_mesh("cpu", (2,)))
local = [cut.shard(x.detach(), 1) for x in (q, k, v)]
with warnings.catch_warnings():
    warnings.simplefilter("error")
    out = RingDilatedAttentionV2(lengths, rates)(*local, True, parallel=cut)
torch.testing.assert_close(out, whole[:, mine], rtol=1e-12, atol=1e-12)
dist.destroy_process_group()
print("fine")
"""


def test_rings_of_two_ranks(tmp_path: Path):
    command = [sys.executable, "-W", "ignore::UserWarning:torch", "-c", RANK]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    results = [process.communicate(timeout=120) for process in ranks]
    assert [out.strip() for out, _ in results] == ["fine", "fine"], results
