"""What imports what, read from sources: parts of this package, or the old names that files of a code base use."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from . import PACKAGE
from .migration.uses import python_files, unknown_in, uses_in

Edges = dict[str, dict[str, int]]
"""From whom -> to whom -> how often."""

_CELL, _GAP, _LETTER, _LEFT = 30, 260, 7.2, 20


def package_edges(root: Path, *, package: str = PACKAGE) -> Edges:
    """Which parts (modules and packages directly below ``root``, a package) import which, in files.

    >>> import dilated_attention_pytorch
    >>> edges = package_edges(Path(dilated_attention_pytorch.__file__).parent)
    >>> edges["functional"]["patterns"]
    1
    """
    edges: Edges = {}
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root).with_suffix("").parts
        module = inside[:-1] if inside[-1] == "__init__" else inside
        if not module:
            continue  # the package itself imports what it exports
        edges.setdefault(module[0], {})
        tree = ast.parse(path.read_bytes())
        targets = {
            part
            for node in ast.walk(tree)
            for part in _parts(node, (package, *inside[:-1]))
            if (root / part).is_dir() or (root / f"{part}.py").is_file()
        }
        for target in targets - {module[0]}:
            edges[module[0]][target] = edges[module[0]].get(target, 0) + 1
    return edges


def _parts(node: ast.AST, folder: tuple[str, ...]) -> Iterable[str]:
    """First parts below the package of what a statement in ``folder`` imports."""
    package = folder[0]
    if isinstance(node, ast.Import):
        names = [alias.name.split(".") for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        start = list(folder[: len(folder) - node.level + 1]) if node.level else []
        base = [*start, *(node.module.split(".") if node.module else ())]
        names = [[*base, alias.name] for alias in node.names]
    else:
        return []
    return {name[1] for name in names if len(name) > 1 and name[0] == package}


@dataclass(frozen=True)
class OldNames:
    """What a code base uses of earlier libraries."""

    edges: Edges
    """Files, from the root, to old names."""
    unknown: list[tuple[Path, int, str]]
    """What is imported by the package's name and neither it nor an earlier library has: file, line, path."""
    failed: list[tuple[Path, int, str]]
    """Files that do not parse: file, line, reason."""


def old_names_of(root: Path) -> OldNames:
    """Which files at or below ``root`` use which old names.

    Raises:
        ValueError: there is nothing at ``root``.
    """
    edges: Edges = {}
    unknown, failed = [], []
    for path in python_files(root):
        try:
            source = path.read_bytes()
            uses = uses_in(source)
            unknown += [(path, line, name) for line, name in unknown_in(source)]
        except (SyntaxError, ValueError) as error:
            failed.append((path, getattr(error, "lineno", None) or 1, str(getattr(error, "msg", error))))
            continue
        for use in uses:
            name = ".".join(part for part in (use.module, use.name) if part)
            found = edges.setdefault(str(path.relative_to(root) if path != root else path.name), {})
            found[name] = found.get(name, 0) + 1
    return OldNames(edges, unknown, failed)


def layers(edges: Mapping[str, Mapping[str, int]]) -> list[list[str]]:
    """Nodes in columns, importers left of what they import; parts that import each other share a column.

    >>> layers({"a": {"b": 1}, "b": {"c": 1}, "d": {"c": 1}})
    [['a'], ['b', 'd'], ['c']]
    """
    nodes = sorted({*edges, *(target for targets in edges.values() for target in targets)})
    depth = dict.fromkeys(nodes, 0)
    for _ in nodes:  # longest ways; a circle stops when every node has had its turn
        deeper = {
            node: max([0, *(depth[target] + 1 for target in edges.get(node, ()) if node not in edges.get(target, ()))])
            for node in nodes
        }
        if deeper == depth:
            break
        depth = {node: min(value, len(nodes)) for node, value in deeper.items()}
    columns = sorted(set(depth.values()), reverse=True)
    return [[node for node in nodes if depth[node] == column] for column in columns]


def as_svg(edges: Mapping[str, Mapping[str, int]], *, title: str) -> str:
    """The graph as a picture: boxes in columns, a line for every edge, thicker for more files."""
    columns = layers(edges)
    place: dict[str, tuple[float, float, float]] = {}
    x = float(_LEFT)
    for column in columns:
        width = max(len(node) for node in column) * _LETTER + 16
        for row, node in enumerate(column):
            place[node] = (x, 50.0 + row * (_CELL + 10), width)
        x += width + _GAP / max(len(columns) / 3, 1)
    height = 70 + max(map(len, columns), default=0) * (_CELL + 10)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{x:.0f}" height="{height}" viewBox="0 0 {x:.0f} {height}" '
        'font-family="sans-serif" font-size="12">',
        f"<title>{escape(title)}</title>",
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{_LEFT}" y="25" font-size="15">{escape(title)}</text>',
    ]
    for source, targets in edges.items():
        for target, count in sorted(targets.items()):
            (x1, y1, width), (x2, y2, _) = place[source], place[target]
            start, y1, y2 = x1 + width, y1 + _CELL / 2, y2 + _CELL / 2
            bend = max((x2 - start) / 2, 30)
            lines.append(
                f'<path d="M{start:.1f},{y1:.1f} C{start + bend:.1f},{y1:.1f} {x2 - bend:.1f},{y2:.1f} '
                f'{x2:.1f},{y2:.1f}" fill="none" stroke="#4477aa" stroke-opacity="0.5" '
                f'stroke-width="{min(1 + count / 3, 6):.1f}">'
                f"<title>{escape(f'{source} -> {target}: {count}')}</title></path>"
            )
    for node, (left, top, width) in place.items():
        lines += [
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{_CELL}" rx="5" fill="#eef3f8" '
            'stroke="#335577"/>',
            f'<text x="{left + 8:.1f}" y="{top + _CELL / 2 + 4:.1f}">{escape(node)}</text>',
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"
