"""Kernels in Triton: the only package that imports it, and it does so only when a kernel runs."""

import importlib.util
from functools import cache


@cache
def has_triton() -> bool:
    """Whether Triton is installed; it is looked for, not loaded."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU (TRITON_INTERPRET=1), as tests without a GPU do."""
    import triton

    return bool(triton.knobs.runtime.interpret)
