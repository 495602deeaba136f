"""Ranks that fail, in real processes: one process with torch loaded forks the ranks of each case, for speed.

Reads a case a line from stdin and answers with a line on stdout: what every rank met, and how it ended.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from dilated_attention_pytorch import dilated_attention
from dilated_attention_pytorch.parallel import ContextParallel, PeerFailed, retry

STEPS, AT = 6, 3


def join(case: dict[str, Any], folder: Path, rank: int) -> None:
    """Make the process group, over a store that the launcher hosts, or rank 0."""
    torch.set_num_threads(1)
    world, port = case["world"], folder / "port"
    hosts = rank == (-1 if case["host"] == "launcher" else 0)
    if case["host"] == "launcher":
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    if hosts:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        (folder / "part").write_text(str(store.port))
        (folder / "part").rename(port)
    else:
        while not port.exists():
            time.sleep(0.005)
        store = dist.TCPStore("127.0.0.1", int(port.read_text()), is_master=False, wait_for_workers=False)
    if rank == -1:
        time.sleep(1000)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)


def strike(case: dict[str, Any], folder: Path) -> None:
    """The fault."""
    (folder / "when").write_text(repr(time.monotonic()))
    if case["fault"] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if case["fault"] == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if case["fault"] == "raise":
        raise RuntimeError("boom")
    if case["fault"] == "memory":
        raise torch.OutOfMemoryError("out of memory, as a test wants it")


def arm(case: dict[str, Any], folder: Path) -> None:
    """Let the fault happen in the middle of the attention, between two exchanges."""
    name = f"dense_{case['phase']}"
    real = getattr(retry, name)

    def faulty(*arguments: Any, **options: Any) -> Any:
        setattr(retry, name, real)
        strike(case, folder)
        return real(*arguments, **options)

    setattr(retry, name, faulty)


def work(case: dict[str, Any], folder: Path, rank: int) -> dict[str, Any]:
    """The steps of one rank; how far the last one is from the same on one device, and what was begun again."""
    mesh = DeviceMesh("cpu", list(range(case["world"])))
    parallel = ContextParallel(mesh, strategy=case.get("strategy", "ring"), timeout=case["timeout"])
    mine = rank == case["culprit"]
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(1, 40, 4, 8, generator=generator)
    for step in range(case.get("steps", STEPS)):
        if mine and case["fault"] == "slow":
            time.sleep(case["seconds"])
        if mine and step == AT and case["fault"] == "skip":
            (folder / "when").write_text(repr(time.monotonic()))
            if case["phase"] == "forward":
                continue
        if mine and step == AT and case["fault"] in ("kill", "stop", "raise", "memory"):
            arm(case, folder)
        with parallel.step(step):
            leaves = [parallel.shard(whole, 1).requires_grad_() for _ in range(3)]
            out = dilated_attention(*leaves, (8, 40), (1, 2), parallel=parallel)
            if not (mine and step == AT and case["fault"] == "skip" and case["phase"] == "backward"):
                out.sum().backward()
        if step == min(AT, case.get("steps", STEPS) - 1):
            alone = [whole.clone().requires_grad_() for _ in range(3)]
            expected = dilated_attention(*alone, (8, 40), (1, 2))
            expected.sum().backward()
            pairs = [(out, expected), *((leaf.grad, one.grad) for leaf, one in zip(leaves, alone, strict=True))]
            errors = [float((a - parallel.shard(b, 1)).abs().max()) for a, b in pairs if a is not None]
    parallel.check()
    return {"error": max(errors), "retries": parallel.traffic.retries}


def run_rank(case: dict[str, Any], folder: Path, rank: int) -> int:
    """Exit code; what happened goes into a file."""
    join(case, folder, rank)
    found: dict[str, Any] = {}
    try:
        found = {"kind": "done", **work(case, folder, rank)}
    except PeerFailed as error:
        found = {"kind": "PeerFailed", "rank": error.rank, "step": error.step, "text": str(error)}
    except Exception as error:
        found = {"kind": type(error).__name__, "text": str(error)}
    found["at"] = time.monotonic()
    (folder / f"{rank}.json").write_text(json.dumps(found))
    return 0 if found["kind"] == "done" else 1


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """Fork the ranks, wait for them, and collect."""
    folder = Path(case["folder"])
    ranks = list(range(case["world"]))
    children: dict[int, int] = {}
    for rank in [*([-1] if case["host"] == "launcher" else []), *ranks]:
        children[rank] = os.fork()
        if children[rank] == 0:
            sys.exit(run_rank(case, folder, rank))
    ended: dict[int, int | None] = dict.fromkeys(ranks)
    deadline = time.monotonic() + case["patience"]
    stopped = case["culprit"] if case["fault"] == "stop" else None
    while time.monotonic() < deadline and any(ended[r] is None for r in ranks if r != stopped):
        for rank in ranks:
            if ended[rank] is None:
                found, status = os.waitpid(children[rank], os.WNOHANG)
                if found:
                    ended[rank] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    left = [rank for rank in ranks if ended[rank] is None]
    for rank, pid in children.items():
        if rank == -1 or ended[rank] is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    when = folder / "when"
    results = {r: json.loads((folder / f"{r}.json").read_text()) for r in ranks if (folder / f"{r}.json").exists()}
    return {"results": results, "left": left, "when": float(when.read_text()) if when.exists() else None}


def main() -> None:
    """Serve."""
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(run_case(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
