"""Gluon kernels on the CPU: their own source, run as Python over torch tensors, one thread a warp group.

Gluon has no interpreter. This one knows what the Hopper kernels use: shared memory, mbarriers with phases and
transaction counts, named barriers, copies through tensor descriptors, warpgroup products, and pointers. Copies and
products happen at once, so it finds wrong geometry, masks, phases and deadlocks, but no missing fence or wait.
"""

from __future__ import annotations

import importlib
import re
import sys
import threading
import time
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from functools import partial
from types import ModuleType, SimpleNamespace
from unittest import mock

import pytest
import torch

from dilated_attention_pytorch.backends import gluon

PATIENCE = 10.0
"""Seconds after which a wait counts as a deadlock."""
LAGS: dict[str, float] = {}
"""Seconds that a warp group, by its function's name, sleeps after each wait: it comes late to all that it reads."""


class Value(torch.Tensor):
    """A tensor of a kernel: never changed in place, and integers divide as in C."""

    __iadd__ = torch.Tensor.__add__
    __isub__ = torch.Tensor.__sub__

    @property
    def type(self):
        return SimpleNamespace(layout=None)

    def to(self, dtype, bitcast=False):
        return self.view(dtype) if bitcast else super().to(dtype)

    def __floordiv__(self, other):
        return torch.div(self, other, rounding_mode="trunc")

    def __rfloordiv__(self, other):
        return torch.div(value(other), self, rounding_mode="trunc")

    def __mod__(self, other):
        return torch.fmod(self, other)


def value(x):
    return (x if isinstance(x, torch.Tensor) else torch.tensor(x)).as_subclass(Value)


