"""Block-sparse attention: each backend gives out, lse and gradients of a SparseProblem."""

from .dispatch import SPARSE_BACKENDS, choose_sparse
from .problem import SparseProblem

__all__ = ["SPARSE_BACKENDS", "SparseProblem", "choose_sparse"]
