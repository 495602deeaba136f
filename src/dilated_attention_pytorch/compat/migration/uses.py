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
    table, tree = load(), ast.parse(source)
    return sorted({use for node in ast.walk(tree) for use in _uses(node, table)} | set(_through_package(tree, table)))


def unknown_in(source: str | bytes) -> list[tuple[int, str]]:
    """(line, path) of what a source imports by this package's name and neither it nor an earlier library has.

    Modules that need something that is not installed here count as having every name.

    Raises:
        SyntaxError: it does not parse.

    >>> unknown_in("from dilated_attention_pytorch import dilated_attention, dilated_attentoin")
    [(1, 'dilated_attention_pytorch.dilated_attentoin')]
    """
    return sorted({found for node in ast.walk(ast.parse(source)) for found in _unknown(node)})


def only_listed(source: bytes) -> list[tuple[int, str]]:
    """What stays as it is: names that nothing has, and old ones that are not imported but read from the package."""
    found = [
        (line, f"unknown name {path}: neither this package nor an earlier one has it")
        for line, path in unknown_in(source)
    ]
    for use in uses_in(source):
        if not use.module and use.local == f"{use.local.split('.')[0]}.{use.name}":
            entry = load().by_path["", use.name]
            found.append((use.line, f"{use.local} is an old name read from the package: use {entry.use}"))
    return found


def _unknown(node: ast.AST) -> Iterator[tuple[int, str]]:
    if isinstance(node, ast.ImportFrom) and not node.level and (below := below_package(node.module)) is not None:
        for alias in node.names:
            exists = _module_exists(below) if alias.name == "*" else _exists(below, alias.name)
            if not exists:
                yield node.lineno, ".".join(part for part in (PACKAGE, below, alias.name.strip("*")) if part)
    elif isinstance(node, ast.Import):
        for alias in node.names:
            if (below := below_package(alias.name)) and not _module_exists(below):
                yield node.lineno, f"{PACKAGE}.{below}"


@cache
def _module_exists(below: str) -> bool:
    try:
        return not below or is_old_module(below) or util.find_spec(f"{PACKAGE}.{below}") is not None
    except ModuleNotFoundError:
        return False


def _exists(below: str, name: str) -> bool:
    if (below, name) in load().by_path or _module_exists(f"{below}.{name}".strip(".")):
        return True
    if is_old_module(below) or not _module_exists(below):
        return False
    try:
        return is_real_name(below, name)
    except ImportError:
        return True


def _through_package(tree: ast.AST, table: Table) -> Iterator[Use]:
    """Old names of the package itself, used as its attributes: ``package.OldName``."""
    local = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name == PACKAGE
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in local:
            path = f"{node.value.id}.{node.attr}"
            if ("", node.attr) in table.by_path and not is_real_name("", node.attr):
                yield Use(node.lineno, "", node.attr, path)


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
    elif isinstance(node, ast.Import):
        for alias in node.names:
            below = below_package(alias.name)
            if below and is_old_module(below):
                yield Use(node.lineno, below, "", alias.asname or alias.name)
