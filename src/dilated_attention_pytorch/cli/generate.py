"""``dilated-attention generate``: continue texts with a model that ``train`` made."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import INTERRUPTED, one_line_errors

if TYPE_CHECKING:
    from ..models import LongNetLM

RUNS = Path("runs")


def generate(
    run: Annotated[
        Path | None,
        typer.Argument(help="Folder of a run, or one of its checkpoints. By default the run in runs/ trained last."),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="How the text begins; repeat for several texts. By default nothing.")
    ] = None,
    prompt_file: Annotated[
        list[Path] | None, typer.Option(help="A file that the text begins with, - for stdin; repeat for several.")
    ] = None,
    max_bytes: Annotated[int, typer.Option(help="Most bytes to add to each text.")] = 400,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable byte.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Draw from so many most probable bytes only.")] = None,
    top_p: Annotated[float, typer.Option(help="Draw from the fewest bytes that have this probability together.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text. By default a new one.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
) -> None:
    """Continue texts with a trained model, byte by byte.

    The text goes to stdout as it is drawn, several texts one after the other when all are done. It ends early
    where the model ends a document. Past bytes are kept no further than the longest segment reaches, so a byte takes
    the same time and memory after a long text as after a short one.
    """
    with one_line_errors():
        from ..training import parse_device

        if max_bytes < 0:
            raise ValueError(f"--max-bytes is {max_bytes}; give at least 0")
        prompts = [text.encode("utf-8", errors="surrogateescape") for text in prompt or ()]
        prompts += [_read(path) for path in prompt_file or ()]
        model = open_model(run or last_run()).to(parse_device(device))
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "generator": seed}
        try:
            _show(model, prompts or [b""], max_bytes=max_bytes, **options)
        except KeyboardInterrupt:
            typer.echo("")
            raise typer.Exit(INTERRUPTED) from None


def _read(path: Path) -> bytes:
    if str(path) == "-":
        return sys.stdin.buffer.read()
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read --prompt-file {str(path)!r}: {error.strerror}") from None


def last_run() -> Path:
    """The run in runs/ with the youngest checkpoints."""
    found = [path for path in RUNS.glob("*/checkpoints") if path.is_dir()]
    if not found:
        raise ValueError(f"there is no run in {str(RUNS)!r}; make one with: dilated-attention train, or name a folder")
    return max(found, key=lambda path: path.stat().st_mtime).parent


def open_model(run: Path) -> LongNetLM:
    """The model of a run or checkpoint; that an older checkpoint had to be taken is a line on stderr."""
    from ..training import load_model

    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", UserWarning)
        model = load_model(run)
    for warning in found:
        typer.echo(f"note: {warning.message}", err=True)
    return model


def _show(model: LongNetLM, prompts: Sequence[bytes], *, max_bytes: int, **options: Any) -> None:
    from ..training.generate import PrintableText, printable, stream_bytes

    started, parts = time.perf_counter(), [PrintableText() for _ in prompts]
    texts, count, alone = [""] * len(prompts), 0, len(prompts) == 1
    steps = stream_bytes(model, prompts, max_bytes=max_bytes, **options)  # raises before anything is shown
    if alone:
        typer.echo(printable(prompts[0]), nl=False)
    for step in steps:
        for number, byte in enumerate(step):
            count += len(byte)
            shown = parts[number].add(byte)
            texts[number] += shown
            if alone and shown:
                typer.echo(shown, nl=False)
                sys.stdout.flush()
    for number, part in enumerate(parts):
        rest = part.end()
        if alone:
            typer.echo(rest)
        else:
            typer.echo(f"--- text {number + 1} of {len(prompts)}\n{printable(prompts[number])}{texts[number]}{rest}")
    seconds = time.perf_counter() - started
    typer.echo(f"{count:,} bytes in {seconds:.1f} s, {count / max(seconds, 1e-9):,.0f} bytes/s", err=True)
