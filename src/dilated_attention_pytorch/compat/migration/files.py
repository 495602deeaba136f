"""A whole tree: every file read, rewritten in memory, and written back only when asked."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .uses import python_files


@dataclass(frozen=True)
class Change:
    """A file with new content."""

    path: Path
    before: bytes
    after: bytes
    notes: tuple[tuple[int, str], ...]

    def diff(self) -> str:
        """As a unified diff."""
        before, after = (_lines(content) for content in (self.before, self.after))
        return "".join(difflib.unified_diff(before, after, str(self.path), str(self.path)))


@dataclass
class Report:
    """What a tree needs."""

    files: int = 0
    changes: list[Change] = field(default_factory=list)
    left: list[tuple[Path, int, str]] = field(default_factory=list)
    """What a person has to decide: file, line, text."""
    failed: list[tuple[Path, int, str]] = field(default_factory=list)
    """Files that do not parse, which stay as they are."""


def migrate_tree(root: Path) -> Report:
    """What there is to change at or below ``root``; nothing is written.

    Raises:
        ValueError: there is nothing at ``root``, or libcst is not installed.
    """
    report = Report()
    for path, content in _contents(root):
        report.files += 1
        if b"dilated_attention_pytorch" in content:
            _migrate(path, content, report)
    return report


def write(report: Report) -> None:
    """Put the changes on the disk, each file whole or not at all, with the permissions it had."""
    from ...training.files import replace_file

    for change in report.changes:
        mode = change.path.stat().st_mode
        target = change.path.resolve()  # the file itself, where the path is a link
        replace_file(target, [change.after])
        target.chmod(mode)


def _lines(content: bytes) -> list[str]:
    return content.decode(errors="replace").splitlines(keepends=True)


def _contents(root: Path) -> Iterator[tuple[Path, bytes]]:
    for path in python_files(root):
        yield path, path.read_bytes()


def _migrate(path: Path, content: bytes, report: Report) -> None:
    import libcst

    from .rewrite import rewrite

    try:
        after, findings = rewrite(content)
    except libcst.ParserSyntaxError as error:
        report.failed.append((path, error.raw_line, f"does not parse: {error.message}"))
        return
    except (SyntaxError, UnicodeDecodeError, LookupError) as error:  # its encoding
        report.failed.append((path, 1, f"cannot be read: {error}"))
        return
    report.left += [(path, line, text) for line, text in findings.left]
    if after != content:
        report.changes.append(Change(path, content, after, tuple(findings.changed)))
