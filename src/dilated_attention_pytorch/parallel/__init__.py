"""Where the sequence lives: sharded over ranks, or streamed through one device."""

from .context import ContextParallel
from .cost import Rates
from .errors import ConfigurationMismatch, PeerFailed
from .streaming import Streaming

__all__ = ["ConfigurationMismatch", "ContextParallel", "PeerFailed", "Rates", "Streaming", "check_parallel"]


def check_parallel(parallel: object) -> None:
    """Raise ValueError for what is no value of the operator's ``parallel``."""
    if parallel is not None and not isinstance(parallel, (ContextParallel, Streaming)):
        raise ValueError(
            f"parallel is {parallel!r}; give ContextParallel(mesh) for a sequence sharded over ranks, "
            "Streaming(device, memory_budget=...) for one in host memory, or None"
        )
