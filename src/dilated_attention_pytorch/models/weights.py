"""Weights of other projects: read without running anything that a file contains, and loaded strictly."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

WeightsSource = str | os.PathLike[str] | Mapping[str, Any]

_SHOWN = 6


class WeightsError(ValueError):
    """Weights are missing, damaged, or not those of the model they were given for."""


def describe(source: WeightsSource) -> str:
    """How messages call the source."""
    return "the state dict" if isinstance(source, Mapping) else repr(os.fspath(source))


def read_weights(source: WeightsSource, wrappers: Sequence[str] = ("model",)) -> dict[str, Tensor]:
    """Tensors by name, on the CPU: of a state dict, or a file of safetensors or torch.save, whatever it is called.

    A torch file is read with ``weights_only``: what is not made of tensors and plain containers is refused, and no code
    of it runs. If the content has one of the keys ``wrappers`` with a mapping behind it, the weights are that mapping.

    Raises:
        WeightsError: no such file, a damaged or foreign one, or content that is no mapping from names to tensors.
    """
    content: object = source if isinstance(source, Mapping) else _read_file(Path(source))
    if isinstance(content, Mapping):
        inner = next((content[key] for key in wrappers if isinstance(content.get(key), Mapping)), None)
        content = content if inner is None else inner
    if not isinstance(content, Mapping) or not content:
        raise WeightsError(f"{describe(source)} holds no weights: give a mapping from names to tensors")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise WeightsError(
                f"{describe(source)} is no state dict: {name!r} is a {type(value).__name__}, not a tensor"
            )
        if not value.is_floating_point():
            raise WeightsError(f"{describe(source)} has {name} as {value.dtype}; weights are floating point")
    return dict(content)


def _read_file(path: Path) -> object:
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise WeightsError(f"cannot read {str(path)!r}: {error.strerror}") from None
    try:
        if start[8:] == b"{":  # after the length of safetensors' header, its JSON
            from safetensors.torch import load_file

            return load_file(path)
        # Checkpoints of training scripts often hold their command line; a namespace is inert.
        # Opened here, for of a path the suffix would decide how it is read.
        with path.open("rb") as file, torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception:  # of many types: the content decides where reading stumbles
        # torch's own message is left out, for it recommends to switch the protection off.
        raise WeightsError(
            f"{str(path)!r} is no readable file of weights: it is damaged or cut short, of another format, or holds "
            "objects other than tensors and plain containers, which could run code and were not restored. Give a file "
            "of safetensors, or a state dict written by torch.save"
        ) from None


def size_of(weights: Mapping[str, Tensor], name: str, dims: int, source: WeightsSource, what: str) -> torch.Size:
    """Shape of the tensor that tells a size of the model, which must be there with ``dims`` dimensions.

    Raises:
        WeightsError: it is not.
    """
    if name not in weights:
        few = ", ".join(sorted(weights)[:_SHOWN])
        raise WeightsError(f"{describe(source)} is no {what}: it lacks {name}; it has {few}{_more(len(weights))}")
    shape = weights[name].shape
    if len(shape) != dims or 0 in shape:
        raise WeightsError(f"{describe(source)} is no {what}: {name} has shape {tuple(shape)}, not {dims} dimensions")
    return shape


class EncoderSizes(TypedDict):
    """Sizes of the encoder that its weights tell, by their names in the configuration."""

    embed_dim: int
    num_layers: int
    ffn_dim: int


def encoder_sizes(weights: Mapping[str, Tensor], embed_dim: int, source: WeightsSource, what: str) -> EncoderSizes:
    """Sizes of the encoder below ``encoder.``; a gap in the numbers of its layers is left to strict loading.

    Raises:
        WeightsError: the tensors that tell them are not there.
    """
    prefix = "encoder.layers."
    ffn_dim, _ = size_of(weights, f"{prefix}0.ffn.fc1.weight", 2, source, what)
    numbers = {name.removeprefix(prefix).partition(".")[0] for name in weights if name.startswith(prefix)}
    return EncoderSizes(embed_dim=embed_dim, num_layers=len(numbers), ffn_dim=ffn_dim)


def materialise(model: nn.Module, weights: Mapping[str, Tensor], source: WeightsSource) -> None:
    """Give a model on the "meta" device memory on the CPU, and these weights; every one has to fit.

    Raises:
        WeightsError: names that are missing or unknown, or other shapes; the message lists them.
    """
    expected = model.state_dict()
    problems = [f"{name} is missing" for name in expected if name not in weights]
    problems += [f"{name} is unknown" for name in weights if name not in expected]
    problems += [
        f"{name} has shape {tuple(value.shape)}, not {tuple(expected[name].shape)}"
        for name, value in weights.items()
        if name in expected and value.shape != expected[name].shape
    ]
    if problems:
        shown = "; ".join(problems[:_SHOWN])
        raise WeightsError(f"{describe(source)} does not fit {type(model).__name__}: {shown}{_more(len(problems))}")
    model.to_empty(device="cpu")
    model.load_state_dict(weights)


def _more(count: int) -> str:
    return f" and {count - _SHOWN} more" if count > _SHOWN else ""
