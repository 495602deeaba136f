"""The state of a run between two steps as named tensors: weights, optimizer, random generators; and back."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..models import LongNetLM
from .checkpoint import CheckpointError, iter_tensor_problems, newest_checkpoint, read_checkpoint
from .config import RunConfig
from .optim import Muon

MODEL = "model"
OPTIMIZER = "optimizer"
RANDOM = "random"

Optimizers = Sequence[torch.optim.Optimizer]


def load_model_tensors(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Copy ``saved`` into ``model``, which must have just these tensors.

    Raises:
        CheckpointError: a name, shape or dtype differs.
    """
    if problem := next(iter_tensor_problems(saved, model.state_dict()), None):
        raise CheckpointError(f"the checkpoint does not fit its own configuration: {problem}")
    model.load_state_dict(saved)


def _owners(model: nn.Module, optimizers: Optimizers) -> Iterator[tuple[str, nn.Parameter, torch.optim.Optimizer]]:
    """Every trained parameter with its name and the optimizer that it belongs to."""
    owner = {p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter in owner:
            yield name, parameter, owner[parameter]


def optimizer_tensors(model: nn.Module, optimizers: Optimizers) -> dict[str, Tensor]:
    """The optimizers' state as ``<parameter>.<entry>``; empty before the first step."""
    return {
        f"{name}.{entry}": value.contiguous()
        for name, parameter, optimizer in _owners(model, optimizers)
        for entry, value in optimizer.state[parameter].items()
    }


def load_optimizer_tensors(model: nn.Module, optimizers: Optimizers, saved: Mapping[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors` for AdamW and Muon.

    Raises:
        CheckpointError: the tensors are not those of these optimizers for this model.
    """
    if not saved:
        return
    expected: dict[str, dict[str, Tensor]] = {}
    for name, parameter, optimizer in _owners(model, optimizers):
        if isinstance(optimizer, Muon):
            expected[name] = {"momentum": parameter}
        else:
            step = torch.zeros((), device=parameter.device)
            expected[name] = {"step": step, "exp_avg": parameter, "exp_avg_sq": parameter}
    flat = {f"{name}.{entry}": tensor for name, state in expected.items() for entry, tensor in state.items()}
    if problem := next(iter_tensor_problems(saved, flat), None):
        raise CheckpointError(f"the checkpoint's optimizer does not fit its model: {problem}")
    for name, parameter, optimizer in _owners(model, optimizers):
        optimizer.state[parameter] = {
            entry: saved[f"{name}.{entry}"].to(like.device, copy=True) for entry, like in expected[name].items()
        }


def random_tensors(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's generators that training may draw from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def load_random_tensors(saved: Mapping[str, Tensor], device: torch.device) -> None:
    """Restore `random_tensors`; a run that moved to another kind of device keeps that device's generator.

    Raises:
        CheckpointError: a state is malformed.
    """
    try:
        torch.set_rng_state(saved["cpu"])
        if device.type == "cuda" and "cuda" in saved:
            torch.cuda.set_rng_state(saved["cuda"], device)
    except (KeyError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"the checkpoint's random state is malformed: {error}") from None


def load_model(path: str | Path) -> LongNetLM:
    """A trained model, on the CPU in eval mode, from a run's folder or one of its checkpoints.

    Raises:
        CheckpointError: nothing complete is there. A damaged checkpoint before which there is a complete one is a
            warning.

    Example::

        model = load_model("runs/demo")
        logits = model(torch.tensor([list(b"def ")]))  # (1, 4, 256)
    """
    path = Path(path)
    root = path / "checkpoints"
    checkpoint, damaged = newest_checkpoint(root) if root.is_dir() else (read_checkpoint(path), [])
    for message in damaged:
        warnings.warn(f"{message}; the one of step {checkpoint.step} is loaded in its place", stacklevel=2)
    try:
        config = RunConfig.from_dict(checkpoint.records["run"])
        saved = checkpoint.tensors[MODEL]
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{str(path)!r} is not a checkpoint of this command: {error}") from None
    model = LongNetLM(config.model)
    load_model_tensors(model, saved)
    return model.eval()
