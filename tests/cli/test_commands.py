"""The command table: every command is listed and loads, and listing loads none."""

from __future__ import annotations

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from dilated_attention_pytorch.cli import COMMANDS, app


def test_help_lists_every_command_with_its_line():
    result = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for name, entry in COMMANDS.items():
        assert name in result.stdout
        assert entry.help in result.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str):
    result = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "Usage:" in result.stdout
    assert f" {name} " in result.stdout


def test_an_unknown_command_is_refused():
    result = CliRunner().invoke(app, ["trian"])
    assert result.exit_code == 2
    assert result.stderr == "error: No such command 'trian'. Did you mean 'train'?\n"


def test_without_a_command_help_is_shown():
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 2
    assert all(name in result.stdout for name in COMMANDS)
    assert result.stderr == ""


def test_help_loads_no_command_and_no_plotting():
    code = """
import sys
from dilated_attention_pytorch.cli import COMMANDS, app
try:
    app(["--help"])
except SystemExit as end:
    assert end.code == 0
package = "dilated_attention_pytorch"
heavy = ["matplotlib", "triton", package + ".training", *(package + ".cli." + name for name in COMMANDS)]
print([module for module in sys.modules if module in heavy])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
