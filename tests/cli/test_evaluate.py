"""The command `evaluate`: its table and files against the model's own losses, other text, wrong input."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import matplotlib.image
import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from dilated_attention_pytorch.cli import app
from dilated_attention_pytorch.training import load_model
from dilated_attention_pytorch.training.corpus import open_packed
from dilated_attention_pytorch.training.windows import held_out_windows


def evaluate(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)], env={"COLUMNS": "150"})


def test_the_table_is_that_of_the_model_on_the_text_given(small_run: Path, tmp_path: Path):
    text = b"alpha beta (x, y)\n" * 11
    (tmp_path / "text.txt").write_bytes(text)
    arguments = ["--data", tmp_path / "text.txt", "--window", "96", "--contexts", "24", "--windows", "2"]
    result = evaluate(small_run, *arguments, "--output", tmp_path / "new" / "out", "--device", "cpu")
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "new" / "out" / "evaluation.json").read_text())
    assert record["windows"] == 2
    assert record["contexts"] == [24, 96]
    assert record["edges"] == [0, 96]
    packed = torch.tensor(list(b"\0" + text))
    windows = torch.stack([packed[:97], packed[96:193]])
    with torch.no_grad():
        losses = load_model(small_run).loss(windows[:, :-1], windows[:, 1:], reduction="none") / math.log(2)
    assert record["bits_per_byte"] == pytest.approx(float(losses.mean()), rel=1e-5)
    assert record["curve"]["bits"][-1] == pytest.approx(float(losses[:, 48:].mean()), rel=1e-5)
    for number in (*record["bits"][0], *record["curve"]["bits"]):
        assert f"{number:.3f}" in result.stdout
    assert matplotlib.image.imread(tmp_path / "new" / "out" / "evaluation.png").std() > 0.01


def test_a_checkpoint_is_measured_on_what_its_run_held_out(small_run: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(small_run, run)
    result = evaluate(run / "checkpoints" / "step-00000002", "--windows", "3")
    assert result.exit_code == 0, result.output
    record = json.loads((run / "evaluation.json").read_text())
    windows = held_out_windows(open_packed(run / "data"), context_length=64, count=3).long()
    with torch.no_grad():
        loss = float(load_model(run).loss(windows[:, :-1], windows[:, 1:])) / math.log(2)
    assert record["contexts"] == [64]
    assert (record["windows"], record["edges"]) == (3, [0, 64])
    assert record["bits_per_byte"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (("nowhere",), "'nowhere' is not a checkpoint of this command"),
        (("RUN", "--window", "0"), "--window is 0; give at least 1"),
        (("RUN", "--windows", "0"), "--windows is 0; give at least 1"),
        (("RUN", "--window", "1000000"), "no window of 1000000"),
        (("RUN", "--contexts", "a"), "--contexts is 'a'; give integers"),
        (("RUN", "--contexts", "65"), "from 1 to the 64 of a window"),
        (("RUN", "--data", "missing"), "'missing': it does not exist"),
        (("RUN", "--output", "file"), "cannot write into the folder 'file': File exists"),
        (("BARE",), "holds no text, as runs do that were trained here; name some with --data"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    arguments: tuple[str, ...], fragment: str, small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    shutil.copytree(small_run / "checkpoints", "bare/checkpoints")
    runs = {"RUN": small_run, "BARE": Path("bare")}
    result = evaluate(*(runs.get(argument, argument) for argument in arguments))
    assert result.exit_code == 2, result.output
    assert fragment in " ".join(result.stderr.split())
    assert result.stdout == ""
