"""Ranks that are killed, stopped, that raise or skip a step: the others raise PeerFailed and name them, in time."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TIMEOUT = 2.0
WORLD = 4


class Faults:
    """The process that forks the ranks of cases."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cases = folder, 0
        script = Path(__file__).with_name("faults.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def run(self, **case: Any) -> dict[str, Any]:
        self.cases += 1
        folder = self.folder / str(self.cases)
        folder.mkdir()
        given = {"world": WORLD, "timeout": TIMEOUT, "host": "launcher", "patience": 60, "culprit": None, **case}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(given | {"folder": str(folder)}) + "\n")
        self.process.stdin.flush()
        return json.loads(self._line())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(20)


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faults]:
    made = Faults(tmp_path_factory.mktemp("faults"))
    yield made
    made.close()


def check(faults: Faults, fault: str, culprit: int, phase: str, host: str) -> None:
    answer = faults.run(fault=fault, culprit=culprit, phase=phase, host=host)
    results = answer["results"]
    assert answer["left"] == ([culprit] if fault == "stop" else []), answer
    for rank in range(WORLD):
        if rank == culprit:
            continue
        met = results[str(rank)]
        assert met["kind"] == "PeerFailed", (rank, met)
        assert met["rank"] == culprit, (rank, met)
        assert met["at"] - answer["when"] < TIMEOUT + 2, (rank, met, answer["when"])
        assert met["step"] == 3, (rank, met)
    if fault == "raise":
        assert results[str(culprit)]["kind"] == "RuntimeError"
        assert all("boom" in met["text"] for met in results.values())


REPRESENTATIVE = [
    ("kill", 2, "forward", "launcher"),
    ("stop", 1, "backward", "launcher"),
    ("raise", 0, "backward", "rank 0"),
    ("skip", 3, "forward", "launcher"),
]
ALL = [
    (fault, culprit, phase, host)
    for fault in ("kill", "stop", "raise", "skip")
    for culprit in range(WORLD)
    for phase in ("forward", "backward")
    for host in ("launcher", "rank 0")
]


@pytest.mark.parametrize(("fault", "culprit", "phase", "host"), REPRESENTATIVE)
def test_all_survivors_name_the_rank_that_failed(faults, fault, culprit, phase, host):
    check(faults, fault, culprit, phase, host)


@pytest.mark.full
@pytest.mark.parametrize(("fault", "culprit", "phase", "host"), [case for case in ALL if case not in REPRESENTATIVE])
def test_all_survivors_name_any_rank_that_failed(faults, fault, culprit, phase, host):
    check(faults, fault, culprit, phase, host)


@pytest.mark.parametrize("phase", [pytest.param("forward", marks=pytest.mark.full), "backward"])
def test_a_rank_that_runs_out_of_memory_computes_in_parts_and_nobody_fails(faults, phase):
    results = faults.run(fault="memory", culprit=2, phase=phase, steps=4)["results"]
    assert [results[str(rank)].get("retries") for rank in range(WORLD)] == [0, 0, 1, 0], results
    assert max(met["error"] for met in results.values()) < 1e-5


@pytest.mark.parametrize("steps", [3, pytest.param(200, marks=pytest.mark.full)])
def test_a_rank_that_is_merely_slow_is_waited_for(faults, steps):
    answer = faults.run(fault="slow", culprit=1, seconds=0.5 * TIMEOUT, steps=steps, patience=60 + steps)
    assert answer["left"] == []
    assert [met["kind"] for met in answer["results"].values()] == ["done"] * WORLD
