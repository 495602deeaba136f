"""Exact long-context attention for PyTorch: dilated attention (LongNet) on zero-copy views of fused kernels."""

from .backends import available_backends
from .explanation import Explanation, explain
from .functional import dilated_attention, dilated_attention_with_lse
from .models import LongNetLM, LongNetLMConfig
from .modules import DilatedAttention, MultiheadDilatedAttention
from .patterns import DilatedPattern
from .types import AttentionOutput
from .verification import Verification, verify

__version__ = "0.1.0"

__all__ = [
    "AttentionOutput",
    "DilatedAttention",
    "DilatedPattern",
    "Explanation",
    "LongNetLM",
    "LongNetLMConfig",
    "MultiheadDilatedAttention",
    "Verification",
    "available_backends",
    "dilated_attention",
    "dilated_attention_with_lse",
    "explain",
    "verify",
]
