"""The table and the picture of what `language.py` measured.

python benchmarks/language_report.py [--results benchmarks/results/language.json] [--picture docs/img/language.png]
"""

from __future__ import annotations

import argparse
import io
import json
import math
import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from common import ROOT
from dilated_attention_pytorch.benchmarking.plot import COLORS, MARKERS, short
from dilated_attention_pytorch.training.files import replace_file

MEASURES = ("bits_per_byte", "bits_second_half", "own_context_bits")
KINDS = {
    "dense": "dense",
    "longnet": "LongNet",
    "wide": "wide LongNet",
    "window": "sliding window",
}


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error; that of a single value is not known."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), error


def summary(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Over seeds: means, standard errors, and percent over dense at the longest context, seed by seed."""
    runs, longest = results["runs"], max(results["scale"]["contexts"])
    reference = {run["seed"]: run for run in runs if run["variant"] == f"dense-{longest}"}
    found: dict[str, dict[str, float]] = {}
    for name in results["variants"]:
        mine = [run for run in runs if run["variant"] == name]
        entry: dict[str, float] = {"seeds": len(mine)}
        for key in MEASURES if mine else ():
            entry[key], entry[f"{key}_error"] = mean_and_error([run[key] for run in mine])
            over = [100 * (run[key] / reference[run["seed"]][key] - 1) for run in mine if run["seed"] in reference]
            if over:
                entry[f"{key}_percent"], entry[f"{key}_percent_error"] = mean_and_error(over)
        found[name] = entry
    return found


def curve(results: dict[str, Any], name: str, key: str) -> tuple[list[float], list[float]]:
    """Means and standard errors over seeds of a list of a run."""
    columns = zip(*(run[key] for run in results["runs"] if run["variant"] == name), strict=True)
    pairs = [mean_and_error(column) for column in columns]
    return [mean for mean, _ in pairs], [error for _, error in pairs]


def label(variant: dict[str, Any]) -> str:
    """For example "LongNet, 32K"."""
    return f"{KINDS[variant['kind']]}, {short(variant['context'])}"


def shown(value: float, error: float, digits: int) -> str:
    """A mean, with its standard error where there is one."""
    return f"{value:.{digits}f}" if math.isnan(error) else f"{value:.{digits}f} ± {error:.{digits}f}"


def table(results: dict[str, Any]) -> str:
    """Markdown: a row for each model, with the speed of training where it was measured."""
    variants, found = results["variants"], summary(results)
    dense = variants[f"dense-{max(results['scale']['contexts'])}"]["attention_flops_per_byte"]
    timed = all("bytes_per_second" in variant for variant in variants.values())
    heads = ["model, context", "attention, MFLOP a byte", "of dense's", *["training, MB/s"] * timed, "seeds"]
    heads += ["bits per byte", "over dense's", "second half", "over dense's"]
    lines = [f"| {' | '.join(heads)} |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for name, variant in variants.items():
        entry, flops = found[name], variant["attention_flops_per_byte"]
        cells = [label(variant), f"{flops / 1e6:.2f}", f"{flops / dense:.1%}"]
        cells += [f"{variant['bytes_per_second'] / 1e6:.2f}"] if timed else []
        cells.append(f"{entry['seeds']}")
        for key in MEASURES[:2]:
            cells.append(shown(entry[key], entry[f"{key}_error"], 4))
            cells.append(f"{shown(entry[f'{key}_percent'], entry[f'{key}_percent_error'], 1)} %")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def position_table(results: dict[str, Any], key: str, names: Sequence[str]) -> str:
    """Markdown: bits by position, a column for each model."""
    edges = edges_of(max(results["variants"][name]["context"] for name in names))
    columns = [curve(results, name, key) for name in names]
    lines = [
        "| position | " + " | ".join(label(results["variants"][name]) for name in names) + " |",
        "| --- |" + " ---: |" * len(names),
    ]
    for n, (low, high) in enumerate(pairwise(edges)):
        cells = [shown(means[n], errors[n], 3) if n < len(means) else "" for means, errors in columns]
        lines.append(f"| {low:,} to {high - 1:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def restricted_table(results: dict[str, Any]) -> str:
    """Markdown: the dense model of the longest context, shown less."""
    longest = max(results["scale"]["contexts"])
    runs = [run for run in results["runs"] if run["variant"] == f"dense-{longest}"]
    lines = ["| it sees at most | second half, bits per byte |", "| --- | ---: |"]
    for context in results["scale"]["contexts"]:
        mean, error = mean_and_error([run["second_half_restricted"][str(context)] for run in runs])
        lines.append(f"| {context:,} bytes | {shown(mean, error, 3)} |")
    return "\n".join(lines)


def edges_of(length: int) -> list[int]:
    """The edges that `language.by_position` takes means between."""
    from language import position_edges

    return position_edges(length)


def draw(results: dict[str, Any]) -> bytes:
    """A PNG: bits over the work of attention, over the speed of training where that was measured, and by position."""
    # The object interface: pyplot would pick a backend and keep state for the whole process.
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    variants, found = results["variants"], summary(results)
    longest, shortest = max(results["scale"]["contexts"]), min(results["scale"]["contexts"])
    across = {"operations of attention a byte, forward (log scale)": lambda v: v["attention_flops_per_byte"]}
    if all("bytes_per_second" in variant for variant in variants.values()):
        across["bytes a second in training (log scale)"] = lambda v: v["bytes_per_second"]
    figure = Figure(figsize=(6.5 * (len(across) + 1), 5), dpi=100, layout="constrained")
    *panels, position = figure.subplots(1, len(across) + 1)
    edges = edges_of(longest)
    middles = [math.sqrt(low * high) if low else high / 2 for low, high in pairwise(edges)]
    for n, (kind, words) in enumerate(KINDS.items()):
        mine = {name: v for name, v in variants.items() if v["kind"] == kind}
        bits = [found[name]["bits_second_half"] for name in mine]
        errors = [found[name]["bits_second_half_error"] for name in mine]
        style: dict[str, Any] = {"color": COLORS[n], "marker": MARKERS[n], "capsize": 3}
        for axes, value in zip(panels, across.values(), strict=True):
            places = [value(v) for v in mine.values()]
            axes.errorbar(places, bits, yerr=errors, label=words, **style)
            for v, place, height in zip(mine.values(), places, bits, strict=True):
                axes.annotate(short(v["context"]), (place, height), xytext=(6, 6), textcoords="offset points")
        means, errors = curve(results, f"{kind}-{longest}", "bits_by_position")
        position.errorbar(middles, means, yerr=errors, label=f"{words}, {short(longest)}", **style)
    means, errors = curve(results, f"dense-{shortest}", "bits_by_position")
    position.errorbar(middles, means, yerr=errors, color="#888888", linestyle=":", label=f"dense, {short(shortest)}")
    for axes, words in zip(panels, across, strict=True):
        axes.set(xlabel=words, ylabel=f"bits per byte, second half of {short(longest)}", xscale="log")
    position.set(xlabel="position in the window (bytes, log scale)", ylabel="bits per byte")
    position.set_xscale("log", base=2)
    position.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    position.xaxis.set_minor_locator(NullLocator())
    for axes in (*panels, position):
        axes.grid(True, color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/language.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/img/language.png")
    given = parser.parse_args(arguments)
    results = json.loads(given.results.read_text())["results"]
    longest = max(results["scale"]["contexts"])
    print(table(results), end="\n\n")
    print(position_table(results, "bits_by_position", [f"{kind}-{longest}" for kind in KINDS]), end="\n\n")
    print(position_table(results, "own_context_bits_by_position", list(results["variants"])), end="\n\n")
    print(restricted_table(results))
    given.picture.parent.mkdir(parents=True, exist_ok=True)
    replace_file(given.picture, [draw(results)])


if __name__ == "__main__":
    main()
