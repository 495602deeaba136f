"""Patterns as text, so that they pass through operators whose arguments are numbers, text and tensors."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor

_CLASSES: dict[str, type] = {}


def register(pattern: type) -> type:
    """Let `decode` know a dataclass of integers, text, tuples and other patterns (a class decorator)."""
    _CLASSES[pattern.__name__] = pattern
    return pattern


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):  # goes beside the code, see `union.bind`
        return None
    if is_dataclass(value) and not isinstance(value, type):
        return {type(value).__name__: {f.name: _plain(getattr(value, f.name)) for f in fields(value) if f.init}}
    return [_plain(entry) for entry in value] if isinstance(value, tuple) else value


def _rebuilt(value: Any) -> Any:
    if isinstance(value, dict):
        ((name, given),) = value.items()
        return _CLASSES[name](**{field: _rebuilt(entry) for field, entry in given.items()})
    return tuple(_rebuilt(entry) for entry in value) if isinstance(value, list) else value


def encode(pattern: Any) -> str:
    """Text for a pattern; equal patterns have equal text."""
    return json.dumps(_plain(pattern))


@lru_cache(maxsize=256)
def decode(code: str) -> Any:
    """The pattern that `encode` made the text from."""
    return _rebuilt(json.loads(code))


def attach(pattern: Any) -> None:
    """Set ``pattern.code`` once: torch.compile can read an attribute, but not trace the making of JSON."""
    object.__setattr__(pattern, "code", encode(pattern))
