"""The import contracts of pyproject.toml catch what they should: each case plants one import in a copy."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINT = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"


@pytest.fixture
def package(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    return tmp_path / "src" / "dilated_attention_pytorch"


def lint(package: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(package.parent)}
    command = [sys.executable, "-c", LINT, "--no-cache"]
    return subprocess.run(command, cwd=package.parents[1], env=environment, capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize(
    ("module", "line", "broken"),
    [
        (
            "types.py",
            "from .functional import dilated_attention",
            "types -> dilated_attention_pytorch.functional",
        ),
        ("backends/sdpa.py", "import triton.language as tl", "sdpa -> triton"),
        ("unplaced.py", "answer = 42", "not listed as layers"),
    ],
)
def test_planted_violation_is_caught(package: Path, module: str, line: str, broken: str):
    with (package / module).open("a") as file:
        file.write(f"\n{line}\n")
    done = lint(package)
    assert done.returncode == 1, done.stdout + done.stderr
    assert broken in " ".join(done.stdout.split())
    assert "1 broken" in done.stdout


def test_kernels_may_import_triton(package: Path):
    (package / "kernels").mkdir(exist_ok=True)
    for name in ("__init__.py", "planted.py"):
        with (package / "kernels" / name).open("a") as file:
            file.write("\nimport triton\n")
    done = lint(package)
    assert done.returncode == 0, done.stdout + done.stderr
