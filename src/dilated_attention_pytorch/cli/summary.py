"""The tables at the start and the end of a training run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from .progress import duration

if TYPE_CHECKING:
    from ..training import Sample, Summary, Trainer


def _grid(console: Console, title: str, rows: Sequence[tuple[str, str]]) -> None:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(value))
    console.print(table)


def show_start(console: Console, trainer: Trainer) -> None:
    """What is trained, on what, where."""
    model, training, corpus = trainer.config.model, trainer.config.training, trainer.corpus
    held_out = corpus.held_out_documents
    parameters = sum(p.numel() for p in trainer.model.parameters())
    source = "the Python standard library's source" if not trainer.config.data else ", ".join(trainer.config.data)
    where = f"{trainer.device}, {training.dtype}"
    if trainer.device.type == "cpu":
        where += f", {torch.get_num_threads()} threads"
    rows = [
        (
            "model",
            f"LongNetLM {trainer.config.preset}: {parameters:,} parameters, context {model.context_length:,}",
        ),
        ("pattern", f"segments {_list(model.segment_lengths)}; rates {_list(model.dilation_rates)}"),
        ("text", source),
        (
            "",
            f"{len(corpus.documents) - len(held_out):,} documents, {_megabytes(corpus.boundary)} to train on",
        ),
        ("", f"{len(held_out):,} documents, {_megabytes(len(corpus.tokens) - corpus.boundary)} held out"),
        ("steps", _stages(trainer)),
        ("device", where),
        ("output", str(trainer.folder)),
    ]
    if trainer.step:
        rows.append(("resumed", f"after step {trainer.step:,}"))
    _grid(console, "Training", rows)


def show_end(console: Console, summary: Summary, sample: Sample | None, files: Sequence[Path]) -> None:
    """The sample, the figures, and where the files lie."""
    if sample:
        body = Text(sample.prompt, style="dim") + Text("|", style="bold cyan") + Text(sample.text)
        console.print(Panel(body, title="Sample: held-out prompt | what the model makes of it", title_align="left"))
    rows = [
        (
            "held-out bits per byte",
            f"{summary.held_out_bits_per_byte:.3f} ({summary.held_out_windows} windows)",
        )
    ]
    curve = summary.position_curve
    for n, back in enumerate(range(len(curve.positions) - 1, -1, -2)):  # every 2nd: a quarter of the context
        label = "in a window's 2nd half" if n == 0 else ""
        error = "" if n == 0 else f" ({curve.bits[back] - curve.bits[-1]:+.3f} ± {curve.error[back]:.3f})"
        rows.append((label, f"{curve.bits[back]:.3f} seeing {curve.positions[back]:,} bytes{error}"))
    rows += [
        ("trained on", f"{summary.trained_bytes:,} bytes in {summary.steps:,} steps"),
        ("training time", f"{duration(summary.seconds)}, {summary.tokens_per_second:,.0f} tokens/s"),
        ("files", "\n".join(map(str, files))),
    ]
    _grid(console, "Result", rows)


def _stages(trainer: Trainer) -> str:
    config, step, parts = trainer.config, 0, []
    for steps in config.training.stage_steps():
        batch, length = config.window_shape(step)
        if steps:
            parts.append(f"{steps:,} of {batch} x {length:,}")
        step += steps
    return f"{config.training.steps:,}: {', then '.join(parts)} bytes"


def _list(values: Sequence[int]) -> str:
    return ", ".join(f"{value:,}" for value in values)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB" if size >= 10_000 else f"{size:,} bytes"
