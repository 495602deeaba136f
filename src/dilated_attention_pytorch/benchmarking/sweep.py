"""All contenders over all lengths, each until it is too slow or memory runs out; and whether ours is right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial

import torch

from ..verification import verify
from .contenders import Contender, Setting
from .measure import PASSES, Measurement, Pass, is_out_of_memory, measure

HOPELESS = 10
"""A run that would take this many times the limit, going by its operations and the length before, is not begun."""


@dataclass(frozen=True)
class Numerics:
    """Largest errors of one of our contenders against the reference in float64, and the bounds they have to keep."""

    contender: str
    length: int
    backend: str
    errors: dict[str, float]
    bounds: dict[str, float]
    passed: bool | None
    """None where memory ran out."""
    detail: str = ""


def check_numerics(contender: Contender, setting: Setting, length: int) -> Numerics:
    """Outputs and gradients of one of our contenders at one length; not checked where memory runs out."""
    shape, pattern = setting.shape(length), setting.pattern
    try:
        found = verify(
            shape, shape, shape, pattern.segment_lengths, pattern.dilation_rates,
            device=setting.device, dtype=setting.dtype, backend=contender.backend, is_causal=setting.is_causal,
        )  # fmt: skip
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return Numerics(contender.name, length, contender.backend, {}, {}, None, "not checked: out of memory")
    errors = {check.name: check.error for check in found.checks}
    bounds = {check.name: check.bound for check in found.checks}
    return Numerics(contender.name, length, found.backend, errors, bounds, found.passed)


def sweep(
    contenders: Sequence[Contender], setting: Setting, lengths: Sequence[int], *, max_seconds: float
) -> Iterator[Measurement]:
    """Measure length by length; every contender, length and pass comes exactly once, with a status if not a time."""
    absent = {contender.name: contender.absent(setting) for contender in contenders}
    stopped: dict[tuple[str, Pass], Measurement] = {}
    before: dict[tuple[str, Pass], tuple[int, float, int]] = {}  # length, seconds, operations of the last time
    with torch.cuda.device(setting.device) if setting.device.type == "cuda" else nullcontext():
        for length in lengths:
            for contender in contenders:
                operations = (0, 0) if absent[contender.name] else setting.flops(contender.family, length)
                prepare = cache(partial(contender.prepare, setting, length))  # once for both passes
                for which, flops in zip(PASSES, operations, strict=True):
                    key = (contender.name, which)
                    if reason := absent[contender.name]:
                        yield Measurement(contender.name, length, which, "absent", reason)
                        continue
                    if stop := stopped.get(key) or stopped.get((contender.name, "forward")):
                        detail = f"not run: {stop.which} is {stop.status} at N={stop.length:,} ({stop.detail})"
                        yield Measurement(contender.name, length, which, stop.status, detail)
                        continue
                    result = _hopeless(contender, length, which, flops, before.get(key), max_seconds)
                    result = result or measure(
                        contender.name, prepare, setting, length, which, flops, max_seconds=max_seconds
                    )
                    if result.milliseconds is not None:
                        before[key] = (length, result.milliseconds / 1e3, flops)
                    elif result.status in ("too slow", "out of memory"):
                        stopped[key] = result
                    yield result


def _hopeless(
    contender: Contender,
    length: int,
    which: Pass,
    flops: int,
    before: tuple[int, float, int] | None,
    max_seconds: float,
) -> Measurement | None:
    """A run that is not begun, for it would take far too long."""
    if before is None:
        return None
    earlier, seconds, work = before
    expected = seconds * flops / max(1, work)
    if expected <= HOPELESS * max_seconds:
        return None
    detail = f"not run: about {expected:.3g} s going by N={earlier:,}"
    return Measurement(contender.name, length, which, "too slow", detail)
