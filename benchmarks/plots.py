"""Pictures of results: what each benchmark's file holds, as bars and lines.

`charts_of` takes the content of a file in ``results/`` and knows by its command which benchmark made it; of one that it
does not know it shows every group of numbers. The site's pages are made from it (``docs/results.py``).
"""

from __future__ import annotations

import io
import math
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555")
"""Told apart under colour blindness."""
_MOST_GROUPS = 6


@dataclass(frozen=True)
class Bars:
    """A row of bars for each label, one for each series that has a value there."""

    title: str
    unit: str
    values: Mapping[str, Mapping[str, float]]
    """label -> series -> value."""
    errors: Mapping[str, float] | None = None
    """label -> standard error, for a single series."""


@dataclass(frozen=True)
class Lines:
    """Curves over a logarithmic axis; the other is logarithmic too where values differ much."""

    title: str
    x: str
    unit: str
    points: Mapping[str, Sequence[tuple[float, float]]]
    """series -> (x, y)."""


Chart = Bars | Lines


def script_of(record: Mapping[str, Any]) -> str:
    """The name of the benchmark that made a file, "" where its command names none.

    >>> script_of({"run": {"command": "python benchmarks/gpu.py --rows short"}})
    'gpu'
    """
    found = re.search(r"benchmarks/(\w+)\.py", record["run"]["command"])
    return found[1] if found else ""


def charts_of(record: Mapping[str, Any]) -> list[Chart]:
    """The charts of a file's content; those without a value are left out."""
    known = _KNOWN.get(script_of(record))
    charts = _with_values(known(record["results"])) if known else []
    return charts or _with_values(_groups(record["results"]))


def _with_values(charts: Iterable[Chart]) -> list[Chart]:
    return [chart for chart in charts if (chart.values if isinstance(chart, Bars) else chart.points)]


