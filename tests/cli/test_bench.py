"""The command ``bench attention``: what it leaves and prints, an interruption, and wrong input."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import matplotlib.image
import pytest
from click.testing import Result
from typer.testing import CliRunner

from dilated_attention_pytorch import benchmarking
from dilated_attention_pytorch.backends import sdpa
from dilated_attention_pytorch.benchmarking import CONTENDERS, measure
from dilated_attention_pytorch.cli import app, bench

SMALL = ["--lengths", "96,32", "--heads", "2", "--head-dim", "8", "--segments", "16,64", "--rates", "1,2"]
SMALL += ["--device", "cpu", "--max-seconds", "5"]


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["bench", "attention", *map(str, arguments)], env={"COLUMNS": "120"})


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "BUDGET_SECONDS", 0.005)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """The folder and the result of a run of every contender."""
    folder = tmp_path_factory.mktemp("bench") / "made" / "here"
    return folder, run(*SMALL, "--contenders", ",".join(CONTENDERS), "--causal", "--output", folder)


def test_the_file_holds_every_measurement(whole: tuple[Path, Result]):
    folder, result = whole
    assert result.exit_code == 0, result.output
    found = json.loads((folder / "bench.json").read_text())
    assert found["complete"] is True
    assert found["versions"]["torch"]
    assert found["device"]
    setting = found["setting"]
    assert (setting["lengths"], setting["heads"], setting["head_dim"], setting["dtype"]) == ([32, 96], 2, 8, "float32")
    assert (setting["segment_lengths"], setting["dilation_rates"], setting["is_causal"]) == ([16, 64], [1, 2], True)
    assert [c["name"] for c in found["contenders"]] == list(CONTENDERS)
    absent = {c["name"]: c["absent"] for c in found["contenders"] if c["absent"]}
    assert {"dense-cudnn", "flex", "ours-triton"} <= set(absent)
    assert "once a branch" in next(c["note"] for c in found["contenders"] if c["name"] == "flex")
    keys = [(m["length"], m["contender"], m["which"]) for m in found["measurements"]]
    assert keys == [(n, c, which) for n in (32, 96) for c in CONTENDERS for which in ("forward", "backward")]
    for m in found["measurements"]:
        assert m["status"] == ("absent" if m["contender"] in absent else "ok"), m
        if m["status"] == "ok":
            assert m["milliseconds"] > 0
            assert m["tflops"] > 0
            assert m["peak_bytes"] is None
        else:
            assert m["detail"] == absent[m["contender"]]
    assert {n["contender"]: n["passed"] for n in found["numerics"]} == {
        "ours": True, "ours-sdpa": True, "ours-reference": True
    }  # fmt: skip
    assert all(n["length"] == 32 for n in found["numerics"])
    assert {(c["ours"], c["which"]) for c in found["crossovers"]} >= {("ours", "forward"), ("ours", "both")}
    assert all(c["compared"] == [32, 96] for c in found["crossovers"] if c["ours"] == "ours")
    exponents = {(e["contender"], e["which"]): e["value"] for e in found["exponents"]}
    assert isinstance(exponents["dense-flash", "forward"], float)
    assert "torchscale" not in {name for name, _ in exponents} or not absent.get("torchscale")
    assert {path.name for path in folder.iterdir()} == {"bench.json", "bench.png"}


def test_the_picture_is_not_blank(whole: tuple[Path, Result]):
    picture = matplotlib.image.imread(whole[0] / "bench.png")
    assert picture.std() > 0.02
    assert len({tuple(p) for p in picture[::3, ::3].reshape(-1, picture.shape[-1])}) > 20


def test_the_tables_say_what_matters(whole: tuple[Path, Result]):
    text = whole[1].stdout
    for fragment in (
        "checked: ours (auto) at N=32: backend sdpa, largest error of out",
        "absent: dense (cuDNN): cuDNN runs on CUDA only",
        "dense (flash): forward time grows as N^",
        "ours (auto), forward and backward together:",
        "bench.json",
        "bench.png",
    ):
        assert fragment in text
    assert "\x1b" not in text


def test_the_recorded_command_runs_again(whole: tuple[Path, Result], tmp_path: Path):
    recorded = json.loads((whole[0] / "bench.json").read_text())
    command = shlex.split(recorded["command"])
    assert command[0] == "dilated-attention"
    command[command.index("--contenders") + 1] = "dense-flash"
    command[command.index("--output") + 1] = str(tmp_path)
    assert CliRunner().invoke(app, command[1:]).exit_code == 0
    again = json.loads((tmp_path / "bench.json").read_text())
    assert again["setting"] == recorded["setting"]
    assert again["numerics"] == []


def test_default_folders_are_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)  # no matplotlib, so no picture
    for name in ("bench", "bench-2"):
        result = run(*SMALL, "--contenders", "dense-flash")
        assert result.exit_code == 0, result.output
        assert "matplotlib is not installed" in result.stdout
        assert [path.name for path in (tmp_path / "runs" / name).iterdir()] == ["bench.json"]


def test_lengths_double():
    assert bench._lengths(None, None, None, (1024, 16384)) == [1024, 2048, 4096, 8192, 16384]
    assert bench._lengths(None, 3, 13, (1024, 16384)) == [3, 6, 12]
    assert bench._lengths("8,4,8", None, None, (1024, 16384)) == [4, 8]
    assert bench._milliseconds(0.01234) == "0.0123 ms"
    assert [bench._milliseconds(v) for v in (1.2345, 100.2, 12345.6)] == ["1.23 ms", "100 ms", "12,346 ms"]


def test_an_interruption_keeps_what_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = benchmarking.sweep

    def sweep(*args, **kwargs):
        for count, measurement in enumerate(real(*args, **kwargs)):
            if count == 3:
                raise KeyboardInterrupt
            yield measurement

    monkeypatch.setattr(benchmarking, "sweep", sweep)
    result = run(*SMALL, "--contenders", "ours,dense-flash", "--output", tmp_path)
    assert result.exit_code == 130
    assert "Interrupted; what is measured is kept" in result.stdout
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["complete"] is False
    status = [m["status"] for m in found["measurements"]]
    assert status == ["ok"] * 3 + ["not run"] * 5
    assert matplotlib.image.imread(tmp_path / "bench.png").std() > 0.02


def test_a_kill_leaves_the_measurements_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = benchmarking.sweep

    def sweep(*args, **kwargs):
        for count, measurement in enumerate(real(*args, **kwargs)):
            if count == 4:
                raise SystemExit(9)
            yield measurement

    monkeypatch.setattr(benchmarking, "sweep", sweep)
    run(*SMALL, "--contenders", "ours,dense-flash", "--output", tmp_path)
    found = json.loads((tmp_path / "bench.json").read_text())
    assert [m["status"] for m in found["measurements"]].count("ok") == 4


def test_what_is_wrong_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    right = sdpa.forward

    def wrong(*args, **kwargs):
        out, lse = right(*args, **kwargs)
        return out * 1.01, lse

    monkeypatch.setattr(sdpa, "forward", wrong)
    result = run(*SMALL, "--contenders", "ours", "--output", tmp_path)
    assert result.exit_code == 1
    assert result.stderr == "error: ours differs from the reference by more than its bound; nothing was timed\n"
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["numerics"][0]["passed"] is False
    assert {m["status"] for m in found["measurements"]} == {"not run"}


def test_a_contender_that_fails_is_recorded_and_fails_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no kernel\nmore")

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", broken)
    result = run(*SMALL, "--contenders", "dense-flash,ours-reference", "--output", tmp_path)
    assert result.exit_code == 1
    assert result.stderr == "error: 4 measurements failed; the first: dense-flash, RuntimeError: no kernel\n"
    found = json.loads((tmp_path / "bench.json").read_text())
    assert {(m["contender"], m["status"]) for m in found["measurements"]} == {
        ("dense-flash", "failed"), ("ours-reference", "ok")
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--contenders", "ours,fast"], "contender 'fast' is unknown; choose from ours, ours-"),
        (["--contenders", " , "], "no contender is named; choose from ours,"),
        (["--contenders", "flex,dense-cudnn"], "no contender can run here: flex: compared on CUDA only"),
        (["--lengths", "a,b"], "--lengths is 'a,b'; give integers with commas between"),
        (["--lengths", ""], "--lengths is ''; give integers with commas between"),
        (["--lengths", "0,16"], "--lengths has 0; every length must be at least 1"),
        (["--min-length", "64"], "both --lengths and --min-length or --max-length are given"),
        (["--heads", "0"], "every size must be at least 1"),
        (["--head-dim", "-8"], "every size must be at least 1"),
        (["--batch", "0"], "every size must be at least 1"),
        (["--segments", "4", "--rates", "9"], "rate 9 is larger than its segment length 4"),
        (["--segments", "4,8", "--rates", "1"], "give one rate a segment length"),
        (["--preset", "gigapath"], "both a --preset and --segments or --rates are given"),
        (["--preset", "huge"], "'huge' is not one of 'longnet', 'gigapath'"),
        (["--dtype", "int8"], "int8"),
        (["--device", "warp"], "device 'warp' cannot be used"),
        (["--max-seconds", "0"], "--max-seconds is 0.0; give a positive number"),
        (["--max-seconds", "nan"], "--max-seconds is nan; give a positive number"),
        (["--max-seconds", "soon"], "Invalid value for '--max-seconds'"),
        (["--output", "/dev/null/bench"], "cannot write into the folder '/dev/null/bench': Not a directory"),
        (["--output", "/proc"], "cannot write into the folder '/proc': "),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(options: list[str], message: str, tmp_path: Path):
    result = run(*SMALL, "--output", tmp_path / "bench", *options)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert not (tmp_path / "bench").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--min-length", "64", "--max-length", "32"], "there are no lengths from 64 to 32"),
        (["--min-length", "0"], "--min-length is 0; give at least 1"),
        (["--segments", "64"], "give both"),
    ],
)
def test_lengths_and_patterns_that_do_not_fit(options: list[str], message: str, tmp_path: Path):
    result = run("--device", "cpu", "--output", tmp_path / "bench", *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_command_that_bench_lacks_is_refused():
    result = CliRunner().invoke(app, ["bench", "attn"])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: No such command 'attn'.")
    result = CliRunner().invoke(app, ["bench"])
    assert result.exit_code == 2
    assert "attention" in result.stdout
