"""``dilated-attention plan``: what attention over a long sequence costs on many devices, before there are any."""

from __future__ import annotations

import importlib.util
import io
import json
import statistics
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .bench_parallel import ShardLayout
from .errors import one_line_errors
from .problem import Batch, Dtype, ElementType, HeadDim, Heads, KvHeads, Segments, integers
from .problem import Rates as DilationRates

if TYPE_CHECKING:
    from ..parallel import Rates
    from ..parallel.cluster import Check, Prediction


class Strategy(StrEnum):
    """How ranks share the work."""

    auto = "auto"
    ring = "ring"
    gather = "gather"
    ulysses = "ulysses"
    hybrid = "hybrid"


def plan(
    tokens: Annotated[str, typer.Option(help="Lengths of the sequence, e.g. 1048576,1000000000.")] = (
        "1048576,16777216,134217728,1000000000"
    ),
    devices: Annotated[str, typer.Option(help="Numbers of devices, e.g. 8,64,512.")] = "8,64,512",
    segments: Segments = None,
    rates: DilationRates = None,
    ratio: Annotated[int, typer.Option(help="Growth of segments and rates by LongNet's rule, from 2048 on.")] = 4,
    batch: Batch = 1,
    heads: Heads = 16,
    kv_heads: KvHeads = None,
    head_dim: HeadDim = 128,
    causal: Annotated[
        bool, typer.Option("--causal/--full", help="Attend only to rows at or before, or to all.")
    ] = True,
    layout: Annotated[ShardLayout, typer.Option(help="Zigzag gives ranks equal causal work.")] = ShardLayout.zigzag,
    dtype: ElementType = Dtype.bfloat16,
    strategy: Annotated[Strategy, typer.Option(help="auto takes the fastest by the model.")] = Strategy.auto,
    measured: Annotated[
        Path | None, typer.Option(help="A report of `bench parallel`: its rates count, and the model is checked on it.")
    ] = None,
    forward_tflops: Annotated[float | None, typer.Option(help="Useful TFLOP/s of a device, forward.")] = None,
    backward_tflops: Annotated[float | None, typer.Option(help="The same, backward.")] = None,
    bandwidth: Annotated[float | None, typer.Option(help="GB/s that a device sends while it receives.")] = None,
    latency: Annotated[float | None, typer.Option(help="Microseconds before an exchange moves anything.")] = None,
    output: Annotated[Path, typer.Option(help="The PNG; a JSON file of the same name stands beside it.")] = Path(
        "runs/plan.png"
    ),
) -> None:
    """Predict one layer's attention on many devices: compute, exposed communication, bytes and memory of a rank.

    A model of integers and four rates. Without --measured they are those of H200 GPUs joined by NVLink. Links between
    machines are slower: give their --bandwidth. The picture needs matplotlib.
    """
    with one_line_errors():
        found, checks, used = _predict(
            tokens, devices, segments, rates, ratio, batch, heads, kv_heads, head_dim, causal, layout, dtype, strategy,
            measured,
            {
                "forward_flops": (forward_tflops, 1e12), "backward_flops": (backward_tflops, 1e12),
                "bandwidth": (bandwidth, 1e9), "latency": (latency, 1e-6),
            },
            output,
        )  # fmt: skip
        files = _write(output, found, checks, used)
    _show(found, checks, used)
    typer.echo("wrote " + " and ".join(map(str, files)))


def _predict(
    tokens: str,
    devices: str,
    segments: str | None,
    dilation_rates: str | None,
    ratio: int,
    batch: int,
    heads: int,
    kv_heads: int | None,
    head_dim: int,
    causal: bool,
    layout: ShardLayout,
    dtype: Dtype,
    strategy: Strategy,
    measured: Path | None,
    given: dict[str, tuple[float | None, float]],
    output: Path,
) -> tuple[list[Prediction], list[Check], Rates]:
    import torch

    from ..parallel import Rates
    from ..parallel.cluster import Check, check, predict, whole_call
    from ..patterns import DilatedPattern

    if output.suffix != ".png":
        raise ValueError(f"--output is {str(output)!r}; the picture is a PNG, give a name that ends in .png")
    if (segments is None) != (dilation_rates is None):
        raise ValueError("one of --segments and --rates is given; give both, or neither for LongNet's rule")
    used, checks = Rates(), list[Check]()
    if measured is not None:
        try:
            used, checks = check(json.loads(measured.read_text()))
        except json.JSONDecodeError as error:
            raise ValueError(f"{str(measured)!r} is no JSON file: {error}") from None
    values = {name: value * unit for name, (value, unit) in given.items() if value is not None}
    used = Rates(**{**vars(used), **values})
    kv = heads if kv_heads is None else kv_heads
    if min(batch, heads, kv, head_dim) < 1 or heads % kv:
        raise ValueError(f"--batch {batch}, --heads {heads}, --kv-heads {kv} and --head-dim {head_dim} do not fit")
    found = []
    for length in integers("--tokens", tokens):
        if length < 1:
            raise ValueError(f"--tokens has {length}; every length must be at least 1")
        if segments is None or dilation_rates is None:
            pattern = DilatedPattern.geometric(length, ratio=ratio)
        else:
            pattern = DilatedPattern(integers("--segments", segments), integers("--rates", dilation_rates))
        call = whole_call(
            pattern, tokens=length, batch=batch, heads=heads, kv_heads=kv, head_dim=head_dim,
            dtype=getattr(torch, dtype.value), is_causal=causal,
        )  # fmt: skip
        for count in integers("--devices", devices):
            if count < 1:
                raise ValueError(f"--devices has {count}; give at least 1")
            found.append(predict(call, count, strategy=strategy.value, layout=layout.value, rates=used))
    return found, checks, used


