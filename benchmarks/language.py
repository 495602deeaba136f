"""Bits per byte of equal language models on source code, by pattern and context, and what their attention costs.

    python benchmarks/language.py [--steps 50] [--seeds 3] [--backend auto] [--small] [--output FILE]

The text is the Python source of the standard library and of the installed packages, split by file. All models are
`LongNetLM` with as many parameters, trained by `dilated_attention_pytorch.training` on as many steps of as many bytes:

- dense: one segment of the whole context at rate 1;
- longnet: segments from a sixteenth of the context to all of it, doubling, at rates 1, 2, 4, 4, 4;
- wide: at the longest context, segments from an eighth of it, at rates 1, 4, 4, 4: more rows near by, fewer far away;
- window: a sliding window, `LocalWindow` in place of the dilated pattern, at the work of longnet at the longest
  context.

All are measured on the same bytes, windows of the longest context inside held-out files. A model trained at a shorter
context sees at most that many bytes, and at least half of them wherever there are as many. `language_report.py` makes
the table and the picture of the results.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import site
import statistics
import sysconfig
import tempfile
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import ROOT, save
from dilated_attention_pytorch import DilatedPattern, LocalWindow, LongNetLMConfig, SparseAttention, explain
from dilated_attention_pytorch.explanation import explain_sparse
from dilated_attention_pytorch.models.blocks import CausalSelfAttention
from dilated_attention_pytorch.training.config import RunConfig, TrainingConfig
from dilated_attention_pytorch.training.corpus import Corpus, open_packed, pack
from dilated_attention_pytorch.training.evaluate import BITS, bits_by_position, curve_positions
from dilated_attention_pytorch.training.loop import Trainer
from dilated_attention_pytorch.training.sources import Source
from dilated_attention_pytorch.training.windows import held_out_windows


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes that all models share. ``step_bytes`` are those of a step, ``windows`` the held-out ones."""

    contexts: tuple[int, ...] = (2048, 8192, 32768)
    embed_dim: int = 256
    num_layers: int = 4
    num_heads: int = 4
    step_bytes: int = 131072
    block: int = 128
    windows: int = 128
    largest_file: int = 1 << 19
    most_text: int = 1 << 40
    backend: str = "auto"

    @property
    def longest(self) -> int:
        """The longest context."""
        return max(self.contexts)


SMALL = Scale(contexts=(64, 256), embed_dim=32, num_layers=2, step_bytes=256, block=16, windows=4, most_text=1 << 19)
"""Seconds on a CPU; it shows that the benchmark runs, and nothing else."""


@dataclass(frozen=True)
class Variant:
    """A pattern at a context; ``window`` instead of the dilated pattern where it is not None."""

    kind: str
    context: int
    pattern: DilatedPattern
    window: LocalWindow | None = None

    @property
    def name(self) -> str:
        """For example "longnet-32768"."""
        return f"{self.kind}-{self.context}"


