"""Old caches of index tensors: a dictionary that forgets what was not used for longest."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, ClassVar

from .arguments import bind
from .table import OldName

_SIZES = ("max_size", "max_patterns", "max_cpu_patterns", "max_gpu_patterns", "max_cache_size")


class OldCache(OrderedDict[Any, Any]):
    """An old cache for code that keeps things of its own in it; nothing of this package reads or fills it."""

    entry: ClassVar[OldName]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        given = bind(self.entry, args, kwargs)
        sizes = {name: size for name in _SIZES if (size := given.take(name)) is not None}
        asked = [size for name, size in sizes.items() if name in given.explicit]
        self.max_size = max(asked or sizes.values(), default=100)
        self.hits = self.misses = 0

    def get(self, key: Any, *args: Any) -> Any:
        """The value of a key; a function among the further arguments makes it where there is none."""
        if key in self:
            self.hits += 1
            self.move_to_end(key)
            return self[key]
        self.misses += 1
        makers: list[Callable[[], Any]] = [arg for arg in args if callable(arg)]
        if not makers:
            return args[0] if args else None
        value = makers[0]()
        self.put(key, value)
        return value

    def put(self, key: Any, value: Any, *args: Any, **kwargs: Any) -> None:
        """Keep a value, and forget the one not used for longest where there are too many."""
        self[key] = value
        self.move_to_end(key)
        while len(self) > self.max_size:
            self.popitem(last=False)

    def get_stats(self) -> dict[str, int]:
        """Hits, misses and size."""
        return {"hits": self.hits, "misses": self.misses, "size": len(self)}

    def reset_stats(self) -> None:
        """Count from 0 again."""
        self.hits = self.misses = 0
