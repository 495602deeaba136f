"""Context parallelism on as many GPUs as there are: scaling of three patterns, checked on sampled rows in float64.

(a) LongNet's segments 2048 x 4^i to 524,288 with rates 4^i, 131,072 tokens a GPU. (b) segments 32768, 131072, 524288
with rates 1, 4, 16 and 120,001 tokens a GPU, so that segments straddle shards. (c) one dense segment over all ranks,
causal, zigzag, 32,768 tokens a GPU: plain ring attention. bfloat16, 16 heads of 128, every strategy.

    python benchmarks/parallel.py            # all GPUs of this machine, NCCL
    python benchmarks/parallel.py --small    # two processes on the CPU, gloo: does it run

Results in benchmarks/results/parallel.json. Exit code 1 where a result leaves its bound or a byte count its formula.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.multiprocessing.spawn import start_processes

from common import ROOT, save
from dilated_attention_pytorch import dilated_attention_with_lse
from dilated_attention_pytorch.benchmarking.parallel import ParallelSetting, measure, measure_rates, slowest
from dilated_attention_pytorch.parallel import ContextParallel
from dilated_attention_pytorch.patterns import DilatedPattern
from dilated_attention_pytorch.testing import error_bound, max_error

STRATEGIES = ("ring", "gather", "ulysses")
SAMPLED = 6
"""Rows of each rank, and keys, that are checked, for every head."""


def cases(world: int, small: bool) -> dict[str, tuple[ParallelSetting, int]]:
    """Setting and tokens a rank by name."""
    shrink = 128 if small else 1
    common: dict[str, Any] = {
        "heads": 4 if small else 16, "kv_heads": 4 if small else 16, "head_dim": 32 if small else 128,
        "dtype": torch.float32 if small else torch.bfloat16, "device": "cpu" if small else "cuda",
        "repeats": 3 if small else 10,
    }  # fmt: skip
    longnet = DilatedPattern(tuple(2048 * 4**i // shrink for i in range(5)), tuple(min(4**i, 16) for i in range(5)))
    if not small:
        longnet = replace(longnet, dilation_rates=tuple(4**i for i in range(5)))
    straddling = DilatedPattern(tuple(n // shrink for n in (32768, 131072, 524288)), (1, 4, 16))
    dense = DilatedPattern((world * 32768 // shrink,), (1,))
    return {
        "a": (ParallelSetting(pattern=longnet, **common), 131072 // shrink),
        "b": (ParallelSetting(pattern=straddling, **common), 120_001 // shrink),
        "c": (ParallelSetting(pattern=dense, is_causal=True, layout="zigzag", **common), 32768 // shrink),
    }


def shown(pattern: DilatedPattern, row: int, head: int, heads: int, tokens: int, device: torch.device) -> Tensor:
    """The rows that share a segment of any branch with an active ``row``, as often as branches do."""
    found = [torch.empty(0, dtype=torch.int64, device=device)]
    for w, r in zip(pattern.segment_lengths, pattern.dilation_rates, strict=True):
        start, offset = row // w * w, pattern.head_offset(head, r, heads)
        if (row - start) % r == offset:
            found.append(torch.arange(start + offset, min(start + w, tokens), r, device=device))
    return torch.cat(found)


def sampled_errors(mesh: DeviceMesh, setting: ParallelSetting, tokens: int, strategy: Any) -> dict[str, list[float]]:
    """[largest error, bound] of out, lse and the gradients at random rows and keys, of all ranks together."""
    device, pattern, dtype = torch.device(mesh.device_type), setting.pattern, setting.dtype
    parallel = ContextParallel(mesh, strategy=strategy, layout=setting.layout, length=tokens)
    rows, size = len(parallel.positions()), (setting.heads, setting.head_dim)
    q, k, v, do = (torch.randn(1, rows, *size, device=device).to(dtype).requires_grad_() for _ in range(4))
    out, lse = dilated_attention_with_lse(
        q, k, v, pattern.segment_lengths, pattern.dilation_rates, is_causal=setting.is_causal, parallel=parallel
    )
    mine = torch.autograd.grad(out, (q, k, v), do)
    whole = [parallel.unshard(t.detach(), 1)[0] for t in (q, k, v, do, out)]
    whole_lse = parallel.unshard(lse.detach().transpose(1, 2).contiguous(), 1)[0]
    places = torch.randperm(rows)[:SAMPLED].tolist()
    positions, scale = parallel.positions().tolist(), setting.head_dim**-0.5
    found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for place in places:
        row = positions[place]
        for head in range(setting.heads):
            others = shown(pattern, row, head, setting.heads, tokens, device)
            earlier = others[others <= row] if setting.is_causal else others
            later = others[others >= row] if setting.is_causal else others
            exact = _row(whole, whole_lse, row, head, earlier, later, scale, torch.float64)
            eager = _row(whole, whole_lse, row, head, earlier, later, scale, dtype)
            got = [out[0, place, head], lse[0, head, place], *(grad[0, place, head] for grad in mine)]
            for name, *three in zip(("out", "lse", "dq", "dk", "dv"), got, exact, eager, strict=True):
                found.setdefault(name, []).append((three[0].detach(), three[1], three[2]))
    errors = {}
    for name, triples in found.items():
        got, exact, eager = (torch.stack(part).double().cpu() for part in zip(*triples, strict=True))
        kind = torch.promote_types(dtype, torch.float32) if name == "lse" else dtype
        error, bound = max_error(got, exact), error_bound(exact, eager, kind, summand=float(exact.abs().max()))
        errors[name] = [slowest(error, mesh), slowest(bound, mesh)]
    return errors


def _row(
    whole: list[Tensor], lse: Tensor, row: int, head: int, keys: Tensor, queries: Tensor, scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:  # fmt: skip
    """out, lse and dq of a query row, dk and dv of the key at the same place, with products in ``dtype``."""
    q, k, v, do, out = (t[:, head] for t in whole)
    acc = torch.promote_types(dtype, torch.float32)

    def product(a: Tensor, b: Tensor) -> Tensor:
        return (a.to(dtype) @ b.to(dtype)).to(acc)

    if not len(keys):
        zero = torch.zeros(q.shape[1], dtype=acc, device=q.device)
        return zero, torch.full((), -torch.inf, dtype=acc, device=q.device), zero, zero, zero
    scores = product(k[keys], q[row]) * scale
    row_lse = torch.logsumexp(scores, 0)
    p = torch.exp(scores - row_lse)
    row_out = product(p, v[keys])
    dp = product(v[keys], do[row])
    ds = p * (dp - (do[row].to(acc) * row_out).sum()) * scale
    scores = product(q[queries], k[row]) * scale
    p = torch.exp(scores - lse[queries, head].to(acc))
    delta = (do[queries].to(acc) * out[queries].to(acc)).sum(-1)
    dk = product((p * (product(do[queries], v[row]) - delta) * scale), q[queries])
    return row_out, row_lse, product(ds, k[keys]), dk, product(p, do[queries])


def rank_main(rank: int, world: int, small: bool, folder: str) -> None:
    """One process."""
    torch.manual_seed(rank)
    if small:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    else:
        torch.cuda.set_device(rank)
        dist.init_process_group(
            "nccl", init_method=f"file://{folder}/store", rank=rank, world_size=world,
            device_id=torch.device("cuda", rank),
        )  # fmt: skip
    worlds, meshes = sorted({1, world}), {}
    for size in worlds:
        group = dist.new_group(list(range(size)))
        if rank < size:
            meshes[size] = DeviceMesh.from_group(group, "cpu" if small else "cuda")
    found: list[dict[str, Any]] = []
    for name in cases(world, small):
        measured = []
        for size in worlds:
            setting, each = cases(world if name != "c" else size, small)[name]
            for strategy in STRATEGIES if size > 1 else ("ring",):
                if size in meshes:
                    one = measure(meshes[size], setting, tokens=size * each, strategy=strategy)
                    errors = sampled_errors(meshes[size], setting, size * each, strategy)
                    measured.append(one)
                    line = {"case": name, **one.to_dict(), "errors": errors}
                    found.append(line)
                    if rank == 0:
                        _say(line, found)
                dist.barrier()
        if world > 1:
            rates = measure_rates(meshes[world], [one for one in measured if one.world == world], setting)
            if rank == 0:
                found.append({"case": name, "rates": asdict(rates)})
                print(json.dumps(found[-1]), flush=True)
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _say(line: dict[str, Any], found: list[dict[str, Any]]) -> None:
    """The point in one line, with its efficiency: useful operations a second and rank against one rank's."""
    alone = next(one for one in found if one["case"] == line["case"])
    line["efficiency_forward"] = line["tflops_per_rank"] / alone["tflops_per_rank"]
    ratio = line["both"]["total"] / line["forward"]["total"] / alone["both"]["total"] * alone["forward"]["total"]
    line["efficiency_both"] = line["efficiency_forward"] / ratio
    worst = max(error / bound if bound else error for error, bound in line["errors"].values())
    print(
        f"({line['case']}) {line['world']} ranks {line['strategy']:<8} forward {line['forward']['total']:.2f} ms "
        f"({line['tflops_per_rank']:.3g} TFLOP/s a rank, {line['efficiency_forward']:.1%}), both "
        f"{line['both']['total']:.2f} ms ({line['efficiency_both']:.1%}), {line['bytes_both'] / 2**20:.1f} MiB "
        f"{'as' if line['formula'] else 'NOT AS'} the formula, error {worst:.2f} of the bound",
        flush=True,
    )


def main() -> None:
    """Start the ranks, save what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="two gloo processes and 1/128 of the tokens")
    parser.add_argument("--ranks", type=int, help="GPUs to use (default: all)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "parallel.json")
    options = parser.parse_args()
    world = options.ranks or (2 if options.small else torch.cuda.device_count())
    if world < 1:
        parser.error("there is no GPU; --small runs on the CPU")
    with tempfile.TemporaryDirectory() as folder:
        start_processes(rank_main, (world, options.small, folder), nprocs=world, start_method="spawn")
        found = json.loads((Path(folder) / "found.json").read_text())
    save(options.output, found, quiet=True)
    points = [one for one in found if "errors" in one]
    right = all(one["formula"] and all(e <= b for e, b in one["errors"].values()) for one in points)
    print(f"wrote {options.output}; {len(points)} points, {'all as they should be' if right else 'SOME ARE WRONG'}")
    sys.exit(not right)


if __name__ == "__main__":
    main()
