"""Old names that nothing replaces: they can be imported, and say what to do when they are used."""

from __future__ import annotations

from typing import Any

from .table import OldName


class RefusedError(NotImplementedError):
    """An old name that has no replacement was used."""


class Refused:
    """What such a name is: using it in any way raises."""

    entry: OldName

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Calling it, as a class or as a function."""
        raise RefusedError(refusal(cls.entry))

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Deriving from it."""
        if "entry" not in cls.__dict__:
            raise RefusedError(refusal(cls.entry))
        super().__init_subclass__(**kwargs)


def refusal(entry: OldName) -> str:
    """What the error says."""
    return f"{entry.name} has no replacement, because {entry.verdict}; use {entry.use}"


def refused_class(entry: OldName) -> type[Refused]:
    """A class that raises when it is called or derived from."""
    return type(entry.name, (Refused,), {"entry": entry, "__module__": entry.paths[0], "__doc__": refusal(entry)})
