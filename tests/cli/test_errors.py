"""Errors of a command: one line, the right exit code, and no defect hidden."""

from __future__ import annotations

import pytest
import torch
import typer

from dilated_attention_pytorch.cli.errors import one_line_errors

DISK = OSError(28, "No space left on device", "/tmp/file")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("rate is 0;\n  give 1"), 2, "error: rate is 0; give 1"),
        (DISK, 1, "error: '/tmp/file': No space left on device; try again"),
        (FileNotFoundError(2, "No such file or directory", "a.json"), 2, "error: 'a.json': No such file or directory"),
        (IsADirectoryError(21, "Is a directory", "runs"), 2, "error: 'runs': Is a directory"),
        (IsADirectoryError(21, "Is a directory", ".runs.tmp", None, "runs"), 2, "error: 'runs': Is a directory"),
        (OSError("odd"), 1, "error: odd; try again"),
        (MemoryError(), 1, "error: out of memory; try again"),
        (FloatingPointError("the loss is nan"), 1, "error: the loss is nan"),
        (torch.OutOfMemoryError("CUDA out of memory."), 1, "error: out of memory (CUDA out of memory.); try again"),
    ],
)
def test_an_error_is_one_line_with_its_code(error: Exception, code: int, line: str, capsys: pytest.CaptureFixture):
    with pytest.raises(typer.Exit) as caught, one_line_errors(hint="try again"):
        raise error
    assert caught.value.exit_code == code
    assert capsys.readouterr().err == line + "\n"


def test_too_large_a_tensor_is_lack_of_memory(capsys: pytest.CaptureFixture):
    with pytest.raises(typer.Exit) as caught, one_line_errors():
        torch.empty(1 << 60, dtype=torch.uint8)
    assert caught.value.exit_code == 1
    assert capsys.readouterr().err.startswith("error: out of memory (")


@pytest.mark.parametrize("error", [RuntimeError("a defect"), KeyError("a defect")])
def test_a_defect_keeps_its_traceback(error: Exception):
    with pytest.raises(type(error), match="a defect"), one_line_errors():
        raise error
