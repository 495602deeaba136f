"""The command `memory`: traces recorded and replayed, pictures read back, owners of memory, wrong input."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from dilated_attention_pytorch.cli import app, memory_record
from dilated_attention_pytorch.cli.memory_record import Workload, lengths, record_training
from dilated_attention_pytorch.cli.memory_watch import (
    PACKAGE,
    Change,
    Ledger,
    TensorWatch,
    changes_of_snapshot,
    owner_of,
    timeline,
)
from dilated_attention_pytorch.memory import read_trace

DATA = Path(__file__).parents[1] / "memory" / "data"


def run(*arguments: object):
    return CliRunner().invoke(app, ["memory", *map(str, arguments)])


def colors(path: Path) -> int:
    """Colours, and no greys, that many pixels have."""
    red, green, blue = (matplotlib.image.imread(path)[..., :3] * 255).round().astype(int).reshape(-1, 3).T
    found, counts = np.unique(red << 16 | green << 8 | blue, return_counts=True)
    channels = np.stack((found >> 16, found >> 8 & 255, found & 255))
    return int(np.sum((counts > 100) & (np.ptp(channels, axis=0) > 60)))


def test_streaming_is_recorded_replayed_and_drawn(tmp_path: Path):
    trace, found = tmp_path / "traces" / "streaming.jsonl", tmp_path / "found.json"
    result = run("record", "streaming", "--lengths", "100-200", "--steps", 3, "--segments", "16,128", "--rates", "1,2",
                 "--memory-budget", 1 << 18, "--output", trace)  # fmt: skip
    assert result.exit_code == 0, result.output
    events = read_trace(trace).events
    assert sum(event.op == "step" for event in events) == 3
    assert sum(event.op == "acquire" for event in events) == sum(event.op == "return" for event in events) > 3
    result = run("replay", trace, "--output", found, "--pools", "simple, fragmentation", "--repeats", 1)
    assert result.exit_code == 0, result.output
    content = json.loads(found.read_text())
    assert [row["pool"] for row in content["pools"]] == ["simple", "fragmentation"]
    assert content["requests"] == sum(event.op == "acquire" for event in events)
    for text in ("torch.empty", "simple", "fragmentation"):
        assert text in result.stdout
    result = run("plot", found)
    assert result.exit_code == 0, result.output
    assert colors(tmp_path / "found.png") >= 2


def test_a_ring_is_recorded_by_its_first_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory_record, "spawn", lambda function, arguments, nprocs: function(0, *arguments))
    trace = tmp_path / "ring.jsonl"
    result = run("record", "ring", "--ranks", 1, "--lengths", 64, "--steps", 2, "--output", trace)
    assert result.exit_code == 0, result.output
    found = read_trace(trace)
    assert sum(event.op == "step" for event in found.events) == 2
    assert found.what.startswith("ring over 1 ranks: 2 steps of 64 rows")


def test_training_is_recorded_with_what_lives_from_step_to_step(tmp_path: Path):
    trace = tmp_path / "training.jsonl"
    work = Workload(lengths=(20, 30), batch=1, heads=2, head_dim=8, segment_lengths=(8, 32), dilation_rates=(1, 2))
    record_training(work, trace, layers=1, least=2048)
    found = read_trace(trace)
    acquired = {event.lease: event.bytes for event in found.events if event.op == "acquire"}
    returned = {event.lease for event in found.events if event.op == "return"}
    assert min(acquired.values()) >= 2048
    kept = [size for lease, size in acquired.items() if lease not in returned]
    assert kept.count(256 * 16 * 4) >= 2  # AdamW's two moments of the embedding of 256 bytes
    assert len(returned) > 10


def test_lengths_are_drawn_alike_every_time():
    assert lengths(7, 7, 3) == (7, 7, 7)
    assert lengths(1, 1000, 5) == lengths(1, 1000, 5)
    assert len(set(lengths(1, 1000, 5))) > 3


def test_a_command_is_profiled(tmp_path: Path):
    found = tmp_path / "profile.json"
    result = run("profile", "--output", found, "--device", "cpu", "verify", "--length", "32", "--dtype", "float32")
    assert result.exit_code == 0, result.output
    content = json.loads(found.read_text())
    assert content["command"] == "verify --length 32 --dtype float32"
    assert content["peak"] == sum(content["peak_owners"].values()) > 10_000
    assert any(name.startswith("backends/") for name in content["peak_owners"])
    assert max(map(sum, zip(*content["bytes"].values(), strict=True))) == content["peak"]
    assert "backends/" in result.stdout
    assert run("plot", found, "--output", tmp_path / "who.png").exit_code == 0
    assert colors(tmp_path / "who.png") >= 3


def test_every_tensor_is_seen_to_come_and_go():
    ledger = Ledger()
    with TensorWatch(ledger):
        first = torch.ones(1000)
        second = first.view(10, 100)  # no memory of its own
        del first
        third = second + 1
        del second, third
    assert [change.bytes for change in ledger.changes] == [4000, 4000, -4000, -4000]


def test_the_memory_history_of_a_gpu_is_read():
    ours = [
        {"filename": "/torch/nn.py", "name": "forward", "line": 1},
        {"filename": str(PACKAGE / "models" / "blocks.py"), "name": "Block.forward", "line": 2},
    ]
    snapshot = {
        "device_traces": [
            [
                {"action": "alloc", "addr": 16, "size": 100, "frames": ours, "time_us": 1_000_000},
                {"action": "free_requested", "addr": 16, "size": 100, "time_us": 1_400_000},
                {"action": "free_completed", "addr": 16, "size": 100, "time_us": 1_500_000},
                {"action": "free_completed", "addr": 99, "size": 7, "time_us": 1_600_000},
            ],
            [{"action": "alloc", "addr": 16, "size": 5, "frames": [], "time_us": 1_250_000}],
        ]
    }
    assert changes_of_snapshot(snapshot) == [
        Change(0.0, "models/blocks.py: Block.forward", 100), Change(0.25, "elsewhere", 5),
        Change(0.5, "models/blocks.py: Block.forward", -100),
    ]  # fmt: skip
    assert owner_of([(str(PACKAGE / "cli" / "memory_watch.py"), "f"), ("x.py", "g")]) == "elsewhere"


def test_a_timeline_has_the_peak_and_who_held_it():
    moments = ((1.0, "a", 10), (1.5, "b", 30), (2.0, "a", 50), (2.5, "b", -30), (5.0, "c", 1))
    changes = [Change(*moment) for moment in moments]
    found = timeline(changes, points=4, owners=2)
    assert (found["peak"], found["peak_owners"]) == (90, {"a": 60, "b": 30})
    assert found["seconds"] == [0.5, 1.0, 4.0]
    assert found["bytes"] == {"a": [10, 60, 60], "b": [30, 30, 0], "others": [0, 0, 1]}
    assert timeline([])["peak"] == 0


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (("record", "ring", "--lengths", "9-5"), "the smaller number first"),
        (("record", "ring", "--lengths", "many"), "'many'; give a number of rows"),
        (("record", "ring", "--lengths", "3", "--ranks", 4), "every rank a row"),
        (("record", "streaming", "--steps", 0), "--steps is 0; give at least 1"),
        (("record", "dancing"), "'dancing'"),
        (("replay", DATA / "ring.jsonl", "--pools", "simple,best"), "there is no pool 'best'"),
        (("replay", DATA / "ring.jsonl", "--budget", 1000), "--budget is too small"),
        (("replay", DATA / "ring.jsonl", "--repeats", 0), "--repeats is 0"),
        (("replay", __file__), "is no JSON; give a file that `memory record` wrote"),
        (("plot", DATA / "ring.jsonl"), "is not what `memory replay` or `memory profile` writes"),
        (("plot", DATA / "ring.jsonl", "--output", "x.pdf"), "ends in .png"),
        (("profile", "memory"), "'memory' cannot be profiled"),
        (("profile", "dance"), "'dance' cannot be profiled; choose one of train"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    arguments: tuple, fragment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert fragment in " ".join(result.stderr.split())
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []
