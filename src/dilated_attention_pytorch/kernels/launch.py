"""Launches that are repeated: a kernel with all of its arguments but the tensors' addresses.

At every launch Triton looks at each argument again and encodes each descriptor anew, which for a dozen descriptors
takes the host several times as long as a short sequence takes the device. A `Launch` goes that way once. After that it
hands the compiled kernel's C launcher what the first launch handed to it, with descriptors that are encoded once for an
address. How the launcher's arguments lie is private to Triton, so this serves the kernels that are tied to one version
of it (`backends.gluon.TRITON_VERSIONS`); hooks on launches do not see the repeated ones.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import groupby
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


class Address(NamedTuple):
    """In a `Launch`'s arguments: the tensor given at this place of a call."""

    slot: int


class View(NamedTuple):
    """In a `Launch`'s arguments: a descriptor of the tensor given at ``slot``, with these sizes and strides."""

    slot: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]
    layout: gl.NVMMASharedLayout


_captured: list[Launch] = []
"""Launches in CUDA graphs, never let go of."""


class Launch:
    """``launch(*tensors)`` runs ``kernel`` on ``grid`` programs of the current stream.

    Args:
        kernel: a jitted function.
        grid: programs, along one axis or two.
        arguments: everything the kernel takes, in its order; an `Address` or a `View` stands for a tensor of the call,
            which has the dtype that it had in the first call.
        device: the device of the tensors, which has to be the current one.
        options: Triton's, for instance num_warps.
    """

    def __init__(
        self, kernel: Any, grid: int | tuple[int, int], arguments: tuple[Any, ...], device: torch.device, **options: Any
    ) -> None:
        self._kernel, self._arguments, self._options = kernel, arguments, options
        self._grid = (grid, 1, 1) if isinstance(grid, int) else (*grid, 1)
        self._device = device.index
        self._launcher: Callable[..., None] | None = None
        self._start: tuple[Any, ...] = ()
        self._parts: list[Callable[[list[int]], Sequence[Any]]] = []

    def __call__(self, *tensors: Tensor) -> None:
        if torch.cuda.is_current_stream_capturing():
            _captured.append(self)  # with the tensors among its constants, which replays read
        addresses = [tensor.data_ptr() for tensor in tensors]
        # Triton compiles another kernel for addresses that are no multiples of 16.
        if self._launcher is None or any(address & 15 for address in addresses):
            compiled = self._kernel[self._grid](*(_given(a, tensors) for a in self._arguments), **self._options)
            if not any(address & 15 for address in addresses):
                self._repeat(compiled)
            return
        arguments: list[Any] = []
        for part in self._parts:
            arguments += part(addresses)
        stream = torch._C._cuda_getCurrentRawStream(self._device)
        self._launcher(*self._grid, stream, *self._start, *arguments)

    def _repeat(self, compiled: Any) -> None:
        """Prepare for launches of what Triton has compiled."""
        launcher = compiled.run
        if launcher.global_scratch_size or launcher.profile_scratch_size:
            return  # memory that Triton allocates for each launch
        encodings = iter(getattr(compiled.metadata, "tensordesc_meta", None) or ())
        parts: list[Callable[[list[int]], Sequence[Any]]] = []
        for (kind, slot), group in groupby(self._arguments, _kind):
            if kind is View and slot is not None:
                parts.append(_descriptors(slot, [(view, next(encodings)) for view in group]))
            elif kind is Address:
                parts.append(_addresses([address.slot for address in group]))
            else:
                parts.append(_constants([a.data_ptr() if isinstance(a, Tensor) else a for a in group]))
        self._parts = parts
        self._start = (
            compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl, None, None,
            compiled.packed_metadata, None, None, None,
        )  # fmt: skip
        # With descriptors `launch` is a function around the C launcher, which encodes them.
        around = inspect.getclosurevars(launcher.launch).nonlocals if inspect.isfunction(launcher.launch) else {}
        self._launcher = around.get("launcher", launcher.launch)


def _kind(argument: Any) -> tuple[Any, int | None]:
    """Neighbours of a kind are worked out together: constants, addresses, views of one tensor."""
    if isinstance(argument, View):
        return View, argument.slot
    return (Address if isinstance(argument, Address) else None), None


def _given(argument: Any, tensors: tuple[Tensor, ...]) -> Any:
    """An argument as Triton takes it."""
    if isinstance(argument, View):
        _, shape, strides, block, layout = argument
        return TensorDescriptor(tensors[argument.slot], list(shape), list(strides), list(block), layout)
    return tensors[argument.slot] if isinstance(argument, Address) else argument


def _constants(values: list[Any]) -> Callable[[list[int]], Sequence[Any]]:
    return lambda addresses: values


def _addresses(slots: list[int]) -> Callable[[list[int]], Sequence[Any]]:
    return lambda addresses: [addresses[slot] for slot in slots]


def _descriptors(slot: int, views: list[tuple[View, Any]]) -> Callable[[list[int]], Sequence[Any]]:
    """The launcher's arguments for views of one tensor: of each the encoded descriptor, sizes and strides."""
    from triton.backends.nvidia.driver import make_tensordesc_arg

    @lru_cache(maxsize=512)
    def encoded(address: int) -> list[Any]:
        base = SimpleNamespace(data_ptr=lambda: address)
        arguments: list[Any] = []
        for view, metadata in views:
            described = SimpleNamespace(base=base, shape=view.shape, strides=view.strides, padding="zero")
            arguments += make_tensordesc_arg(described, metadata)
        return arguments

    return lambda addresses: encoded(addresses[slot])
