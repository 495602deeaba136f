"""The packed corpus: what it contains, how it is split, and that damage is noticed."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest

from dilated_attention_pytorch.training.corpus import Corpus, open_packed, pack
from dilated_attention_pytorch.training.sources import find_sources


def make_files(folder: Path, sizes: dict[str, int]) -> Path:
    generator = random.Random(0)
    for name, size in sizes.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(generator.choices(b"abcdefgh \n", k=size)))
    return folder


def pack_folder(folder: Path, output: Path, *, fraction: float = 0.1, context_length: int = 10) -> Corpus:
    return pack(find_sources([folder]), output, held_out_fraction=fraction, context_length=context_length)


def held_out_names(corpus: Corpus) -> set[str]:
    return {document.name for document in corpus.held_out_documents}


SIZES = {f"{folder}/{number}.txt": 50 + 7 * number for folder in ("a", "b") for number in range(20)}


def test_the_packed_bytes_are_the_files_with_a_nul_before_each(tmp_path: Path):
    folder = make_files(tmp_path / "text", SIZES)
    corpus = pack_folder(folder, tmp_path / "out")
    packed = bytes(corpus.tokens.tolist())
    assert packed == b"".join(b"\0" + (folder / d.name).read_bytes() for d in corpus.documents)
    for document in corpus.documents:
        text = packed[document.offset : document.offset + document.length]
        assert text == (folder / document.name).read_bytes()
        assert document.held_out == (document.offset > corpus.boundary)
    assert len(corpus.train) == corpus.boundary
    assert len(corpus.train) + len(corpus.held_out) == len(packed)
    assert {d.name for d in corpus.documents} == set(SIZES)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the process's own memory map")
def test_the_bytes_are_mapped_not_read(tmp_path: Path):
    corpus = pack_folder(make_files(tmp_path / "text", SIZES), tmp_path / "out")
    assert len(corpus.tokens) > 0
    assert str(tmp_path / "out" / "corpus.bin") in Path("/proc/self/maps").read_text()


def test_the_split_is_by_file_and_does_not_depend_on_the_place(tmp_path: Path):
    here = pack_folder(make_files(tmp_path / "here", SIZES), tmp_path / "out1")
    there = pack_folder(make_files(tmp_path / "far" / "there", SIZES), tmp_path / "out2")
    assert held_out_names(here) == held_out_names(there)
    assert here.fingerprint == there.fingerprint
    share = len(here.held_out) / len(here.tokens)
    assert 0.1 <= share < 0.2


def test_a_new_file_moves_no_other_file_to_the_other_side(tmp_path: Path):
    folder = make_files(tmp_path / "text", dict.fromkeys(SIZES, 100))
    before = held_out_names(pack_folder(folder, tmp_path / "out1"))
    make_files(folder, {"c.txt": 100})
    after = held_out_names(pack_folder(folder, tmp_path / "out2"))
    assert len(before ^ after) <= 1


def test_the_largest_file_trains(tmp_path: Path):
    for seed in range(8):
        folder = make_files(tmp_path / str(seed), {f"large{seed}": 500, f"small{seed}": 20})
        corpus = pack_folder(folder, tmp_path / f"out{seed}", fraction=0.5)
        assert held_out_names(corpus) == {f"small{seed}"}


def test_the_held_out_side_has_room_for_a_window(tmp_path: Path):
    corpus = pack_folder(make_files(tmp_path / "text", SIZES), tmp_path / "out", fraction=0.01, context_length=300)
    assert len(corpus.held_out) >= 300


def test_the_only_file_gives_its_tail(tmp_path: Path):
    folder = make_files(tmp_path / "text", {"book.txt": 1000})
    corpus = pack_folder(folder, tmp_path / "out", fraction=0.1)
    book = (folder / "book.txt").read_bytes()
    assert bytes(corpus.train.tolist()) == b"\0" + book[:900]
    assert bytes(corpus.held_out.tolist()) == b"\0" + book[900:]
    assert held_out_names(corpus) == {"book.txt (tail)"}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"a": 150}, "the training text has 50 bytes, less than one context of 100"),
        ({"a": 60}, "the training text has 0 bytes, less than one context of 100"),
        ({"a": 500, "b": 60}, "the held-out text has 60 bytes, less than one context of 100"),
        ({"a": 90, "b": 85, "c": 88}, "the training text has 90 bytes, less than one context of 100"),
    ],
)
def test_too_little_text_is_refused(tmp_path: Path, sizes: dict[str, int], message: str):
    folder = make_files(tmp_path / "text", sizes)
    with pytest.raises(ValueError, match="give more text or a shorter context length") as caught:
        pack_folder(folder, tmp_path / "out", context_length=100)
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_opening_again_gives_the_same_corpus(tmp_path: Path):
    corpus = pack_folder(make_files(tmp_path / "text", SIZES), tmp_path / "out")
    again = open_packed(tmp_path / "out")
    assert again.fingerprint == corpus.fingerprint
    assert again.documents == corpus.documents
    assert again.boundary == corpus.boundary
    assert again.tokens.equal(corpus.tokens)


def _flip(folder: Path) -> None:
    content = bytearray((folder / "corpus.bin").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "corpus.bin").write_bytes(content)


def _cut(folder: Path) -> None:
    content = (folder / "corpus.bin").read_bytes()
    (folder / "corpus.bin").write_bytes(content[:-1])


def _other_table(folder: Path) -> None:
    record = json.loads((folder / "corpus.json").read_text())
    (folder / "corpus.json").write_text(json.dumps(record | {"documents": 3}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_flip, "damaged"),
        (_cut, "damaged"),
        (_other_table, "damaged"),
        (lambda folder: (folder / "corpus.json").write_text("{"), "damaged"),
        (lambda folder: (folder / "corpus.json").unlink(), "corpus.json is missing"),
        (lambda folder: (folder / "corpus.bin").unlink(), "corpus.bin is missing"),
    ],
)
def test_damage_is_noticed(tmp_path: Path, damage, message: str):
    pack_folder(make_files(tmp_path / "text", SIZES), tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        open_packed(tmp_path / "out")


def test_another_text_or_another_split_has_another_fingerprint(tmp_path: Path):
    folder = make_files(tmp_path / "text", SIZES)
    prints = {pack_folder(folder, tmp_path / "out").fingerprint}
    prints.add(pack_folder(folder, tmp_path / "out", fraction=0.3).fingerprint)
    file = folder / "a" / "3.txt"
    file.write_bytes(file.read_bytes()[:-1] + b"X")
    prints.add(pack_folder(folder, tmp_path / "out").fingerprint)
    file.rename(folder / "a" / "renamed.txt")
    prints.add(pack_folder(folder, tmp_path / "out").fingerprint)
    assert len(prints) == 4


def test_a_file_that_changes_while_it_is_read_leaves_nothing(tmp_path: Path):
    folder = make_files(tmp_path / "text", SIZES)
    sources = find_sources([folder])
    (folder / "a" / "3.txt").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"3\.txt' changed while it was read"):
        pack(sources, tmp_path / "out", held_out_fraction=0.1, context_length=10)
    assert list((tmp_path / "out").iterdir()) == []
