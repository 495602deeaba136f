"""From a record of the table to the object that the old name is now."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from functools import cache
from typing import Any

from .table import OldName, load

_CLASSES = {
    "attention": ("attention", "OldAttention"),
    "hilbert_attention": ("attention", "OldAttention"),
    "full": ("attention", "FullAttention"),
    "dynamic": ("attention", "DynamicAttention"),
    "base": ("attention", "OldBase"),
    "multihead": ("multihead", "OldMultihead"),
    "dynamic_multihead": ("multihead", "DynamicMultihead"),
    "self": ("multihead", "OldSelfAttention"),
    "hilbert_self": ("multihead", "OldSelfAttention"),
    "sparse": ("sparse", "OldSparse"),
    "sparse_hierarchical": ("sparse", "OldSparse"),
    "sparse_adaptive": ("sparse", "OldSparse"),
    "sparse_multihead": ("sparse", "OldSparseMultihead"),
    "longnet": ("models", "OldLongNet"),
    "longnet_lm": ("models", "OldLongNetLM"),
    "encoder_layer": ("models", "OldEncoderLayer"),
    "decoder_layer": ("models", "OldDecoderLayer"),
    "pool": ("pools", "OldPool"),
    "cache": ("caches", "OldCache"),
}
"""Kind of a record -> module of compat and class that the old class is made from."""


@cache
def resolve(entry: OldName) -> Any:
    """The class, function or value of an old name; the same object each time."""
    if entry.kind == "record":
        from .records import record_class

        return record_class(entry)
    if entry.kind == "enum":
        from .records import enum_class

        return enum_class(entry)
    if entry.kind == "refused":
        from .refused import refused_class

        return refused_class(entry)
    if entry.kind == "constant":
        return _constant(json.loads(entry.values))
    if entry.kind == "factory":
        from .factories import factory_function

        return factory_function(entry)
    module, name = _CLASSES[entry.kind]
    base = getattr(importlib.import_module(f"{__package__}.{module}"), name)
    documentation = f"Old name: use {entry.use}. {entry.computed}"
    return type(entry.name, (base,), {"entry": entry, "__module__": entry.paths[0], "__doc__": documentation})


def old(name: str, module: str | None = None) -> Any:
    """An old name without a warning, for other old names that are made of it; from ``module`` or any."""
    table = load()
    if module is not None:
        return resolve(table.by_path[module, name])
    entry = next(entry for entry in table.names if entry.name == name and entry.kind != "refused")
    return resolve(entry)


def _constant(value: Any) -> Any:
    """A value as the table writes it; "spec:x" is whether x is installed, "version:x" which."""
    kind, _, package = value.partition(":") if isinstance(value, str) else ("", "", "")
    if kind == "spec":
        return importlib.util.find_spec(package) is not None
    if kind == "version":
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None
    return value
