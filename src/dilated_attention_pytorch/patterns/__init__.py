"""Who attends to whom: frozen patterns, and their translation into plans of integers."""

from .block_list import BlockList
from .block_sparse import DilatedBlocks, GlobalLocal, Hierarchical, LocalWindow, RandomBlocks
from .content import ContentTopK
from .dilated import DilatedPattern
from .presets import get_pattern
from .union import Union

__all__ = [
    "BlockList",
    "ContentTopK",
    "DilatedBlocks",
    "DilatedPattern",
    "GlobalLocal",
    "Hierarchical",
    "LocalWindow",
    "RandomBlocks",
    "Union",
    "get_pattern",
]
