"""Kept results: where each comes from, what its plot shows, how pages show it, and that a page's figures are theirs."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages():
    return load(ROOT / "docs" / "results.py")


@pytest.fixture(scope="module")
def plots(pages):  # which puts benchmarks on the path
    import plots

    return plots


def words(svg: bytes) -> list[str]:
    root = ElementTree.fromstring(svg)
    assert root.tag.endswith("svg")
    return ["".join(text.itertext()) for text in root.iter() if text.tag.endswith("}text")]


def numbers(chart) -> list[float]:
    if hasattr(chart, "values"):
        return [value for found in chart.values.values() for value in found.values()]
    return [y for points in chart.points.values() for _, y in points]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_kept_result_says_where_it_comes_from_and_has_a_plot(path: Path, plots):
    record = json.loads(path.read_text())
    run = record["run"]
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", run["date"])
    assert run["device"]
    assert run["torch"]
    assert run["python"]
    assert " /" not in run["command"], "a path of one machine"
    assert (ROOT / "benchmarks" / f"{plots.script_of(record)}.py").exists(), run["command"]
    charts = plots.charts_of(record)
    assert all(numbers(chart) for chart in charts)
    assert all(math.isfinite(value) for chart in charts for value in numbers(chart))
    shown = words(plots.draw(charts))
    assert {chart.title for chart in charts} <= set(shown)


RUN = {"command": "python benchmarks/{}.py", "date": "2026-01-02", "device": "a GPU", "torch": "2", "python": "3"}


def record(script: str, results: object) -> dict:
    return {"run": RUN | {"command": RUN["command"].format(script)}, "results": results}


def test_rates_and_times_of_a_gpu(plots):
    row = {"name": "longnet", "n": 4096, "d": 64, "causal": True, "backend": "gluon"}
    short = {"name": "short", "n": 2048, "d": 64, "causal": False, "backend": "triton", "dense_ms_of_this_n": 0.25}
    rows = [
        row | {"forward": {"ms": 2.0, "tflops": 123.0, "dense_tflops": 456.0}},
        row | {"backend": "sdpa", "refused": "no"},
        short | {"forward": {"ms": 0.5, "tflops": 1.0, "dense_tflops": math.nan}},
    ]
    charts = plots.charts_of(record("gpu", rows))
    assert [chart.title for chart in charts] == ["forward, bfloat16, 16 heads", "few rows, forward, D=64"]
    assert charts[0].values == {"longnet causal, N=4,096, D=64": {"gluon": 123.0, "dense, best": 456.0}}
    assert charts[1].points == {"triton": [(2048, 0.5)], "dense": [(2048, 0.25)]}
    assert {"123", "456", "gluon", "dense, best", "longnet causal, N=4,096, D=64"} <= set(words(plots.draw(charts)))


def test_slides(plots):
    rows = [
        {"tiles": 10, "ours: forward": {"ms": 2.0, "gib": 1.0}, "original: forward": {"refused": "memory"}},
        {"tiles": 20, "ours: forward": {"ms": 3.0, "gib": 1.5}, "errors": {"ours": 0.1}},
    ]
    charts = plots.charts_of(record("slide_encoder", rows))
    assert [chart.points for chart in charts] == [{"ours": [(10, 2.0), (20, 3.0)]}, {"ours": [(10, 1.0), (20, 1.5)]}]


def test_block_sparse_beside_dense(plots):
    row = {"row": "90", "causal": False, "backend": "triton", "kept": 0.1}
    row |= {"ms": {"forward": 2.0}, "dense_ms": {"forward": 9.0}}
    (chart,) = plots.charts_of(record("sparse", {"speed": [row, {"row": "50", "causal": True, "refused": "no"}]}))
    assert chart.values == {"90, triton, keeps 0.100": {"forward": 4.5, "by the pairs left out": 10.0}}


def test_lists_and_selection_of_blocks(plots):
    choice = {"pattern": "ContentTopK(keep=1)", "causal": True, "choose_ms": 1.0, "list_ms": 2.0, "call_ms": 3.0}
    results = {
        "speed": [],
        "lists": [{"pattern": "local", "causal": False, "ms": 4.0}],
        "selection": [choice | {"dense_ms": 9.0}],
    }
    lists, selection = plots.charts_of(record("sparse", results))
    assert lists.values == {"local": {"time": 4.0}}
    assert selection.values == {"ContentTopK 0 causal": {"choose": 1.0, "list": 2.0, "call": 3.0, "dense": 9.0}}


def test_needles_generation_streaming_and_models(plots):
    needle = {"rows": 64, "poolings": [{"pooling": "mean", "recall": {"1": 0.25, "4": 0.5}}]}
    (chart,) = plots.charts_of(record("sparse_needle", needle))
    assert chart.values == {"mean": {"1 blocks": 0.25, "4 blocks": 0.5}}
    step = {"preset": "base", "dtype": "torch.bfloat16", "contexts": [{"context": 8, "step_milliseconds": 2.0}]}
    (chart,) = plots.charts_of(record("generation", step))
    assert chart.points == {"step": [(8, 2.0)]}
    forward = {"seconds": [3.0, 2.0], "compute_seconds": 1.0, "transfer_seconds": 0.5}
    (chart,) = plots.charts_of(record("streaming", {"rows": 10, "forward": forward}))
    assert chart.values == {"forward": {"streamed, best": 2.0, "compute": 1.0, "transfer": 0.5}}
    longest = {"tokens": 64, "heads": 1, "head_dim": 8, "seconds": [3.0, 2.0], "first_seconds": 9.0}
    seconds, memory = plots.charts_of(record("longest", longest | {"tensor_bytes": 2**30, "peak_bytes": 2**31}))
    assert seconds.values == {"forward": {"best": 2.0, "first": 9.0}}
    assert memory.values == {"device": {"inputs and results": 1.0, "peak": 2.0}}
    runs = [{"variant": "dense-8", "bits_second_half": bits} for bits in (1.0, 2.0)]
    (chart,) = plots.charts_of(record("language", {"variants": {"dense-8": {}, "longnet-8": {}}, "runs": runs}))
    assert chart.values == {"dense-8": {"bits": 1.5}}
    assert chart.errors == pytest.approx({"dense-8": 0.5})


def test_ranks(plots):
    row = {"case": "a", "world": 2, "strategy": "ring", "efficiency_forward": 0.75, "efficiency_both": 0.5}
    (chart,) = plots.charts_of(record("parallel", [row, {"case": "a", "world": 1}]))
    assert chart.values == {"2 ranks, ring": {"forward": 0.75, "both": 0.5}}


def test_the_model_of_ranks(plots):
    points = {"a": {"ring": {"measured_ms": 2.0, "predicted_ms": 3.0, "bytes_sent": 7}}}
    (chart,) = plots.charts_of(record("parallel_model", {"ranks": 2, "points": points}))
    assert chart.values == {"a, ring": {"measured": 2.0, "predicted": 3.0}}


def test_of_a_file_that_nothing_is_known_of_every_group_of_numbers_is_shown(plots):
    results = {
        "one": 1.0,
        "first": {"a": 2, "b": 3.0, "c": "text", "d": True},
        "list": [{"x": 5, "y": math.inf}, {"p": 6, "q": 7}],
    }
    charts = plots.charts_of(record("unheard_of", results))
    assert [(chart.title, numbers(chart)) for chart in charts] == [("first", [2.0, 3.0]), ("list 1", [6.0, 7.0])]


def test_pages_show_results_where_they_ask_for_them(pages, monkeypatch):
    rows = [{"tiles": 1, "ours: forward": {"ms": 2.0}}]
    given = {name: record("slide_encoder", rows) for name in ("gpu_a", "gpu_b", "other")}
    given["gpu_c"] = record("gpu", [])  # with nothing to draw
    monkeypatch.setattr(pages, "records", lambda: given)
    text = "# Page\n\n<!-- plot: gpu_* -->\n\n<!-- plot: absent -->\n\nBetween `<!-- plot: other -->` words.\n"
    shown = pages.with_results(text)
    assert re.findall(r"\(plots/(\w+)\.svg\)", shown) == ["gpu_a", "gpu_b"]
    assert "absent" not in shown
    sections = pages.with_results("<!-- results -->\n")
    assert re.findall(r"^## (\w+)$", sections, re.MULTILINE) == list(given)
    assert "| command | `python benchmarks/slide_encoder.py` |" in sections
    assert "plots/gpu_c.svg" not in sections
    assert (
        sections.index("| command |") < sections.index("| date | 2026-01-02 |") < sections.index("| device | a GPU |")
    )


def table_after(text: str, heading: str) -> list[list[str]]:
    rows = text.partition(heading)[2].partition("\n\n|")[2].partition("\n\n")[0].splitlines()
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"run": {}, "results": [1]}', '{"run": {"command": "x"}}'])
def test_a_broken_file_is_named(pages, monkeypatch, tmp_path, text):
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    monkeypatch.setattr(pages, "records", pages.records.__wrapped__)
    assert pages.records() == {}
    (tmp_path / "gpu_x.json").write_text(text)
    with pytest.raises(ValueError, match=r"gpu_x\.json holds no command and results of a run"):
        pages.with_results("<!-- results -->")


def test_figures_of_the_page_on_orderings_are_those_of_the_result():
    page = (ROOT / "docs" / "hilbert.md").read_text()
    results = json.loads((ROOT / "benchmarks" / "results" / "ordering.json").read_text())["results"]
    recall = {(row["image"], row["keys_by_entropy"], row["order"]): row["recall"] for row in results["recall"]}
    head, _, *rows = table_after(page, "**Recall.**")
    assert len(rows) * len(head[1:]) == len(recall)
    for label, *cells in rows:
        image, keys = label.split(", ")
        for order, cell in zip(head[1:], cells, strict=True):
            assert cell == f"{recall[image, int(keys), order.lower()]:.3f}", (label, order)
    near = {(" x ".join(map(str, row["shape"])), row["order"]): row for row in results["locality"]}
    head, _, *rows = table_after(page, "**Locality.**")
    grid = ""
    for label, what, *cells in rows:
        grid = label or grid
        for order, cell in zip(head[2:], cells, strict=True):
            row = near[grid, order.lower()]
            expected = {
                "distance, all branches": f"{row['attended_distance']:.1f}",
                "distance, segments of 256": f"{row['attended_distance_by_branch']['256/1']:.1f}",
                "neighbours inside": f"{row['neighbours_inside']:.3f}",
            }[what]
            assert cell == expected, (grid, what, order)
    percent = results["accuracy"]["percent"]
    head, _, cells = table_after(page, "**Accuracy.**")
    for order, cell in zip(head, cells, strict=True):
        found = percent[order.lower()]
        assert cell == f"{found['mean']:.2f} ± {found['standard_error']:.2f}"
