"""Errors of a command as one line on stderr and an exit code, without a traceback."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import typer

FAILED = 1
WRONG_INPUT = 2
INTERRUPTED = 130

_OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")


def fail(message: str, code: int) -> typer.Exit:
    """Print ``message`` as one line on stderr; the exception to raise."""
    typer.echo("error: " + " ".join(message.split()), err=True)
    return typer.Exit(code)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; torch raises a RuntimeError for it, on a GPU a subclass of it."""
    if isinstance(error, RuntimeError):
        return any(words in str(error) for words in _OUT_OF_MEMORY)
    return isinstance(error, MemoryError)


@contextmanager
def one_line_errors(*, hint: str = "") -> Iterator[None]:
    """Turn a ValueError or a path that is not there into exit code 2, a refusing disk or lack of memory into 1.

    The ``hint`` goes with the latter.
    """
    try:
        yield
    except ValueError as error:
        raise fail(str(error), WRONG_INPUT) from None
    except FloatingPointError as error:
        raise fail(str(error), FAILED) from None
    except OSError as error:
        path = error.filename if error.filename2 is None else error.filename2  # of a rename the name that was asked for
        where = f"{os.fsdecode(path)!r}: " if isinstance(path, (str, bytes)) else ""
        text = f"{where}{error.strerror or error}"
        if isinstance(error, (FileNotFoundError, IsADirectoryError, NotADirectoryError)):
            raise fail(text, WRONG_INPUT) from None
        raise fail(f"{text}{hint and '; ' + hint}", FAILED) from None
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):  # a defect
            raise
        text = str(error)
        reason = f"out of memory ({text.splitlines()[0]})" if text else "out of memory"
        raise fail(f"{reason}{hint and '; ' + hint}", FAILED) from None
