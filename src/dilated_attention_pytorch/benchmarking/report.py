"""Everything that a comparison found, as plain data for JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from .analysis import crossovers, exponents
from .contenders import Contender, Setting
from .measure import PASSES, Measurement
from .sweep import Numerics


def report(
    contenders: Sequence[Contender],
    setting: Setting,
    lengths: Sequence[int],
    measurements: Sequence[Measurement],
    numerics: Sequence[Numerics],
    *,
    run: Mapping[str, Any],
    complete: bool,
) -> dict[str, Any]:
    """The comparison as one dictionary; what an interruption left out is listed as "not run"."""
    measured = {(m.contender, m.length, m.which) for m in measurements}
    missing = [
        Measurement(contender.name, length, which, "not run", "interrupted")
        for length in lengths
        for contender in contenders
        for which in PASSES
        if (contender.name, length, which) not in measured
    ]
    pattern = setting.pattern
    return {
        **run,
        "complete": complete,
        "threads": torch.get_num_threads(),
        "setting": {
            "batch": setting.batch,
            "heads": setting.heads,
            "head_dim": setting.head_dim,
            "dtype": str(setting.dtype).removeprefix("torch."),
            "device": str(setting.device),
            "is_causal": setting.is_causal,
            "segment_lengths": pattern.segment_lengths,
            "dilation_rates": pattern.dilation_rates,
            "lengths": list(lengths),
        },
        "contenders": [
            {
                "name": contender.name,
                "label": contender.label,
                "family": contender.family,
                "absent": contender.absent(setting),
                "note": contender.note,
            }
            for contender in contenders
        ],
        "numerics": [asdict(n) for n in numerics],
        "crossovers": [asdict(c) for c in crossovers(contenders, measurements)],
        "exponents": [asdict(e) for e in exponents(contenders, measurements)],
        "measurements": [asdict(m) for m in (*measurements, *missing)],
    }
