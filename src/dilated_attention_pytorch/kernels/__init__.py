"""Kernels in Triton: the only package that imports it, and it does so only when a kernel runs."""


def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU (TRITON_INTERPRET=1), as tests without a GPU do."""
    import triton

    return bool(triton.knobs.runtime.interpret)