class Pointer:
    """Places in a tensor's storage."""

    def __init__(self, tensor, offset=0):
        self.tensor, self.offset = tensor, offset

    def __add__(self, offset):
        return Pointer(self.tensor, self.offset + offset)

    @property
    def dtype(self):
        return SimpleNamespace(element_ty=self.tensor.dtype)

    def flat(self):
        return self.tensor.as_strided((self.tensor.untyped_storage().nbytes() // self.tensor.element_size(),), (1,), 0)

    def places(self, mask):
        places = value(self.offset).long() + self.tensor.storage_offset()
        if mask is None:
            return places, torch.ones_like(places, dtype=torch.bool)
        return torch.broadcast_tensors(places, value(mask).bool())


class Barrier:
    """An mbarrier: a phase ends when all arrivals and all announced bytes have come."""

    def __init__(self):
        self.count = self.missing = self.bytes = self.parity = 0
        self.changed = threading.Condition()

    def _settle(self):
        assert self.missing >= 0, "more arrivals than the barrier counts"
        if self.missing == 0 and self.bytes == 0:
            self.parity ^= 1
            self.missing = self.count
            self.changed.notify_all()

    def init(self, count):
        self.count = self.missing = count

    def arrive(self, count=1, size=0):
        with self.changed:
            self.missing -= count
            self.bytes += size
            self._settle()

    def came(self, size):
        with self.changed:
            self.bytes -= size
            self._settle()

    def wait(self, parity):
        with self.changed:
            if not self.changed.wait_for(lambda: self.parity != int(parity), PATIENCE):
                raise TimeoutError("a barrier's phase never ended")
        time.sleep(_program.lag)


class Barriers:
    def __init__(self, number):
        self.all = [Barrier() for _ in range(number)]

    def index(self, i):
        return self.all[int(i)]

    def __getattr__(self, name):
        return getattr(self.all[0], name)


class Memory:
    """Shared memory; what nobody wrote is NaN."""

    def __init__(self, tensor):
        self.tensor = tensor

    @property
    def dtype(self):
        return self.tensor.dtype

    def index(self, i):
        return Memory(self.tensor[int(i)])

    def slice(self, start, length, dim=0):
        return Memory(self.tensor.narrow(dim, start, length))

    def permute(self, order):
        return Memory(self.tensor.permute(order))

    def _reinterpret(self, dtype, shape, layout):
        return Memory(self.tensor.view(shape))

    def load(self, layout=None):
        return value(self.tensor.clone())

    def store(self, x):
        self.tensor.copy_(x)


class Descriptor:
    """A tensor descriptor; reads behind its shape give zeros, writes there are dropped."""

    def __init__(self, base, shape, strides, block_shape, layout):
        base = base.detach()
        self.view = base.as_strided(shape, strides)
        last = base.storage_offset() + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        assert last < base.untyped_storage().nbytes() // base.element_size(), "a descriptor reaches behind its tensor"
        self.block, self.dtype, self.layout = block_shape, base.dtype, layout

    def boxes(self, place):
        place = [int(p) for p in place]
        assert all(p >= 0 for p in place), f"a copy begins at {place}"
        inside = [slice(p, min(p + b, n)) for p, b, n in zip(place, self.block, self.view.shape, strict=True)]
        local = [slice(0, max(0, s.stop - s.start)) for s in inside]
        return self.view[tuple(inside)] if all(s.stop > s.start for s in inside) else None, tuple(local)


def _copy_in(descriptor, place, barrier, memory):
    found, local = descriptor.boxes(place)
    memory.tensor.zero_()
    if found is not None:
        memory.tensor[local] = found
    barrier.came(memory.tensor.numel() * memory.tensor.element_size())


def _copy_out(descriptor, place, memory):
    found, local = descriptor.boxes(place)
    if found is not None:
        found.copy_(memory.tensor[local])


def reduce_add(descriptor, place, memory):
    found, local = descriptor.boxes(place)
    if found is not None:
        with _ATOMIC:
            found.add_(memory.tensor[local])


_ATOMIC = threading.Lock()


def _product(a, b, accumulator, use_acc=True, is_async=False):
    a, b = (x.tensor if isinstance(x, Memory) else x for x in (a, b))
    result = a.float() @ b.float()
    return value(accumulator + result if use_acc else result)


def _wait_products(pendings, deps):
    return deps[0] if len(deps) == 1 else tuple(deps)


class _Program(threading.local):
    def __init__(self):
        self.named, self.number, self.lag = defaultdict(Barrier), 0, 0.0


_program = _Program()


def _assembly(text, constraints, arguments, **_):
    found = re.match(r"bar\.(sync|arrive) (\d+), (\d+)", text)
    if found is None:
        assert text == "mov.b32 $0, 0;", text
        return 0
    kind, name, threads = found[1], int(found[2]), int(found[3])
    barrier = _program.named[name]
    with barrier.changed:
        barrier.count = barrier.count or threads // 128
        if barrier.missing == 0:
            barrier.missing = barrier.count
        parity = barrier.parity
        barrier.missing -= 1
        if barrier.missing == 0:
            barrier._settle()
    if kind == "sync":
        barrier.wait(parity)
    return arguments[0]


def _together(tasks):
    """Run callables in threads; raise what one of them raised."""
    errors, named, number = [], _program.named, _program.number

    def run(task):
        _program.named, _program.number = named, number
        try:
            with torch.no_grad():
                task()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(task,), daemon=True) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


class Function:
    """What ``gluon.jit`` makes of a function: a device function when called, a kernel with a grid."""

    def __init__(self, function):
        self.function = function

    def __call__(self, *arguments, **options):
        _program.lag = LAGS.get(self.function.__name__, _program.lag)
        return self.function(*arguments, **options)

    def __getitem__(self, grid):
        def launch(*arguments, num_warps=None):
            arguments = [Pointer(a.detach()) if isinstance(a, torch.Tensor) else a for a in arguments]

            def program(number):
                _program.named, _program.number = defaultdict(Barrier), number
                self.function(*arguments)

            _together([partial(program, number) for number in range(grid[0])])
            return self

        return launch


def _jit(function=None, **_):
    return Function(function) if function else Function


def _allocate(dtype, shape, layout):
    if layout == "barrier":
        return Barriers(shape[0])
    empty = float("nan") if dtype.is_floating_point else -(2**31)
    return Memory(torch.full(shape, empty, dtype=dtype))


def _load(pointer, mask=None, other=0):
    places, there = pointer.places(mask)
    flat = pointer.flat()
    assert not there.any() or (places[there].min() >= 0 and places[there].max() < len(flat)), "a load outside"
    found = flat[places.clamp(0, len(flat) - 1)]
    return value(torch.where(there, found, torch.as_tensor(other, dtype=found.dtype)))


def _store(pointer, x, mask=None):
    places, there = pointer.places(mask)
    pointer.flat()[places[there]] = torch.broadcast_to(value(x), places.shape)[there].to(pointer.tensor.dtype)


def _atomic_add(pointer, x, sem=None):
    with _ATOMIC:
        old = _load(pointer)
        _store(pointer, old + x)
    return old


class Constant(int):
    """A constexpr of a module."""

    @property
    def value(self):
        return int(self)


def _language():
    gl = ModuleType("triton.experimental.gluon.language")
    layouts = "NVMMASharedLayout SwizzledSharedLayout BlockedLayout SliceLayout NVMMADistributedLayout DotOperandLayout"
    for name in layouts.split():
        setattr(gl, name, lambda *_, **__: None)
    for name in ("bfloat16", "float16", "float32", "int32", "int64"):
        setattr(gl, name, getattr(torch, name))
    two = lambda function: lambda a, b: function(value(a), value(b))  # noqa: E731
    gl.constexpr = Constant
    gl.static_range = range
    gl.to_tensor = value
    gl.arange = lambda a, b, layout=None: value(torch.arange(a, b, dtype=torch.int32))
    gl.full = lambda shape, x, dtype, layout=None: value(x).to(dtype).expand(shape).clone()
    gl.zeros = lambda shape, dtype, layout=None: value(torch.zeros(shape, dtype=dtype))
    gl.zeros_like = torch.zeros_like
    gl.where = lambda c, a, b: value(torch.where(value(c).bool(), value(a), value(b)))
    gl.minimum, gl.maximum = two(torch.minimum), two(torch.maximum)
    gl.max = lambda x, axis: x.amax(axis)
    gl.sum = lambda x, axis: x.sum(axis, dtype=x.dtype)
    gl.exp2, gl.log2, gl.exp, gl.log = torch.exp2, torch.log2, torch.exp, torch.log
    gl.convert_layout = lambda x, layout: x
    gl.split = lambda x: x.unbind(-1)
    gl.program_id = lambda axis: _program.number
    gl.load, gl.store, gl.atomic_add = _load, _store, _atomic_add
    gl.thread_barrier = lambda: None
    gl.inline_asm_elementwise = _assembly
    gl.allocate_shared_memory = _allocate
    gl.warp_specialize = lambda parts, *_: _together([lambda f=f, a=a: f(*a) for f, a in parts])
    return gl


def _modules():
    gl = _language()
    hopper = ModuleType("triton.experimental.gluon.language.nvidia.hopper")
    hopper.mbarrier = SimpleNamespace(
        MBarrierLayout=lambda: "barrier",
        init=lambda barrier, count: barrier.init(count),
        expect=lambda barrier, size: barrier.arrive(1, size),
        arrive=lambda barrier, count=1, pred=True: barrier.arrive(count) if pred else None,
        wait=lambda barrier, phase: barrier.wait(phase),
    )
    hopper.tma = SimpleNamespace(
        async_copy_global_to_shared=_copy_in, async_copy_shared_to_global=_copy_out, store_wait=lambda pendings: None
    )
    hopper.fence_async_shared = lambda: None
    hopper.warpgroup_mma, hopper.warpgroup_mma_wait = _product, _wait_products
    host = ModuleType("triton.experimental.gluon.nvidia.hopper")
    host.TensorDescriptor = Descriptor
    core = ModuleType("triton.experimental.gluon.language._core")
    core.builtin = lambda function: function
    gluon = ModuleType("triton.experimental.gluon")
    gluon.jit, gluon.language = _jit, gl
    return {m.__name__: m for m in (gl, hopper, host, core, gluon)}


@contextmanager
def _interpreted(*names):
    """The kernel modules of these names, imported over the interpreter; the package's own stay as they are."""
    package = "dilated_attention_pytorch.kernels"
    for name in names:  # what these import must be loaded before, or leaving the patch would unload it
        importlib.import_module(f"{package}.{name}")
    modules = _modules()
    gluon_module = modules["triton.experimental.gluon"]
    with (
        mock.patch.dict(sys.modules, modules),
        mock.patch.object(sys.modules["triton.experimental"], "gluon", gluon_module),
    ):
        for name in [m for m in sys.modules if m.startswith((f"{package}.hopper_", f"{package}.launch"))]:
            del sys.modules[name]
        kernels = {name: importlib.import_module(f"{package}.{name}") for name in names}
        sys.modules[f"{package}.hopper_backward_kernel"]._reduce_add = reduce_add
        launch = sys.modules[f"{package}.launch"]
        launch.Launch.__call__ = lambda self, *tensors: self._kernel[self._grid](
            *(launch._given(a, tensors) for a in self._arguments), **self._options
        )
    with mock.patch.multiple(sys.modules[package], create=True, **kernels):
        yield kernels.values()


@pytest.fixture(params=["_consumer", "producer", "scheduler", "_producer", "_writer"])
def lagging(request, monkeypatch):
    """One of the warp groups is slower than all others."""
    monkeypatch.setitem(LAGS, request.param, 0.02)


@pytest.fixture
def interpreted_hopper(monkeypatch):
    """Backend "gluon" computes with interpreted kernels, on the CPU."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(gluon, "unavailable", lambda device="cuda": None)
    with _interpreted("hopper_forward", "hopper_backward", "hopper_sparse", "hopper_sparse_backward") as kernels:
        for module in kernels:
            monkeypatch.setattr(module, "_processors", lambda device: 2)
            monkeypatch.setattr(module, "_side_stream", lambda device: stream, raising=False)
        yield
