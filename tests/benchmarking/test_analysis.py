"""Exponents and crossovers of times that are known."""

from __future__ import annotations

import math

import pytest

from dilated_attention_pytorch.benchmarking import choose_contenders, crossovers, exponents
from dilated_attention_pytorch.benchmarking.analysis import find_crossover, fit_exponent, upper_half
from dilated_attention_pytorch.benchmarking.measure import Measurement

LENGTHS = [1024 << k for k in range(6)]


def measured(name: str, which: str, time_of) -> list[Measurement]:
    return [Measurement(name, n, which, "ok", milliseconds=time_of(n)) for n in LENGTHS]


@pytest.mark.parametrize("power", [1, 2])
def test_the_exponent_of_synthetic_times(power: int):
    assert fit_exponent({n: 3e-5 * n**power for n in LENGTHS}) == pytest.approx(power, abs=1e-9)


def test_the_exponent_is_of_the_upper_half():
    times = {n: 5.0 if n < 8192 else 5.0 * (n / 8192) ** 2 for n in LENGTHS}  # launches at first, then work
    assert list(upper_half(times)) == LENGTHS[3:]
    assert fit_exponent(upper_half(times)) == pytest.approx(2)
    assert fit_exponent(times) < 1.5
    assert list(upper_half({1: 1.0, 2: 1.0})) == [1, 2]
    assert fit_exponent({4: 1.0}) is None
    assert fit_exponent({}) is None


def test_the_crossover_is_interpolated_on_logarithms():
    ours, dense = {n: 0.01 * n for n in LENGTHS}, {n: n**2 / 3e5 for n in LENGTHS}
    length, how = find_crossover(ours, dense)
    assert how == "interpolated"
    assert length == pytest.approx(3000, rel=1e-6)


@pytest.mark.parametrize(
    ("ours", "dense", "found"),
    [
        ([1, 1, 1], [2, 2, 2], (10, "first measured")),
        ([2, 2, 2], [1, 1, 1], (None, "not reached")),
        ([1, 1, 2], [2, 2, 1], (None, "not reached")),  # faster for a while, slower at the end
        ([1, 1, 1], [1, 1, 1], (None, "not reached")),
        ([1, 2, 1], [2, 1, 2], (math.sqrt(10 * 1000 * 10), "interpolated")),  # it counts from where it stays
        ([], [], (None, "nothing to compare")),
    ],
)
def test_the_crossover_is_where_ours_stays_faster(ours, dense, found):
    lengths = (10, 100, 1000)
    length, how = find_crossover(dict(zip(lengths, ours, strict=False)), dict(zip(lengths, dense, strict=False)))
    assert how == found[1]
    assert length == (None if found[0] is None else pytest.approx(found[0]))


def test_lengths_that_only_one_ran_are_not_compared():
    assert find_crossover({10: 1.0, 100: 1.0}, {1: 1.0}) == (None, "nothing to compare")
    assert find_crossover({10: 2.0, 100: 1.0, 1000: 1.0}, {10: 1.0}) == (None, "not reached")


def test_findings_take_the_fastest_dense_and_both_passes_together():
    contenders = choose_contenders(["ours", "dense-cudnn", "dense-flash"])
    measurements = []
    for which, factor in (("forward", 1), ("backward", 2)):
        measurements += measured("ours", which, lambda n, f=factor: f * 0.01 * n)
        measurements += measured("dense-cudnn", which, lambda n, f=factor: f * n**2 / 4e5)
        measurements += measured("dense-flash", which, lambda n, f=factor: f * n**2 / 3e5)
    found = {c.which: c for c in crossovers(contenders, measurements)}
    assert set(found) == {"forward", "backward", "both"}
    for crossover in found.values():
        assert crossover.length == pytest.approx(4000, rel=1e-6)
        assert crossover.compared == tuple(LENGTHS)
    slopes = {(e.contender, e.which): e.value for e in exponents(contenders, measurements)}
    assert slopes["ours", "forward"] == pytest.approx(1)
    assert slopes["dense-flash", "backward"] == pytest.approx(2)
