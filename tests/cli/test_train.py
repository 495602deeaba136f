"""The ``train`` command: what a run leaves, kill -9 and resume, Ctrl-C, a full disk, and wrong input."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from dilated_attention_pytorch.cli import app
from dilated_attention_pytorch.training import Trainer
from dilated_attention_pytorch.training.metrics import read_metrics

STEPS = 12
OPTIONS = ["--context-length", "64", "--batch-size", "1", "--steps", str(STEPS), "--checkpoint-every", "2"]
OPTIONS += ["--eval-every", "6", "--sample-bytes", "20", "--device", "cpu"]


def train(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


def weights(folder: Path) -> str:
    content = (folder / "checkpoints" / f"step-{STEPS:08d}" / "model.safetensors").read_bytes()
    return hashlib.sha256(content).hexdigest()


def steps_of(folder: Path) -> list[int]:
    return [r["step"] for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == "train"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files of the standard library."""
    folder = tmp_path_factory.mktemp("text")
    for module in ("bisect", "heapq", "keyword"):
        shutil.copy(__import__(module).__file__, folder)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, text: Path) -> tuple[Path, Result]:
    """The folder and the result of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    result = train("--data", text, "--output", folder, *OPTIONS)
    assert result.exit_code == 0, result.output
    return folder, result


def test_a_run_leaves_what_it_promises(whole: tuple[Path, Result]):
    folder, result = whole
    assert steps_of(folder) == list(range(1, STEPS + 1))
    for name in ("loss.png", "position.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    steps = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert steps == ["step-00000010", "step-00000012"]
    names = {path.name for path in (folder / "checkpoints" / steps[-1]).iterdir()}
    assert {name.rpartition(".")[2] for name in names} == {"json", "safetensors"}  # nothing that could execute

    summary = json.loads((folder / "summary.json").read_text())
    held_out = [r for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == "held-out"]
    assert [r["step"] for r in held_out] == [0, 6, STEPS]
    assert summary["held_out_bits_per_byte"] < held_out[0]["bits_per_byte"] - 1
    assert f"{summary['held_out_bits_per_byte']:.3f}" in result.stdout
    assert summary["position_curve"]["positions"] == [64]
    assert len((folder / "sample.txt").read_text()) > 20
    assert f"step {STEPS}/{STEPS}: held-out" in result.stdout  # plain lines, without a terminal
    assert "\x1b" not in result.stdout


def test_a_second_run_into_the_folder_is_refused(whole: tuple[Path, Result], text: Path):
    result = train("--data", text, "--output", whole[0], *OPTIONS)
    assert result.exit_code == 2
    assert f"already holds a run at step {STEPS}" in result.stderr


def test_resuming_a_finished_run_evaluates_again(whole: tuple[Path, Result], tmp_path: Path):
    folder = shutil.copytree(whole[0], tmp_path / "run")
    before = (folder / "summary.json").read_text()
    (folder / "summary.json").unlink()
    result = train("--output", folder, "--resume")
    assert result.exit_code == 0, result.output
    assert json.loads((folder / "summary.json").read_text()) == json.loads(before)
    assert steps_of(folder) == list(range(1, STEPS + 1))


def test_default_folders_are_numbered(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    short = [*OPTIONS, "--steps", "1", "--sample-bytes", "0"]
    for expected in ("runs/demo", "runs/demo-2"):
        result = train("--data", text, *short)
        assert result.exit_code == 0, result.output
        assert (tmp_path / expected / "summary.json").exists()
        assert not (tmp_path / expected / "sample.txt").exists()
    (tmp_path / "runs" / "demo-2" / "summary.json").unlink()
    assert train("--resume").exit_code == 0
    assert (tmp_path / "runs" / "demo-2" / "summary.json").exists()


def test_killed_by_sigkill_it_resumes_to_the_same_weights(whole: tuple[Path, Result], text: Path, tmp_path: Path):
    """A real process, killed after a step that the clock chooses."""
    folder = tmp_path / "run"
    code = "from dilated_attention_pytorch.cli import app; app()"
    command = [sys.executable, "-c", code, "train", "--data", str(text), "--output", str(folder), *OPTIONS]
    target = time.time_ns() % (STEPS - 3) + 2
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while process.poll() is None and len(steps_of(folder)) < target:
            time.sleep(0.005)
        process.kill()
        complaint = process.stderr.read()
    assert process.returncode == -signal.SIGKILL, complaint
    assert not (folder / "summary.json").exists()
    result = train("--output", folder, "--resume")
    assert result.exit_code == 0, result.output
    assert weights(folder) == weights(whole[0]), f"killed after step {target}"
    assert steps_of(folder) == list(range(1, STEPS + 1))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_and_says_how_to_go_on(
    number: int, whole: tuple[Path, Result], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real = Trainer._train_step

    def step(self: Trainer) -> dict:
        record = real(self)
        if self.step == 5:
            os.kill(os.getpid(), number)
        return record

    folder = tmp_path / "run"
    monkeypatch.setattr(Trainer, "_train_step", step)
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    result = train("--data", text, "--output", folder, *OPTIONS)
    monkeypatch.undo()
    assert result.exit_code == 130
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert (folder / "checkpoints" / "step-00000005").exists()
    command = re.search(r"continue with: dilated-attention (.*)", result.stdout)
    assert command, result.stdout
    again = CliRunner().invoke(app, command[1].split())
    assert again.exit_code == 0, again.output
    assert weights(folder) == weights(whole[0])


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writes beyond ``size`` bytes of a file fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_loses_nothing(
    whole: tuple[Path, Result], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "run"
    real = Trainer._train_step

    def step(self: Trainer) -> dict:
        if self.step == 3:
            raise OSError(28, "No space left on device", str(folder / "metrics.jsonl"))
        return real(self)

    monkeypatch.setattr(Trainer, "_train_step", step)
    result = train("--data", text, "--output", folder, *OPTIONS)
    monkeypatch.undo()
    assert result.exit_code == 1
    assert "No space left on device; the last checkpoint is complete; continue with" in result.stderr
    with file_size_limit(100_000):  # the metrics fit, the checkpoint of step 4 does not
        result = train("--output", folder, "--resume")
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "File too large; the last checkpoint is complete" in result.stderr
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000000", "step-00000002"]
    result = train("--output", folder, "--resume")
    assert result.exit_code == 0, result.output
    assert weights(folder) == weights(whole[0])


def _file(folder: Path, content: bytes) -> Path:
    (folder / "data.txt").write_bytes(content)
    return folder / "data.txt"


def _empty_folder(folder: Path) -> Path:
    (folder / "nothing").mkdir()
    return folder / "nothing"


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda folder: folder / "missing", [], "it does not exist"),
        (lambda folder: _file(folder, b""), [], "it is empty"),
        (lambda folder: _file(folder, b"a\0b"), [], "it is not text: byte 1 is NUL"),
        (lambda folder: _file(folder, b"a\xff" * 99), [], "it is not valid UTF-8"),
        (_empty_folder, [], "the folder holds no text file"),
        (lambda folder: _file(folder, b"short"), [], "the training text has 0 bytes, less than one context of 64"),
        (None, ["--steps", "0"], "steps is 0; give an integer of at least 1"),
        (None, ["--batch-size", "0"], "batch_size is 0; give an integer of at least 1"),
        (None, ["--learning-rate", "0"], "learning_rate is 0.0; give a positive number"),
        (None, ["--learning-rate", "nan"], "learning_rate is nan; give a positive number"),
        (None, ["--context-length", "0"], "seq_len is 0; give an integer of at least 1"),
        (None, ["--seed", "-1"], "seed is -1; give an integer of at least 0"),
        (None, ["--checkpoint-every", "0"], "checkpoint_every is 0; give an integer of at least 1"),
        (None, ["--eval-every", "-3"], "eval_every is -3; give an integer of at least 1"),
        (None, ["--sample-bytes", "-1"], "sample_bytes is -1; give an integer of at least 0"),
        (None, ["--device", "warp"], "device 'warp' cannot be used"),
        (None, ["--preset", "huge"], "'huge' is not one of 'demo', 'small', 'base'"),
        (None, ["--dtype", "float16"], "'float16' is not one of 'float32', 'bfloat16'"),
        (None, ["--steps", "many"], "Invalid value for '--steps'"),
        (None, ["--output", "/dev/null/run"], "cannot make the folder '/dev/null/run'"),
        (None, ["--resume"], "no checkpoint in"),
    ],
)
def test_wrong_input_is_one_message_and_exit_code_2(make, options: list[str], message: str, text: Path, tmp_path: Path):
    data = text if make is None else make(tmp_path)
    result = train("--data", data, "--output", tmp_path / "run", *OPTIONS, *options)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert not (tmp_path / "run" / "checkpoints").exists()


def _remove_data(folder: Path) -> None:
    shutil.rmtree(folder / "data")
    run = folder / "checkpoints" / f"step-{STEPS:08d}" / "run.json"
    source = Path(json.loads(run.read_text())["data"][0])
    (source / "bisect.py").write_text("changed\n" * 400)


def _damage_all(folder: Path) -> None:
    for path in folder.glob("checkpoints/*/model.safetensors"):
        path.write_bytes(path.read_bytes()[:-100])


def _foreign(folder: Path) -> None:
    shutil.rmtree(folder / "checkpoints")
    (folder / "checkpoints" / "step-00000005").mkdir(parents=True)
    (folder / "checkpoints" / "step-00000005" / "model.pt").write_bytes(b"\x80\x04.")


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (_damage_all, [], "is damaged: model.safetensors is not what was written"),
        (_foreign, [], "is not a checkpoint of this command: it has no manifest.json"),
        (lambda folder: shutil.rmtree(folder / "checkpoints"), [], "no checkpoint in"),
        (_remove_data, [], "the text changed since the checkpoint was written"),
        (None, ["--steps", "13"], "--steps is 13, but the run in"),
        (None, ["--preset", "base"], "--preset is 'base', but the run in"),
        (None, ["--data", "elsewhere"], "--data is 'elsewhere', but the run in"),
    ],
)
def test_what_cannot_be_resumed_is_one_line_and_exit_code_2(
    change, options: list[str], message: str, whole: tuple[Path, Result], tmp_path: Path, text: Path
):
    folder = shutil.copytree(whole[0], tmp_path / "run")
    kept = {path.name: path.read_bytes() for path in text.iterdir()}
    try:
        if change is not None:
            change(folder)
        result = train("--output", folder, "--resume", *options)
    finally:
        for name, content in kept.items():
            (text / name).write_bytes(content)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
