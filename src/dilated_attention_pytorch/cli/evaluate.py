"""``dilated-attention evaluate``: what context is worth to a model that ``train`` made."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .errors import one_line_errors
from .generate import last_run, open_model
from .problem import integers

if TYPE_CHECKING:
    from torch import Tensor

    from ..training.evaluate import ContextTable


def evaluate(
    run: Annotated[
        Path | None,
        typer.Argument(help="Folder of a run, or one of its checkpoints. By default the run in runs/ trained last."),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="File or folder of text; repeat for more. By default the text that the run held out."),
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Bytes of a window. By default the context that the model was trained with.")
    ] = None,
    contexts: Annotated[
        str | None,
        typer.Option(help="Contexts to restrict the model to, e.g. 64,256,1024. By default halves of the window."),
    ] = None,
    windows: Annotated[int, typer.Option(help="Most windows to measure on.")] = 16,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ... On CUDA in bfloat16 (autocast).")] = "auto",
    output: Annotated[
        Path | None, typer.Option(help="Folder for evaluation.json and evaluation.png. By default that of the run.")
    ] = None,
) -> None:
    """Measure bits per byte by position in the window and by context, against the same model with less context.

    In a row of the table the bytes are the same, so that numbers along it can be compared: what the model loses when
    it sees fewer bytes. Without matplotlib there is no plot.
    """
    with one_line_errors():
        import torch

        from ..training import parse_device
        from ..training.evaluate import context_table, curve_positions
        from ..training.files import make_writable

        source = run or last_run()
        where, model = parse_device(device), open_model(source)
        folder = source if (source / "checkpoints").is_dir() else source.parent.parent
        length = model.config.context_length if window is None else window
        chosen = curve_positions(length)[::2] if contexts is None else integers("--contexts", contexts)
        for name, value in (("--window", length), ("--windows", windows)):
            if value < 1:
                raise ValueError(f"{name} is {value}; give at least 1")
        text = _windows(data, folder, length=length, count=windows)
        make_writable(output or folder)
        autocast = torch.bfloat16 if where.type == "cuda" else None
        table = context_table(model.to(where), text, chosen, device=where, autocast=autocast)
        files = _write(table, output or folder, title=f"What context is worth: {source.name}")
    _show(table, files)


def _windows(data: list[Path] | None, folder: Path, *, length: int, count: int) -> Tensor:
    """Windows of the files named, or of the text that the run held out."""
    from ..training.corpus import open_packed
    from ..training.evaluate import unseen_corpus
    from ..training.sources import find_sources
    from ..training.windows import held_out_windows

    if not data and not (folder / "data").is_dir():
        raise ValueError(f"{str(folder)!r} holds no text, as runs do that were trained here; name some with --data")
    corpus = unseen_corpus(find_sources(data)) if data else open_packed(folder / "data")
    if len(corpus.held_out) <= length:
        raise ValueError(f"the text has {len(corpus.held_out)} bytes, no window of {length}; give more, or --window")
    return held_out_windows(corpus, context_length=length, count=count)


def _write(table: ContextTable, folder: Path, *, title: str) -> list[Path]:
    import dataclasses
    import json

    from ..training.files import replace_file
    from ..training.report import can_plot

    files = [folder / "evaluation.json"]
    replace_file(files[0], [json.dumps(dataclasses.asdict(table), indent=1).encode()])
    if can_plot():
        from ..training.plots import plot_contexts

        files.append(folder / "evaluation.png")
        plot_contexts(table, files[1], title=title)
    return files


def _show(table: ContextTable, files: list[Path]) -> None:
    from itertools import pairwise

    from rich.console import Console
    from rich.table import Table

    shown = Table(title=f"Bits per byte, {table.windows} windows of {table.edges[-1]:,} bytes", title_justify="left")
    shown.add_column("position", justify="right")
    for context in table.contexts[:-1]:
        shown.add_column(f"{context:,} bytes", justify="right")
    shown.add_column("all before", justify="right", style="bold")
    for (low, high), row in zip(pairwise(table.edges), table.bits, strict=True):
        shown.add_row(f"{low + 1:,} to {high:,}", *(f"{bits:.3f}" for bits in row))
    curve = table.curve
    shown.add_section()
    shown.add_row("2nd half", *(f"{bits:.3f}" for bits in curve.bits))
    several = table.windows > 1  # one has no spread
    worth = [
        f"{b - curve.bits[-1]:+.3f}" + (f"±{e:.3f}" if several else "")
        for b, e in zip(curve.bits, curve.error, strict=True)
    ]
    shown.add_row("it costs", *worth[:-1], "")
    console = Console()
    console.print(shown)
    for path in files:
        console.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)
