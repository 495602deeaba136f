"""Which files are training text: the user's files and folders, or the standard library's own source."""

from __future__ import annotations

import codecs
import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

CHUNK = 1 << 20

NOT_STANDARD_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
"""Folders inside the standard library's folder that are installed packages or test data, not its source."""


class Source(NamedTuple):
    """A text file: its name in the folder it was found in ("/" between parts), its place, its size."""

    name: str
    path: Path
    size: int


def iter_chunks(path: Path) -> Iterator[bytes]:
    """The bytes of a file, a megabyte at a time."""
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def text_size(path: Path) -> int:
    """Size of a text file in bytes.

    Text is UTF-8 without a NUL byte, at least one byte long.

    Raises:
        ValueError: the file is not text; the message says why.
        OSError: the file cannot be read.
    """
    if not path.is_file():
        raise ValueError("it is not a regular file")
    decoder = codecs.getincrementaldecoder("utf-8")()
    size = 0
    try:
        for chunk in iter_chunks(path):
            if b"\0" in chunk:
                raise ValueError(f"it is not text: byte {size + chunk.index(0)} is NUL")
            decoder.decode(chunk)
            size += len(chunk)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        raise ValueError("it is not text: it is not valid UTF-8") from None
    if not size:
        raise ValueError("it is empty")
    return size


def _files_below(folder: Path) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise error

    for parent, folders, files in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        yield from (Path(parent, name) for name in sorted(files) if not name.startswith("."))


def find_sources(paths: Sequence[Path]) -> list[Source]:
    """The text files among ``paths``.

    A file that is named must be text. A folder is walked: hidden names and ``__pycache__`` are left out, and
    so is what is no text (see `text_size`). A file reached twice counts once.

    Raises:
        ValueError: a path is missing or unreadable, a named file is not text, a folder holds no text.
    """
    sources: list[Source] = []
    seen: set[Path] = set()
    for path in paths:
        try:
            if not path.exists():
                raise ValueError("it does not exist")
            if path.is_dir():
                found = list(_folder_sources(path))
                if not found:
                    raise ValueError("the folder holds no text file (UTF-8, not empty, name not hidden)")
            else:
                found = [Source(path.name, path, text_size(path))]
        except ValueError as error:
            raise ValueError(f"cannot train on {str(path)!r}: {error}") from None
        except OSError as error:
            where = "" if error.filename in (None, str(path)) else f" {error.filename!r}"
            raise ValueError(f"cannot read {str(path)!r}:{where} {error.strerror or error}") from None
        for source in found:
            if (real := source.path.resolve()) not in seen:
                seen.add(real)
                sources.append(source)
    return sources


def _folder_sources(folder: Path, suffix: str = "", leave_out: frozenset[str] = frozenset()) -> Iterator[Source]:
    for path in _files_below(folder):
        relative = path.relative_to(folder)
        if path.suffix == suffix or not suffix:
            if leave_out.intersection(relative.parts):
                continue
            try:
                yield Source(relative.as_posix(), path, text_size(path))
            except ValueError:  # not text: nothing to train on here
                continue


def standard_library() -> list[Source]:
    """The ``*.py`` files of the running Python's standard library, without installed packages and its tests.

    Raises:
        ValueError: this Python keeps no source files (for instance a zipped or frozen standard library).
    """
    folder = Path(sysconfig.get_path("stdlib"))
    try:
        found = list(_folder_sources(folder, ".py", NOT_STANDARD_LIBRARY))
    except OSError:
        found = []
    if len(found) < 2:
        raise ValueError("this Python has no standard library source to train on; name text with --data")
    return found
