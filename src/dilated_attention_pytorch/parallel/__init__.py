"""Where the sequence lives: sharded over ranks, or streamed through one device."""

from .context import ContextParallel
from .cost import Rates
from .errors import ConfigurationMismatch, PeerFailed
from .streaming import Streaming

__all__ = ["ConfigurationMismatch", "ContextParallel", "PeerFailed", "Rates", "Streaming"]
