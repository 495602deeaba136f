"""``dilated-attention convert``: checkpoints to folders of Hugging Face transformers, and back."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from .errors import one_line_errors


def convert(
    source: Annotated[Path, typer.Argument(help="A run's folder or checkpoint, or a folder with config.json.")],
    target: Annotated[Path, typer.Argument(help="The folder to write; it must not exist yet, or be empty.")],
) -> None:
    """Convert a trained model to a folder of Hugging Face transformers, or such a folder to a checkpoint.

    A byte-level tokenizer is saved beside the model. Needs transformers and tokenizers.
    """
    with one_line_errors():
        for package in ("transformers", "tokenizers"):
            if importlib.util.find_spec(package) is None:
                raise ValueError(f"{package} is not installed; run: pip install 'dilated-attention-pytorch[hf]'")
        if not source.is_dir():
            raise ValueError(
                f"{str(source)!r} is no folder; give a run's folder, a checkpoint, or a saved model's folder"
            )
        from transformers.utils import logging

        from ..integrations.transformers import checkpoint_to_pretrained, pretrained_to_checkpoint

        logging.disable_progress_bar()
        logging.set_verbosity_error()  # what is wrong is said in one line here

        if (source / "config.json").exists():
            written = pretrained_to_checkpoint(source, target)
        else:
            checkpoint_to_pretrained(source, target)
            written = target
    typer.echo(f"wrote {written}")
