"""The consolidation ledger and the table of the migration guide, made from the table of old names.

python -m dilated_attention_pytorch.compat.ledger DOCS    # writes ledger.md, and the table in migration.md
"""

from __future__ import annotations

import sys
import tomllib
from functools import lru_cache
from importlib import resources
from pathlib import Path

from .table import OldName, load

BEGIN, END = "<!-- table of old names: generated -->", "<!-- end of the table -->"
_HEAD = """# Ledger of old variants

What every class of the earlier libraries of this name computed, how it differed from its siblings, and what became of
it. The texts come from the table of old names; `python -m dilated_attention_pytorch.compat.ledger docs` writes this
page.
"""
_SHORT = ("refused", "constant", "record", "enum", "factory")
"""Kinds that get a line a group, not one a name."""


@lru_cache(maxsize=1)
def _groups() -> dict[str, dict[str, str]]:
    text = resources.files(__package__).joinpath("names", "groups.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def ledger() -> str:
    """The page ``ledger.md``."""
    lines = [_HEAD]
    rows: dict[str, list[OldName]] = {}
    for entry in load().names:
        rows.setdefault(entry.group, []).append(entry)
    lines += ["## Variants", ""]
    for group, texts in _groups().items():
        entries = [entry for entry in rows.get(group, ()) if entry.kind not in _SHORT]
        if entries:
            lines += [f"### {texts['title']}", "", *_variants(entries, texts), ""]
    lines += ["## Settings, factories and parts", "", "| part | what it did | names | what became of it |"]
    lines += ["| --- | --- | --- | --- |"]
    for group, texts in _groups().items():
        entries = [entry for entry in rows.get(group, ()) if entry.kind in _SHORT]
        if entries:
            names = ", ".join(f"`{name}`" for name in sorted({entry.name for entry in entries}))
            verdict = "refused because " if entries[0].kind == "refused" else ""
            cells = (texts["title"], texts["computed"], names, f"{verdict}{texts['verdict']}")
            lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    return "\n".join(lines) + "\n"


def _variants(entries: list[OldName], texts: dict[str, str]) -> list[str]:
    """What the variants of a group share, then one line each."""
    head = [f"Computed: {texts['computed']}", ""]
    if texts["changes"]:
        head += [f"Numbers change: {texts['changes']}.", ""]
    head += [f"Now {texts['verdict']}.", ""]
    head += ["| old variant | where | how it differed | replaced by |", "| --- | --- | --- | --- |"]
    return head + [_variant(entry) for entry in sorted(entries, key=lambda entry: (entry.name, entry.modules))]


def _variant(entry: OldName) -> str:
    name = f"`{entry.name}`" + (f" (another name of `{entry.alias_of}`)" if entry.alias_of else "")
    return "| " + " | ".join(map(_cell, (name, _where(entry), entry.differed, f"`{entry.use}`"))) + " |"


def _where(entry: OldName) -> str:
    """The modules that defined a name, or the one to import it from."""
    return ", ".join(f"`{module}`" if module else "the package" for module in entry.homes or entry.modules[:1])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def name_table() -> str:
    """Old name, where it was and the new spelling: the table of the migration guide; without refused parts."""
    lines = ["| old name | where | use |", "| --- | --- | --- |"]
    rows = {
        (entry.name, _where(entry), entry.use) for entry in load().names if entry.kind not in ("refused", "constant")
    }
    lines += ["| " + " | ".join(map(_cell, (f"`{name}`", where, use))) + " |" for name, where, use in sorted(rows)]
    return "\n".join(lines)


def with_table(page: str) -> str:
    """A page with the table between its two marks.

    Raises:
        ValueError: a page without the marks.
    """
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no marks; put {BEGIN!r} and {END!r} where the table goes")
    return f"{head}{BEGIN}\n\n{name_table()}\n\n{END}{tail}"


def main(arguments: list[str]) -> None:
    """Write both pages in the folder given."""
    if len(arguments) != 1:
        raise SystemExit("usage: python -m dilated_attention_pytorch.compat.ledger DOCS")
    folder = Path(arguments[0])
    (folder / "ledger.md").write_text(ledger(), encoding="utf-8")
    guide = folder / "migration.md"
    guide.write_text(with_table(guide.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
