"""What every benchmark shares: where a result comes from, how it is timed, where it is kept."""

from __future__ import annotations

import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def _command() -> str:
    """The command of this run, without the options that say where results go."""
    words = [str(Path(sys.argv[0]).resolve().relative_to(ROOT)), *sys.argv[1:]]
    places = ("--output", "--results", "--trace")
    kept = [word for before, word in pairwise(["", *words]) if before not in places and word not in places]
    return shlex.join(["python", *(word for word in kept if not word.startswith(tuple(f"{p}=" for p in places)))])


def provenance() -> dict[str, Any]:
    """Device, versions, commit and command of this run."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    changed = subprocess.run(
        ["git", "status", "--porcelain", "--", "src"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    found: dict[str, Any] = {
        "command": _command(),
        "commit": git.stdout.strip() + (" with changes in src" if changed.stdout.strip() else ""),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        import triton

        found |= {
            "device": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "triton": triton.__version__,
        }
    else:
        cpuinfo = Path("/proc/cpuinfo")
        models = [s for s in cpuinfo.read_text().splitlines() if s.startswith("model name")] if cpuinfo.exists() else []
        found["device"] = models[0].split(":", 1)[1].strip() if models else platform.processor()
    return found


def cpu_medians(functions: dict[str, Callable[[], object]], *, repeats: int) -> dict[str, list[float]]:
    """Seconds of every run of each function, run in turn so that drift of the machine meets all alike."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return times


def median_ratio(a: list[float], b: list[float]) -> float:
    """Median of the ratios of runs that stood side by side."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def peak_cpu_bytes(function: Callable[[], object]) -> int:
    """Largest sum of live allocations that PyTorch's CPU allocator made during the call, its result included."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = function()
    live = peak = 0
    assert recorded.profiler is not None
    assert recorded.profiler.kineto_results is not None
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    del kept
    return peak


def save(path: Path, results: object, *, quiet: bool = False) -> None:
    """Write the results with where they come from, and print them unless ``quiet``."""
    text = json.dumps({"run": provenance(), "results": results}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")
    if not quiet:
        print(text)
