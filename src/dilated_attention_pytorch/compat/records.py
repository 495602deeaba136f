"""Old settings objects: plain records with the old fields and defaults, which old constructors take apart."""

from __future__ import annotations

import copy
from enum import Enum
from typing import Any

from .table import OldName, Required, Signature


class Record:
    """Fields of an old dataclass; `signature` says which."""

    signature = Signature()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        name, order = type(self).__name__, list(self.signature.defaults)
        if len(args) > len(order):
            raise TypeError(f"{name} has {len(order)} fields ({', '.join(order)}), {len(args)} values were given")
        values = dict(zip(order, args, strict=False))
        for key, value in kwargs.items():
            if key in values or key not in order:
                reason = "was given twice" if key in values else f"is no field; it has {', '.join(order)}"
                raise TypeError(f"{name}: {key} {reason}")
            values[key] = value
        for key, default in self.signature.defaults.items():
            if key not in values:
                if default is Required:
                    raise TypeError(f"{name} needs {key}; give it")
                values[key] = copy.copy(default)
            setattr(self, key, values[key])
        self._check()

    def _check(self) -> None:
        lengths, rates = getattr(self, "segment_lengths", None), getattr(self, "dilation_rates", None)
        if lengths is not None and rates is not None and len(lengths) != len(rates):
            raise ValueError(
                f"dilation_rates has {len(rates)} entries, segment_lengths has {len(lengths)}; give one rate a "
                "segment length"
            )
        for name, low, high in (("dropout", 0.0, 1.0), ("sparsity_ratio", 0.0, 1.0)):
            value = getattr(self, name, None)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name} is {value!r}; give a number from {low} to {high}")

    def to_dict(self) -> dict[str, Any]:
        """Fields and values."""
        return dict(vars(self))

    @property
    def num_groups(self) -> int:
        """Number of branches, where there are any."""
        return len(self.segment_lengths)

    @property
    def max_segment_length(self) -> int:
        """The longest segment, where there are any."""
        return max(self.segment_lengths)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"{type(self).__name__} has no field {name!r}; it has {', '.join(self.signature.defaults)}"
        )

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]  # its fields can be set

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"


def record_class(entry: OldName) -> type[Record]:
    """The record of an old dataclass."""
    body = {"signature": entry.signature(), "__module__": entry.paths[0], "__doc__": f"Old settings: use {entry.use}."}
    return type(entry.name, (Record,), body)


def enum_class(entry: OldName) -> type[Enum]:
    """The old enumeration, whose members are equal to their names in small letters."""
    members = {member.upper(): member for member in entry.values.split()}
    make: Any = Enum  # its functional form makes a class; mypy wants the name as a literal
    made: type[Enum] = make(entry.name, members, module=entry.paths[0])
    return made
