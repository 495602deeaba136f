"""``dilated-attention doctor``: what this installation has, and how fast each backend is on each device."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from typing import Annotated, Any

import torch
import typer

from .. import __version__, available_backends, dilated_attention

REPEATS, HEADS, HEAD_DIM = 5, 4, 64


def versions() -> dict[str, str | None]:
    """Versions of what results depend on; None for what is not installed or not in this torch build."""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = None
    cudnn = torch.backends.cudnn.version() if torch.version.cuda else None
    return {
        "dilated-attention-pytorch": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "cuDNN": str(cudnn) if cudnn else None,
        "triton": triton,
        "platform": platform.platform(),
    }


def devices() -> dict[str, str]:
    """Device names as torch takes them, each with a description."""
    found = {"cpu": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads"}
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        found[f"cuda:{index}"] = f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {memory}"
    return found


def problem(device: str) -> tuple[int, tuple[int, ...], tuple[int, ...], torch.dtype]:
    """(rows, segment lengths, dilation rates, dtype): quick, but not lost in launch times."""
    rows, dtype = (512, torch.float32) if device == "cpu" else (16384, torch.bfloat16)
    return rows, (rows // 4, rows // 2, rows), (1, 2, 4), dtype


def median_ms(work: Callable[[], object], device: str, repeats: int = REPEATS) -> float:
    """Median wall time of ``work`` in milliseconds, after one call that does not count."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if device != "cpu":
            torch.cuda.synchronize(device)
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[1:])


def measure(backend: str, device: str) -> dict[str, Any]:
    """Time of a forward pass, and of a forward and a backward pass, or the error they end in."""
    rows, segment_lengths, dilation_rates, dtype = problem(device)
    shape = (3, 1, rows, HEADS, HEAD_DIM)
    generator = torch.Generator(device).manual_seed(0)
    tensors = torch.randn(shape, generator=generator, device=device, dtype=dtype).unbind()
    query, key, value = (tensor.requires_grad_() for tensor in tensors)

    def forward() -> torch.Tensor:
        return dilated_attention(query, key, value, segment_lengths, dilation_rates, backend=backend)

    def step() -> None:
        torch.autograd.grad(forward().sum(), (query, key, value))

    result: dict[str, Any] = {"backend": backend}
    try:
        with torch.no_grad():
            result["forward_ms"] = median_ms(forward, device)
        result["step_ms"] = median_ms(step, device)
    except Exception as error:  # a broken backend is a finding, and the others still count
        result["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
    return result


def report() -> dict[str, Any]:
    """Everything that ``doctor`` prints, as plain data."""
    found: dict[str, Any] = {"versions": versions(), "devices": []}
    for device, description in devices().items():
        rows, segment_lengths, dilation_rates, dtype = problem(device)
        found["devices"].append(
            {
                "device": device,
                "description": description,
                "problem": {
                    "shape": [1, rows, HEADS, HEAD_DIM],
                    "dtype": str(dtype).removeprefix("torch."),
                    "segment_lengths": segment_lengths,
                    "dilation_rates": dilation_rates,
                },
                "backends": [measure(backend, device) for backend in available_backends(device=device)],
            }
        )
    return found


def show(found: dict[str, Any]) -> None:
    """Print a report as tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("", "version", title="Versions")
    for name, version in found["versions"].items():
        table.add_row(name, version or "-")
    console.print(table)
    for device in found["devices"]:
        table = Table("backend", title=f"{device['device']}: {device['description']}")
        table.add_column("forward", justify="right")
        table.add_column("forward + backward", justify="right")
        for backend in device["backends"]:
            if "error" in backend:
                times = ["failed", backend["error"]]
            else:
                times = [f"{backend['forward_ms']:.1f} ms", f"{backend['step_ms']:.1f} ms"]
            table.add_row(backend["backend"], *times)
        console.print(table)
        (_, rows, heads, dim), dtype = device["problem"]["shape"], device["problem"]["dtype"]
        console.print(f"median of {REPEATS}: {rows} rows, {heads} heads of {dim}, {dtype}", highlight=False)


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Show versions, devices, and the backends of each device with a timing."""
    found = report()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        show(found)
    if any("error" in backend for device in found["devices"] for backend in device["backends"]):
        raise typer.Exit(1)
