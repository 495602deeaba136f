"""The commands `explain` and `verify`."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from dilated_attention_pytorch.backends import sdpa
from dilated_attention_pytorch.cli import app


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def test_explain_prints_backend_work_and_calls():
    result = run("explain", "--length", "1000", "--heads", "4", "--segments", "256,1024", "--rates", "1,4")
    assert result.exit_code == 0
    for fragment in ("sdpa (cpu_flash)", "GFLOP", "MiB", "4,000 of 4,000", "Fused calls"):
        assert fragment in result.stdout


def test_explain_json_follows_the_options():
    full, causal = (
        json.loads(run("explain", "--length", "512", "--dtype", "bfloat16", "--json", *extra).stdout)
        for extra in ((), ("--causal",))
    )
    assert full["backend"] == "sdpa"
    assert full["pairs"] > causal["pairs"]


def test_verify_reports_and_passes():
    result = run("verify", "--length", "200", "--heads", "4", "--head-dim", "16", "--causal")
    assert result.exit_code == 0
    assert result.stdout.count("ok") == 5
    found = json.loads(run("verify", "--length", "60", "--heads", "2", "--head-dim", "8", "--json").stdout)
    assert found["passed"]
    assert [check["name"] for check in found["checks"]] == ["out", "lse", "dq", "dk", "dv"]


def test_verify_exits_1_where_a_backend_is_wrong(monkeypatch):
    right = sdpa.forward

    def forward(*args, **kwargs):
        out, lse = right(*args, **kwargs)
        return out * 1.01, lse

    monkeypatch.setattr(sdpa, "forward", forward)
    result = run("verify", "--length", "60", "--heads", "2", "--head-dim", "8")
    assert result.exit_code == 1
    assert "FAILED" in result.stdout


@pytest.mark.parametrize("command", ["explain", "verify"])
@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (("--rates", "1"), "give both"),
        (("--segments", "a,b", "--rates", "1,2"), "'a,b'; give integers"),
        (("--segments", "4", "--rates", "9"), "rate 9 is larger than its segment length 4"),
        (("--segments", "4,8", "--rates", "1"), "give one rate a segment length"),
        (("--length", "0"), "at least 1"),
        (("--heads", "0"), "at least 1"),
        (("--batch", "-1"), "at least 1"),
        (("--heads", "4", "--kv-heads", "3"), "multiple"),
        (("--length", "8", "--query-length", "9"), "no more"),
        (("--device", "cuda:99"), "cuda:99"),
        (("--device", "nonsense"), "nonsense"),
        (("--backend", "fast"), "'fast'; choose one of 'auto'"),
        (("--padding", "none"), "'none'; choose one of 'mask', 'zeros'"),
        (("--dtype", "int8"), "int8"),
        (("--length", "many"), "--length"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(command, arguments, fragment):
    result = run(command, *arguments)
    assert result.exit_code == 2
    assert fragment in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.output