def draw(charts: Sequence[Chart]) -> bytes:
    """An SVG with the charts below each other."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    heights = [_height(chart) for chart in charts]
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "results", "font.size": 9}):
        figure = Figure(figsize=(8.5, sum(heights)), layout="constrained")
        panels: Any = figure.subplots(len(charts), 1, squeeze=False, height_ratios=heights)
        for axes, chart in zip(panels[:, 0], charts, strict=True):
            (_draw_bars if isinstance(chart, Bars) else _draw_lines)(axes, chart)
            axes.set_title(chart.title, fontsize=10, loc="left")
            axes.spines[["top", "right"]].set_visible(False)
        content = io.BytesIO()
        figure.savefig(content, format="svg", metadata={"Date": None}, facecolor="white")
    return content.getvalue()


def _height(chart: Chart) -> float:
    if isinstance(chart, Lines):
        return 3.2
    return 0.9 + sum(0.17 * len(series) + 0.12 for series in chart.values.values())


def _series(chart: Bars) -> list[str]:
    return list(dict.fromkeys(name for values in chart.values.values() for name in values))


def _draw_bars(axes: Any, chart: Bars) -> None:
    names, place, ticks = _series(chart), 0.0, []
    for label, values in chart.values.items():
        first = place
        for name, value in values.items():
            color, error = COLORS[names.index(name) % len(COLORS)], (chart.errors or {}).get(label)
            if error is None:
                axes.barh(place, value, height=0.85, color=color)
            else:  # near each other: the axis need not begin at 0
                axes.errorbar(value, place, xerr=error, color=color, marker="o", capsize=3)
            text = f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
            axes.annotate(text, (value + (error or 0), place), xytext=(3, 0), textcoords="offset points", va="center")
            place += 1
        ticks.append(((first + place - 1) / 2, label))
        place += 0.7
    axes.set_yticks([middle for middle, _ in ticks], [label for _, label in ticks])
    axes.set(xlabel=chart.unit, ylim=(place - 0.2, -0.8))
    axes.margins(x=0.12)
    _legend(axes, names, "s")


def _draw_lines(axes: Any, chart: Lines) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

    for n, points in enumerate(chart.points.values()):
        axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3.5, color=COLORS[n % len(COLORS)])
    values = [y for points in chart.points.values() for _, y in points]
    axes.set(xlabel=chart.x, ylabel=chart.unit, xscale="log")
    if max(values) > 3 * min(values):
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, 1.1 * max(values))
    axes.set_xticks(sorted({x for points in chart.points.values() for x, _ in points}))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
    axes.tick_params(axis="x", labelrotation=30)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    _legend(axes, list(chart.points), "o")


def _legend(axes: Any, names: list[str], marker: str) -> None:
    from matplotlib.lines import Line2D

    if len(names) > 1:
        handles = [
            Line2D([], [], color=COLORS[n % len(COLORS)], marker=marker, linestyle="", label=name)
            for n, name in enumerate(names)
        ]
        axes.legend(handles=handles, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _gpu(rows: Sequence[Mapping[str, Any]]) -> Iterator[Chart]:
    def label(row: Mapping[str, Any]) -> str:
        causal = " causal" if row["causal"] and "causal" not in row["name"] else ""
        return f"{row['name']}{causal}, N={row['n']:,}, D={row['d']}"

    for direction in ("forward", "backward"):
        rates: dict[str, dict[str, float]] = {}
        for row in rows:
            if direction in row and row["name"] not in ("short", "long"):
                found = rates.setdefault(label(row), {})
                found[row["backend"]] = row[direction]["tflops"]
                if not math.isnan(dense := row[direction]["dense_tflops"]):
                    found["dense, best"] = dense
        ordered = {
            row: dict(sorted(found.items(), key=lambda item: item[0] == "dense, best")) for row, found in rates.items()
        }
        yield Bars(f"{direction}, bfloat16, 16 heads", "useful TFLOP/s", ordered)
    for name, title in (("short", "few rows, forward, D=64"), ("long", "many rows, D=64")):
        times: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            if row["name"] == name:
                for direction in ("forward",) if name == "short" else ("forward", "backward"):
                    if direction in row:
                        key = row["backend"] if name == "short" else f"{row['backend']}, {direction}"
                        times.setdefault(key, []).append((row["n"], row[direction]["ms"]))
                if "dense_ms_of_this_n" in row:
                    times.setdefault("dense", []).append((row["n"], row["dense_ms_of_this_n"]))
        yield Lines(title, "rows", "milliseconds", {key: sorted(set(points)) for key, points in times.items()})


def _slide_encoder(rows: Sequence[Mapping[str, Any]]) -> Iterator[Chart]:
    for field, what in (("ms", "milliseconds"), ("gib", "GiB at the peak")):
        for work in ("forward", "training step"):
            points: dict[str, list[tuple[float, float]]] = {}
            for row in rows:
                for key, found in row.items():
                    name, _, done = key.partition(": ")
                    if done == work and isinstance(found, Mapping) and field in found:
                        points.setdefault(name, []).append((row["tiles"], found[field]))
            yield Lines(f"{work} of a slide", "tiles", what, points)


def _ordering(results: Mapping[str, Any]) -> Iterator[Chart]:
    if "permutation" in results:
        yield from _ordering_times(results)
        return
    near: dict[str, dict[str, float]] = {}
    for row in results["locality"]:
        near.setdefault(" x ".join(map(str, row["shape"])), {})[row["order"]] = row["neighbours_inside"]
    yield Bars("neighbours in space within the shortest segment", "share", near)
    kept: dict[str, dict[str, float]] = {}
    for row in results["recall"]:
        kept.setdefault(f"{row['image']}, {row['keys_by_entropy']} keys", {})[row["order"]] = row["recall"]
    yield Bars("dense attention kept at equal numbers of pairs", "share", kept)
    percent = results.get("accuracy", {}).get("percent", {})
    yield Bars(
        "a small model on 8 x 8 digits: mean and standard error",
        "percent right",
        {name: {"accuracy": found["mean"]} for name, found in percent.items()},
        {name: found["standard_error"] for name, found in percent.items()},
    )


def _ordering_times(results: Mapping[str, Any]) -> Iterator[Chart]:
    orders = results["milliseconds_of_orders"]
    yield Bars(
        "an order, computed once for a grid", "milliseconds", {name: dict(found) for name, found in orders.items()}
    )
    moved = results["permutation"]
    shape = " x ".join(f"{size:,}" for size in moved["shape"])
    times = {name: {"a call, median": found["median"]} for name, found in moved["milliseconds"].items()}
    for name, value in moved.get("device_milliseconds", {}).items():
        times[name]["on the device alone"] = value
    yield Bars(f"rows of {shape} {moved['dtype'].removeprefix('torch.')}", "milliseconds", times)
    for key, work in (("forward", "forward"), ("training_step", "training step")):
        if key in results:
            found = results[key]
            title = f"encoder of {found['layers']} layers, {found['width']} wide, {found['rows']:,} rows: {work}"
            yield Bars(title, "milliseconds", {name: dict(ms) for name, ms in found["milliseconds"].items()})


def _parallel(rows: Sequence[Mapping[str, Any]]) -> Iterator[Chart]:
    for case in dict.fromkeys(row["case"] for row in rows if "efficiency_forward" in row):
        values: dict[str, dict[str, float]] = {}
        for row in rows:
            if row.get("case") == case and "efficiency_forward" in row:
                label = f"{row['world']} ranks, {row['strategy']}"
                values[label] = {"forward": row["efficiency_forward"], "both": row["efficiency_both"]}
        yield Bars(f"case {case}: rate of a rank over that of one device alone", "share", values)


def _sparse(results: Mapping[str, Any]) -> Iterator[Chart]:
    faster: dict[str, dict[str, float]] = {}
    for row in results.get("speed", ()):
        if "ms" in row:
            label = f"{row['row']}{' causal' if row['causal'] else ''}, {row['backend']}, keeps {row['kept']:.3f}"
            ratios = {direction: row["dense_ms"][direction] / ms for direction, ms in row["ms"].items()}
            faster[label] = {**ratios, "by the pairs left out": 1 / row["kept"]}
    yield Bars("time of the best dense kernel over that of block-sparse attention", "times as fast", faster)
    listed: dict[str, dict[str, float]] = {}
    for row in results.get("lists", ()):
        listed[f"{row['pattern']}{' causal' if row['causal'] else ''}"] = {"time": row["ms"]}
    yield Bars("making the lists of blocks of a million rows", "milliseconds", listed)
    chosen: dict[str, dict[str, float]] = {}
    for row in results.get("selection", ()):
        steps = {name: row[f"{name}_ms"] for name in ("choose", "list", "call", "dense")}
        chosen[f"{row['pattern'].partition('(')[0]} {len(chosen)}{' causal' if row['causal'] else ''}"] = steps
    yield Bars("selection by content, in the order of the file", "milliseconds", chosen)


def _sparse_needle(results: Mapping[str, Any]) -> Iterator[Chart]:
    recall = {
        row["pooling"]: {f"{blocks} blocks": share for blocks, share in row["recall"].items()}
        for row in results["poolings"]
    }
    yield Bars(f"a needle in {results['rows']:,} rows: its block is among those selected", "share of draws", recall)


def _generation(results: Mapping[str, Any]) -> Iterator[Chart]:
    rows = results["contexts"]
    title = f"one token of preset {results['preset']}, {results['dtype'].removeprefix('torch.')}"
    yield Lines(
        title, "rows before it", "milliseconds", {"step": [(r["context"], r["step_milliseconds"]) for r in rows]}
    )


def _streaming(results: Mapping[str, Any]) -> Iterator[Chart]:
    times: dict[str, dict[str, float]] = {}
    for direction in ("forward", "forward_and_backward"):
        if direction in results:
            found = results[direction]
            parts = {"streamed, best": min(found["seconds"])}
            parts |= {key: found[f"{key}_seconds"] for key in ("compute", "transfer") if f"{key}_seconds" in found}
            times[direction] = parts
    yield Bars(f"{results['rows']:,} rows through one device, and the bounds of it", "seconds", times)


def _parallel_model(results: Mapping[str, Any]) -> Iterator[Chart]:
    values = {
        f"{case}, {strategy}": {"measured": one["measured_ms"], "predicted": one["predicted_ms"]}
        for case, strategies in results["points"].items()
        for strategy, one in strategies.items()
    }
    yield Bars(f"{results['ranks']} ranks, forward and backward, and the model of it", "milliseconds", values)


def _longest(results: Mapping[str, Any]) -> Iterator[Chart]:
    what = f"{results['tokens']:,} tokens, {results['heads']} heads of {results['head_dim']}, on one device"
    yield Bars(what, "seconds", {"forward": {"best": min(results["seconds"]), "first": results["first_seconds"]}})
    if results["peak_bytes"]:
        memory = {"inputs and results": results["tensor_bytes"] / 2**30, "peak": results["peak_bytes"] / 2**30}
        yield Bars("its memory", "GiB", {"device": memory})


def _language(results: Mapping[str, Any]) -> Iterator[Chart]:
    means, errors = {}, {}
    for name in results["variants"]:
        bits = [run["bits_second_half"] for run in results["runs"] if run["variant"] == name]
        if bits:
            means[name] = {"bits": statistics.mean(bits)}
            errors[name] = statistics.stdev(bits) / math.sqrt(len(bits)) if len(bits) > 1 else 0.0
    title = "models by pattern and longest context: mean and standard error over seeds"
    yield Bars(title, "bits per byte, second half of a window", means, errors)


def _cpu(results: Mapping[str, Any]) -> Iterator[Chart]:
    shape, seconds = results["shape"], results["median_seconds"]
    what = f"{shape['N']:,} rows, {shape['H']} heads of {shape['D']}, {shape['dtype']}"
    names = {"": "dilated attention", "calls_": "its fused calls on contiguous tensors", "dense_": "dense attention"}
    values = {
        direction: {name: seconds[key + direction] for key, name in names.items() if key + direction in seconds}
        for direction in ("forward", "backward")
    }
    yield Bars(what, "seconds, median", values)


def _memory(results: Mapping[str, Any]) -> Iterator[Chart]:
    for key, title, unit in (
        ("microseconds_of_1_MiB", "asking for 1 MiB and giving it back", "microseconds"),
        ("seconds_of_streaming", "streamed attention with each pool", "seconds"),
    ):
        if key in results:
            yield Bars(title, unit, {name: {"time": value} for name, value in results[key].items()})
    reuse: dict[str, dict[str, float]] = {}
    for name, trace in results.get("traces", {}).items():
        reuse[name] = {found["pool"]: found["reuse"] for found in trace["pools"]}
    yield Bars("requests of a recorded trace that were met from memory in hand", "share", reuse)


def _groups(content: Any, title: str = "") -> Iterator[Chart]:
    """Of a file that nothing is known of: every dictionary of two or more numbers, the first few of them."""
    yield from islice(_all_groups(content, title), _MOST_GROUPS)


def _all_groups(content: Any, title: str) -> Iterator[Chart]:
    if isinstance(content, Mapping):
        numbers = {name: float(value) for name, value in content.items() if _is_number(value)}
        if len(numbers) > 1:
            yield Bars(title or "numbers", "", {name: {"value": value} for name, value in numbers.items()})
        for name, value in content.items():
            yield from _all_groups(value, f"{title}, {name}" if title else str(name))
    elif isinstance(content, list):
        for n, value in enumerate(content):
            yield from _all_groups(value, f"{title} {n}".strip())


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


_KNOWN: dict[str, Callable[[Any], Iterator[Chart]]] = {
    "cpu": _cpu,
    "generation": _generation,
    "language": _language,
    "gpu": _gpu,
    "memory": _memory,
    "slide_encoder": _slide_encoder,
    "ordering": _ordering,
    "parallel": _parallel,
    "parallel_model": _parallel_model,
    "sparse": _sparse,
    "sparse_needle": _sparse_needle,
    "longest": _longest,
    "streaming": _streaming,
}
