"""One rank of a pool of gloo processes: runs the cases that the test process sends, until it hangs up."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache, partial
from multiprocessing.connection import Client
from unittest import mock

os.environ["OMP_NUM_THREADS"] = "1"

import model_tasks
import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from dilated_attention_pytorch import (
    BlockList,
    HilbertOrdering,
    LocalWindow,
    LongNetLM,
    LongNetLMConfig,
    dilated_attention_with_lse,
    explain,
    sparse_attention_with_lse,
)
from dilated_attention_pytorch.parallel import ContextParallel, attention, context, retry, sparse_attention
from dilated_attention_pytorch.parallel.watch import watch_of
from dilated_attention_pytorch.sparse_testing import SparseCase
from dilated_attention_pytorch.testing import Case


@cache
def two_dimensions(ring: int, heads: int) -> DeviceMesh:
    """A mesh of all ranks, which all of them have to ask for at the same point."""
    return DeviceMesh("cpu", torch.arange(ring * heads).view(ring, heads))


def make(mesh: DeviceMesh, strategy: str, layout: str) -> ContextParallel:
    """``strategy`` may say more: "hybrid 2x2 ring" is a mesh of 2 x 2 ranks with a ring across its rows."""
    if not strategy.startswith("hybrid"):
        return ContextParallel(mesh, strategy=strategy, layout=layout)
    name, shape, across = strategy.split()
    sizes = map(int, shape.split("x"))
    return ContextParallel(two_dimensions(*sizes), strategy=name, layout=layout, across=across)


def attend(mesh: DeviceMesh, case: Case, strategy: str, layout: str, backend: str = "auto") -> dict[str, object]:
    """This rank's rows of out, lse, dq, dk, dv, which rows they are, and what was sent in each direction."""
    parallel = make(mesh, strategy, layout)
    query, key, value, grad_out, grad_lse = case.tensors()
    leaves = [parallel.shard(t, 1).requires_grad_() for t in (query, key, value)]
    options = case.options() | {"backend": backend}
    if "key_padding_mask" in options:
        options["key_padding_mask"] = parallel.shard(options["key_padding_mask"], 1)
    exchange = explain(*leaves, **options, parallel=parallel).exchange
    torch.default_generator.manual_seed(case.seed + parallel.rank)  # the seed of dropout is that of rank 0
    out, lse = dilated_attention_with_lse(*leaves, **options, parallel=parallel)
    forward = parallel.traffic.bytes_sent, parallel.traffic.messages_sent
    outputs, grads = [out], [parallel.shard(grad_out, 1)]
    if case.grad_lse and lse.requires_grad:
        outputs, grads = [out, lse], [*grads, parallel.shard(grad_lse, 2)]
    gradients = torch.autograd.grad(outputs, leaves, grads)
    found = [t.detach().double().numpy() for t in (out, lse.transpose(1, 2), *gradients)]
    whole = parallel.unshard(out.detach(), 1)
    return {
        "rows": parallel.positions().numpy(),
        "results": found,
        "unsharded": whole.double().numpy(),
        "forward": forward,
        "total": (parallel.traffic.bytes_sent, parallel.traffic.messages_sent),
        "exchange": exchange,
        "leased": parallel.pool.stats().leased,
    }


def attend_sparse(
    mesh: DeviceMesh, case: SparseCase, strategy: str, layout: str, backend: str = "auto"
) -> dict[str, object]:
    """The same of block-sparse attention, twice: the second call plans nothing anew.

    A pattern may be a mask of blocks as a NumPy array; tensors do not travel to the pool.
    """
    if isinstance(case.pattern, np.ndarray):
        case = replace(case, pattern=BlockList.from_mask(torch.from_numpy(case.pattern), block_size=16))
    parallel = make(mesh, strategy, layout)
    query, key, value, grad_out, grad_lse = case.tensors()
    leaves = [parallel.shard(t, 1).requires_grad_() for t in (query, key, value)]
    options = case.sparse_options() | {"backend": backend, "pattern": case.pattern}
    if "key_padding_mask" in options:
        options["key_padding_mask"] = parallel.shard(options["key_padding_mask"], 1)
    outputs, grads = [], [parallel.shard(grad_out, 1)]
    before, forward = parallel.traffic.bytes_sent, 0
    for _ in range(2):
        out, lse = sparse_attention_with_lse(*leaves, **options, parallel=parallel)
        forward, before = parallel.traffic.bytes_sent - before, parallel.traffic.bytes_sent
        outputs = [out]
    if case.grad_lse:
        outputs, grads = [out, lse], [*grads, parallel.shard(grad_lse, 2)]
    gradients = torch.autograd.grad(outputs, leaves, grads)
    return {
        "rows": parallel.positions().numpy(),
        "results": [t.detach().double().numpy() for t in (out, lse.transpose(1, 2), *gradients)],
        "forward": forward,
        "backward": parallel.traffic.bytes_sent - before,
        "leased": parallel.pool.stats().leased,
    }


