"""Exact long-context attention for PyTorch: dilated attention (LongNet) on zero-copy views of fused kernels."""

from .backends import available_backends
from .explanation import Explanation, explain
from .functional import dilated_attention, dilated_attention_with_lse, received_attention
from .models import LongNetEncoder, LongNetEncoderConfig, LongNetLM, LongNetLMConfig, LongNetViT
from .modules import DilatedAttention, MultiheadDilatedAttention
from .ordering import HilbertOrdering, hilbert_order, hilbert_order_from_coordinates
from .parallel import ContextParallel
from .patterns import DilatedPattern
from .types import AttentionOutput
from .verification import Verification, verify

__version__ = "0.1.0"

__all__ = [
    "AttentionOutput",
    "ContextParallel",
    "DilatedAttention",
    "DilatedPattern",
    "Explanation",
    "HilbertOrdering",
    "LongNetEncoder",
    "LongNetEncoderConfig",
    "LongNetLM",
    "LongNetLMConfig",
    "LongNetViT",
    "MultiheadDilatedAttention",
    "Verification",
    "available_backends",
    "dilated_attention",
    "dilated_attention_with_lse",
    "explain",
    "hilbert_order",
    "hilbert_order_from_coordinates",
    "received_attention",
    "verify",
]
