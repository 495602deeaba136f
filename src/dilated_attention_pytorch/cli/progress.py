"""How a training run shows on a terminal (a bar) and elsewhere (a line now and then)."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from ..training import Trainer

SECONDS_BETWEEN_LINES = 10.0


def duration(seconds: float) -> str:
    """Seconds as "42 s", "3 min 05 s" or "2 h 07 min"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


class TrainingProgress:
    """A `Reporter`: loss, bits per byte, tokens/s and ETA, live on a terminal, as plain lines elsewhere."""

    def __init__(self, console: Console, *, steps: int, total_bytes: int, done_bytes: int) -> None:
        """The bar counts bytes, of which steps may have different numbers; ``done_bytes`` were done before."""
        self._console, self._steps, self._total, self._first = console, steps, total_bytes, done_bytes
        self._started = self._printed = time.monotonic()
        self._speed = 0.0
        self._bar = Progress(
            TextColumn("step {task.fields[step]}"),
            BarColumn(bar_width=None),
            TextColumn("{task.description}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            expand=True,
        )
        self._task: TaskID = self._bar.add_task("", total=total_bytes, completed=done_bytes, step=f"0/{steps}")

    @classmethod
    def of(cls, console: Console, trainer: Trainer) -> Self:
        """The progress of a run from where ``trainer`` stands."""
        config = trainer.config
        return cls(
            console,
            steps=config.training.steps,
            total_bytes=config.trained_bytes(config.training.steps),
            done_bytes=config.trained_bytes(trainer.step),
        )

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._bar.stop()

    def note(self, message: str) -> None:
        """A line above the bar."""
        self._console.print(message, markup=False, highlight=False)

    def record(self, record: dict[str, Any]) -> None:
        """Show a line of metrics.jsonl."""
        step = f"{record['step']}/{self._steps}"
        if record["kind"] == "held-out":
            self.note(f"step {step}: held-out {record['bits_per_byte']:.3f} bits per byte")
            return
        speed = record["tokens_per_second"]
        self._speed = 0.9 * self._speed + 0.1 * speed if self._speed else speed
        text = f"loss {record['loss']:.3f}, {record['bits_per_byte']:.3f} bits/byte, {self._speed:,.0f} tokens/s"
        self._bar.update(self._task, completed=record["tokens"], description=text, step=step)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._printed >= SECONDS_BETWEEN_LINES:
            self._printed = now
            pace = (now - self._started) / (record["tokens"] - self._first)
            self.note(f"step {step}: {text}, ETA {duration(pace * (self._total - record['tokens']))}")