def _write(output: Path, found: list[Prediction], checks: list[Check], used: Rates) -> list[Path]:
    """The JSON file, and the picture where matplotlib is installed."""
    from ..training.files import replace_file

    output.parent.mkdir(parents=True, exist_ok=True)
    rows = [{**vars(one), "seconds": one.seconds, "tokens_per_second": one.tokens_per_second} for one in found]
    report = {"rates": vars(used), "predictions": rows, "checks": [{**vars(c), "error": c.error} for c in checks]}
    beside = output.with_suffix(".json")
    replace_file(beside, [(json.dumps(report, indent=1) + "\n").encode()])
    if importlib.util.find_spec("matplotlib") is None:
        return [beside]
    replace_file(output, [picture(found)])
    return [beside, output]


def _show(found: list[Prediction], checks: list[Check], used: Rates) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=max(100, Console().width))
    table = Table(title="One layer's attention, forward and backward")
    for name in ("tokens", "devices", "strategy", "compute", "exposed", "tokens/s", "sent", "memory"):
        table.add_column(name, justify="left" if name == "strategy" else "right", no_wrap=True)
    for one in found:
        table.add_row(
            f"{one.tokens:,}", f"{one.devices:,}", one.strategy, _time(one.compute_seconds), _time(one.exposed_seconds),
            f"{one.tokens_per_second:.3g}", _size(one.bytes_sent), _size(one.memory_bytes),
        )  # fmt: skip
    console.print(table)
    console.print(
        f"with {used.forward_flops / 1e12:.3g} TFLOP/s forward, {used.backward_flops / 1e12:.3g} backward, "
        f"{used.bandwidth / 1e9:.3g} GB/s, {used.latency * 1e6:.3g} us an exchange; sent and memory are of a rank",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    if checks:
        table = Table(title="The model against what was measured")
        for name in ("tokens", "devices", "strategy", "measured", "predicted", "error"):
            table.add_column(name, justify="left" if name == "strategy" else "right", no_wrap=True)
        for point in checks:
            table.add_row(
                f"{point.tokens:,}", f"{point.devices:,}", point.strategy, _time(point.measured_seconds),
                _time(point.predicted_seconds), f"{point.error:+.0%}",
            )  # fmt: skip
        console.print(table)
        median = statistics.median(abs(point.error) for point in checks)
        console.print(f"median error of the model: {median:.0%}", highlight=False)


def _time(seconds: float) -> str:
    """Three significant digits.

    >>> _time(0.01234), _time(12.345)
    ('12.3 ms', '12.3 s')
    """
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _size(count: int) -> str:
    return f"{count / 2**30:.3g} GiB" if count >= 2**30 else f"{count / 2**20:.3g} MiB"


def picture(found: Sequence[Prediction]) -> bytes:
    """A PNG: seconds (solid; dashed without communication) and memory of a rank over the number of devices."""
    from matplotlib.figure import Figure

    from ..benchmarking.plot import COLORS, MARKERS, short

    figure = Figure(figsize=(11.5, 5), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, tokens in enumerate(sorted({one.tokens for one in found})):
        line = sorted((one for one in found if one.tokens == tokens), key=lambda one: one.devices)
        x = [one.devices for one in line]
        style: dict[str, Any] = {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)]}
        left.plot(x, [one.seconds for one in line], label=f"{short(tokens)} tokens", **style)
        left.plot(x, [one.compute_seconds for one in line], linestyle="--", linewidth=1, **style)
        right.plot(x, [one.memory_bytes / 2**30 for one in line], **style)
    for axes, label in ((left, "seconds, forward and backward"), (right, "GiB of a rank")):
        axes.set(xscale="log", yscale="log", xlabel="devices", ylabel=label)
        axes.grid(alpha=0.3, which="both")
    left.set_title("Time of one layer's attention (dashed: computing alone)")
    right.set_title("Memory")
    figure.legend(loc="outside lower center", ncols=6, frameon=False)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()
