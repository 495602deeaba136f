"""The command `graph`: what it finds in sources written for the test, and the pictures."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from typer.testing import CliRunner

from dilated_attention_pytorch.cli import app
from dilated_attention_pytorch.compat.graph import as_svg, layers, old_names_of, package_edges

P = "dilated_attention_pytorch"
SVG = "{http://www.w3.org/2000/svg}"


def test_edges_of_a_package(tmp_path: Path):
    root = tmp_path / "thing"
    sources = {
        "__init__.py": "from .top import a",
        "top.py": "from .low import x\nfrom . import low\nimport thing.middle.deep\nimport json",
        "low.py": "import os",
        "middle/__init__.py": "from ..low import x",
        "middle/deep.py": "from . import other\nfrom ..top import a\n",
        "middle/other.py": "def f():\n    from ..low import x\n",
    }
    for name, text in sources.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    edges = package_edges(root, package="thing")
    assert edges == {"low": {}, "middle": {"low": 2, "top": 1}, "top": {"low": 1, "middle": 1}}


def test_columns_follow_imports_and_circles_end():
    assert layers({"a": {"b": 1, "c": 1}, "b": {"c": 1}}) == [["a"], ["b"], ["c"]]
    for circle in ({"a": {"b": 1}, "b": {"a": 1, "c": 1}}, {"a": {"b": 1}, "b": {"c": 1}, "c": {"a": 1}}):
        assert sorted(node for column in layers(circle) for node in column) == ["a", "b", "c"]


def test_a_picture_has_every_box_and_line():
    edges = {"one": {"two": 3, "<three>": 1}, "two": {"<three>": 1}}
    root = ElementTree.fromstring(as_svg(edges, title="a & b"))
    texts = [node.text for node in root.iter(f"{SVG}text")]
    assert texts == ["a & b", "one", "two", "<three>"]
    titles = [node.find(f"{SVG}title").text for node in root.iter(f"{SVG}path")]
    assert titles == ["one -> <three>: 1", "one -> two: 3", "two -> <three>: 1"]
    left = {t.text: float(t.get("x")) for t in root.iter(f"{SVG}text")}
    assert left["one"] < left["two"] < left["<three>"]


def test_the_command_shows_this_package(tmp_path: Path):
    picture = tmp_path / "graph.svg"
    result = CliRunner().invoke(app, ["graph", "--svg", str(picture)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "functional" in result.output
    boxes = {node.text for node in ElementTree.parse(picture).getroot().iter(f"{SVG}text")}
    assert {"functional", "parallel", "compat", "types"} <= boxes


def test_the_command_shows_who_uses_old_names(tmp_path: Path):
    (tmp_path / "a.py").write_text(f"from {P}.core import PatternCache, ValidationMixin\nimport {P}.long_net\n")
    (tmp_path / "b.py").write_text(f"from {P} import dilated_attention, ImprovedDilatedAttention\n")
    (tmp_path / "c.py").write_text("import torch\n")
    (tmp_path / "d.py").write_text("def (\n")
    (tmp_path / "e.py").write_text(
        f"import {P} as p\nfrom {P}.core import nope\np.LongNetLM, p.ImprovedDilatedAttention\n"
    )
    found = old_names_of(tmp_path)
    assert found.edges == {
        "a.py": {"core.PatternCache": 1, "core.ValidationMixin": 1, "long_net": 1},
        "b.py": {"ImprovedDilatedAttention": 1},
        "e.py": {"ImprovedDilatedAttention": 1},
    }
    assert [(path.name, line) for path, line, _ in found.failed] == [("d.py", 1)]
    assert [(path.name, line, name) for path, line, name in found.unknown] == [("e.py", 2, f"{P}.core.nope")]
    result = CliRunner().invoke(app, ["graph", str(tmp_path)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "3 files use 4 old names" in result.output
    assert f"e.py:2: unknown name {P}.core.nope" in result.output.replace("\n", "")
    assert "d.py:1: does not parse" in result.output


def test_wrong_input_is_one_line(tmp_path: Path):
    for arguments in (["graph", str(tmp_path / "nothing")], ["graph", "--svg", "graph.png"]):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2
        assert result.output.count("\n") == 1
