"""Memory that lives longer than a call: receive buffers and staging, with a byte budget and statistics.

PyTorch's caching allocator stays the owner of everything else.
"""

from .adaptive import AdaptivePool
from .base import Leak, LeakedLeaseWarning, Lease, LeaseError, MemoryBudgetExceeded, MemoryPool
from .factory import create_memory_pool
from .replay import Replay, replay
from .simple import SimplePool
from .stats import PoolStats, Usage
from .strategies import Bucketing, Fragmentation, Numa
from .trace import RecordingPool, Trace, read_trace

__all__ = [
    "AdaptivePool",
    "Bucketing",
    "Fragmentation",
    "Leak",
    "LeakedLeaseWarning",
    "Lease",
    "LeaseError",
    "MemoryBudgetExceeded",
    "MemoryPool",
    "Numa",
    "PoolStats",
    "RecordingPool",
    "Replay",
    "SimplePool",
    "Trace",
    "Usage",
    "create_memory_pool",
    "read_trace",
    "replay",
]
