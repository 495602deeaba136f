"""The benchmarks of language models run, small, and say what they measure."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dilated_attention_pytorch import LongNetLM, LongNetLMConfig
from dilated_attention_pytorch.training.corpus import pack

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a benchmark by its name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def diverge(*_: Any, **__: Any) -> None:
    raise FloatingPointError("the loss is nan")


def test_every_model_is_trained_and_measured(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    language, path = script("language"), tmp_path / "language.json"
    monkeypatch.setattr(sys, "argv", [str(BENCHMARKS / "language.py")])  # which the results name
    options = ["--small", "--steps", "2", "--seeds", "2", "--processes", "1", "--timed-steps", "2"]
    language.main([*options, "--output", str(path)])
    results = json.loads(path.read_text())["results"]
    names = ["dense-64", "dense-256", "longnet-64", "longnet-256", "window-256", "wide-256"]
    assert list(results["variants"]) == names
    assert {(run["variant"], run["seed"]) for run in results["runs"]} == {(n, s) for s in (0, 1) for n in names}
    assert len(results["runs"]) == 2 * len(names)
    assert results["text"]["measured_bytes"] == 4 * 256
    for run in results["runs"]:
        assert 5 < run["bits_per_byte"] < 10
        assert len(run["bits_by_position"]) == 3
        assert run["second_half_restricted"].keys() == ({"64", "256"} if run["variant"] == "dense-256" else set())
    same = [run for run in results["runs"] if run["variant"] == "dense-256"]
    assert same[0]["bits_per_byte"] != same[1]["bits_per_byte"]
    assert results["failed"] == []
    assert all(variant["bytes_per_second"] > 0 for variant in results["variants"].values())

    monkeypatch.setattr(language, "train", diverge)
    job = (language.variants(language.SMALL)[0], language.SMALL, 3, 1, tmp_path / "text", "cpu")
    pack(language.code_sources(language.SMALL), job[4], held_out_fraction=0.1, context_length=256)
    assert language.run(job) == {"variant": "dense-64", "seed": 3, "error": "the loss is nan"}

    report = script("language_report")
    report.main(["--results", str(path), "--picture", str(tmp_path / "img" / "language.png")])
    assert (tmp_path / "img" / "language.png").read_bytes()[:4] == b"\x89PNG"


def test_what_is_compared_costs_what_it_should(script: Any):
    language = script("language")
    scale = language.Scale()
    work = {v.name: language.attention_flops(v, scale) for v in language.variants(scale)}
    for context in (2048, 8192, 32768):
        # Two products of two operations for each of (context + 1) / 2 keys, in every head, dimension and layer.
        assert work[f"dense-{context}"] == 4 * (context + 1) / 2 * scale.embed_dim * scale.num_layers
        assert 0.15 < work[f"longnet-{context}"] / work[f"dense-{context}"] < 0.25
    assert 0.2 < work["wide-32768"] / work["dense-32768"] < 0.25
    assert work["window-32768"] == pytest.approx(work["longnet-32768"], rel=0.01)


def test_all_models_have_as_many_parameters_and_the_pattern_they_are_named_for(script: Any, tmp_path: Path):
    language, scale = script("language"), script("language").SMALL
    corpus = pack(language.code_sources(scale), tmp_path, held_out_fraction=0.1, context_length=256)
    sizes, reaches = set(), {}
    for variant in language.variants(scale):
        trainer, _ = language.train(
            variant, scale, corpus, seed=0, steps=1, device=torch.device("cpu"), folder=tmp_path / variant.name
        )
        model = trainer.model.eval()
        sizes.add(sum(p.numel() for p in model.parameters()))
        tokens = torch.randint(256, (1, variant.context))
        changed = tokens.clone()
        changed[0, 0] += 1 - 2 * (changed[0, 0] == 255)
        moved = (model(tokens) - model(changed)).detach().abs().amax(-1)[0]
        reaches[variant.name] = int(moved.nonzero().max())
    assert len(sizes) == 1
    assert reaches["dense-256"] == 255
    # Two layers of a window of 16 to 31 rows, two of the short convolutions and an n-gram of 4 rows before them.
    assert 32 < reaches["window-256"] < 2 * 31 + 2 * 4 + 4


class Ramp(nn.Module):
    """Finds the next byte less probable the more bytes it sees: the loss is 0.1 nats for each byte before."""

    def forward(self, tokens: Tensor) -> Tensor:
        loss = 0.1 * torch.arange(1, tokens.shape[1] + 1, dtype=torch.float64)
        # All bytes of the windows are 0; the other 255 share what is left.
        rest = ((1 - (-loss).exp()) / 255).log()
        logits = rest[:, None].repeat(1, 256)
        logits[:, 0] = -loss
        return logits.expand(tokens.shape[0], -1, -1)


def test_bits_are_sorted_by_position_and_context(script: Any):
    language = script("language")
    scale = language.SMALL
    trainer = SimpleNamespace(model=Ramp(), device=torch.device("cpu"), autocast=None)
    windows = torch.zeros(4, 257, dtype=torch.uint8)
    short, long = (language.Variant("dense", context, language.longnet(256, scale)) for context in (64, 256))
    seen = torch.arange(1, 257, dtype=torch.float64) * 0.1 / math.log(2)
    found = language.measure(trainer, long, scale, windows)
    assert found["bits_per_byte"] == found["own_context_bits"] == pytest.approx(float(seen.mean()), rel=1e-6)
    assert found["bits_second_half"] == pytest.approx(float(seen[128:].mean()), rel=1e-6)
    expected = [float(seen[low:high].mean()) for low, high in ((0, 64), (64, 128), (128, 256))]
    assert found["bits_by_position"] == pytest.approx(expected, rel=1e-6)
    limited = float(seen[32:64].mean())  # between 33 and 64 bytes are seen
    assert found["second_half_restricted"] == pytest.approx({"64": limited, "256": expected[2]}, rel=1e-6)
    found = language.measure(trainer, short, scale, windows)
    assert found["bits_by_position"] == pytest.approx([expected[0], limited, limited], rel=1e-6)
    assert found["own_context_bits_by_position"] == pytest.approx(expected[:1], rel=1e-6)


def test_the_report_compares_seed_by_seed(script: Any):
    report: ModuleType = script("language_report")
    bits = {"dense-8": (1.0, 2.0, 3.0), "longnet-8": (1.01, 2.04, 3.09), "dense-4": (1.5,)}
    runs = [
        {"variant": name, "seed": seed, **dict.fromkeys(report.MEASURES, value)}
        for name, values in bits.items()
        for seed, value in enumerate(values)
    ]
    found = report.summary({"scale": {"contexts": [4, 8]}, "variants": dict.fromkeys(bits), "runs": runs})
    assert found["dense-8"]["bits_per_byte"] == 2
    assert found["dense-8"]["bits_per_byte_error"] == pytest.approx(1 / math.sqrt(3))
    assert found["longnet-8"]["bits_per_byte_percent"] == pytest.approx(2)  # 1, 2 and 3
    assert found["longnet-8"]["bits_per_byte_percent_error"] == pytest.approx(1 / math.sqrt(3))
    assert found["dense-4"]["bits_per_byte_percent"] == pytest.approx(50)
    assert math.isnan(found["dense-4"]["bits_per_byte_error"])


def test_the_page_shows_what_was_measured(script: Any):
    report, page = script("language_report"), (BENCHMARKS.parent / "docs" / "quality.md").read_text()
    results = json.loads((BENCHMARKS / "results" / "language.json").read_text())["results"]
    names = list(results["variants"])
    at_32k = [f"{kind}-32768" for kind in report.KINDS]
    assert report.table(results) in page
    assert report.position_table(results, "bits_by_position", at_32k) in page
    assert report.position_table(results, "own_context_bits_by_position", names) in page
    for line in report.restricted_table(results).splitlines()[2:]:
        assert line.split("|")[2].split("±")[0].strip() in page


def test_speed_has_a_column_and_a_panel_where_it_was_measured(script: Any):
    report = script("language_report")
    results = json.loads((BENCHMARKS / "results" / "language.json").read_text())["results"]
    for variant in results["variants"].values():
        variant.pop("bytes_per_second", None)
    untimed = report.draw(results)
    for n, variant in enumerate(results["variants"].values()):
        variant["bytes_per_second"] = 1e6 * (n + 1)
    heads, _, first, *_ = report.table(results).splitlines()
    assert heads.split(" | ")[3] == "training, MB/s"
    assert first.split(" | ")[3] == "1.00"
    assert report.draw(results) != untimed


def test_the_cache_is_filled_to_each_context_and_bounded(script: Any):
    config = LongNetLMConfig(
        context_length=64, embed_dim=32, num_layers=2, num_heads=4, segment_lengths=(16, 64), dilation_rates=(1, 4)
    )
    found = script("generation").measure(LongNetLM(config).eval(), (40, 64, 300), steps=6)
    assert [entry["cache_rows"] for entry in found["contexts"]] == [40, 0, 300 - 256]
    assert found["key_value_bytes_bound"] == 2 * 64 * 2 * 32 * 4  # layers, rows, key and value, width, float32
    sizes = [entry["key_value_bytes"] for entry in found["contexts"]]
    assert sizes[0] <= sizes[1] == sizes[2] == found["key_value_bytes_bound"]
    times = [entry["step_milliseconds"] for entry in found["contexts"]]
    assert found["slowest_over_fastest"] == max(times) / min(times)
