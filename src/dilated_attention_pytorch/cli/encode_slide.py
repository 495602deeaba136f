"""``dilated-attention encode-slide``: tile features of slides to embeddings, with GigaPath's slide encoder."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from .errors import FAILED, INTERRUPTED, fail, is_out_of_memory, one_line_errors
from .problem import integers

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from ..encoding import SlideError
    from ..models import LongNetViT

OUTPUT = Path("runs/slides")
SECONDS_BETWEEN_LINES = 10.0


class Dtype(StrEnum):
    """What matrix products run in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def encode_slide(
    features: Annotated[
        list[Path],
        typer.Argument(
            help="Files of slides (.h5, .hdf5, .pt, .npz), each with features (tiles, channels) and coords (tiles, 2) "
            "in pixels, or folders of them.",
            show_default=False,
        ),
    ],
    weights: Annotated[Path, typer.Option(help="Checkpoint of GigaPath's slide encoder (torch.save or safetensors).")],
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = OUTPUT,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Encode again what is there already.")] = False,
    global_pool: Annotated[
        bool, typer.Option("--global-pool", help="Every layer's embedding is that of the mean over tiles.")
    ] = False,
    heat_map: Annotated[
        bool, typer.Option("--heat-map", help="Also a PNG of how much attention each tile receives.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[
        Dtype | None, typer.Option(help="Below float32 is autocast. By default bfloat16 on CUDA, else float32.")
    ] = None,
    num_heads: Annotated[int, typer.Option(help="Attention heads, which leave no trace in the weights.")] = 16,
    tile_size: Annotated[int, typer.Option(help="Pixels along a side of a tile.")] = 256,
    slide_ngrids: Annotated[int, typer.Option(help="Tiles along a side of the grid of positions.")] = 1000,
    max_wsi_size: Annotated[
        int, typer.Option(help="Pixels along a side of the largest slide, for the segment lengths.")
    ] = 262144,
    segments: Annotated[
        str | None, typer.Option(help="Segment lengths, e.g. 1024,5792. By default by the original's rule.")
    ] = None,
    rates: Annotated[str, typer.Option(help="Dilation rates, one for each segment length.")] = "1,2,4,8,16",
    backend: Annotated[str, typer.Option(help="auto, or the name of a backend of attention.")] = "auto",
) -> None:
    """Encode slides, given as features of their tiles, with GigaPath's slide encoder.

    Each slide gets NAME.safetensors in the output folder: class_token, pooled, and layers (the embedding of the input
    and after every layer). summary.json lists what was encoded, skipped or refused. A slide whose results are complete
    is skipped, so that the same command continues after an interruption.

    Damaged files are reported with the field at fault and skipped; then the exit code is 1.
    """
    options: dict[str, Any] = {
        "num_heads": num_heads,
        "tile_size": tile_size,
        "slide_ngrids": slide_ngrids,
        "max_wsi_size": max_wsi_size,
        "global_pool": global_pool,
        "backend": backend,
    }
    with one_line_errors():
        options["dilation_rates"] = integers("--rates", rates)
        options["segment_lengths"] = None if segments is None else integers("--segments", segments)
        job = _open(features, weights, output, options, device, dtype, overwrite=overwrite, heat_map=heat_map)
    hint = "what is written is complete; the same command continues"
    try:
        with one_line_errors(hint=hint):
            job.run()
    except KeyboardInterrupt:
        job.write_summary(complete=False)
        job.console.print(f"\nInterrupted; {hint}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None
    if job.failed:
        raise fail(f"{len(job.failed)} of {len(job.slides)} slides were not encoded, see above", FAILED)


@dataclass
class Job:
    """Slides to encode, and what became of them so far."""

    slides: dict[str, Path]
    model: LongNetViT
    autocast: torch.dtype | None
    folder: Path
    settings: dict[str, Any]
    about: dict[str, Any]
    console: Console
    overwrite: bool
    heat_map: bool
    encoded: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def run(self) -> None:
        """Encode what is not there yet."""
        with SlideProgress(len(self.slides)) as progress, self._warnings(progress):
            for name, path in self.slides.items():
                self._take(name, path, progress)
        self.write_summary(complete=True)
        self.console.print(
            f"{len(self.encoded):,} encoded, {len(self.skipped):,} there already, {len(self.failed):,} failed; "
            f"results in {self.folder}",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip

    def _take(self, name: str, path: Path, progress: SlideProgress) -> None:
        from ..encoding import SlideError

        try:
            done = self._encode(name, path)
        except SlideError as error:
            self._fail(name, error, progress)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            # The other slides may be smaller.
            self._fail(name, SlideError(path, None, "is too large: out of memory"), progress)
        else:
            if done is None:
                self.skipped.append(name)
            else:
                self.encoded.append(done)
        progress.advance(path.name)

    def _fail(self, name: str, error: SlideError, progress: SlideProgress) -> None:
        self.failed.append({"slide": name, "file": str(error.path), "field": error.field, "reason": error.reason})
        progress.note("error: " + " ".join(str(error).split()))

    def _encode(self, name: str, path: Path) -> dict[str, Any] | None:
        """Write the results of a slide; None where they are there."""
        from .. import encoding
        from ..training.files import replace_file

        target, drawn = self.folder / f"{name}.safetensors", self.folder / f"{name}.png"
        started = time.monotonic()
        try:
            source = encoding.Source.of(path)
        except OSError as error:
            raise encoding.SlideError(path, None, f"cannot be read ({error.strerror or error})") from None
        there = encoding.is_complete(target, source, received=self.heat_map)
        if there and not self.overwrite and (drawn.exists() or not self.heat_map):
            return None
        embed = self.model.patch_embed
        tile_size = self.settings["tile_size"]
        slide = encoding.read_slide(path)
        encoding.check_against(
            path, slide, channels=embed.in_chans, tile_size=tile_size, grid=self.settings["slide_ngrids"]
        )
        tensors = encoding.embed_slide(self.model, slide, autocast=self.autocast, received=self.heat_map)
        for field_name, tensor in tensors.items():
            if not bool(tensor.isfinite().all()):
                raise encoding.SlideError(path, None, f"gives a {field_name} that is not finite; try another --dtype")
        if self.heat_map:
            picture = encoding.heat_map(
                tensors["received_attention"], slide.coords, tile_size=tile_size, title=path.name
            )
            replace_file(drawn, [picture])
        # Last: where it is complete, everything is.
        replace_file(target, [encoding.pack(tensors, self.settings, source)])
        seconds = round(time.monotonic() - started, 3)
        return {"slide": name, "file": str(path), "tiles": len(slide.coords), "seconds": seconds}

    @contextmanager
    def _warnings(self, progress: SlideProgress) -> Iterator[None]:
        """Warnings of the model as notes, here and in the summary."""

        def note(message: Warning | str, *_: object, **__: object) -> None:
            self.notes.append(str(message))
            progress.note(f"note: {message}")

        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = note
            yield

    def write_summary(self, *, complete: bool) -> None:
        """summary.json, whole or not at all."""
        from ..training.files import replace_file

        content = {
            "complete": complete and not self.failed,
            **self.about,
            "settings": self.settings,
            "encoded": self.encoded,
            "skipped": self.skipped,
            "failed": self.failed,
            "notes": self.notes,
        }
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
        replace_file(self.folder / "summary.json", [text.encode()])


def _open(
    features: list[Path],
    weights: Path,
    output: Path,
    options: dict[str, Any],
    device: str,
    dtype: Dtype | None,
    *,
    overwrite: bool,
    heat_map: bool,
) -> Job:
    """Everything read and tried that does not depend on a slide; ValueError where something makes no sense."""
    import torch
    from rich.console import Console

    from ..encoding import check_settings, find_slides
    from ..models import LongNetViT
    from ..training import parse_device
    from ..training.files import make_writable
    from .doctor import devices, versions

    slides = find_slides(features)
    _check_installed(slides, heat_map)
    where = parse_device(device)
    precision = dtype or (Dtype.bfloat16 if where.type == "cuda" else Dtype.float32)
    model = LongNetViT.from_gigapath(weights, **options).to(where)
    config = model.encoder.config
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    settings = {
        "weights": digest,
        "dtype": precision.value,
        **{name: options[name] for name in ("num_heads", "tile_size", "slide_ngrids", "global_pool")},
        "segment_lengths": config.segment_lengths,
        "dilation_rates": config.dilation_rates,
    }
    make_writable(output)
    if not overwrite:
        for name in slides:
            check_settings(output / f"{name}.safetensors", settings)
    index = "cpu" if where.type == "cpu" else f"{where.type}:{where.index or 0}"
    about = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "versions": versions(),
        "device": devices().get(index, str(where)),
        "weights": str(weights),
    }
    autocast = None if precision is Dtype.float32 else getattr(torch, precision.value)
    return Job(slides, model, autocast, output, settings, about, Console(), overwrite, heat_map)


def _check_installed(slides: dict[str, Path], heat_map: bool) -> None:
    from ..encoding.reading import HDF5

    hdf5 = [path for path in slides.values() if path.suffix.lower() in HDF5]
    if hdf5 and importlib.util.find_spec("h5py") is None:
        raise ValueError(f"h5py is not installed, which reads {str(hdf5[0])!r}; run: pip install h5py")
    if heat_map and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("matplotlib is not installed, which draws --heat-map; run: pip install matplotlib")


class SlideProgress:
    """Slides done, on stderr beside what is said about them: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, slides: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        # Lines would break the bar on a terminal if they came through another console.
        self._console, self._total, self._done = Console(stderr=True), slides, 0
        self._printed = time.monotonic()
        self._bar = Progress(
            TextColumn("slide"), MofNCompleteColumn(), BarColumn(bar_width=None),
            TextColumn("{task.description}", markup=False), TextColumn("ETA"), TimeRemainingColumn(),
            console=self._console, disable=not self._console.is_terminal, expand=True,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=slides)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def note(self, message: str) -> None:
        """A line above the bar."""
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)

    def advance(self, name: str) -> None:
        """One more is done."""
        self._done += 1
        self._bar.update(self._task, completed=self._done, description=name)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._printed >= SECONDS_BETWEEN_LINES:
            self._printed = now
            self.note(f"slide {self._done:,}/{self._total:,}: {name}")
