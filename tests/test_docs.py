"""The documentation is true: its Python runs, its links lead somewhere, its layout tables match the tree."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "dilated_attention_pytorch"
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LAYOUT = (ROOT / "docs" / "layout.md").read_text()

FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def python_blocks(page: str) -> list[str]:
    """The Python code blocks of a page, each at its own lines, so that a traceback names the right one."""
    text = (ROOT / page).read_text()
    return [
        "\n" * text.count("\n", 0, match.start(2)) + match[2] for match in FENCE.finditer(text) if match[1] == "python"
    ]


def heading_anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ +(.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


def table_rows(heading: str) -> list[list[str]]:
    """The rows, as cells, of the first table under a heading of the layout page; without the table's head."""
    section = LAYOUT.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


LAYOUT_ROWS = [*table_rows("The package"), *table_rows("Parts of earlier libraries, and where they are here")]


def place(name: str) -> Path:
    """A path of a layout table: below the package, or from the root of the repository."""
    return ROOT / name if name.startswith(("docs/", "tests/", "benchmarks/", "examples/")) else PACKAGE / name


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)])
def test_python_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for block in python_blocks(page):
        exec(compile(block, str(ROOT / page), "exec"), namespace)


def commands(page: str) -> list[str]:
    """Every call of our command that a page shows: lines of code blocks, and code within the text."""
    text = (ROOT / page).read_text()
    lines = [line for _, block in FENCE.findall(text) for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    return [line.removeprefix("$ ") for line in lines if line.removeprefix("$ ").startswith("dilated-attention ")]


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_commands_take_the_options_that_pages_give_them(page: str):
    from dilated_attention_pytorch.cli import app

    for line in commands(page):
        words = shlex.split(line, comments=True)[1:]
        command = typer.main.get_command(app)
        while hasattr(command, "resolve_command") and words:
            _, command, words = command.resolve_command(command.context_class(command), words)
        if words:  # else the page only names it
            assert command.make_context("command", words) is not None, line


def test_readme_and_semantics_have_code_that_runs():
    assert len(python_blocks("README.md")) >= 1
    assert len(python_blocks("docs/semantics.md")) >= 3


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_lead_somewhere(page: str):
    here = ROOT / page
    for link in LINK.findall(FENCE.sub("", here.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (here.parent / path).resolve() if path else here
        assert target.exists(), f"{page} links to {link}"
        if anchor:
            assert anchor in heading_anchors(target.read_text()), f"{page} links to {link}"


def test_every_documentation_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text().partition("nav:")[2]
    assert set(re.findall(r": (\S+\.md)", navigation)) == {
        page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")
    }


@pytest.mark.parametrize("row", LAYOUT_ROWS, ids=lambda row: row[1])
def test_layout_row_says_what_is_there(row: list[str]):
    *_, places, state = row
    names = re.findall(r"`([^`]+)`", places)
    assert names
    assert state in ("here", "planned")
    for name in names:
        assert place(name).exists() == (state == "here"), f"{name} is marked {state}"
        assert place(name).is_dir() == (name.endswith("/") and state == "here")


def test_layout_names_every_module_of_the_package():
    named = {name for row in table_rows("The package") for name in re.findall(r"`([^`]+)`", row[-2])}
    present = {
        path.name + "/" * path.is_dir()
        for path in PACKAGE.iterdir()
        if (path.suffix == ".py" and path.name != "__init__.py") or (path / "__init__.py").exists()
    }
    assert present - named == set()


def test_readme_names_the_python_and_torch_that_the_package_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    readme = (ROOT / "README.md").read_text()
    (torch,) = [name for name in project["dependencies"] if name.startswith("torch")]
    assert f"Python {project['requires-python'].removeprefix('>=')} or newer" in readme
    assert f"PyTorch {torch.removeprefix('torch>=')} or newer" in readme


def test_every_make_target_that_the_pages_name_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        for target in re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)", (ROOT / page).read_text(), re.MULTILINE):
            assert "".join(target) in targets, f"{page} names make {''.join(target)}"
