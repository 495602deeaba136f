"""metrics.jsonl: one JSON object a line, appended in training, cut back to the checkpoint on resuming."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Self

from .files import replace_file


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file; a line that a kill left incomplete is dropped, no file gives none."""
    records: list[dict[str, Any]] = []
    try:
        lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline is incomplete
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


class MetricsLog:
    """The open metrics file of a run. ``records`` holds what it contains."""

    def __init__(self, path: Path, *, keep_until: int) -> None:
        """Open ``path`` with the records of steps up to ``keep_until``; later ones are done again."""
        self.records = [r for r in read_metrics(path) if r["step"] <= keep_until]
        replace_file(path, [json.dumps(record).encode() + b"\n" for record in self.records])
        self._file = path.open("ab")

    def append(self, record: dict[str, Any]) -> None:
        """Add one record; it is in the file when this returns."""
        self.records.append(record)
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()

    def sync(self) -> None:
        """Wait until the disk has every record, so that none is missing before a checkpoint."""
        os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
