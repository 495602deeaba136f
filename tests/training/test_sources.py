"""Which files count as text: the rule, the order, and a message for every path that cannot be used."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dilated_attention_pytorch.training.sources import CHUNK, find_sources, standard_library, text_size


def write(path: Path, content: bytes = b"some text\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_a_folder_gives_its_text_files_by_relative_name(tmp_path: Path):
    write(tmp_path / "b.txt", b"bb")
    write(tmp_path / "deep" / "er" / "a.py", "naïve".encode())
    write(tmp_path / ".hidden.txt")
    write(tmp_path / ".git" / "config")
    write(tmp_path / "__pycache__" / "c.txt")
    write(tmp_path / "image.bin", b"\x89PNG\0\x01")
    write(tmp_path / "latin.txt", "naïve".encode("latin-1"))
    write(tmp_path / "empty.txt", b"")
    assert [(s.name, s.size) for s in find_sources([tmp_path])] == [("b.txt", 2), ("deep/er/a.py", 6)]


def test_a_file_reached_twice_counts_once(tmp_path: Path):
    file = write(tmp_path / "folder" / "a.txt")
    os.symlink(file, tmp_path / "folder" / "b.txt")
    assert [s.name for s in find_sources([file, tmp_path / "folder", file])] == ["a.txt"]


def test_a_folder_that_links_to_itself_ends(tmp_path: Path):
    write(tmp_path / "a.txt")
    os.symlink(tmp_path, tmp_path / "loop")
    assert [s.name for s in find_sources([tmp_path])] == ["a.txt"]


def test_a_character_across_two_chunks_is_text(tmp_path: Path):
    file = write(tmp_path / "a.txt", b"x" * (CHUNK - 1) + "é".encode() + b"y")
    assert text_size(file) == CHUNK + 2


def _missing(folder: Path) -> Path:
    return folder / "missing"


def _dangling(folder: Path) -> Path:
    os.symlink(folder / "nowhere", folder / "link")
    return folder / "link"


def _pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


def _truncated_character(folder: Path) -> Path:
    return write(folder / "a.txt", "é".encode()[:1])


def _only_binaries(folder: Path) -> Path:
    write(folder / "sub" / "a.bin", b"\0")
    return folder / "sub"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_missing, "it does not exist"),
        (_dangling, "it does not exist"),
        (_pipe, "it is not a regular file"),
        (lambda folder: write(folder / "a.txt", b""), "it is empty"),
        (lambda folder: write(folder / "a.txt", b"abc\0"), "it is not text: byte 3 is NUL"),
        (lambda folder: write(folder / "a.txt", b"x" * CHUNK + b"a\0"), f"byte {CHUNK + 1} is NUL"),
        (lambda folder: write(folder / "a.txt", b"a\xff"), "it is not valid UTF-8"),
        (_truncated_character, "it is not valid UTF-8"),
        (_only_binaries, "the folder holds no text file"),
    ],
)
def test_a_path_that_cannot_be_used_is_named_with_the_reason(tmp_path: Path, make, reason: str):
    path = make(tmp_path)
    with pytest.raises(ValueError, match="cannot train on") as caught:
        find_sources([path])
    assert reason in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_file_without_permission_is_named_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = write(tmp_path / "a.txt")

    def refuse(self: Path, mode: str):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ValueError, match=r"a\.txt': Permission denied"):
        find_sources([file])


def test_the_standard_library_comes_without_packages_and_tests():
    names = {source.name for source in standard_library()}
    assert {"argparse.py", "json/decoder.py", "asyncio/events.py"} <= names
    assert all(name.endswith(".py") for name in names)
    assert not [n for n in names if {"site-packages", "test", "tests"}.intersection(n.split("/"))]
