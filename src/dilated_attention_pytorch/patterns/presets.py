"""Block-sparse patterns by the name of their source."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .block_sparse import GlobalLocal, Hierarchical, LocalWindow, RandomBlocks
from .content import ContentTopK
from .union import Union


def _longformer(*, window: int = 256, num_global_tokens: int = 1, block_size: int = 64) -> GlobalLocal:
    return GlobalLocal(window, num_global_tokens, block_size=block_size)


def _bigbird(
    *, block_size: int = 64, window_blocks: int = 1, global_blocks: int = 2, random_blocks: int = 3, seed: int = 0
) -> Union:
    near = GlobalLocal(window_blocks * block_size, global_blocks * block_size, block_size=block_size)
    return Union((near, RandomBlocks(random_blocks, seed, block_size)))


def _local(*, window: int = 1024, block_size: int = 128) -> LocalWindow:
    return LocalWindow(window, block_size)


def _hierarchical(*, window: int = 1024, ratio: int = 8, num_levels: int = 3, block_size: int = 128) -> Hierarchical:
    levels = tuple((window * ratio**level, block_size * ratio**level) for level in range(num_levels))
    return Hierarchical(levels, block_size)


def _moba(*, keep: int = 8, block_size: int = 128, **options: Any) -> ContentTopK:
    return ContentTopK(keep, block_size=block_size, **options)


_MAKERS: dict[str, Callable[..., Any]] = {
    "longformer": _longformer,
    "bigbird": _bigbird,
    "local": _local,
    "hierarchical": _hierarchical,
    "moba": _moba,
}


def get_pattern(name: str, **parameters: Any) -> Any:
    """A block-sparse pattern by name, with the parameters of its source unless others are given.

    - ``"longformer"`` (arXiv 2004.05150, section 3.1): window of 512 tokens, 256 on each side, and a global token at
      the start; ``window``, ``num_global_tokens``, ``block_size``.
    - ``"bigbird"`` (arXiv 2007.14062, appendix E.1, the ITC base model): blocks of 64, a window of 3 blocks, 2 global
      and 3 random blocks; ``block_size``, ``window_blocks`` (a side), ``global_blocks``, ``random_blocks``, ``seed``.
    - ``"local"`` (arXiv 2004.05150): ``window`` tokens (1024) on each side, ``block_size``.
    - ``"hierarchical"`` (strided attention, arXiv 1904.10509, at several scales): ``num_levels`` (3) windows, each
      ``ratio`` (8) times as wide and as coarse as the one before; ``window``, ``ratio``, ``num_levels``,
      ``block_size``.
    - ``"moba"`` (arXiv 2502.13189, section 2.2): mean pooling. Its 3 blocks of 512, the own one among them, are
      2 x 4 selected blocks of 128; ``keep``, ``block_size``, and the other fields of `ContentTopK`.

    Raises:
        ValueError: a name or a parameter that does not exist.

    >>> get_pattern("longformer", window=512)
    GlobalLocal(window=512, num_global_tokens=1, global_indices=(), block_size=64)
    """
    if name not in _MAKERS:
        raise ValueError(f"name is {name!r}; choose one of {', '.join(map(repr, _MAKERS))}")
    try:
        return _MAKERS[name](**parameters)
    except TypeError as error:
        raise ValueError(f"get_pattern({name!r}): {error}; its docstring lists the parameters") from None
