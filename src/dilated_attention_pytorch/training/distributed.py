"""Training over several processes that torchrun started: each holds a shard of the tokens, and of the weights if asked.

The ranks form a mesh of replicas x context: the ranks of one replica share every sequence, replicas share the windows
of a step. Losses are sums divided by the tokens of the whole step, so that gradients need no weights to be added up.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from ..models import LongNetLM
from ..parallel import ContextParallel
from ..parallel.comm import add_up
from ..parallel.heartbeat import heartbeat
from ..parallel.peers import Peers

T = TypeVar("T")
GRACE = 3.0
"""Seconds that a rank has to end by itself once another has failed."""


def launched() -> bool:
    """Whether torchrun started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def restarts() -> int:
    """How often torchrun has restarted the ranks."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def local_device(name: str) -> torch.device:
    """The device of this rank: "auto" and "cuda" are the GPU of its number on this machine, if there are any.

    Raises:
        ValueError: "cuda" without one.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if name not in ("auto", "cuda"):
        raise ValueError(f"device is {name!r}; under torchrun every rank takes its own: give 'auto', 'cpu' or 'cuda'")
    if not torch.cuda.is_available():
        raise ValueError("device 'cuda' cannot be used: PyTorch finds no GPU; 'cpu' always can")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


@dataclass(frozen=True, kw_only=True)
class TeamConfig:
    """How ranks divide the work; it changes nothing of what is learned, so a resumed run may have another.

    Attributes:
        context_parallel: ranks that share a sequence; the world is a multiple of it.
        fsdp: shard weights, gradients and optimizer state over all ranks (FSDP2, `fully_shard`).
        timeout: of `ContextParallel`, in seconds.
        layout: of the sequence; "zigzag" gives ranks equal causal work.
    """

    context_parallel: int
    fsdp: bool = False
    timeout: float = 30.0
    layout: Any = "zigzag"


