"""``dilated-attention bench``: comparisons on this machine. ``attention`` times attention over sequence lengths."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import shlex
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .bench_ordering import ordering
from .bench_parallel import parallel
from .errors import FAILED, INTERRUPTED, fail, one_line_errors
from .problem import Batch, Causal, Dtype, HeadDim, Rates, Segments, integers, read_problem

if TYPE_CHECKING:
    from rich.console import Console

    from ..benchmarking import Contender, Measurement, Setting
    from ..benchmarking.sweep import Numerics

RUNS = Path("runs")
LENGTHS = {"cuda": (2048, 1048576), "cpu": (1024, 16384)}
HEADS = {"cuda": 16, "cpu": 4}
DTYPES = {"cuda": Dtype.bfloat16, "cpu": Dtype.float32}


class Preset(StrEnum):
    """Patterns to choose from."""

    longnet = "longnet"
    gigapath = "gigapath"


PATTERNS = {
    Preset.longnet: ("2048,4096,8192,16384,32768", "1,2,4,8,16"),
    Preset.gigapath: ("1024,4096,32768,131072,1048576", "1,2,4,8,16"),
}

bench = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode="rich")


@bench.callback()
def main() -> None:
    """Compare attention over sequence lengths: times, memory, a plot."""


bench.command()(parallel)
bench.command()(ordering)


@dataclass
class Comparison:
    """What is compared, and what is found so far."""

    setting: Setting
    contenders: list[Contender]
    lengths: list[int]
    folder: Path
    run: dict[str, Any]
    numerics: list[Numerics] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)

    def report(self, *, complete: bool) -> dict[str, Any]:
        """Everything as plain data."""
        from ..benchmarking import report

        return report(
            self.contenders, self.setting, self.lengths, self.measurements, self.numerics,
            run=self.run, complete=complete,
        )  # fmt: skip

    def write(self, *, complete: bool) -> None:
        """bench.json, whole or not at all."""
        from ..training.files import replace_file

        text = json.dumps(self.report(complete=complete), indent=1, allow_nan=False) + "\n"
        replace_file(self.folder / "bench.json", [text.encode()])

    def draw(self) -> bool:
        """bench.png; False without matplotlib."""
        from ..benchmarking import draw
        from ..training.files import replace_file

        if importlib.util.find_spec("matplotlib") is None:
            return False
        replace_file(self.folder / "bench.png", [draw(self.contenders, self.setting, self.measurements)])
        return True


@bench.command()
def attention(
    lengths: Annotated[str | None, typer.Option(help="Sequence lengths, e.g. 4096,65536.")] = None,
    min_length: Annotated[
        int | None, typer.Option(help="Or the first of lengths that double; by default 2048 on CUDA, 1024 on a CPU.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="The largest of them; by default 1048576 on CUDA, 16384 on a CPU.")
    ] = None,
    contenders: Annotated[
        str | None,
        typer.Option(
            help="Names with commas between: ours, ours-BACKEND (ours-sdpa, ...), torchscale, dense-cudnn, "
            "dense-flash, flex. By default ours, on the backend that auto picks, and all that are not ours."
        ),
    ] = None,
    preset: Annotated[
        Preset | None,
        typer.Option(help="Pattern: longnet (segments 2048 to 32768, the default) or gigapath (1024 to 1048576)."),
    ] = None,
    segments: Segments = None,
    rates: Rates = None,
    batch: Batch = 1,
    heads: Annotated[int | None, typer.Option(help="Heads; by default 16 on CUDA, 4 on a CPU.")] = None,
    head_dim: HeadDim = 64,
    causal: Causal = False,
    dtype: Annotated[Dtype | None, typer.Option(help="By default bfloat16 on CUDA, float32 on a CPU.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    max_seconds: Annotated[float, typer.Option(help="A contender stops growing when one run takes longer.")] = 2.0,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the results. By default runs/bench, numbered if that is taken.")
    ] = None,
) -> None:
    """Time dilated attention against torchscale, dense attention and FlexAttention over sequence lengths.

    The output folder gets bench.json (every measurement, versions, the command) and bench.png (time over length).
    Ours is checked against the reference first. Who cannot run here is listed with the reason, and who becomes too
    slow or runs out of memory too. Ctrl-C keeps what is measured.

    Exit code 1 where ours is wrong or a contender failed.
    """
    with one_line_errors():
        comparison = _read(
            lengths=lengths, min_length=min_length, max_length=max_length, contenders=contenders, preset=preset,
            segments=segments, rates=rates, batch=batch, heads=heads, head_dim=head_dim, causal=causal, dtype=dtype,
            device=device, max_seconds=max_seconds, output=output,
        )  # fmt: skip
    with one_line_errors():
        _run(comparison, max_seconds)


def _read(
    *,
    lengths: str | None,
    min_length: int | None,
    max_length: int | None,
    contenders: str | None,
    preset: Preset | None,
    segments: str | None,
    rates: str | None,
    batch: int,
    heads: int | None,
    head_dim: int,
    causal: bool,
    dtype: Dtype | None,
    device: str,
    max_seconds: float,
    output: Path | None,
) -> Comparison:
    """The comparison that the options ask for; ValueError where one makes no sense."""
    from ..benchmarking import Setting, choose_contenders
    from ..patterns import DilatedPattern
    from ..training import parse_device
    from .doctor import devices, versions

    if not 0 < max_seconds < math.inf:
        raise ValueError(f"--max-seconds is {max_seconds}; give a positive number")
    if preset is not None and (segments, rates) != (None, None):
        raise ValueError("both a --preset and --segments or --rates are given; give one of them")
    if segments is rates is None:
        segments, rates = PATTERNS[preset or Preset.longnet]
    names = None if contenders is None else [name for part in contenders.split(",") if (name := part.strip())]
    chosen = choose_contenders(names)
    kind = parse_device(device).type
    dtype, heads = dtype or DTYPES[kind], HEADS[kind] if heads is None else heads
    wanted = _lengths(lengths, min_length, max_length, LENGTHS[kind])
    (shape, *_, segment_lengths, dilation_rates), options = read_problem(
        length=wanted[0], query_length=None, batch=batch, heads=heads, kv_heads=None, head_dim=head_dim,
        segments=segments, rates=rates, dtype=dtype, device=device,
    )  # fmt: skip
    where = options["device"]
    setting = Setting(
        shape[0], heads, head_dim, options["dtype"], where, causal, DilatedPattern(segment_lengths, dilation_rates)
    )
    absent = {contender.name: contender.absent(setting) for contender in chosen}
    if all(absent.values()):
        raise ValueError(f"no contender can run here: {'; '.join(f'{name}: {why}' for name, why in absent.items())}")
    folder = _folder(output)
    command = [
        "dilated-attention", "bench", "attention", "--lengths", ",".join(map(str, wanted)),
        "--contenders", ",".join(absent), "--segments", segments, "--rates", rates, "--batch", batch,
        "--heads", heads, "--head-dim", head_dim, *(["--causal"] if causal else []), "--dtype", dtype.value,
        "--device", device, "--max-seconds", f"{max_seconds:g}", "--output", folder,
    ]  # fmt: skip
    known = devices()
    index = "cpu" if kind == "cpu" else f"cuda:{where.index or 0}"
    run = {
        "command": shlex.join(map(str, command)),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "versions": versions(),
        "device": known.get(index, str(where)),
    }
    return Comparison(setting, chosen, wanted, folder, run)


def _lengths(text: str | None, low: int | None, high: int | None, default: tuple[int, int]) -> list[int]:
    """Lengths in growing order, each once."""
    if text is not None:
        if (low, high) != (None, None):
            raise ValueError("both --lengths and --min-length or --max-length are given; give one of them")
        found = sorted(set(integers("--lengths", text)))
        if found[0] < 1:
            raise ValueError(f"--lengths has {found[0]}; every length must be at least 1")
        return found
    first, last = default[0] if low is None else low, default[1] if high is None else high
    if first < 1:
        raise ValueError(f"--min-length is {first}; give at least 1")
    if first > last:
        raise ValueError(f"there are no lengths from {first} to {last}; give a --max-length of at least --min-length")
    return list(itertools.takewhile(lambda n: n <= last, (first << k for k in itertools.count())))


def _folder(given: Path | None) -> Path:
    """The folder of the results, made and tried."""
    numbered = (RUNS / ("bench" if n == 1 else f"bench-{n}") for n in itertools.count(1))
    folder = given or next(path for path in numbered if not path.exists())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"cannot write into the folder {str(folder)!r}: {error.strerror}") from None
    return folder


def _run(comparison: Comparison, max_seconds: float) -> None:
    from rich.console import Console

    from ..benchmarking import check_numerics, sweep

    console, setting, complete = Console(), comparison.setting, False
    dtype = str(setting.dtype).removeprefix("torch.")
    _say(console, f"{comparison.run['device']}; {setting.heads} heads of {setting.head_dim}, {dtype}")
    here = []
    for contender in comparison.contenders:
        if reason := contender.absent(setting):
            _say(console, f"absent: {contender.label}: {reason}")
        else:
            here.append(contender)
    try:
        for contender in (c for c in here if c.family == "ours"):
            checked = check_numerics(contender, setting, comparison.lengths[0])
            comparison.numerics.append(checked)
            _say(console, f"checked: {contender.label} at N={checked.length:,}: {_errors(checked)}")
        if any(checked.passed is False for checked in comparison.numerics):
            comparison.write(complete=False)
            raise fail("ours differs from the reference by more than its bound; nothing was timed", FAILED)
        for measurement in sweep(comparison.contenders, setting, comparison.lengths, max_seconds=max_seconds):
            comparison.measurements.append(measurement)
            if measurement.status == "absent":
                continue
            _say(console, _line(comparison, measurement))
            if measurement.which == "backward":  # so that a kill leaves what is measured
                comparison.write(complete=False)
        complete = True
    except KeyboardInterrupt:
        _say(console, "\nInterrupted; what is measured is kept")
    comparison.write(complete=complete)
    drawn = comparison.draw()
    _show(console, comparison, drawn)
    if not complete:
        raise typer.Exit(INTERRUPTED)
    if failed := [m for m in comparison.measurements if m.status == "failed"]:
        raise fail(f"{len(failed)} measurements failed; the first: {failed[0].contender}, {failed[0].detail}", FAILED)


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _errors(checked: Numerics) -> str:
    if checked.passed is None:
        return checked.detail
    parts = [f"{name} {error:.2g} (bound {checked.bounds[name]:.2g})" for name, error in checked.errors.items()]
    return f"backend {checked.backend}, largest error of {', '.join(parts)}"


def _line(comparison: Comparison, measurement: Measurement) -> str:
    label = next(c.label for c in comparison.contenders if c.name == measurement.contender)
    found = measurement.status if measurement.milliseconds is None else _milliseconds(measurement.milliseconds)
    detail = f"  {measurement.detail}" if measurement.detail else ""
    return f"N={measurement.length:<10,}{label:<18}{measurement.which:<10}{found}{detail}"


def _milliseconds(value: float) -> str:
    """Three significant digits, and no exponent.

    >>> [_milliseconds(v) for v in (0.01234, 1.2345, 12345.6)]
    ['0.0123 ms', '1.23 ms', '12,346 ms']
    """
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f} ms"


def _show(console: Console, comparison: Comparison, drawn: bool) -> None:
    """The tables at the end."""
    from rich.table import Table

    found = comparison.report(complete=True)
    labels = {c["name"]: c["label"] for c in found["contenders"]}
    absent = {c["name"] for c in found["contenders"] if c["absent"]}
    table = Table("N", "contender", title="Time, useful TFLOP/s, and memory beyond what was there before")
    for which in ("forward", "backward"):
        for name in (which, "TFLOP/s", "MiB"):
            table.add_column(name, justify="right")
    by_key = {(m["length"], m["contender"], m["which"]): m for m in found["measurements"]}
    for length in comparison.lengths:
        table.add_section()
        for name in (name for name in labels if name not in absent):
            cells = [c for which in ("forward", "backward") for c in _cells(by_key[length, name, which])]
            table.add_row(f"{length:,}", labels[name], *cells)
    console.print(table)
    for row in found["exponents"]:
        if row["value"] is not None and row["contender"] in labels:
            over = f"N={row['lengths'][0]:,} to {row['lengths'][-1]:,}"
            _say(console, f"{labels[row['contender']]}: {row['which']} time grows as N^{row['value']:.2f} over {over}")
    for row in found["crossovers"]:
        _say(console, _crossover(row, labels))
    for contender in found["contenders"]:
        if contender["note"] and not contender["absent"]:
            _say(console, f"{contender['label']}: {contender['note']}")
    _say(console, f"written: {comparison.folder / 'bench.json'}")
    if drawn:
        _say(console, f"written: {comparison.folder / 'bench.png'}")
    else:
        _say(console, "no bench.png: matplotlib is not installed (pip install matplotlib)")


def _cells(measurement: dict[str, Any]) -> Sequence[str]:
    if measurement["milliseconds"] is None:
        return measurement["status"], "-", "-"
    peak = "-" if measurement["peak_bytes"] is None else f"{measurement['peak_bytes'] / 2**20:,.1f}"
    return _milliseconds(measurement["milliseconds"]), f"{measurement['tflops']:.3g}", peak


def _crossover(row: dict[str, Any], labels: dict[str, str]) -> str:
    which = "forward and backward together" if row["which"] == "both" else row["which"]
    start = f"{labels[row['ours']]}, {which}: "
    if row["length"] is None:
        if row["how"] == "not reached":
            return f"{start}not faster than dense at N={row['compared'][-1]:,}, the longest that both ran"
        return f"{start}no length that dense attention ran too"
    where = "interpolated" if row["how"] == "interpolated" else "the shortest measured"
    longest = f"{row['compared'][-1]:,}, the longest that both ran"
    return f"{start}faster than dense from N={row['length']:,.0f} ({where}) to {longest}"
