"""Comparing attention over sequence lengths: who takes part, how it is timed, what the times say."""

from .analysis import Crossover, Exponent, crossovers, exponents
from .contenders import CONTENDERS, Contender, Setting, choose_contenders
from .measure import Measurement
from .plot import draw
from .report import report
from .sweep import check_numerics, sweep

__all__ = [
    "CONTENDERS",
    "Contender",
    "Crossover",
    "Exponent",
    "Measurement",
    "Setting",
    "check_numerics",
    "choose_contenders",
    "crossovers",
    "draw",
    "exponents",
    "report",
    "sweep",
]
