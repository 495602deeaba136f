"""Who attends to whom: frozen patterns, and their translation into plans of integers."""

from .dilated import DilatedPattern

__all__ = ["DilatedPattern"]
