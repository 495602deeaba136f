"""Checkpoints of ``dilated-attention train`` to folders of the transformers library, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ...training import load_model
from ...training.checkpoint import Checkpoint, write_checkpoint
from ...training.config import RunConfig, TrainingConfig
from ...training.corpus import SEPARATOR
from ...training.state import MODEL
from .configuration import LongNetConfig
from .heads import LongNetForCausalLM
from .tokenizer import BYTES, byte_tokenizer

_SHOWN = 4


def checkpoint_to_pretrained(source: str | Path, target: str | Path) -> LongNetForCausalLM:
    """Write the model of a run's folder or checkpoint as a folder that ``from_pretrained`` reads.

    A byte-level tokenizer is saved beside it; ids from 256 on, if the vocabulary has them, are the special tokens
    ``<256>``, ``<257>`` and so on. The separator of documents, byte 0, ends generation.

    Args:
        source: a run's folder, of which the newest complete checkpoint is taken, or a checkpoint.
        target: a folder that does not exist yet, or is empty.

    Returns:
        The model, in eval mode; its logits are bit for bit those of ``load_model(source)``.

    Raises:
        ValueError: no complete checkpoint, a target that holds files, or a vocabulary smaller than the 256 bytes.

    Example::

        checkpoint_to_pretrained("runs/demo", "demo-hf")
        model = AutoModelForCausalLM.from_pretrained("demo-hf")
    """
    target = _empty_folder(target)
    lm = load_model(source)
    if lm.config.vocab_size < BYTES:
        raise ValueError(f"the vocabulary has {lm.config.vocab_size} ids, which are no bytes; give a byte-level model")
    tokenizer = byte_tokenizer([f"<{token}>" for token in range(BYTES, lm.config.vocab_size)])
    roles = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), SEPARATOR)
    model = LongNetForCausalLM.from_longnet_lm(lm, **roles)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return model


def pretrained_to_checkpoint(source: str | Path, target: str | Path) -> Path:
    """Write a causal LongNet model saved by transformers as a run's folder that ``load_model`` reads.

    Weights become float32, as training keeps them: those of a float32 model stay the same bit for bit. The folder holds
    the model alone, at step 0; there is no optimizer and no text, so a run cannot be resumed from it.

    Args:
        source: a folder written by ``LongNetForCausalLM.save_pretrained``.
        target: a folder that does not exist yet, or is empty.

    Returns:
        The checkpoint's folder.

    Raises:
        ValueError: a folder of another model, weights that are missing, damaged or of other sizes, or a target that
            holds files.

    Example::

        pretrained_to_checkpoint("demo-hf", "runs/back")
        model = load_model("runs/back")
    """
    target = _empty_folder(target)
    described = _described(source)
    if described.get("model_type") != LongNetConfig.model_type or not described.get("is_causal", True):
        kind = "a bidirectional LongNet" if described.get("model_type") == LongNetConfig.model_type else None
        raise ValueError(
            f"{str(source)!r} holds {kind or 'a model of type ' + repr(described.get('model_type'))}; give a folder "
            "written by LongNetForCausalLM.save_pretrained"
        )
    # With output_loading_info the model comes with what was found, which its annotation leaves out; sizes that differ
    # are reported there, too. save_pretrained writes safetensors, so nothing else is opened.
    try:
        loaded: Any = LongNetForCausalLM.from_pretrained(
            source, dtype=torch.float32, local_files_only=True, use_safetensors=True, ignore_mismatched_sizes=True,
            output_loading_info=True,
        )  # fmt: skip
    except (OSError, SafetensorError) as error:
        raise ValueError(f"the weights in {str(source)!r} cannot be read: {error}") from None
    model, found = loaded
    problems = [
        f"{what} {', '.join(names[:_SHOWN])}{f' and {len(names) - _SHOWN} more' if len(names) > _SHOWN else ''}"
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if (names := sorted(str(key if isinstance(key, str) else key[0]) for key in found[what]))
    ]
    if problems:
        raise ValueError(f"the weights in {str(source)!r} do not fit their configuration: {'; '.join(problems)}")
    lm = model.to_longnet_lm()
    # Every checkpoint records a run; this one has taken no step.
    training = TrainingConfig(steps=1, batch_size=1, learning_rate=1e-3)
    run = RunConfig(preset="converted", model=lm.config, training=training)
    return write_checkpoint(
        target / "checkpoints", Checkpoint(0, {"run": run.to_dict()}, {MODEL: lm.state_dict()}), keep=2
    )


def _described(source: str | Path) -> dict[str, Any]:
    """What config.json of a folder says; a ValueError where there is none."""
    path = Path(source) / "config.json"
    try:
        described = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(
            f"{str(source)!r} is no folder of the transformers library: {path.name}: {error.strerror}"
        ) from None
    except ValueError:
        raise ValueError(f"{str(path)!r} is no JSON") from None
    return described if isinstance(described, dict) else {}


def _empty_folder(path: str | Path) -> Path:
    """``path``, which has to be free to write to."""
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{str(path)!r} is not empty; name a folder that does not exist yet")
    return path
