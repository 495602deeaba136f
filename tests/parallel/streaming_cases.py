"""What the tests of streaming share: checks against the dense oracle, counted memory, a device that lags."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from dilated_attention_pytorch import Streaming, dilated_attention_with_lse
from dilated_attention_pytorch.parallel.streaming_transfer import Copy, DirectMover, Slot
from dilated_attention_pytorch.testing import Case, error_bound, largest_summands, max_error, oracle, results


def violations_of(case: Case, streaming: Streaming, backend: str = "auto") -> list[str]:
    """Where streamed results leave bound B of the dense oracle; empty when all is well."""
    tensors, options = case.tensors(), case.options()
    seed = None
    if case.dropout_p:
        torch.default_generator.manual_seed(case.seed)
        seed = int(torch.randint(2**62, (1,)))
        torch.default_generator.manual_seed(case.seed)
    attend = partial(dilated_attention_with_lse, parallel=streaming, backend=backend, **options)
    got = results(attend, tensors, grad_lse=case.grad_lse)
    dense, exact = partial(oracle, seed=seed, **options), [t.double() for t in tensors]
    gold, eager = (results(dense, inputs, grad_lse=case.grad_lse) for inputs in (exact, tensors))
    found = []
    for index, (name, actual) in enumerate(got.items()):
        dtype = torch.promote_types(case.dtype, torch.float32) if name == "lse" else case.dtype
        error, bound = max_error(actual, gold[name]), error_bound(gold[name], eager[name], dtype)
        if not error <= bound:
            summand = largest_summands(exact, grad_lse=case.grad_lse, seed=seed, **options)[index]
            bound = error_bound(gold[name], eager[name], dtype, summand=summand)
        if not (error <= bound < float("inf") and actual.dtype == dtype):
            found.append(f"{name} ({actual.dtype}): error {error:.3g}, bound {bound:.3g}, {streaming}, {case}")
    return found


def counted(function: Callable[[], Any]) -> tuple[int, Any]:
    """Most bytes that PyTorch's CPU allocator held at once during a call, and what it returned."""
    for _ in range(5):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            result = function()
        live = peak = 0
        events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
        for event in sorted(events, key=lambda e: e.start_ns()):
            live += event.nbytes()
            peak = max(peak, live)
        if peak > sum(t.nbytes for t in result):
            return peak, result
    # On a busy machine the profiler now and then misses the beginning, but not every time.
    raise AssertionError("the profiler does not even see the results")


class LaggingMover(DirectMover):
    """Two slots and copies that happen as late as the order allows, as on a GPU whose copies lag."""

    depth = 2

    def __init__(self, moved: Any) -> None:
        super().__init__(moved)
        self.waiting: dict[int, list[tuple[Any, Sequence[Copy]]]] = {}  # by feed: they do not wait for each other
        self.downloads = 0

    def upload(self, copies: Sequence[Copy], slot: Slot) -> Any:
        token = object(), slot.feed
        slot.memory.fill_(0xFF)  # NaN: what was there is gone from here on
        self.waiting.setdefault(slot.feed, []).append((token, copies))
        return token

    def arrived(self, token: Any) -> None:
        waiting = self.waiting[token[1]]
        while waiting:
            first, copies = waiting.pop(0)
            super().upload(copies, None)
            if first is token:
                return

    def download(self, copies: Sequence[Copy]) -> Callable[[], None]:
        self.downloads += 1
        assert self.downloads <= 2

        def finish() -> None:
            self.downloads -= 1
            super(LaggingMover, self).download(copies)

        return finish
