"""What computes a partial result: each backend gives out, lse and gradients of a Problem."""

from .dispatch import BACKENDS, available_backends, choose
from .problem import Part, Problem

__all__ = ["BACKENDS", "Part", "Problem", "available_backends", "choose"]
