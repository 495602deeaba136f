"""What a training run is: model sizes and training options, a frozen record each, and the presets."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple, get_args

from ..models import LongNetLMConfig
from ..patterns import DilatedPattern

ComputeDtype = Literal["float32", "bfloat16"]
Optimizer = Literal["adamw", "muon"]


class Stage(NamedTuple):
    """The first steps of a run on shorter windows, which cost less and so allow more steps.

    This is the staged training of Shortformer (arXiv 2012.15832). ``share`` of all steps take windows of
    ``context_length`` bytes, ``batch_factor`` times as many as a full-length step.
    """

    share: float
    context_length: int
    batch_factor: int = 1


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Options of a training run besides the model and the text.

    Attributes:
        steps: optimizer steps, at least 1; the learning rate reaches its end at the last one.
        batch_size: windows a step; a window has the model's context length and one byte more.
        stages: what comes before steps of full length, in order; see `Stage`.
        optimizer: "adamw", or "muon" for Muon on the linear layers inside the blocks and AdamW on the rest.
        learning_rate: peak of the schedule (linear warm-up, then a cosine).
        warmup_steps: steps of the warm-up; at most a tenth of ``steps`` counts.
        final_fraction: the last learning rate as a fraction of the peak.
        weight_decay: decoupled, as AdamW's; on matrices only.
        gradient_clip: largest norm of the whole gradient.
        seed: of the initial weights, the windows drawn and dropout.
        dtype: "float32", or "bfloat16" for autocast with float32 weights.
        held_out_fraction: share of the bytes held out, in whole files.
        eval_every: steps between evaluations on held-out text.
        eval_windows: held-out windows of such an evaluation; the last one takes twice as many.
        checkpoint_every: steps between checkpoints.
        keep_checkpoints: complete checkpoints kept, at least 2, so that a damaged one has a predecessor.
        sample_bytes: bytes generated at the end; 0 for none.

    Raises:
        ValueError: a value out of range; the message says what was given and what is allowed.
    """

    steps: int
    batch_size: int
    learning_rate: float
    stages: tuple[Stage, ...] = ()
    optimizer: Optimizer = "adamw"
    warmup_steps: int = 100
    final_fraction: float = 0.1
    weight_decay: float = 0.1
    gradient_clip: float = 1.0
    seed: int = 0
    dtype: ComputeDtype = "float32"
    held_out_fraction: float = 0.05
    eval_every: int = 500
    eval_windows: int = 32
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    sample_bytes: int = 400

    def __post_init__(self) -> None:
        least = {"steps": 1, "batch_size": 1, "eval_every": 1, "eval_windows": 1, "checkpoint_every": 1}
        least |= {"keep_checkpoints": 2, "warmup_steps": 0, "sample_bytes": 0, "seed": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"{name} is {value!r}; give an integer of at least {low}")
        for name in ("learning_rate", "gradient_clip"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ValueError(f"{name} is {value!r}; give a positive number")
        for name in ("final_fraction", "weight_decay", "held_out_fraction"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 <= value < 1:
                raise ValueError(f"{name} is {value!r}; give a number of at least 0 and below 1")
        object.__setattr__(self, "stages", tuple(Stage(*stage) for stage in self.stages))
        if any(s.share < 0 or s.context_length < 1 or s.batch_factor < 1 for s in self.stages):
            raise ValueError(f"stages has {self.stages}; shares are at least 0, lengths and factors at least 1")
        if sum(stage.share for stage in self.stages) > 1:
            raise ValueError(f"stages has {self.stages}; their shares sum to at most 1")
        for name, choices in (("dtype", get_args(ComputeDtype)), ("optimizer", get_args(Optimizer))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}")

    def stage_steps(self) -> list[int]:
        """Steps of every stage, and at the end those of full length.

        >>> options = {"steps": 10, "batch_size": 1, "learning_rate": 1e-3}
        >>> TrainingConfig(stages=(Stage(0.5, 64), Stage(0.25, 128)), **options).stage_steps()
        [5, 3, 2]
        """
        ends = [0]
        share = 0.0
        for stage in self.stages:
            share += stage.share
            ends.append(math.floor(share * self.steps + 0.5))
        return [b - a for a, b in pairwise([*ends, self.steps])]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run as its checkpoints record it: the preset it began from, its model, its options, its text.

    ``data`` holds the paths as given, empty for the standard library's source.
    """

    preset: str
    model: LongNetLMConfig
    training: TrainingConfig
    data: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """All fields as values that JSON can hold."""
        return {
            "preset": self.preset,
            "model": self.model.to_dict(),
            "training": dataclasses.asdict(self.training),
            "data": list(self.data),
        }

    def _shapes(self) -> list[tuple[int, int, int]]:
        """(steps, windows a step, bytes a window) of every stage and of the rest."""
        full, batch = self.model.context_length, self.training.batch_size
        shapes = [(s.batch_factor * batch, min(s.context_length, full)) for s in self.training.stages]
        shapes.append((batch, full))
        return [(n, *shape) for n, shape in zip(self.training.stage_steps(), shapes, strict=True)]

    def window_shape(self, step: int) -> tuple[int, int]:
        """Windows of step ``step`` (from 0) and the bytes of each."""
        for steps, batch, length in self._shapes():
            if step < steps:
                return batch, length
            step -= steps
        return self.training.batch_size, self.model.context_length

    def trained_bytes(self, step: int) -> int:
        """Bytes that the first ``step`` steps predict."""
        total = 0
        for steps, batch, length in self._shapes():
            total += max(0, min(step, steps)) * batch * length
            step -= steps
        return total

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> RunConfig:
        """The inverse of `to_dict`.

        Raises:
            ValueError: a field is missing, unknown or out of range.
        """
        try:
            return cls(
                preset=str(fields["preset"]),
                model=LongNetLMConfig.from_dict(fields["model"]),
                training=TrainingConfig(**fields["training"]),
                data=tuple(map(str, fields["data"])),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"the configuration of the run does not fit: {error}") from None

    @classmethod
    def from_preset(
        cls, preset: str, *, data: tuple[str, ...] = (), context_length: int | None = None, **training: Any
    ) -> RunConfig:
        """A preset with some training options replaced.

        Segment lengths and dilation rates are the preset's, unless ``context_length`` differs from the
        preset's: then `DilatedPattern.geometric` chooses them for the new length.

        >>> RunConfig.from_preset("demo", context_length=8192, steps=10).model.segment_lengths
        (2048, 4096, 8192)
        """
        model = LongNetLMConfig.preset(preset)
        if context_length is not None and context_length != model.context_length:
            pattern = DilatedPattern.geometric(context_length, max_rate=model.num_heads)
            model = dataclasses.replace(
                model,
                context_length=context_length,
                segment_lengths=pattern.segment_lengths,
                dilation_rates=pattern.dilation_rates,
            )
        options = TrainingConfig(**{**PRESETS[preset], **training})
        return cls(preset=preset, model=model, training=options, data=data)


PRESETS: dict[str, dict[str, Any]] = {
    "demo": {
        "steps": 450,
        "batch_size": 1,
        "optimizer": "muon",
        "learning_rate": 6e-3,
        "stages": (Stage(0.6, 512), Stage(0.22, 1024)),
        "warmup_steps": 20,
        "eval_every": 150,
        "eval_windows": 8,
        "checkpoint_every": 150,
        "sample_bytes": 200,
    },
    "small": {"steps": 10_000, "batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 500},
    "base": {
        "steps": 50_000,
        "batch_size": 2,
        "learning_rate": 6e-4,
        "warmup_steps": 750,
        "checkpoint_every": 1000,
        "eval_every": 1000,
    },
}
"""Training options by preset; the sizes of the same name are in ``models/config.py``."""