def train(mesh: DeviceMesh, layout: str, tied: bool) -> dict[str, object]:
    """Logits of this rank's rows and the gradients of the loss over all rows, of a model with the same weights."""
    torch.manual_seed(0)
    config = LongNetLMConfig(
        vocab_size=50, context_length=64, embed_dim=32, num_layers=2, num_heads=4, segment_lengths=(8, 40),
        dilation_rates=(1, 4), tie_embeddings=tied, activation_checkpointing=tied,
    )  # fmt: skip
    model, tokens = LongNetLM(config).double(), torch.randint(50, (2, 62))
    parallel = ContextParallel(mesh, layout=layout)
    inputs, targets = parallel.shard(tokens[:, :-1], 1), parallel.shard(tokens[:, 1:], 1)
    model.loss(inputs, targets, reduction="sum", parallel=parallel).backward()
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad, group=parallel.group)
    logits = parallel.unshard(model(inputs, parallel=parallel), 1)
    alone = model(tokens[:, :-1])
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.loss(tokens[:, :-1], tokens[:, 1:], reduction="sum").backward()
    errors = [float((a - p.grad).abs().max()) for a, p in zip(found, model.parameters(), strict=True)]
    return {"logits": float((logits - alone).detach().abs().max()), "gradients": max(errors)}


def repeat(mesh: DeviceMesh, case: Case, strategy: str) -> dict[str, object]:
    """How many buffers each of five steps allocated, and what is still on loan."""
    parallel = ContextParallel(mesh, strategy=strategy)
    misses = []
    with mock.patch.object(context, "make_job", wraps=context.make_job) as planned:
        for _ in range(5):
            query, key, value, grad_out, _ = case.tensors()
            leaves = [parallel.shard(t, 1).requires_grad_() for t in (query, key, value)]
            out, _ = dilated_attention_with_lse(*leaves, **case.options(), parallel=parallel)
            torch.autograd.grad(out, leaves, parallel.shard(grad_out, 1))
            misses.append(parallel.pool.stats().misses)
    return {
        "planned": planned.call_count,
        "misses": misses,
        "leased": parallel.pool.stats().leased,
        "held": parallel.pool.stats().held,
    }


def collective(mesh: DeviceMesh, strategy: str, layout: str) -> dict[str, object]:
    """Sums and whole tensors of all ranks, and gradients of what each rank makes of them; two derivatives."""
    parallel = make(mesh, strategy, layout)
    torch.manual_seed(0)
    whole = torch.randn(2, 23, 3, dtype=torch.float64)
    weights = torch.randn(parallel.world, 2, 23, 3, dtype=torch.float64)  # each rank's own, known to all
    rows = parallel.shard(whole, 1).requires_grad_()
    joined = parallel.unshard(rows, 1, differentiable=True)
    (grad,) = torch.autograd.grad((joined**2 * weights[parallel.rank]).sum(), rows, create_graph=True)
    (again,) = torch.autograd.grad(grad.sum(), rows)
    every = weights.sum(0)
    expected = [
        (joined, whole),
        *((a, parallel.shard(b, 1)) for a, b in ((grad, 2 * whole * every), (again, 2 * every))),
    ]
    mine = weights[parallel.rank].clone().requires_grad_()
    total = parallel.add_up(mine)
    (share,) = torch.autograd.grad((total * (parallel.rank + 1)).sum(), mine)
    ranks = parallel.world * (parallel.world + 1) / 2
    expected += [(total, every), (share, torch.full_like(share, ranks))]
    plain = parallel.unshard(rows, 1)
    return {
        "errors": [float((a - b).detach().abs().max()) for a, b in [*expected, (plain, whole)]],
        "detached": not plain.requires_grad,
    }


def captured(mesh: DeviceMesh) -> str:
    """What attention says while a CUDA graph is being captured; on all ranks, and afterwards it works."""
    parallel = ContextParallel(mesh, strategy="ring")
    rows = parallel.shard(torch.randn(1, 40, 2, 8), 1)
    with (
        mock.patch.object(watch_of(parallel.group), "on_gpu", True),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=True),
        ignored_reports(parallel),
    ):
        try:
            dilated_attention_with_lse(rows, rows, rows, [64], [1], parallel=parallel)
            answer = "nothing"
        except RuntimeError as error:
            answer = str(error).partition(",")[0]
    dilated_attention_with_lse(rows, rows, rows, [64], [1], parallel=parallel)
    return answer


def ignored_reports(parallel: ContextParallel) -> AbstractContextManager[object]:
    """An error that all ranks meet is not reported to the others, which would end the pool."""
    return mock.patch.object(parallel.peers, "reporting", nullcontext)


