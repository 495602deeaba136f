"""Where the sequence lives: sharded over ranks, or streamed through one device."""

from .context import ContextParallel

__all__ = ["ContextParallel"]
