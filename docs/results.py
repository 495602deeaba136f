"""For the site: results of benchmarks as pages and plots, made from ``benchmarks/results/`` at every build.

``<!-- results -->`` in a page becomes a section for each file; ``<!-- plot: NAME -->`` the plot of one, or of all that
match (``gpu_*``). Where there is no such file, nothing is shown.
"""

from __future__ import annotations

import json
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
RESULTS = BENCHMARKS / "results"
FIRST = ("command", "date", "commit", "device", "torch", "python")
"""What is said of a run first, where it is known."""
sys.path.insert(0, str(BENCHMARKS))

from plots import charts_of, draw  # noqa: E402

_MARKER = re.compile(r"^<!-- (results|plot: *(\S+)) -->$", re.MULTILINE)


@cache
def records() -> dict[str, Any]:
    """Name -> content of every kept file, in the order of names."""
    return {path.stem: _read(path) for path in sorted(RESULTS.glob("*.json"))}


def _read(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        _ = record["run"]["command"], record["results"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} holds no command and results of a run; write it again with its benchmark, or remove it"
        ) from error
    return record


def picture(name: str) -> str:
    """The line of a page that shows a result's plot, empty where it has none."""
    if not charts_of(records()[name]):
        return ""
    return f"![Plot of benchmarks/results/{name}.json](plots/{name}.svg)"


def section(name: str) -> str:
    """A result: how it came about, then its plot."""
    run = records()[name]["run"]
    rows = [
        (key, run[key]) for key in (*(key for key in FIRST if key in run), *(key for key in run if key not in FIRST))
    ]
    table = [f"| {key} | {_cell(key, value)} |" for key, value in rows]
    return "\n".join(
        [f"## {name}", "", f"| | `benchmarks/results/{name}.json` |", "| --- | --- |", *table, "", picture(name)]
    )


def _cell(key: str, value: Any) -> str:
    text = json.dumps(value) if isinstance(value, (dict, list)) else str(value)
    return f"`{text}`" if key in ("command", "commit") else text.replace("|", "\\|")


def with_results(markdown: str) -> str:
    """A page with its markers replaced."""

    def shown(match: re.Match[str]) -> str:
        if match[1] == "results":
            return "\n\n".join(map(section, records()))
        return "\n\n".join(picture(name) for name in records() if Path(name).match(match[2]))

    return _MARKER.sub(shown, markdown)


def on_files(files: Any, *, config: Any) -> Any:
    """Add the plots to the site."""
    from mkdocs.structure.files import File

    records.cache_clear()
    for name, record in records().items():
        if charts := charts_of(record):
            files.append(File.generated(config, f"plots/{name}.svg", content=draw(charts)))
    return files


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Put results where a page asks for them."""
    return with_results(markdown)
