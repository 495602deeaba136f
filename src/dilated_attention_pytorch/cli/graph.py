"""``dilated-attention graph``: what imports what, in this package or in a code base that used the old ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .errors import one_line_errors


def graph(
    path: Annotated[
        Path | None, typer.Argument(help="A file or folder of your code; without it, this package.", show_default=False)
    ] = None,
    svg: Annotated[Path | None, typer.Option(help="Also draw the graph as this SVG.", show_default=False)] = None,
) -> None:
    """Show the graph of imports: which part of this package imports which, or which of your files use old names.

    Numbers are files (of this package) or imports (of an old name).
    """
    with one_line_errors():
        if svg is not None and svg.suffix != ".svg":
            raise ValueError(f"--svg is {str(svg)!r}; the picture is an SVG, give a name that ends in .svg")
        from rich.console import Console
        from rich.table import Table

        from ..compat.graph import OldNames, as_svg, old_names_of, package_edges
        from ..training.files import replace_file

        found: OldNames | None = None
        if path is None:
            edges = package_edges(Path(__file__).parents[1])
            title, columns = "imports of dilated_attention_pytorch", ("part", "imports")
        else:
            found = old_names_of(path)
            edges = found.edges
            title, columns = f"old names in {path}", ("file", "uses")
        table = Table(*columns, title=title)
        for source, targets in edges.items():
            listed = ", ".join(f"{target} {count}" for target, count in sorted(targets.items()))
            table.add_row(source, listed or "nothing")
        if edges:
            Console().print(table)
        if found is not None:
            for file, line, text in found.failed:
                typer.echo(f"{file}:{line}: does not parse: {text}")
            for file, line, name in found.unknown:
                typer.echo(f"{file}:{line}: unknown name {name}: neither this package nor an earlier one has it")
            names = {target for targets in edges.values() for target in targets}
            typer.echo(f"{len(edges)} files use {len(names)} old names")
        if svg is not None:
            replace_file(svg, [as_svg(edges, title=title).encode()])
            typer.echo(f"wrote {svg}")
