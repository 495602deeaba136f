"""Text from a byte-level model: documents that begin as asked, byte by byte, and safe to show."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from typing import Any

from ..models import LongNetLM
from .corpus import SEPARATOR


def stream_bytes(
    model: LongNetLM, prompts: Sequence[bytes], *, max_bytes: int, **options: Any
) -> Iterator[list[bytes]]:
    """Continue documents that begin with ``prompts``, a byte of each at a time; b"" for one that has ended.

    A document ends at the separator, which begins the next one in training; it is not returned. Any prompt will do,
    an empty one too.

    Args:
        max_bytes: most bytes to add to each prompt.
        options: ``temperature``, ``top_k``, ``top_p`` and ``generator``, as for :meth:`LongNetLM.generate`.
    """
    tokens = [[SEPARATOR, *prompt] for prompt in prompts]
    for step in model.stream(tokens, max_new_tokens=max_bytes, end_token=SEPARATOR, **options):
        yield [bytes([token]) if token >= 0 else b"" for token in step.tolist()]


class PrintableText:
    """Bytes as text that is safe to show, as they come: malformed UTF-8 and control characters become U+FFFD.

    >>> text = PrintableText()
    >>> [text.add(part) for part in (b"a", b"\\xc3", b"\\xa9", b"\\r", b"\\n\\x1b")], text.end()
    (['a', '', 'é', '', '\\n�'], '')
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._carriage_return = False

    def add(self, data: bytes, *, final: bool = False) -> str:
        """What can be shown now: a character whose bytes are not complete waits, and so does a carriage return."""
        decoded = "\r" * self._carriage_return + self._decoder.decode(data, final)
        self._carriage_return = decoded.endswith("\r") and not final
        decoded = decoded[: len(decoded) - self._carriage_return].replace("\r\n", "\n").replace("\r", "\n")
        return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in decoded)

    def end(self) -> str:
        """What was waiting."""
        return self.add(b"", final=True)


def printable(text: bytes) -> str:
    """All of ``text`` as :class:`PrintableText` shows it."""
    return PrintableText().add(text, final=True)
