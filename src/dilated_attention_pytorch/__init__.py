"""Exact long-context attention for PyTorch: dilated attention (LongNet) on zero-copy views of fused kernels."""

from .backends import available_backends
from .backends.sparse.explanation import SparseExplanation
from .compat import install as _install_old_names
from .compat import old_name as __getattr__  # noqa: F401  (Python calls it for names that are not here)
from .explanation import Explanation, explain, explain_sparse
from .functional import dilated_attention, dilated_attention_with_lse, received_attention
from .memory import MemoryPool, create_memory_pool
from .models import (
    DilatedTransformerDecoderLayer,
    DilatedTransformerEncoderLayer,
    LongNet,
    LongNetEncoder,
    LongNetEncoderConfig,
    LongNetLM,
    LongNetLMConfig,
    LongNetViT,
)
from .modules import DilatedAttention, MultiheadDilatedAttention, MultiheadSparseAttention
from .ordering import HilbertOrdering, hilbert_order, hilbert_order_from_coordinates, recommend_ordering
from .parallel import ContextParallel, Streaming
from .patterns import (
    BlockList,
    ContentTopK,
    DilatedBlocks,
    DilatedPattern,
    GlobalLocal,
    Hierarchical,
    LocalWindow,
    RandomBlocks,
    Union,
    get_pattern,
)
from .sparse import SparseAttention, sparse_attention, sparse_attention_with_lse
from .types import AttentionOutput
from .verification import Verification, verify

_install_old_names()

__version__ = "0.1.0"

__all__ = [
    "AttentionOutput",
    "BlockList",
    "ContentTopK",
    "ContextParallel",
    "DilatedAttention",
    "DilatedBlocks",
    "DilatedPattern",
    "DilatedTransformerDecoderLayer",
    "DilatedTransformerEncoderLayer",
    "Explanation",
    "GlobalLocal",
    "Hierarchical",
    "HilbertOrdering",
    "LocalWindow",
    "LongNet",
    "LongNetEncoder",
    "LongNetEncoderConfig",
    "LongNetLM",
    "LongNetLMConfig",
    "LongNetViT",
    "MemoryPool",
    "MultiheadDilatedAttention",
    "MultiheadSparseAttention",
    "RandomBlocks",
    "SparseAttention",
    "SparseExplanation",
    "Streaming",
    "Union",
    "Verification",
    "available_backends",
    "create_memory_pool",
    "dilated_attention",
    "dilated_attention_with_lse",
    "explain",
    "explain_sparse",
    "get_pattern",
    "hilbert_order",
    "hilbert_order_from_coordinates",
    "received_attention",
    "recommend_ordering",
    "sparse_attention",
    "sparse_attention_with_lse",
    "verify",
]
