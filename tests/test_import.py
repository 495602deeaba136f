"""Importing the package has no effects. Each check runs in a fresh interpreter."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PROBE = """
import json, os, sys, threading, time, warnings
import torch
state = lambda: {
    "environment": dict(os.environ),
    "modules": sorted(m.partition(".")[0] for m in sys.modules),
    "threads": threading.active_count(),
    "torch_threads": torch.get_num_threads(),
    "dtype": str(torch.get_default_dtype()),
    "grad": torch.is_grad_enabled(),
    "seed": torch.initial_seed(),
    "cuda": torch.cuda.is_initialized(),
    "filters": len(warnings.filters),
}
before = state()
start = time.process_time()
import dilated_attention_pytorch
seconds = time.process_time() - start
with open(sys.argv[1], "w") as file:
    json.dump({"before": before, "after": state(), "seconds": seconds}, file)
"""


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> dict:
    report = tmp_path_factory.mktemp("import") / "report.json"
    command = [
        sys.executable,
        "-W",
        "error::DeprecationWarning:dilated_attention_pytorch",
        "-c",
        PROBE,
        str(report),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return {**json.loads(report.read_text()), "output": done.stdout + done.stderr}


def test_prints_nothing(probe: dict):
    assert probe["output"] == ""


@pytest.mark.parametrize(
    "what", ["environment", "threads", "torch_threads", "dtype", "grad", "seed", "cuda", "filters"]
)
def test_leaves_the_process_as_it_was(probe: dict, what: str):
    assert probe["after"][what] == probe["before"][what]


def test_loads_nothing_heavy(probe: dict):
    heavy = {"triton", "transformers", "matplotlib", "typer", "rich", "click", "safetensors", "pytest"}
    loaded = set(probe["after"]["modules"]) - set(probe["before"]["modules"])
    assert "dilated_attention_pytorch" in loaded
    assert not heavy & loaded


def test_is_quick(probe: dict):
    assert probe["seconds"] < 2.0  # of CPU time, beyond that of torch; most of it is room for a slow machine
