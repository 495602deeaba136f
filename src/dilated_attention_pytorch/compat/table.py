"""The table of old names: records read from ``names/*.toml``, and indices by path."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib import import_module, resources
from typing import Any

from . import PACKAGE

TOP_LEVEL = "."
"""How the table writes the package itself."""
_STILL_THERE = ("", "kernels", "models", "sparse")
"""Old modules whose paths exist today."""


class Required:
    """The default of an argument that has none."""


@dataclass(frozen=True, kw_only=True)
class Signature:
    """Arguments of an old callable: positional ones with defaults, later or earlier keywords, and whether more go."""

    defaults: dict[str, Any] = field(default_factory=dict)
    keywords: tuple[str, ...] = ()
    takes_more: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Every argument that has a name."""
        return (*self.defaults, *self.keywords)


@dataclass(frozen=True, kw_only=True)
class OldName:
    """One old name: where it was, what it was, and what replaces it."""

    name: str
    modules: tuple[str, ...]
    """Paths below the package, "" for the package itself."""
    homes: tuple[str, ...] = ()
    """Those that defined it; the others imported it from there."""
    kind: str
    """Which adapter makes it, see `resolve`."""
    group: str
    use: str = ""
    """The new spelling."""
    computed: str = ""
    changes: str = ""
    """Why its numbers change; empty where they do not."""
    verdict: str = ""
    differed: str = ""
    returns: str = "tensor"
    arguments: str = ""
    call: str = ""
    values: str = ""
    alias_of: str = ""

    @property
    def paths(self) -> tuple[str, ...]:
        """Full paths of the modules that had it."""
        return tuple(path_of(module) for module in self.modules)

    def signature(self) -> Signature:
        """Arguments of the constructor or function."""
        return parse_signature(self.arguments)

    def call_signature(self) -> Signature:
        """Arguments of ``forward``."""
        return parse_signature(self.call)

    def message(self, module: str) -> str:
        """What the deprecation warning of the name, imported from ``module``, says."""
        text = f"{path_of(module)}.{self.name} is deprecated: use {self.use}."
        return f"{text} Numbers change: {self.changes}." if self.changes else text


@dataclass(frozen=True)
class Table:
    """All old names."""

    names: tuple[OldName, ...]
    by_path: dict[tuple[str, str], OldName]
    """(module below the package, name) -> record."""
    modules: frozenset[str]
    """Old modules and the packages above them, below the package."""

    def names_in(self, module: str) -> tuple[str, ...]:
        """Old names of one module, sorted."""
        return tuple(sorted(name for where, name in self.by_path if where == module))


def path_of(module: str) -> str:
    """The full path of a module below the package."""
    return f"{PACKAGE}.{module}" if module else PACKAGE


@lru_cache
def parse_signature(text: str) -> Signature:
    """``"a b=1 c= | d **"``: a has no default, b has 1, c None, d is a keyword of another version; ** takes more."""
    defaults: dict[str, Any] = {}
    keywords: list[str] = []
    positional, takes_more = True, False
    for word in text.split():
        name, equals, value = word.partition("=")
        if word == "|":
            positional = False
        elif word == "**":
            takes_more = True
        elif not positional:
            keywords.append(name)
        else:
            defaults[name] = (json.loads(value) if value else None) if equals else Required
    return Signature(defaults=defaults, keywords=tuple(keywords), takes_more=takes_more)


@lru_cache(maxsize=1)
def load() -> Table:
    """Read the table, once."""
    files = resources.files(__package__).joinpath("names")
    groups = tomllib.loads(files.joinpath("groups.toml").read_text(encoding="utf-8"))
    names: list[OldName] = []
    for file in sorted(files.iterdir(), key=lambda file: file.name):
        if not file.name.endswith(".toml") or file.name in ("groups.toml", "arguments.toml"):
            continue
        content = tomllib.loads(file.read_text(encoding="utf-8"))
        for row in content.get("old", ()):
            group = {key: value for key, value in groups[row["group"]].items() if key != "title"}
            home, _, others = row["modules"].partition("|")
            where = {"homes": _modules(home), "modules": _modules(home) + _modules(others)}
            names.append(OldName(**{**group, **row, **where}))
        for group_name, rows in content.get("refused", {}).items():
            names += _short_rows(rows, "refused", group_name, groups[group_name])
        values = content.get("values", {})
        for row in _short_rows(content.get("constants", {}), "constant", "constants", groups["constants"]):
            names.append(replace(row, values=json.dumps(values[row.name])))
    names = [row for row in map(_without_own, names) if row.modules]
    by_path = {(module, row.name): row for row in names for module in row.modules}
    modules = {module for module, _ in by_path}
    above = {module.rpartition(".")[0] for module in modules} | {module.split(".")[0] for module in modules}
    return Table(tuple(names), by_path, frozenset((modules | above) - {""}))


def _without_own(row: OldName) -> OldName:
    """The record without the modules that exist and have a name of their own, which is not old there."""
    kept = tuple(module for module in row.modules if row.name not in _own_names(module))
    return row if kept == row.modules else replace(row, modules=kept)


@lru_cache
def _own_names(module: str) -> frozenset[str]:
    if module not in _STILL_THERE:
        return frozenset()
    return frozenset(getattr(import_module(path_of(module)), "__all__", ()))


def _modules(text: str) -> tuple[str, ...]:
    return tuple("" if module == TOP_LEVEL else module for module in text.split())


def _short_rows(rows: dict[str, str], kind: str, group_name: str, group: dict[str, str]) -> list[OldName]:
    """Rows "modules" = "names", one record a name."""
    where: dict[str, list[str]] = {}
    for modules, names in rows.items():
        for name in names.split():
            where.setdefault(name, []).extend(_modules(modules))
    texts: dict[str, Any] = {key: value for key, value in group.items() if key != "title"}
    return [
        OldName(name=name, modules=tuple(modules), kind=kind, group=group_name, **texts)
        for name, modules in where.items()
    ]


@lru_cache(maxsize=1)
def ignored_arguments() -> dict[str, str]:
    """Old arguments without a meaning here -> why, and what to do instead."""
    file = resources.files(__package__).joinpath("names", "arguments.toml")
    rows = tomllib.loads(file.read_text(encoding="utf-8"))["ignored"]
    return {name: reason for reason, names in rows.items() for name in names.split()}
