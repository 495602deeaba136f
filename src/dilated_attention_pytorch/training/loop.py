"""The training loop: steps, evaluations, checkpoints; everything a run does except talking to its user."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from ..models import LongNetLM
from .checkpoint import Checkpoint, CheckpointError, is_sharded, read_checkpoint, write_checkpoint
from .config import RunConfig
from .corpus import Corpus
from .distributed import ShardedForward, Team, full
from .distributed_checkpoint import load_sharded, spread, write_sharded
from .evaluate import BITS, bits_by_position, token_losses
from .metrics import MetricsLog
from .optim import learning_rate, make_optimizers
from .state import (
    MODEL,
    OPTIMIZER,
    RANDOM,
    load_model_tensors,
    load_optimizer_tensors,
    load_random_tensors,
    optimizer_tensors,
    random_tensors,
)
from .windows import held_out_windows, training_batch


class Reporter(Protocol):
    """Who watches a run."""

    def record(self, record: dict[str, Any]) -> None:
        """A line of metrics.jsonl: ``kind`` is "train" or "held-out"."""

    def note(self, message: str) -> None:
        """Something worth a line."""


class Trainer:
    """A run in memory: model, optimizer, text, and the number of steps done.

    A step is a function of the configuration, the state and the step's number alone, so a run that continues
    from a checkpoint repeats an uninterrupted one bit for bit (on the CPU, with as many threads).
    """

    def __init__(
        self,
        config: RunConfig,
        corpus: Corpus,
        folder: Path,
        *,
        device: torch.device,
        compile_model: bool = False,
        team: Team | None = None,
    ) -> None:
        """Draw the initial weights. ``folder`` takes metrics.jsonl and checkpoints; ``team`` are the ranks, if many."""
        self.team = team
        self.config, self.corpus, self.folder, self.device = config, corpus, folder, device
        torch.manual_seed(config.training.seed)
        self.model = LongNetLM(config.model).to(device)
        if team is not None:
            team.check_model(self.model)
            team.prepare(self.model)
            torch.manual_seed(config.training.seed * 1_000_003 + 1 + team.rank)  # ranks drop different rows
        self.optimizers = make_optimizers(self.model, config.training)
        self._forward: nn.Module = self.model
        if compile_model:
            self._forward = cast(nn.Module, torch.compile(self.model))
        if team is not None and team.parallel is not None:
            self._forward = ShardedForward(self.model, team.parallel)
        self.step = 0
        self.seconds = 0.0
        self._resumed = False
        windows = 2 * config.training.eval_windows
        self.held_out = held_out_windows(corpus, context_length=config.model.context_length, count=windows)

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype that matrix products run in, None for that of the weights."""
        return torch.bfloat16 if self.config.training.dtype == "bfloat16" else None

    @property
    def done(self) -> bool:
        """Whether every step has been taken."""
        return self.step >= self.config.training.steps

    def restore(self, checkpoint: Checkpoint, folder: Path | None = None) -> list[str]:
        """Continue from ``checkpoint``; returns what may keep the run from being bit-identical.

        With a team, ``folder`` is where the checkpoint lies, and every rank reads its part of it.

        Raises:
            CheckpointError: the checkpoint is of another model, or of other text.
        """
        try:
            progress, tensors = checkpoint.records["progress"], checkpoint.tensors
            if progress["corpus"] != self.corpus.fingerprint:
                raise CheckpointError(
                    "the text changed since the checkpoint was written; restore it, or start a new run"
                )
            if self.team is not None and folder is not None:
                self._restore_shards(self.team, folder)
            else:
                load_model_tensors(self.model, tensors[MODEL])
                load_optimizer_tensors(self.model, self.optimizers, tensors[OPTIMIZER])
                load_random_tensors(tensors[RANDOM], self.device)
            self.step, self.seconds = checkpoint.step, float(progress["seconds"])
            self._resumed = True
            before = progress["environment"]
            return [
                f"{name} was {before.get(name)} and is {value}: results may differ in the last bits"
                for name, value in self._environment().items()
                if before.get(name) != value
            ]
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"the checkpoint is not one of this command: {error} is missing") from None

    def _restore_shards(self, team: Team, folder: Path) -> None:
        if is_sharded(folder):
            load_sharded(folder, self.model, self.optimizers, team)
            return
        tensors = read_checkpoint(folder).tensors  # of one process: every rank reads all and keeps its part
        load_model_tensors(self.model, spread(tensors[MODEL], self.model.state_dict()))
        entries = ("exp_avg", "exp_avg_sq", "momentum")
        like = {f"{name}.{entry}": p for name, p in self.model.named_parameters() for entry in entries}
        load_optimizer_tensors(self.model, self.optimizers, spread(tensors[OPTIMIZER], like))

    def _environment(self) -> dict[str, Any]:
        found = {"torch": torch.__version__, "device": self.device.type, "threads": torch.get_num_threads()}
        return found if self.team is None else found | {"ranks": self.team.world}

    def save(self) -> Path:
        """Write a checkpoint of the state after the steps done."""
        progress = {
            "step": self.step,
            "seconds": self.seconds,
            "corpus": self.corpus.fingerprint,
            "environment": self._environment(),
        }
        records = {"run": self.config.to_dict(), "progress": progress}
        keep, root = self.config.training.keep_checkpoints, self.folder / "checkpoints"
        if self.team is not None:
            return write_sharded(root, self.step, records, self.model, self.optimizers, self.team, keep=keep)
        checkpoint = Checkpoint(
            self.step,
            records,
            {
                MODEL: self.model.state_dict(),
                OPTIMIZER: optimizer_tensors(self.model, self.optimizers),
                RANDOM: random_tensors(self.device),
            },
        )
        return write_checkpoint(root, checkpoint, keep=keep)

    def full_weights(self) -> dict[str, Tensor]:
        """All weights, on the CPU and whole; with a team every rank has to ask."""
        return {name: full(tensor).detach().cpu() for name, tensor in self.model.state_dict().items()}

    @property
    def is_main(self) -> bool:
        """Whether this process writes metrics and talks to the user."""
        return self.team is None or self.team.is_main

    def evaluate(self, *, count: int, context: int) -> float:
        """Mean bits per byte over ``count`` of the run's held-out windows, seeing at most ``context`` bytes."""
        stride = max(1, len(self.held_out) // count)
        windows = self.held_out[::stride][:count]
        bits = bits_by_position(self._forward, windows, context=context, device=self.device, autocast=self.autocast)
        return float(bits.double().mean())

    def train(self, reporter: Reporter, *, should_stop: Callable[[], bool] = lambda: False) -> bool:
        """Take the steps that are left; returns whether all are done.

        Checkpoints are written before the first step, every ``checkpoint_every`` steps, at the end, and when
        ``should_stop`` asks to stop after a step.
        """
        training = self.config.training
        main, keep = self.is_main, self.step if self._resumed else -1  # what another run left is no part of this one
        with contextlib.ExitStack() as stack:
            log = stack.enter_context(MetricsLog(self.folder / "metrics.jsonl", keep_until=keep)) if main else None

            def record(entry: dict[str, Any]) -> None:
                if log is not None:
                    log.append(entry)
                    reporter.record(entry)

            def save() -> None:
                if log is not None:
                    log.sync()
                self.save()

            def evaluate() -> None:
                # The context that the last step trained: a longer one says nothing about a stage of short windows.
                context = self.config.window_shape(max(0, self.step - 1))[1]
                bits = self.evaluate(count=training.eval_windows, context=context)
                record({"kind": "held-out", "step": self.step, "bits_per_byte": bits, "context": context})

            if not self._resumed:
                evaluate()
                save()
            while not self.done:
                with self.team.step(self.step) if self.team else contextlib.nullcontext():
                    record(self._train_step())
                stop = self.team.any(should_stop()) if self.team else should_stop()
                if self.step % training.eval_every == 0 or self.done:
                    evaluate()
                if self.step % training.checkpoint_every == 0 or self.done or stop:
                    save()
                if stop:
                    break
        return self.done

    def _train_step(self) -> dict[str, Any]:
        started = time.perf_counter()
        training = self.config.training
        rate = learning_rate(self.step, training)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        batch_size, length = self.config.window_shape(self.step)
        windows = training_batch(
            self.corpus, context_length=length, batch_size=batch_size, seed=training.seed, step=self.step
        ).to(self.device, torch.int64)
        self.model.train()
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            if self.team is not None:
                loss = self.team.loss(self.model, windows)
            else:
                loss = token_losses(self._forward, windows).mean()
        self.model.zero_grad(set_to_none=True)
        if self.team is not None:
            value = self.team.backward(loss, list(self.model.parameters()))
        else:
            loss.backward()
            value = float(loss.detach())
        norm = float(full(torch.nn.utils.clip_grad_norm_(self.model.parameters(), training.gradient_clip)))
        if self.team is not None:
            self.team.peers.check()  # on a GPU, before what a failed peer left undefined reaches the weights
        if not (math.isfinite(value) and math.isfinite(norm)):  # before the weights take it in
            raise FloatingPointError(
                f"step {self.step + 1}: the loss is {value}, the norm of its gradient {norm}; start a new "
                f"run with a learning rate below {training.learning_rate:g}"
            )
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        elapsed = time.perf_counter() - started
        self.seconds += elapsed
        return {
            "kind": "train",
            "step": self.step,
            "loss": value,
            "bits_per_byte": value * BITS,
            "learning_rate": rate,
            "gradient_norm": norm,
            "tokens": self.config.trained_bytes(self.step),
            "tokens_per_second": batch_size * length / elapsed,
            "seconds": self.seconds,
        }
