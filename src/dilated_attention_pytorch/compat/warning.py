"""Warnings that point at the code that used an old name, not at the code that made it work."""

from __future__ import annotations

import sys
import warnings

from . import PACKAGE

_BETWEEN = ("torch.nn.modules.module",)


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the nearest frame outside of compat (and outside of the import machinery and of module calls)."""
    depth, frame = 1, sys._getframe(0)
    while frame.f_back is not None:
        # warnings itself leaves out the frames of the import machinery.
        depth += not _imports(frame.f_code.co_filename)
        frame = frame.f_back
        name = frame.f_globals.get("__name__", "")
        inside = name == PACKAGE or name.startswith(PACKAGE + ".compat") or name in _BETWEEN
        if not inside and not _imports(frame.f_code.co_filename):
            break
    warnings.warn(message, category, stacklevel=depth)


def _imports(filename: str) -> bool:
    return "importlib" in filename and "_bootstrap" in filename
