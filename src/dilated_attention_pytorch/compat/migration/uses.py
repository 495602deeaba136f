"""Which old names a file uses, from its syntax tree; nothing is imported or run."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module, util
from pathlib import Path

from .. import PACKAGE
from ..modules import MADE, OldModule
from ..table import Table, load

_ROOT = re.compile(rf"(?:src\.)?{PACKAGE}(?:\.(.+))?")
_SKIPPED = {".git", ".venv", "venv", "node_modules", "__pycache__", ".tox", ".mypy_cache", "build", "dist"}


@dataclass(frozen=True, order=True)
class Use:
    """One use of an old name."""

    line: int
    module: str
    """Below the package, "" for the package itself."""
    name: str
    """"" for the module alone, "*" for all of its names."""
    local: str
    """What it is called in the file."""


def python_files(root: Path) -> list[Path]:
    """Python files at or below ``root``, sorted; without those of environments and builds.

    Raises:
        ValueError: there is nothing at ``root``.
    """
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise ValueError(f"PATH is {str(root)!r}; give a Python file or a folder of them")
    below = (path for path in root.rglob("*.py") if not _SKIPPED & set(path.relative_to(root).parts[:-1]))
    return sorted(path for path in below if path.is_file())


def below_package(dotted: str | None) -> str | None:
    """The part of a module's path below the package, "" for the package; None for modules of others."""
    match = _ROOT.fullmatch(dotted or "")
    return None if match is None else (match[1] or "")


@cache
def is_old_module(below: str) -> bool:
    """Whether a module is one that only the table has."""
    if not below or below not in load().modules:
        return False
    try:
        found = util.find_spec(f"{PACKAGE}.{below}")
    except ModuleNotFoundError:
        return True
    return found is None or found.origin == "compat"


def is_real_name(below: str, name: str) -> bool:
    """Whether a module that exists (the package itself, say) has a name of its own."""
    module = import_module(f"{PACKAGE}.{below}" if below else PACKAGE)
    made = (below, name) in MADE or type(module.__dict__.get(name)) is OldModule
    return name in module.__dict__ and not made


def uses_in(source: str | bytes) -> list[Use]:
    """Old names that a source imports, in order of lines.

    Raises:
        SyntaxError: it does not parse.

    >>> uses_in("from dilated_attention_pytorch.long_net import LongNet as Net")
    [Use(line=1, module='long_net', name='LongNet', local='Net')]
    """
    table = load()
    return sorted(use for node in ast.walk(ast.parse(source)) for use in _uses(node, table))


def _uses(node: ast.AST, table: Table) -> Iterator[Use]:
    if isinstance(node, ast.ImportFrom) and not node.level and (below := below_package(node.module)) is not None:
        old_module = is_old_module(below)
        for alias in node.names:
            local = alias.asname or alias.name
            submodule = f"{below}.{alias.name}".strip(".")
            if alias.name == "*":
                if old_module:
                    yield Use(node.lineno, below, "*", "*")
            elif (below, alias.name) in table.by_path and (old_module or not is_real_name(below, alias.name)):
                yield Use(node.lineno, below, alias.name, local)
            elif is_old_module(submodule) and not is_real_name(below, alias.name):
                yield Use(node.lineno, submodule, "", local)
            elif old_module:
                yield Use(node.lineno, below, alias.name, local)
    elif isinstance(node, ast.Import):
        for alias in node.names:
            below = below_package(alias.name)
            if below and is_old_module(below):
                yield Use(node.lineno, below, "", alias.asname or alias.name)
