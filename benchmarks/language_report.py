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


def table(results: dict[str, Any]) -> str:
    """Markdown: a row for each model."""
    variants, found = results["variants"], summary(results)
    dense = variants[f"dense-{max(results['scale']['contexts'])}"]["attention_flops_per_byte"]
    lines = [
        "| model, context | attention, MFLOP a byte | of dense's at the longest | training, MB/s | bits per byte "
        "| over dense at the longest | second half of the windows | over dense |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, variant in variants.items():
        entry, flops = found[name], variant["attention_flops_per_byte"]
        cells = [
            label(variant),
            f"{flops / 1e6:.2f}",
            f"{flops / dense:.1%}",
            f"{variant['bytes_per_second'] / 1e6:.2f}",
        ]
        for key in MEASURES[:2]:
            cells.append(f"{entry[key]:.4f} ± {entry[f'{key}_error']:.4f}")
            cells.append(f"{entry[f'{key}_percent']:+.2f} ± {entry[f'{key}_percent_error']:.2f} %")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def position_table(results: dict[str, Any], key: str, names: Sequence[str]) -> str:
    """Markdown: bits by position, a column for each model."""
    longest = max(results["variants"][name]["context"] for name in names)
    edges = edges_of(longest)
    columns = [curve(results, name, key) for name in names]
    lines = [
        "| position | " + " | ".join(label(results["variants"][name]) for name in names) + " |",
        "| --- |" + " ---: |" * len(names),
    ]
    for n, (low, high) in enumerate(pairwise(edges)):
        cells = [f"{means[n]:.3f} ± {errors[n]:.3f}" if n < len(means) else "" for means, errors in columns]
        lines.append(f"| {low:,} to {high - 1:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def edges_of(length: int) -> list[int]:
    """The edges that `language.by_position` takes means between."""
    from language import position_edges

    return position_edges(length)


def draw(results: dict[str, Any]) -> bytes:
    """A PNG: bits over the work of attention, bits over the time of a step, bits by position."""
    # The object interface: pyplot would pick a backend and keep state for the whole process.
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    figure = Figure(figsize=(15, 5), dpi=100, layout="constrained")
    work, time, position = figure.subplots(1, 3)
    variants, found = results["variants"], summary(results)
    longest = max(results["scale"]["contexts"])
    for n, (kind, words) in enumerate(KINDS.items()):
        mine = {name: v for name, v in variants.items() if v["kind"] == kind}
        bits = [found[name]["bits_second_half"] for name in mine]
        errors = [found[name]["bits_second_half_error"] for name in mine]
        style = {"color": COLORS[n], "marker": MARKERS[n], "capsize": 3, "label": words}
        work.errorbar([v["attention_flops_per_byte"] for v in mine.values()], bits, yerr=errors, **style)
        time.errorbar([v["bytes_per_second"] / 1e6 for v in mine.values()], bits, yerr=errors, **style)
        for v, height in zip(mine.values(), bits, strict=True):
            places = (work, v["attention_flops_per_byte"]), (time, v["bytes_per_second"] / 1e6)
            for axes, across in places:
                axes.annotate(short(v["context"]), (across, height), xytext=(5, 5), textcoords="offset points")
        edges = edges_of(longest)
        middles = [math.sqrt(low * high) if low else high / 2 for low, high in pairwise(edges)]
        means, errors = curve(results, f"{kind}-{longest}", "bits_by_position")
        position.errorbar(middles, means, yerr=errors, **(style | {"label": f"{words}, {short(longest)}"}))
    shortest = min(results["scale"]["contexts"])
    means, errors = curve(results, f"dense-{shortest}", "bits_by_position")
    position.errorbar(middles, means, yerr=errors, color="#888888", linestyle=":", label=f"dense, {short(shortest)}")
    work.set(xlabel="operations of attention a byte, forward (log scale)", ylabel="bits per byte, second half of 32K")
    work.set_xscale("log")
    time.set(xlabel="megabytes a second in training")
    position.set(xlabel="position in the window (bytes, log scale)", ylabel="bits per byte")
    position.set_xscale("log", base=2)
    position.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    position.xaxis.set_minor_locator(NullLocator())
    for axes in (work, time, position):
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
    print(position_table(results, "own_context_bits_by_position", list(results["variants"])))
    given.picture.parent.mkdir(parents=True, exist_ok=True)
    replace_file(given.picture, [draw(results)])


if __name__ == "__main__":
    main()
