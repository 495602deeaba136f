"""The state of a run between two steps as named tensors: weights, optimizer, random generators; and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..models import LongNetLM
from .checkpoint import Checkpoint, CheckpointError, iter_tensor_problems, newest_checkpoint, read_checkpoint
from .config import RunConfig

MODEL = "model"
OPTIMIZER = "optimizer"
RANDOM = "random"


def load_model_tensors(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Copy ``saved`` into ``model``, which must have just these tensors.

    Raises:
        CheckpointError: a name, shape or dtype differs.
    """
    if problem := next(iter_tensor_problems(saved, model.state_dict()), None):
        raise CheckpointError(f"the checkpoint does not fit its own configuration: {problem}")
    model.load_state_dict(saved)


def _named(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as ``<parameter>.<entry>``; empty before the first step."""
    return {
        f"{name}.{entry}": value.contiguous()
        for name, parameter in _named(model).items()
        for entry, value in optimizer.state[parameter].items()
    }


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, saved: Mapping[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors` for AdamW.

    Raises:
        CheckpointError: the tensors are not AdamW's for this model.
    """
    expected: dict[str, Tensor] = {}
    for name, parameter in _named(model).items() if saved else ():
        expected |= {f"{name}.exp_avg": parameter, f"{name}.exp_avg_sq": parameter}
        expected[f"{name}.step"] = torch.tensor(0.0)
    if problem := next(iter_tensor_problems(saved, expected), None):
        raise CheckpointError(f"the checkpoint's optimizer does not fit its model: {problem}")
    for name, parameter in _named(model).items() if saved else ():
        optimizer.state[parameter] = {
            "step": saved[f"{name}.step"].clone(),
            "exp_avg": saved[f"{name}.exp_avg"].to(parameter.device, copy=True),
            "exp_avg_sq": saved[f"{name}.exp_avg_sq"].to(parameter.device, copy=True),
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
        CheckpointError: nothing complete is there.

    Example::

        model = load_model("runs/demo")
        logits = model(torch.tensor([list(b"def ")]))  # (1, 4, 256)
    """
    path = Path(path)
    root = path / "checkpoints"
    checkpoint: Checkpoint = newest_checkpoint(root)[0] if root.is_dir() else read_checkpoint(path)
    try:
        config = RunConfig.from_dict(checkpoint.records["run"])
        saved = checkpoint.tensors[MODEL]
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{str(path)!r} is not a checkpoint of this command: {error}") from None
    model = LongNetLM(config.model)
    load_model_tensors(model, saved)
    return model.eval()
