"""The command `generate`: the text of the model on stdout, prompts from options, files and stdin, wrong input."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from dilated_attention_pytorch import LongNetLM
from dilated_attention_pytorch.cli import app
from dilated_attention_pytorch.training import load_model
from dilated_attention_pytorch.training.generate import printable


def generate(*arguments: str | Path, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(app, ["generate", *map(str, arguments)], input=stdin)


def expected(run: Path, prompts: list[bytes], **options: object) -> list[str]:
    """Prompts and texts, straight from the model."""
    tokens = [[0, *prompt] for prompt in prompts]
    texts = load_model(run).generate(tokens, **options, end_token=0)
    return [printable(a) + printable(bytes(b.tolist())) for a, b in zip(prompts, texts, strict=True)]


def test_one_prompt_and_its_text(small_run: Path):
    result = generate(small_run, "--prompt", "alpha é", "--max-bytes", "40", "--temperature", "0")
    assert result.exit_code == 0, result.output
    (text,) = expected(small_run, ["alpha é".encode()], max_new_tokens=40, temperature=0)
    assert result.stdout == text + "\n"
    assert "bytes/s" in result.stderr


def test_prompts_from_everywhere(small_run: Path, tmp_path: Path):
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"beta\n(x")
    options = ["--max-bytes", "30", "--seed", "3", "--top-k", "50", "--top-p", "0.9", "--temperature", "1.5"]
    arguments = ["--prompt", "alpha", "--prompt-file", str(file), "--prompt-file", "-", *options]
    result = generate(small_run / "checkpoints" / "step-00000002", *arguments, stdin=b"gamma")
    assert result.exit_code == 0, result.output
    texts = expected(
        small_run, [b"alpha", b"beta\n(x", b"gamma"],
        max_new_tokens=30, temperature=1.5, top_k=50, top_p=0.9, generator=3,
    )  # fmt: skip
    assert result.stdout == "".join(f"--- text {n} of 3\n{text}\n" for n, text in enumerate(texts, 1))


def test_without_arguments_the_last_run_begins_a_document(
    small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shutil.copytree(small_run, tmp_path / "runs" / "demo")
    monkeypatch.chdir(tmp_path)
    result = generate("--seed", "1", "--max-bytes", "20")
    assert result.exit_code == 0, result.output
    assert result.stdout == expected(small_run, [b""], max_new_tokens=20, temperature=0.8, generator=1)[0] + "\n"


@pytest.mark.parametrize(
    ("arguments", "code", "fragment"),
    [
        (("nowhere",), 2, "'nowhere' is not a checkpoint of this command"),
        ((), 2, "there is no run in 'runs'; make one with: dilated-attention train"),
        (("RUN", "--temperature", "-1"), 2, "temperature is -1.0"),
        (("RUN", "--top-k", "0"), 2, "top_k is 0"),
        (("RUN", "--top-p", "1.5"), 2, "top_p is 1.5"),
        (("RUN", "--max-bytes", "-3"), 2, "--max-bytes is -3"),
        (("RUN", "--device", "warp"), 2, "device 'warp' cannot be used"),
        (("RUN", "--prompt-file", "missing.txt"), 2, "cannot read --prompt-file 'missing.txt': No such file"),
    ],
)
def test_wrong_input_is_one_line(
    arguments: tuple[str, ...], code: int, fragment: str, small_run: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    result = generate(*(small_run if argument == "RUN" else argument for argument in arguments))
    assert result.exit_code == code, result.output
    assert fragment in " ".join(result.stderr.split())
    assert result.stdout == ""


def test_an_older_checkpoint_in_place_of_a_damaged_one_is_a_line(small_run: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(small_run / "checkpoints" / "step-00000002", run / "checkpoints" / "step-00000002")
    shutil.copytree(small_run / "checkpoints" / "step-00000002", run / "checkpoints" / "step-00000003")
    (run / "checkpoints" / "step-00000003" / "model.safetensors").write_bytes(b"")
    result = generate(str(run), "--max-bytes", "1")
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("note: checkpoint ")
    assert "the one of step 2 is loaded in its place" in result.stderr.splitlines()[0]
    assert len(result.stderr.splitlines()) == 2  # and how long it took


def test_logits_that_are_not_finite_are_one_line(small_run: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(LongNetLM, "logits", lambda self, features: features.new_full((len(features), 256), torch.nan))
    result = generate(str(small_run), "--max-bytes", "1")
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("error: the logits are not finite")
