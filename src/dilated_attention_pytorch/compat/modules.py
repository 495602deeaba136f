"""Modules made from the table: each name becomes what replaces it when it is first asked for."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from . import KEPT, PACKAGE
from .resolve import resolve
from .table import load
from .warning import warn

MADE: set[tuple[str, str]] = set()
"""(module, name) of old names made so far, which then are attributes of their modules."""


class OldModule(ModuleType):
    """A module of an earlier library: its names are made, with one warning each, on first use."""

    def __getattr__(self, name: str) -> Any:
        module, kept = _below(self.__name__)
        entry = load().by_path.get((module, name))
        if entry is None:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = self.__dict__[name] = resolve(entry) if kept else _made(module, name)
        return value

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self.__all__})


class CallableModule(OldModule):
    """An old module whose name is a function of ours too: calling it calls the function."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__wrapped__(*args, **kwargs)


class OldNameLoader(Loader):
    """Makes the modules of the table, and single names of packages that still exist."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """An empty old module; a callable one where its name is a function of the package."""
        below, kept = _below(spec.name)
        if below and below not in load().modules:
            return ModuleType(spec.name)
        function = None if kept else _function(below)
        if function is None:
            return OldModule(spec.name)
        made = CallableModule(spec.name)
        made.__dict__["__wrapped__"] = function  # also gives help() and inspect the function's signature
        return made

    def exec_module(self, module: ModuleType) -> None:
        """Say which names there are; nothing is made yet."""
        below, _ = _below(module.__name__)
        table = load()
        if isinstance(module, OldModule):
            module.__doc__ = f"Old names of {module.__name__}, made from the table of {PACKAGE}.compat."
            module.__dict__["__all__"] = list(table.names_in(below))
            return
        # An old name in a package that exists: `from package import name` finds it among the modules.
        parent, _, name = below.rpartition(".")
        sys.modules[module.__name__] = _made(parent, name)


def spec_of(fullname: str) -> ModuleSpec | None:
    """The spec of an old module, or of an old name in a real package; None for what nothing ever had."""
    below, kept = _below(fullname)
    table = load()
    if below in table.modules or (kept and not below):
        is_package = not below or any(other.startswith(below + ".") for other in table.modules)
        return ModuleSpec(fullname, OldNameLoader(), origin="compat", is_package=is_package)
    parent, _, name = below.rpartition(".")
    if parent and not kept and (parent, name) in table.by_path:
        return ModuleSpec(fullname, OldNameLoader(), origin="compat")
    return None


def _below(fullname: str) -> tuple[str, bool]:
    """The path below the package of an old module, and whether it was asked for as kept, without a warning."""
    for prefix, kept in ((KEPT, True), (PACKAGE, False)):
        if fullname == prefix or fullname.startswith(prefix + "."):
            return fullname[len(prefix) + 1 :], kept
    return fullname, False


def top_level_name(name: str) -> Any:
    """An old name of the package itself, remembered as its attribute."""
    if ("", name) not in load().by_path:
        raise AttributeError(f"module {PACKAGE!r} has no attribute {name!r}")
    value = _made("", name)
    setattr(sys.modules[PACKAGE], name, value)
    return value


def _function(below: str) -> Any:
    """The public function of the package that has the name of an old module, if any."""
    package = import_module(PACKAGE)
    found = package.__dict__.get(below)
    if callable(found):
        return getattr(found, "__wrapped__", found) if isinstance(found, CallableModule) else found
    return None


def _made(module: str, name: str) -> Any:
    """What replaces a name; warns where it was imported or read."""
    entry = load().by_path[module, name]
    value = resolve(entry)
    MADE.add((module, name))
    warn(entry.message(module), DeprecationWarning)
    return value
