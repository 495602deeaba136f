"""Launches of kernels that are compiled: without Triton's own look-up, which costs the host more than the launch."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch

_COMPILED: dict[Hashable, Any] = {}


def launch(kernel: Any, key: tuple[Hashable, ...], programs: int, *arguments: Any, num_warps: int = 4) -> None:
    """Launch a kernel of Triton or Gluon with all its arguments, constants included.

    Args:
        kernel: a jitted function.
        key: what the kernel is compiled for: its constants, the dtypes of the tensors, and every integer that is not
            in its ``do_not_specialize``. Tensors have to begin at multiples of 16 bytes.
        programs: of a one-dimensional grid.
        arguments: as for ``kernel[grid]``.
        num_warps: of a program.
    """
    name = (kernel.__module__, kernel.__name__, torch.cuda.current_device(), *key)
    compiled = _COMPILED.get(name)
    if compiled is None:
        _COMPILED[name] = kernel[(programs,)](*arguments, num_warps=num_warps)
    else:
        compiled[(programs, 1, 1)](*arguments)
