"""The command `migrate`: a tree on the disk, its exit codes, and files it must not lose."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from dilated_attention_pytorch.cli import app
from dilated_attention_pytorch.cli.migrate import LEFT

P = "dilated_attention_pytorch"
OLD = f"from {P}.ring_dilated_attention_v2 import RingDilatedAttentionV2\nx = RingDilatedAttentionV2([4], [1])\n"
NEW = f"from {P} import DilatedAttention\nx = DilatedAttention([4], [1])\n"
UNDECIDED = f"from {P}.core import create_dilated_attention\nx = create_dilated_attention('ring')\n"


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["migrate", *map(str, arguments)])
    return result.exit_code, result.output


def test_shows_a_diff_and_writes_nothing(tmp_path: Path):
    file = tmp_path / "a.py"
    file.write_text(OLD)
    code, output = run(tmp_path)
    assert code == LEFT
    assert f"+from {P} import DilatedAttention\n+x = DilatedAttention([4], [1])\n" in output
    assert "-x = RingDilatedAttentionV2([4], [1])\n" in output
    assert "1 files read: would rewrite 1, 0 places to decide" in output
    assert file.read_text() == OLD
    assert [path.name for path in tmp_path.iterdir()] == ["a.py"]


def test_writes_and_is_done(tmp_path: Path):
    file = tmp_path / "deep" / "er" / "a.py"
    file.parent.mkdir(parents=True)
    file.write_text(OLD)
    file.chmod(0o750)
    assert run(tmp_path, "--write")[0] == 0
    assert file.read_text() == NEW
    assert file.stat().st_mode & 0o777 == 0o750
    assert run(tmp_path) == (0, "1 files read: would rewrite 0, 0 places to decide, 0 files that do not parse\n")


def test_says_what_is_left_with_file_and_line(tmp_path: Path):
    (tmp_path / "a.py").write_text(OLD)
    (tmp_path / "b.py").write_text("\n\n" + UNDECIDED)
    code, output = run(tmp_path, "--write")
    assert code == LEFT
    assert f"{tmp_path / 'b.py'}:3: to decide: create_dilated_attention has no single replacement" in output
    assert (tmp_path / "a.py").read_text() == NEW
    assert f"from {P}.compat.old.core import create_dilated_attention" in (tmp_path / "b.py").read_text()


def test_files_that_do_not_parse_are_named_and_not_lost(tmp_path: Path):
    broken = f"from {P}.core import PatternCache\ndef (:\n"
    (tmp_path / "broken.py").write_text(broken)
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe" + P.encode())
    (tmp_path / "good.py").write_text(OLD)
    code, output = run(tmp_path, "--write")
    assert code == LEFT
    assert f"{tmp_path / 'broken.py'}:2: to decide: does not parse" in output
    assert f"{tmp_path / 'binary.py'}:" in output
    assert (tmp_path / "broken.py").read_text() == broken
    assert (tmp_path / "good.py").read_text() == NEW


def test_environments_are_left_alone_and_links_stay_links(tmp_path: Path):
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "a.py").write_text(OLD)
    (tmp_path / "real.txt").write_text(OLD)
    (tmp_path / "link.py").symlink_to("real.txt")
    assert run(tmp_path, "--write")[0] == 0
    assert (tmp_path / ".venv" / "a.py").read_text() == OLD
    assert (tmp_path / "link.py").is_symlink()
    assert (tmp_path / "real.txt").read_text() == NEW


def test_one_file(tmp_path: Path):
    (tmp_path / "a.py").write_text(OLD)
    (tmp_path / "b.py").write_text(OLD)
    assert run(tmp_path / "a.py", "--write")[0] == 0
    assert [(tmp_path / name).read_text() for name in ("a.py", "b.py")] == [NEW, OLD]


def test_wrong_input_is_one_line(tmp_path: Path):
    code, output = run(tmp_path / "nothing")
    assert code == 2
    assert output.count("\n") == 1
    assert "give a Python file or a folder of them" in output
