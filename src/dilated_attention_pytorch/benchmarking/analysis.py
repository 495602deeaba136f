"""What the times say: how they grow with the length, and from which length on ours is faster than dense."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from .contenders import Contender
from .measure import PASSES, Measurement

Times = Mapping[int, float]
"""Milliseconds by length."""
Finding = Literal["interpolated", "first measured", "not reached", "nothing to compare"]


@dataclass(frozen=True)
class Exponent:
    """Time grows as length to the power of ``value`` over the upper half of the lengths (None: fewer than two)."""

    contender: str
    which: str
    value: float | None
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Crossover:
    """From ``length`` on, to the longest measured, ours is faster than the fastest dense attention.

    ``how`` says where the length is from: "interpolated" between two measured ones on log-log axes, "first measured"
    (it may lie below), "not reached" or "nothing to compare" (then it is None).
    """

    which: str
    ours: str
    length: float | None
    how: Finding
    compared: tuple[int, ...]


def fit_exponent(times: Times) -> float | None:
    """Least-squares slope of log time over log length.

    >>> round(fit_exponent({2: 3.0, 4: 12.0, 8: 48.0}), 6)
    2.0
    """
    if len(times) < 2:
        return None
    x, y = [math.log(n) for n in times], [math.log(t) for t in times.values()]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return above / sum((a - mean_x) ** 2 for a in x)


def upper_half(times: Times) -> dict[int, float]:
    """The longer half of the lengths, rounded up, and at least two where there are."""
    kept = sorted(times)[-max(2, -(-len(times) // 2)) :]
    return {length: times[length] for length in kept}


def find_crossover(ours: Times, dense: Times) -> tuple[float | None, Finding]:
    """The length from which ours stays faster on all common lengths, and how it was found (see `Crossover`).

    >>> find_crossover({10: 4.0, 1000: 4.0}, {10: 2.0, 1000: 8.0})
    (100.0, 'interpolated')
    """
    common = sorted(ours.keys() & dense.keys())
    if not common:
        return None, "nothing to compare"
    first = len(common)
    while first and ours[common[first - 1]] < dense[common[first - 1]]:
        first -= 1
    if first == len(common):
        return None, "not reached"
    if first == 0:
        return float(common[0]), "first measured"
    low, high = common[first - 1], common[first]
    slower, faster = (math.log(ours[n] / dense[n]) for n in (low, high))
    share = slower / (slower - faster)
    return round(math.exp(math.log(low) + share * (math.log(high) - math.log(low))), 6), "interpolated"


def times_of(measurements: Sequence[Measurement], name: str, which: str) -> dict[int, float]:
    """Milliseconds by length of one contender's pass; ``which`` may be "both", the two passes together."""
    passes = PASSES if which == "both" else (which,)
    found = [
        {m.length: m.milliseconds for m in measurements if (m.contender, m.which) == (name, p) and m.milliseconds}
        for p in passes
    ]
    return {n: sum(times[n] for times in found) for n in sorted(found[0]) if all(n in times for times in found)}


def exponents(contenders: Sequence[Contender], measurements: Sequence[Measurement]) -> list[Exponent]:
    """The exponent of every contender that has times, pass by pass."""
    found = []
    for contender in contenders:
        for which in PASSES:
            if times := upper_half(times_of(measurements, contender.name, which)):
                found.append(Exponent(contender.name, which, fit_exponent(times), tuple(times)))
    return found


def crossovers(contenders: Sequence[Contender], measurements: Sequence[Measurement]) -> list[Crossover]:
    """Every one of ours against the fastest dense attention of each length, by pass and for both together."""
    found = []
    for ours in (c for c in contenders if c.family == "ours"):
        for which in (*PASSES, "both"):
            mine = times_of(measurements, ours.name, which)
            dense: dict[int, float] = {}
            for contender in (c for c in contenders if c.family == "dense"):
                for n, t in times_of(measurements, contender.name, which).items():
                    dense[n] = min(t, dense.get(n, math.inf))
            length, how = find_crossover(mine, dense)
            found.append(Crossover(which, ours.name, length, how, tuple(sorted(mine.keys() & dense.keys()))))
    return found
