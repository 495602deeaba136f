"""The example over files and the benchmark run, small, and show what they say."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]


def load(path: str) -> ModuleType:
    """A script as a module, without running it."""
    spec = importlib.util.spec_from_file_location(Path(path).stem + "_script", ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_attends_over_files_larger_than_its_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    example = load("examples/attend_over_files.py")
    arguments = ["--rows", "6000", "--budget-mib", "2", "--folder", str(tmp_path)]
    assert example.main(arguments) < 1e-5
    text = capsys.readouterr().out
    assert "3 files of 2.9 MiB, 2.0 MiB of memory" in text
    assert int(text.split(": ")[1].split()[0]) > 4  # chunks
    assert not list(tmp_path.iterdir())

    real = example.dilated_attention  # the check can fail
    monkeypatch.setattr(example, "dilated_attention", lambda *args, **options: real(*args, **options) * 1.01)
    assert example.main(arguments) > 1e-4


def test_the_benchmark_measures_at_a_small_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    benchmark = load("benchmarks/streaming.py")
    given = argparse.Namespace(
        device="cpu", budget_gib=2**-10, rows=4096, heads=4, head_dim=48, pattern="far", segments="64,256,8192",
        rates="1,4,64", backend="auto", directions="both", more_budgets_gib=[2**-9], pageable=True, pools=True,
        repeats=1, sampled=30, resident_rows=None, trace=tmp_path,
    )  # fmt: skip
    found = benchmark.measure(given)
    assert found["qkv_bytes"] == 3 * 4096 * 4 * 48 * 2
    assert found["qkv_bytes"] >= 4 * found["budget_bytes"]
    traces = [f"{direction}_{gib:g}_gib.json.gz" for direction in ("backward", "forward") for gib in (2**-10, 2**-9)]
    assert sorted(path.name for path in tmp_path.iterdir()) == traces
    forward, both = found["forward"], found["forward_and_backward"]
    assert both["chunks"] > forward["chunks"] > 1
    assert both["bytes_in"] > forward["bytes_in"] >= found["qkv_bytes"]
    for one in (forward, both):
        assert one["sampled"]["rows"] == 3 * 30
        assert [branch["rows"] for branch in one["sampled"]["branches"]] == [30] * 3
        assert 0 < one["sampled"]["worst_error_over_bound"] <= 1
        assert one["sampled"]["worst_lse_error"] < 1e-3
        (more,) = one["more_budgets"]
        assert more["chunks"] < one["chunks"]
        assert more["time_over_bound"] > 0
        assert one["time_over_bound"] == min(one["seconds"]) / max(one["compute_seconds"], one["transfer_seconds"])
    for name in ("out", "lse", "dq", "dk", "dv"):  # every row is compared
        assert 0 < both[f"{name}_difference_over_limit"] <= 1
    assert found["pools"]["own"]["new_after_second_call"] is None
    assert [pool["new_after_second_call"] for name, pool in found["pools"].items() if name != "own"] == [0] * 4

    pattern = benchmark.DilatedPattern((64, 256, 8192), (1, 4, 64))
    tensors = [torch.randn(1, 512, 2, 8).bfloat16() for _ in range(3)]
    right = benchmark.attend(tensors, pattern, backward=False)
    wrong = {**right, "out": right["out"] * 1.2}
    compared = benchmark.resident(tensors, pattern, 512, torch.device("cpu"), 1, wrong)
    assert compared["out_difference_over_limit"] > 1
    assert "out_difference_over_limit" not in benchmark.resident(tensors, pattern, 100, torch.device("cpu"), 1, right)

    tensors = [torch.randn(1, 100, 2, 8).bfloat16() for _ in range(3)]
    pattern = benchmark.DilatedPattern((100,), (1,))
    wrong = torch.zeros(1, 100, 2, 8).bfloat16(), torch.zeros(1, 2, 100)
    assert benchmark.check_rows(*tensors, *wrong, pattern, 5)["worst_error_over_bound"] > 2
    with pytest.raises(SystemExit, match="give more --rows"):
        benchmark.measure(argparse.Namespace(**{**vars(given), "budget_gib": 1.0}))


def test_the_longest_sequence_at_a_small_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    benchmark = load("benchmarks/longest.py")
    assert benchmark.pattern_of(2**28).segment_lengths[-1] == 2**29
    given = argparse.Namespace(
        device="cpu", log2_tokens=13, heads=2, head_dim=16, backend="auto", repeats=1, sampled=20
    )  # fmt: skip
    found = benchmark.measure(given)
    assert (found["tokens"], found["segment_lengths"], found["dilation_rates"]) == (8192, [2048, 16384], [1, 8])
    first, last = found["sampled"]["branches"]
    assert (first["rows"], first["tails"], first["of_segments"]) == (20, 2, 4)
    assert (last["rows"], last["tails"], last["of_segments"]) == (20, 2, 1)
    assert found["sampled"]["pairs"] >= 40 * 1024
    assert 0 < found["sampled"]["worst_error_over_bound"] <= 1
    real = benchmark.dilated_attention_with_lse  # the check can fail

    def wrong(*tensors: torch.Tensor, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = real(*tensors, **options)
        out[0, -1] += 1  # the last row alone, which is active in the first branch
        return out, lse

    monkeypatch.setattr(benchmark, "dilated_attention_with_lse", wrong)
    assert benchmark.measure(given)["sampled"]["worst_error_over_bound"] > 1
