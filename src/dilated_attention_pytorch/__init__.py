"""Exact long-context attention for PyTorch: dilated attention (LongNet) on zero-copy views of fused kernels."""

from .backends import available_backends
from .functional import dilated_attention, dilated_attention_with_lse
from .patterns import DilatedPattern
from .types import AttentionOutput

__version__ = "0.1.0"

__all__ = [
    "AttentionOutput",
    "DilatedPattern",
    "available_backends",
    "dilated_attention",
    "dilated_attention_with_lse",
]
