"""What a finished run leaves: the held-out evaluation, two plots, a sample of text, and a summary of all."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from .evaluate import PositionCurve, bits_by_position, curve_positions, position_curve
from .files import replace_file
from .generate import printable, stream_bytes
from .loop import Trainer
from .metrics import read_metrics

PROMPT_BYTES = 200
SAMPLE_TEMPERATURE = 0.8


@dataclass(frozen=True)
class Summary:
    """The figures of a run, as summary.json holds them."""

    parameters: int
    steps: int
    trained_bytes: int
    seconds: float
    tokens_per_second: float
    held_out_windows: int
    held_out_bits_per_byte: float
    position_curve: PositionCurve


@dataclass(frozen=True)
class Sample:
    """The beginning of a held-out document and what the model made of it, safe to print."""

    prompt: str
    text: str


def _measure(trainer: Trainer) -> tuple[float, PositionCurve]:
    """Bits per byte of all held-out windows, and of their second halves by the position in the context."""
    length = trainer.config.model.context_length
    half = length // 2

    def measure(context: int | None, first: int) -> Tensor:
        return bits_by_position(
            trainer.model,
            trainer.held_out,
            context=context,
            first=first,
            device=trainer.device,
            autocast=trainer.autocast,
        )

    positions = curve_positions(length)
    whole = measure(None, 0)
    bits = [measure(context, half) for context in positions[:-1]] + [whole[:, half:]]
    return float(whole.double().mean()), position_curve(positions, bits)


def draw_sample(trainer: Trainer) -> Sample:
    """Continue the first bytes of a held-out document."""
    # The last by name of those that are long enough to be a fair prompt: always the same one.
    document = max(trainer.corpus.held_out_documents, key=lambda d: (min(d.length, 4 * PROMPT_BYTES), d.name))
    start, training = document.offset, trainer.config.training
    prompt = bytes(trainer.corpus.tokens[start : start + min(PROMPT_BYTES, document.length)].tolist())
    steps = stream_bytes(
        trainer.model,
        [prompt],
        max_bytes=training.sample_bytes,
        temperature=SAMPLE_TEMPERATURE,
        generator=training.seed,
    )
    return Sample(printable(prompt), printable(b"".join(step[0] for step in steps)))


def can_plot() -> bool:
    """Whether matplotlib is installed; it is looked for, not loaded."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_plots(trainer: Trainer, curve: PositionCurve, *, parameters: int) -> list[Path]:
    """Write loss.png and position.png; the files written."""
    from .plots import plot_loss, plot_position

    model, folder = trainer.config.model, trainer.folder
    what = f"LongNetLM on bytes, {parameters / 1e6:.1f} M parameters, context {model.context_length:,}"
    records = read_metrics(folder / "metrics.jsonl")
    paths = [folder / "loss.png", folder / "position.png"]
    plot_loss(records, paths[0], title=f"Loss over training\n{what}")
    title = f"What context is worth\n{what}"
    plot_position(curve, paths[1], title=title, segment_lengths=model.segment_lengths)
    return paths


def finish_run(trainer: Trainer) -> tuple[Summary, Sample | None, list[Path]]:
    """Evaluate, plot, generate; returns the summary, the sample if there is one, and the files written."""
    folder = trainer.folder
    parameters = sum(p.numel() for p in trainer.model.parameters())
    overall, curve = _measure(trainer)
    trained = trainer.config.trained_bytes(trainer.step)
    summary = Summary(
        parameters=parameters,
        steps=trainer.step,
        trained_bytes=trained,
        seconds=trainer.seconds,
        tokens_per_second=trained / max(trainer.seconds, 1e-9),
        held_out_windows=len(trainer.held_out),
        held_out_bits_per_byte=overall,
        position_curve=curve,
    )
    files = draw_plots(trainer, curve, parameters=parameters) if can_plot() else []
    sample = None
    if trainer.config.training.sample_bytes:
        sample = draw_sample(trainer)
        content = f"{sample.prompt}\n{'-' * 20} the model goes on: {'-' * 20}\n{sample.text}\n"
        replace_file(folder / "sample.txt", [content.encode()])
        files.append(folder / "sample.txt")
    replace_file(folder / "summary.json", [json.dumps(asdict(summary), indent=1).encode()])
    return summary, sample, [*files, folder / "summary.json", folder / "metrics.jsonl"]
