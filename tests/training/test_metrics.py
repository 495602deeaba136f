"""metrics.jsonl: no step twice, no broken line."""

from __future__ import annotations

import json
from pathlib import Path

from dilated_attention_pytorch.training.metrics import MetricsLog, read_metrics


def test_records_come_back(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, keep_until=0) as log:
        log.append({"kind": "train", "step": 1, "loss": 0.1})
        log.append({"kind": "held-out", "step": 1, "bits_per_byte": 3.5})
        log.sync()
        assert len(path.read_text().splitlines()) == 2  # in the file before it is closed
    assert read_metrics(path) == log.records
    assert [json.loads(line) for line in path.read_text().splitlines()] == log.records


def test_resuming_drops_what_is_done_again_and_what_a_kill_cut(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"kind": "train", "step": n, "loss": n / 7}) for n in range(1, 9)]
    path.write_text("\n".join(lines) + '\n{"kind": "train", "step": 9, "lo')
    with MetricsLog(path, keep_until=5) as log:
        assert [r["step"] for r in log.records] == [1, 2, 3, 4, 5]
        log.append({"kind": "train", "step": 6, "loss": 0.5})
    assert path.read_text().splitlines() == [*lines[:5], '{"kind": "train", "step": 6, "loss": 0.5}']


def test_a_last_line_without_its_newline_is_incomplete(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 12')
    assert read_metrics(path) == [{"step": 1}]
    path.write_text('{"step": 1}\nnot json\n[2]\n{"step": "x"}\n{"step": 3}\n')
    assert read_metrics(path) == [{"step": 1}, {"step": 3}]


def test_a_missing_file_is_empty(tmp_path: Path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []
