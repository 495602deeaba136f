"""What an adaptive pool can be made of: how sizes are rounded, how memory is kept, where host memory lies."""

from .bucketing import Bucketing
from .fragmentation import Arena, Fragmentation
from .numa import Numa

__all__ = ["Arena", "Bucketing", "Fragmentation", "Numa"]
