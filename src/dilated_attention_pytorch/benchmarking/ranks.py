"""Processes for `parallel`: those that torchrun started, or some of our own on this machine."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .parallel import ParallelMeasurement, Plan, run_ranks

Said = Callable[[ParallelMeasurement], None]


def started_by_torchrun() -> bool:
    """Whether this process is one of torchrun's."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def world_of_torchrun() -> int:
    """Ranks that torchrun started."""
    return int(os.environ["WORLD_SIZE"])


def join(plan: Plan, said: Said) -> dict[str, Any] | None:
    """Measure as one of torchrun's ranks; the report on the first one, None on the others."""
    rank = int(os.environ["RANK"])
    _start(plan.setting.device, int(os.environ.get("LOCAL_RANK", rank)))
    try:
        found = run_ranks(plan, said)
    finally:
        dist.destroy_process_group()
    return found if rank == 0 else None


def spawn(plan: Plan, said: Said) -> dict[str, Any]:
    """Measure with processes of our own; ``said`` has to be a function of a module, which a new process can find."""
    from torch.multiprocessing.spawn import start_processes

    with tempfile.TemporaryDirectory() as folder:
        world = max(plan.worlds)
        start_processes(_rank, (world, plan, said, folder), nprocs=world, start_method="spawn")
        found: dict[str, Any] = json.loads((Path(folder) / "report.json").read_text())
    return found


def _rank(rank: int, world: int, plan: Plan, said: Said, folder: str) -> None:
    threads = max(1, (os.cpu_count() or 1) // world)
    torch.set_num_threads(threads)
    _start(plan.setting.device, rank, init_method=f"file://{folder}/store", rank=rank, world_size=world)
    found = run_ranks(plan, said)
    if rank == 0:
        (Path(folder) / "report.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _start(device: str, local: int, **where: Any) -> None:
    if device == "cuda":
        torch.cuda.set_device(local)
        where["device_id"] = torch.device("cuda", local)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", **where)
