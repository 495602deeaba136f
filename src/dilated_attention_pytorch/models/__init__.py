"""Models built of dilated attention."""

from .config import LongNetLMConfig
from .longnet_lm import LongNetLM

__all__ = ["LongNetLM", "LongNetLMConfig"]