class Team:
    """The ranks of a run.

    Raises:
        ValueError: the world is no multiple of ``context_parallel``.
    """

    def __init__(self, config: TeamConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        world, size = int(os.environ["WORLD_SIZE"]), config.context_parallel
        if size < 1 or world % size:
            raise ValueError(f"context_parallel is {size}, and torchrun started {world} ranks; give a divisor of that")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        self.rank, self.world = dist.get_rank(), world
        self.mesh = init_device_mesh(device.type, (world,))
        self.group = self.mesh.get_group()
        self.peers = Peers(self.mesh, config.timeout)
        self.replicas, self.replica = world // size, self.rank // size
        context = self.mesh
        if self.replicas > 1:
            context = init_device_mesh(device.type, (self.replicas, size), mesh_dim_names=("replica", "context"))[
                "context"
            ]
        self.context: DeviceMesh = context
        self.parallel: ContextParallel | None = None
        if size > 1:
            self.parallel = ContextParallel(context, layout=config.layout, timeout=config.timeout)
        if world > 1:
            # FSDP and checkpoints wait in collectives that nobody polls: end the process, torchrun begins anew.
            heartbeat().on_failure.append(self._end_soon)
        self._finished = False

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and talks to the user."""
        return self.rank == 0

    def _end_soon(self) -> None:
        def end() -> None:
            if not self._finished:
                found = heartbeat().verdict
                print(f"rank {self.rank}: rank {found and found[0]} failed: {found and found[1]}", file=sys.stderr)
                sys.stderr.flush()
                os._exit(1)

        timer = threading.Timer(GRACE, end)
        timer.daemon = True
        timer.start()

    def check_model(self, model: LongNetLM) -> None:
        """Raise ValueError for a model whose layers read a neighbour's rows."""
        if self.parallel is not None and (model.config.ngram_sizes or model.config.short_convolution):
            raise ValueError(
                "the run's model has ngram_sizes or short_convolution, which read rows that another rank holds; "
                "continue it without --context-parallel"
            )

    def prepare(self, model: LongNetLM) -> None:
        """Shard the weights, if asked; every rank has drawn the same ones."""
        if not self.config.fsdp:
            return
        from torch.distributed.fsdp import fully_shard

        for block in model.blocks:
            fully_shard(block, mesh=self.mesh)
        # By default what is left of the model stays gathered behind a forward pass, and the next one of a step would
        # not see what the optimizer has changed since.
        fully_shard(model, mesh=self.mesh, reshard_after_forward=True)

    def own_windows(self, windows: Tensor) -> Tensor:
        """The windows of this replica; at least one.

        Raises:
            ValueError: fewer windows than replicas.
        """
        if len(windows) < self.replicas:
            raise ValueError(f"a step has {len(windows)} windows for {self.replicas} replicas; raise --batch-size")
        return windows[self.replica :: self.replicas]

    def loss(self, model: nn.Module, windows: Tensor) -> Tensor:
        """This rank's part of the mean loss of a step; the parts of all ranks add up to it.

        ``windows (B, N + 1)`` int64 are the step's, the same on every rank.
        """
        own = self.own_windows(windows)
        inputs, targets = own[:, :-1], own[:, 1:]
        if self.parallel is not None:
            inputs, targets = self.parallel.shard(inputs, 1), self.parallel.shard(targets, 1)
        logits = model(inputs, parallel=self.parallel)
        total = nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")
        return total / windows[:, 1:].numel()

    def backward(self, loss: Tensor, parameters: Sequence[nn.Parameter]) -> float:
        """Gradients of the whole loss on every rank (of its shard of the weights); returns the whole loss."""
        # FSDP averages over ranks where we add up.
        (loss * self.world if self.config.fsdp else loss).backward()
        whole = loss.detach().clone()
        if self.config.fsdp:
            self.add_up([whole])
            return float(whole)
        for p in parameters:
            if p.grad is None:  # not reached on this rank, but maybe on others
                p.grad = torch.zeros_like(p)
        self.add_up([whole, *(p.grad for p in parameters if p.grad is not None)])
        return float(whole)

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over all ranks, as one message."""
        if self.world == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        add_up(flat, self.group)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """What all ranks do as step ``number``; see `ContextParallel.step`."""
        with self.peers.step(number), self.parallel.step(number) if self.parallel else contextlib.nullcontext():
            yield

    def any(self, flag: bool) -> bool:
        """Whether any rank says so, on every rank."""
        found = torch.tensor([float(flag)], device=self.device)
        self.add_up([found])
        return bool(found.item() > 0)

    def after_main(self, main: Callable[[], T], others: Callable[[], T]) -> T:
        """What ``main`` gives on rank 0, and ``others`` on the other ranks after that.

        Raises:
            ValueError: rank 0 raised one; on all ranks.
        """
        problem: list[Any] = [None]
        result: T | None = None
        if self.is_main:
            try:
                result = main()
            except ValueError as error:
                problem = [str(error)]
        dist.broadcast_object_list(problem, src=0, group=self.group)
        if problem[0] is not None:
            raise ValueError(problem[0])
        return result if self.is_main and result is not None else others()

    def barrier(self) -> None:
        """Wait for all ranks, for as long as it takes: a long preparation of one of them is no failure."""
        if self.world > 1:
            dist.barrier(group=self.group)

    def close(self) -> None:
        """Leave together; nobody counts as failed from here on."""
        self.barrier()
        self._finished = True
        if self.world > 1:
            heartbeat().close()


class ShardedForward(nn.Module):
    """A model over a sharded sequence that takes and gives whole ones, for evaluation: no gradient flows."""

    def __init__(self, model: nn.Module, parallel: ContextParallel) -> None:
        super().__init__()
        self.model, self.parallel = model, parallel

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``(B, N, vocab_size)`` of all tokens, on every rank."""
        if tokens.shape[1] < self.parallel.world:
            return self.model(tokens)
        return self.parallel.unshard(self.model(self.parallel.shard(tokens, 1), parallel=self.parallel), 1)


def full(tensor: Tensor) -> Tensor:
    """A tensor whole, on every rank; all ranks of a sharded one have to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
