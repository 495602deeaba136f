"""The generated pages are those of the table, and the table says something of every old name."""

from __future__ import annotations

from pathlib import Path

import pytest

from dilated_attention_pytorch.compat.ledger import ledger, main, with_table
from dilated_attention_pytorch.compat.table import load

DOCS = Path(__file__).parents[2] / "docs"


def test_the_committed_pages_are_the_generated_ones():
    assert (DOCS / "ledger.md").read_text(encoding="utf-8") == ledger()
    guide = (DOCS / "migration.md").read_text(encoding="utf-8")
    assert guide == with_table(guide)


def test_the_command_writes_both_pages(tmp_path: Path):
    (tmp_path / "migration.md").write_text((DOCS / "migration.md").read_text(encoding="utf-8"), encoding="utf-8")
    main([str(tmp_path)])
    assert (tmp_path / "ledger.md").read_text(encoding="utf-8") == ledger()
    with pytest.raises(ValueError, match="the page has no marks"):
        with_table("# a page")
    with pytest.raises(SystemExit, match="usage"):
        main([])


def test_every_old_name_has_its_texts():
    page = ledger()
    for entry in load().names:
        assert entry.use, entry.name
        assert entry.computed, entry.name
        assert entry.verdict, entry.name
        assert f"`{entry.name}`" in page
        if entry.kind in ("attention", "hilbert_attention", "multihead", "self", "hilbert_self", "sparse", "pool"):
            assert entry.differed, entry.name


def test_names_say_what_changes_where_the_old_class_was_no_attention():
    by_path = load().by_path
    text = by_path["improved_dilated_attention", "ImprovedDilatedAttention"].message("improved_dilated_attention")
    assert "use DilatedAttention(segment_lengths, dilation_rates)" in text
    assert "Numbers change: the softmax ran over the heads of one row" in text
    assert "Numbers change" not in by_path["core.memory_pool", "UnifiedMemoryPool"].message("core.memory_pool")
