"""The packed corpus: one memory-mapped file of bytes, split by file into training and held-out text.

Layout of ``corpus.bin``: every document is one NUL byte followed by its text. NUL cannot occur in text, so it
marks a beginning unambiguously and gives the first byte of a document something to be predicted from.
Training documents come first, held-out ones after them; ``corpus.json`` is written last and holds the table
of documents.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .files import replace_file
from .sources import Source, iter_chunks

SEPARATOR = 0
_FORMAT = "packed bytes 1"


@dataclass(frozen=True, slots=True)
class Document:
    """One document: where its text starts (one after its separator) and how many bytes it has."""

    name: str
    offset: int
    length: int
    held_out: bool


@dataclass(frozen=True)
class Corpus:
    """Packed text. ``tokens`` is uint8 (bytes, vocabulary 256), mapped from the file."""

    tokens: Tensor
    documents: tuple[Document, ...]
    boundary: int
    fingerprint: str

    @property
    def train(self) -> Tensor:
        """Bytes of the training documents with their separators."""
        return self.tokens[: self.boundary]

    @property
    def held_out(self) -> Tensor:
        """Bytes of the held-out documents with their separators."""
        return self.tokens[self.boundary :]

    @property
    def held_out_documents(self) -> tuple[Document, ...]:
        """The documents of `held_out`; their offsets count from the start of `tokens`."""
        return tuple(document for document in self.documents if document.held_out)


@dataclass(frozen=True, slots=True)
class _Piece:
    """A run of bytes of a source: the whole file, or the head or the tail of a corpus of one file."""

    name: str
    source: Source
    start: int
    length: int
    held_out: bool

    def chunks(self) -> Iterator[bytes]:
        skip, left = self.start, self.length
        for chunk in iter_chunks(self.source.path):
            part = chunk[skip : skip + left]
            skip, left = max(0, skip - len(chunk)), left - len(part)
            if b"\0" in part:
                break
            yield part
        if left:
            raise ValueError(f"{str(self.source.path)!r} changed while it was read; start again")


def split_sources(sources: Sequence[Source], *, held_out_fraction: float, context_length: int) -> list[_Piece]:
    """Divide sources into training and held-out pieces, training first, each side in the order of names.

    Files are held out whole, in the order of a hash of their relative name, until the held-out side has
    ``held_out_fraction`` of all bytes and at least ``context_length``; the largest file always trains. So the
    split does not depend on where the folder lies. The only file of a corpus gives its last bytes instead.

    Raises:
        ValueError: a side has fewer than ``context_length`` bytes.
    """
    sources = sorted(sources, key=lambda s: (s.name, str(s.path)))
    target = max(int(held_out_fraction * sum(s.size for s in sources)), context_length)
    if len(sources) == 1:
        (only,) = sources
        head = only.size - target
        pieces = [
            _Piece(only.name, only, 0, max(head, 0), False),
            _Piece(f"{only.name} (tail)", only, max(head, 0), target, True),
        ]
    else:
        largest = max(sources, key=lambda s: s.size)
        others = (s for s in sources if s is not largest)
        held: set[Path] = set()
        size = 0
        for source in sorted(others, key=lambda s: hashlib.sha256(s.name.encode()).digest()):
            if size >= target:
                break
            held.add(source.path)
            size += source.size
        pieces = [_Piece(s.name, s, 0, s.size, s.path in held) for s in sources]
        pieces.sort(key=lambda piece: piece.held_out)
    for side, held_out in (("training", False), ("held-out", True)):
        size = sum(piece.length for piece in pieces if piece.held_out == held_out)
        if size < context_length:
            raise ValueError(
                f"the {side} text has {size} bytes, less than one context of {context_length}; "
                "give more text or a shorter context length"
            )
    return pieces


def pack(sources: Sequence[Source], folder: Path, *, held_out_fraction: float, context_length: int) -> Corpus:
    """Write ``corpus.bin`` and ``corpus.json`` into ``folder`` (each whole or not at all) and open them."""
    pieces = split_sources(sources, held_out_fraction=held_out_fraction, context_length=context_length)
    digest = hashlib.sha256()
    documents: list[Document] = []
    separator = bytes([SEPARATOR])

    def content() -> Iterator[bytes]:
        position = 0
        for piece in pieces:
            documents.append(Document(piece.name, position + 1, piece.length, piece.held_out))
            position += 1 + piece.length
            digest.update(separator)
            yield separator
            for chunk in piece.chunks():
                digest.update(chunk)
                yield chunk

    replace_file(folder / "corpus.bin", content())
    table = [[d.name, d.offset, d.length, d.held_out] for d in documents]
    record = {"format": _FORMAT, "sha256": digest.hexdigest(), "documents": table}
    replace_file(folder / "corpus.json", [json.dumps(record).encode()])
    return open_packed(folder)


def open_packed(folder: Path) -> Corpus:
    """Map a packed corpus after checking it.

    Raises:
        ValueError: the files are missing, or the bytes are not those that the table was written for.
    """
    path = folder / "corpus.bin"
    try:
        record = json.loads((folder / "corpus.json").read_bytes())
        documents = tuple(Document(*row) for row in record["documents"])
        digest, size = hashlib.sha256(), 0
        for chunk in iter_chunks(path):
            digest.update(chunk)
            size += len(chunk)
        if record["format"] != _FORMAT or digest.hexdigest() != record["sha256"]:
            raise ValueError
    except FileNotFoundError as error:
        raise ValueError(f"{os.path.basename(error.filename)} is missing from {str(folder)!r}") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"the packed text in {str(folder)!r} is damaged") from None
    boundary = next((d.offset - 1 for d in documents if d.held_out), size)
    fingerprint = hashlib.sha256(json.dumps([record["sha256"], record["documents"]]).encode()).hexdigest()
    tokens = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    return Corpus(tokens, documents, boundary, fingerprint)
