"""Old import paths and names keep working: one table of them, and a finder that makes their modules when asked.

`install` puts a finder behind all others, so a module that exists always wins. Neither the table nor anything that it
names is loaded before the first import of an old name.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PACKAGE = __name__.rpartition(".")[0]
KEPT = __name__ + ".old"
"""Below this, old modules can be imported on purpose, without a warning: what `migrate` leaves undecided goes there."""
_PREFIX = PACKAGE + "."


class OldNameFinder(MetaPathFinder):
    """Finds the modules that earlier libraries of this name had, after every real finder has failed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of an old module (or of an old name in a package that still exists), else None."""
        if not fullname.startswith(_PREFIX):
            return None
        from .modules import spec_of

        return spec_of(fullname)


def install() -> None:
    """Make old paths importable (once, however often it is called)."""
    if not any(type(finder).__qualname__ == OldNameFinder.__qualname__ for finder in sys.meta_path):
        sys.meta_path.append(OldNameFinder())
    # The functions of block-sparse attention may live in a module where a package of old modules was.
    sparse = sys.modules.get(_PREFIX + "sparse")
    if sparse is not None and not hasattr(sparse, "__path__"):
        sparse.__path__ = []


def old_name(name: str) -> Any:
    """What an old name of the package itself, say ``ImprovedDilatedAttention``, is now; warns.

    Raises:
        AttributeError: nothing ever had that name.
    """
    if not name.startswith("_"):
        from .modules import top_level_name

        return top_level_name(name)
    raise AttributeError(f"module {PACKAGE!r} has no attribute {name!r}")
