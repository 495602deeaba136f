"""``dilated-attention migrate``: old imports and constructor calls of a code base, found and rewritten."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .errors import one_line_errors

LEFT = 3
"""Exit code where something is left to do."""


def migrate(
    path: Annotated[Path, typer.Argument(help="A Python file, or a folder of them.", show_default=False)],
    write: Annotated[
        bool, typer.Option("--write", help="Rewrite the files; else only show what would change.")
    ] = False,
) -> None:
    """Rewrite imports and constructor calls of earlier libraries of this name, fkodom's and its successor's.

    Prints a diff of every file that changes, then what a person has to decide, with file and line. What cannot be
    decided keeps working: it is imported from dilated_attention_pytorch.compat.old, without a warning.

    Exit codes: 0 nothing is left, 3 something is: changes not written, calls to decide, files that do not parse.

    Needs libcst.
    """
    import importlib.util

    with one_line_errors():
        if importlib.util.find_spec("libcst") is None:
            raise ValueError("libcst is not installed; run: pip install libcst")
        from ..compat.migration import migrate_tree
        from ..compat.migration.files import write as write_changes

        report = migrate_tree(path)
        for change in report.changes:
            typer.echo(change.diff(), nl=False)
            for line, text in change.notes:
                typer.echo(f"{change.path}:{line}: {text}")
        if write:
            write_changes(report)
        for file, line, text in (*report.failed, *report.left):
            typer.echo(f"{file}:{line}: to decide: {text}")
        verb = "rewrote" if write else "would rewrite"
        typer.echo(
            f"{report.files} files read: {verb} {len(report.changes)}, {len(report.left)} places to decide, "
            f"{len(report.failed)} files that do not parse"
        )
    if report.left or report.failed or (report.changes and not write):
        raise typer.Exit(LEFT)