def broken(mesh: DeviceMesh, strategy: str, phase: str) -> dict[str, object]:
    """Buffers on loan after an error on all ranks between two exchanges; then the same attention, and its error."""
    sparse = strategy == "sparse"
    case = Case(seed=1, key_rows=70, segment_lengths=(16, 70), dilation_rates=(1, 2), kv_heads=3, dtype=torch.float64)
    parallel, pattern = make(mesh, "gather" if sparse else strategy, "contiguous"), LocalWindow(48, block_size=16)
    given, grad = case.tensors()[:3], case.tensors()[3]

    def attend(*tensors: torch.Tensor, **where: object) -> torch.Tensor:
        if sparse:
            return sparse_attention_with_lse(*tensors, pattern, **where).out
        return dilated_attention_with_lse(*tensors, **case.options(), **where).out

    def step() -> list[torch.Tensor]:
        leaves = [parallel.shard(t, 1).requires_grad_() for t in given]
        out = attend(*leaves, parallel=parallel)
        return [out.detach(), *torch.autograd.grad(out, leaves, parallel.shard(grad, 1))]

    # While the first rows travel; with rows of the first round at hand; with what comes home at hand.
    place, name, wanted = {
        "sparse": (sparse_attention, "retrying", 1 if phase == "forward" else 3),
        "ulysses": (torch.Tensor, "clone", 1 if phase == "forward" else 12),
    }.get(strategy, (retry, "dense_forward", 1) if phase == "forward" else (attention, "add_home", 1))
    calls, real = [], getattr(place, name)

    def failing(*arguments: object, **options: object) -> object:
        calls.append(name)
        if len(calls) == wanted:
            raise ValueError("on purpose")
        return real(*arguments, **options)

    raised = False
    with mock.patch.object(place, name, failing), ignored_reports(parallel):
        try:
            step()
        except ValueError as error:
            raised = str(error) == "on purpose"
    leased = parallel.pool.stats().leased
    found = step()
    leaves = [t.detach().requires_grad_() for t in given]
    out = attend(*leaves)
    expected = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
    errors = [float((a - parallel.shard(b, 1)).abs().max()) for a, b in zip(found, expected, strict=True)]
    stats = parallel.pool.stats()
    return {
        "raised": raised,
        "leased": leased,
        "requests": stats.requests,
        "error": max(errors),
        "leased_after": stats.leased,
    }


def under_ordering(mesh: DeviceMesh, shape: tuple[int, int], strategy: str, layout: str) -> dict[str, object]:
    """Errors of attention under an ordering of the whole sequence, which is then sharded, beside one device's."""
    torch.manual_seed(0)
    ordering, parallel = HilbertOrdering(shape, skip_first=1), make(mesh, strategy, layout)
    given = [torch.randn(1, ordering.rows, 4, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    pattern, grad = ((16, 64), (1, 2)), torch.randn(1, ordering.rows, 4, 8, dtype=torch.float64)
    alone = ordering.invert(dilated_attention_with_lse(*map(ordering.apply, given), *pattern).out)
    expected = torch.autograd.grad(alone, given, grad)
    leaves = [parallel.shard(ordering.apply(t.detach()), 1).requires_grad_() for t in given]
    out, _ = dilated_attention_with_lse(*leaves, *pattern, parallel=parallel)
    gradients = torch.autograd.grad(out, leaves, parallel.shard(ordering.apply(grad), 1))
    found = [ordering.invert(parallel.unshard(t.detach(), 1)) for t in (out, *gradients)]
    return {"errors": [float((a - b).abs().max()) for a, b in zip(found, (alone, *expected), strict=True)]}


def run_model(task: Callable[..., object], mesh: DeviceMesh, *arguments: object) -> object:
    """A task of `model_tasks`, which makes a mesh of two dimensions as this pool does."""
    return task(mesh, make, *arguments)


TASKS = {
    "repeat": repeat,
    "attend": attend,
    "attend_sparse": attend_sparse,
    "train": train,
    "under_ordering": under_ordering,
    "captured": captured,
    "collective": collective,
    "broken": broken,
    **{f"model {name}": partial(run_model, task) for name, task in model_tasks.TASKS.items()},
}


def main() -> None:
    """Connect, join the process group, serve."""
    address, rank, world, store = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    groups = {size: dist.new_group(list(range(size))) for size in range(1, world + 1)}
    meshes = {}
    with Client(address, authkey=b"pool") as connection:
        connection.send(rank)
        while True:
            try:
                task, size, *arguments = connection.recv()
            except EOFError:
                break
            try:
                if size not in meshes:
                    meshes[size] = DeviceMesh.from_group(groups[size], "cpu")
                connection.send(("done", TASKS[task](meshes[size], *arguments)))
            except Exception:
                connection.send(("raised", traceback.format_exc()))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