def longnet(context: int, scale: Scale) -> DilatedPattern:
    """A fifth of dense attention's pairs at every context. No rate is above the heads, so that no offset lacks one."""
    return DilatedPattern.geometric(context, first_segment=context // 16, max_rate=scale.num_heads)


def variants(scale: Scale) -> list[Variant]:
    """Everything that is compared."""
    found = [Variant("dense", context, DilatedPattern((context,), (1,))) for context in scale.contexts]
    found += [Variant("longnet", context, longnet(context, scale)) for context in scale.contexts]
    work, pattern = attention_flops(found[-1], scale), found[0].pattern
    sizes = range(scale.block, scale.longest, scale.block)
    choices = [Variant("window", scale.longest, pattern, LocalWindow(size, scale.block)) for size in sizes]
    above = bisect_left(choices, work, key=lambda choice: attention_flops(choice, scale))
    near = choices[max(0, above - 1) : above + 1]
    found.append(min(near, key=lambda choice: abs(attention_flops(choice, scale) - work)))
    far = min(4, scale.num_heads)
    wide = DilatedPattern(tuple(scale.longest // part for part in (8, 4, 2, 1)), (1, far, far, far))
    found.append(Variant("wide", scale.longest, wide))
    return found


def attention_flops(variant: Variant, scale: Scale) -> float:
    """Operations of attention a byte: forward, all layers, scores and their products with the values."""
    shape = (1, variant.context, scale.num_heads, scale.embed_dim // scale.num_heads)
    if variant.window is not None:
        pairs = explain_sparse(shape, shape, shape, variant.window, is_causal=True).flops_forward
    else:
        pattern = variant.pattern
        pairs = explain(
            shape, shape, shape, pattern.segment_lengths, pattern.dilation_rates, is_causal=True
        ).flops_forward
    return pairs * scale.num_layers / variant.context


def code_sources(scale: Scale) -> list[Source]:
    """Python files of the standard library and of the installed packages, each content once.

    Files above ``largest_file``, mostly tables that a program wrote, are left out.
    """
    folders = (Path(sysconfig.get_path("stdlib")), *map(Path, site.getsitepackages()))
    files = [(folder, path) for folder in folders for path in sorted(folder.rglob("*.py")) if path.is_file()]
    found: list[Source] = []
    seen: set[bytes] = set()
    total = 0
    with ThreadPoolExecutor(16) as pool:
        for batch in range(0, len(files), 1024):  # not all files of a small run
            some = files[batch : batch + 1024]
            for (folder, path), content in zip(some, pool.map(lambda f: f[1].read_bytes(), some), strict=True):
                digest = hashlib.sha256(content).digest()
                if len(content) > scale.largest_file or digest in seen or not is_text(content):
                    continue
                seen.add(digest)
                found.append(Source(f"{folder.name}/{path.relative_to(folder).as_posix()}", path, len(content)))
                total += len(content)
                if total >= scale.most_text:
                    return found
    return found


def is_text(content: bytes) -> bool:
    """Whether a file with this content can be trained on: UTF-8, not empty, without a NUL byte."""
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return bool(content) and b"\0" not in content


class Records:
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def record(self, record: dict[str, Any]) -> None:
        if record["kind"] == "train":
            self.steps.append(record)

    def note(self, message: str) -> None:
        print(message, flush=True)


def train(
    variant: Variant, scale: Scale, corpus: Corpus, *, seed: int, steps: int, device: torch.device, folder: Path
) -> tuple[Trainer, list[dict[str, Any]]]:
    """A trained model, and the record of every step."""
    model = LongNetLMConfig(
        context_length=variant.context,
        embed_dim=scale.embed_dim,
        num_layers=scale.num_layers,
        num_heads=scale.num_heads,
        segment_lengths=variant.pattern.segment_lengths,
        dilation_rates=variant.pattern.dilation_rates,
        norm="pre-rms",
        rope_base=1e12,
        ngram_sizes=(2, 3, 4),
        short_convolution=5,
        backend=scale.backend,
    )
    training = TrainingConfig(
        steps=steps,
        batch_size=scale.step_bytes // variant.context,
        optimizer="muon",
        learning_rate=6e-3,
        warmup_steps=20,
        seed=seed,
        dtype="bfloat16" if device.type == "cuda" else "float32",
        eval_every=steps,
        eval_windows=1,
        checkpoint_every=steps,
    )
    trainer = Trainer(RunConfig(preset="demo", model=model, training=training), corpus, folder, device=device)
    if variant.window is not None:
        for module in trainer.model.modules():
            if isinstance(module, CausalSelfAttention):
                module.attention = SparseAttention(variant.window, is_causal=True)
    records = Records()
    trainer.train(records)
    return trainer, records.steps


def by_position(bits: Tensor) -> list[float]:
    """Means of bits ``(W, N)`` over the positions between `position_edges`."""
    return [float(bits[:, low:high].double().mean()) for low, high in pairwise(position_edges(bits.shape[1]))]


def position_edges(length: int) -> list[int]:
    """0, 64 and its doubles up to ``length``."""
    return [0, *curve_positions(length)]


def measure(trainer: Trainer, variant: Variant, scale: Scale, windows: Tensor) -> dict[str, Any]:
    """Bits per byte of ``windows (W, longest + 1)``; see the module's docstring for what a model sees.

    Besides, of every fourth window: "own_context", cut into contexts of the model's length, and "restricted", of
    the dense model of the longest context when it is shown less.
    """

    def bits(given: Tensor, context: int | None) -> Tensor:
        return bits_by_position(
            trainer.model, given, context=context, device=trainer.device, autocast=trainer.autocast,
            tokens_at_once=scale.step_bytes,
        )  # fmt: skip

    length, context = scale.longest, variant.context
    whole, few = bits(windows, None if context == length else context), windows[::4]
    own = whole[::4]
    if context < length:  # windows cut into contexts of the model's own, each from its first byte on
        parts = [few[:, start : start + context + 1] for start in range(0, length, context)]
        own = bits(torch.stack(parts).flatten(0, 1), None)
    restricted = {
        str(shorter): float(bits(few, shorter)[:, length // 2 :].double().mean())
        for shorter in scale.contexts
        if variant.kind == "dense" and context == length and shorter < length
    }
    if restricted:
        restricted[str(length)] = float(own[:, length // 2 :].double().mean())
    return {
        "bits_per_byte": float(whole.double().mean()),
        "bits_second_half": float(whole[:, length // 2 :].double().mean()),
        "bits_by_position": by_position(whole),
        "own_context_bits": float(own.double().mean()),
        "own_context_bits_by_position": by_position(own),
        "second_half_restricted": restricted,
    }


@cache
def opened(packed: Path) -> Corpus:
    """The packed text, checked once a process."""
    return open_packed(packed)


def run(job: tuple[Variant, Scale, int, int, Path, str]) -> dict[str, Any]:
    """Train and measure one model: (variant, scale, seed, steps, folder of the packed text, device)."""
    variant, scale, seed, steps, packed, device = job
    corpus = opened(packed)
    windows = held_out_windows(corpus, context_length=scale.longest, count=scale.windows)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            trainer, records = train(
                variant, scale, corpus, seed=seed, steps=steps, device=torch.device(device), folder=Path(folder)
            )
        except FloatingPointError as error:
            return {"variant": variant.name, "seed": seed, "error": str(error)}
    trained = time.perf_counter()
    last = records[-max(1, steps // 10) :]
    return {
        "variant": variant.name,
        "seed": seed,
        "train_bits_per_byte": statistics.mean(record["loss"] for record in last) * BITS,
        **measure(trainer, variant, scale, windows),
        "train_seconds": trained - started,
        "measure_seconds": time.perf_counter() - trained,
    }


def bytes_per_second(variant: Variant, scale: Scale, corpus: Corpus, device: torch.device, steps: int) -> float:
    """Of training, by the median step, with nothing else on the device.

    A step is of twice as many bytes as in the runs, so that the device and not the host sets the pace.
    """
    scale = replace(scale, step_bytes=2 * scale.step_bytes)
    with tempfile.TemporaryDirectory() as folder:
        _, records = train(variant, scale, corpus, seed=0, steps=steps, device=device, folder=Path(folder))
    ends = [record["seconds"] for record in records]
    return scale.step_bytes / statistics.median(b - a for a, b in pairwise(ends[steps // 3 :]))


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1, help="runs at one time on the device")
    parser.add_argument("--timed-steps", type=int, default=8, help="steps of the runs that are timed alone")
    parser.add_argument("--backend", default="auto", help="of dilated attention; the sliding window takes its own")
    parser.add_argument("--small", action="store_true", help="tiny models on little text, to see that it runs")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/language.json")
    given = parser.parse_args(arguments)
    scale = replace(SMALL if given.small else Scale(), backend=given.backend)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    compared = variants(scale)
    results: dict[str, Any] = {"scale": asdict(scale), "steps": given.steps, "variants": {}, "runs": [], "failed": []}
    with tempfile.TemporaryDirectory() as folder:
        packed = Path(folder)
        corpus = pack(code_sources(scale), packed, held_out_fraction=0.1, context_length=scale.longest)
        windows = held_out_windows(corpus, context_length=scale.longest, count=scale.windows)
        results["text"] = {
            "files": len(corpus.documents),
            "held_out_files": len(corpus.held_out_documents),
            "bytes": len(corpus.tokens),
            "held_out_bytes": len(corpus.held_out),
            "measured_bytes": windows[:, 1:].numel(),
            "fingerprint": corpus.fingerprint,
        }
        for variant in compared:
            results["variants"][variant.name] = {
                "kind": variant.kind,
                "context": variant.context,
                "pattern": repr(variant.window or variant.pattern),
                "attention_flops_per_byte": attention_flops(variant, scale),
            }
        # Long contexts first: they take longest, and the last runs should end together.
        ordered = sorted(compared, key=lambda variant: -variant.context)
        jobs = [(v, scale, seed, given.steps, packed, device) for seed in range(given.seeds) for v in ordered]
        for found in results_of(jobs, given.processes):
            results["failed" if "error" in found else "runs"].append(found)
            save(given.output, results, quiet=True)  # what is done is kept, whatever happens to the rest
            print({key: value for key, value in found.items() if not isinstance(value, (list, dict))}, flush=True)
        for variant in compared:  # last, when kernels are compiled and no other process uses the device
            speed = bytes_per_second(variant, scale, corpus, torch.device(device), given.timed_steps)
            results["variants"][variant.name]["bytes_per_second"] = speed
            save(given.output, results, quiet=True)
            print(f"{variant.name}: {speed:,.0f} bytes a second", flush=True)
    if results["failed"]:
        raise SystemExit(f"{len(results['failed'])} runs failed; the results name them")


def results_of(jobs: Sequence[tuple[Variant, Scale, int, int, Path, str]], processes: int) -> Iterator[dict[str, Any]]:
    """The result of every job, as they finish."""
    if processes == 1:
        yield from map(run, jobs)
        return
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(run, job) for job in jobs]):
            yield future.result()


if __name__ == "__main__":
    main()
