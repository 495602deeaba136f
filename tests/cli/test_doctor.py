"""The ``doctor`` command: truthful versions, a timing of every backend, a failure that shows."""

from __future__ import annotations

import json
import platform

import pytest
import torch
from typer.testing import CliRunner

from dilated_attention_pytorch import __version__, available_backends
from dilated_attention_pytorch.cli import app, doctor


@pytest.fixture(scope="module")
def found() -> dict:
    """What ``doctor --json`` reports here."""
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_versions_are_those_of_this_process(found: dict):
    assert found["versions"]["dilated-attention-pytorch"] == __version__
    assert found["versions"]["python"] == platform.python_version()
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["CUDA"] == torch.version.cuda


def test_every_backend_of_every_device_has_a_time(found: dict):
    cuda = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    assert [device["device"] for device in found["devices"]] == ["cpu", *cuda]
    for device in found["devices"]:
        names = tuple(backend["backend"] for backend in device["backends"])
        assert names == available_backends(device=device["device"])
        assert all(backend["forward_ms"] > 0 for backend in device["backends"])
        assert all(backend["step_ms"] > 0 for backend in device["backends"])


def test_tables_show_each_backend_with_its_times(found: dict, capsys: pytest.CaptureFixture[str]):
    doctor.show(found)
    lines = capsys.readouterr().out.splitlines()
    for backend in found["devices"][0]["backends"]:
        times = [f"{backend[name]:.1f} ms" for name in ("forward_ms", "step_ms")]
        assert any(backend["backend"] in line and all(time in line for time in times) for line in lines)
    assert any(torch.__version__ in line for line in lines)


def test_a_backend_that_fails_is_shown_and_fails_the_command(monkeypatch: pytest.MonkeyPatch):
    def broken(*args: object, backend: str, **options: object) -> None:
        raise RuntimeError(f"no kernel for {backend}\nmore detail")

    monkeypatch.setattr(doctor, "dilated_attention", broken)
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 1
    errors = {entry["backend"]: entry["error"] for entry in json.loads(result.stdout)["devices"][0]["backends"]}
    assert errors == {name: f"RuntimeError: no kernel for {name}" for name in available_backends(device="cpu")}
    result = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "120"})
    assert result.exit_code == 1
    assert "no kernel for sdpa" in result.stdout


def test_median_ignores_the_first_call_and_a_slow_outlier(monkeypatch: pytest.MonkeyPatch):
    clock = iter([0.0, 90.0, 100.0, 100.002, 200.0, 200.003, 300.0, 350.0])
    monkeypatch.setattr(doctor.time, "perf_counter", lambda: next(clock))
    assert doctor.median_ms(lambda: None, "cpu", repeats=3) == pytest.approx(3.0, abs=1e-6)
