"""Buffers that live longer than a call: receive buffers and staging, with a byte budget and statistics.

PyTorch's caching allocator stays the owner of everything else.
"""

from .base import Lease, LeaseError, MemoryBudgetExceeded, MemoryPool, PoolStats
from .simple import SimplePool

__all__ = ["Lease", "LeaseError", "MemoryBudgetExceeded", "MemoryPool", "PoolStats", "SimplePool"]
