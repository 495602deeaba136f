"""Checkpoints to folders of transformers and back, bit by bit; the command; the tokenizer saved beside the model."""

from __future__ import annotations

import doctest
import importlib
import os
import pkgutil
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import dilated_attention_pytorch.integrations.transformers as package
from dilated_attention_pytorch import LongNetLM, LongNetLMConfig
from dilated_attention_pytorch.cli import app
from dilated_attention_pytorch.integrations.transformers import (
    LongNetConfig,
    LongNetForMaskedLM,
    byte_tokenizer,
    checkpoint_to_pretrained,
    pretrained_to_checkpoint,
)
from dilated_attention_pytorch.training import RunConfig, TrainingConfig, load_model
from dilated_attention_pytorch.training.checkpoint import Checkpoint, write_checkpoint

TINY: dict[str, Any] = {
    "context_length": 64,
    "embed_dim": 32,
    "num_layers": 2,
    "num_heads": 4,
    "segment_lengths": (8, 64),
    "dilation_rates": (1, 4),
    "ngram_sizes": (2,),
    "short_convolution": 2,
}
TEXT = "def f(x):\r\n\treturn '\N{SNOWMAN}é' \x00 <mask> <0x00> \N{LATIN CAPITAL LETTER A WITH MACRON}"


def write_run(folder: Path, **options: Any) -> LongNetLM:
    """A checkpoint as training writes it, without what only training reads."""
    torch.manual_seed(0)
    lm = LongNetLM(LongNetLMConfig(**{**TINY, **options})).eval()
    training = TrainingConfig(steps=3, batch_size=1, learning_rate=1e-3)
    run = RunConfig(preset="demo", model=lm.config, training=training)
    write_checkpoint(folder / "checkpoints", Checkpoint(3, {"run": run.to_dict()}, {"model": lm.state_dict()}), keep=2)
    return lm


@pytest.mark.parametrize("options", [{}, {"tie_embeddings": True, "norm": "pre-rms", "vocab_size": 258}], ids=str)
def test_there_and_back_bit_by_bit(options: dict[str, Any], tmp_path: Path) -> None:
    lm = write_run(tmp_path / "run", **options)
    checkpoint_to_pretrained(tmp_path / "run", tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert len(tokenizer) == lm.config.vocab_size
    tokens = torch.tensor([tokenizer(TEXT).input_ids])
    assert tokens[0].tolist() == list(TEXT.encode())
    gold = lm(tokens)
    assert torch.equal(model(tokens).logits, gold)
    assert model.generation_config.eos_token_id == model.generation_config.pad_token_id == 0
    checkpoint = pretrained_to_checkpoint(tmp_path / "hf", tmp_path / "back")
    for source in (checkpoint, tmp_path / "back"):
        back = load_model(source)
        assert back.config == lm.config
        assert torch.equal(back(tokens), gold)
        state = lm.state_dict()
        assert back.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[name]) for name, value in back.state_dict().items())


def test_the_command_converts_both_ways_and_says_what_is_wrong(tmp_path: Path) -> None:
    lm = write_run(tmp_path / "run")

    def convert(source: str, target: str) -> Any:
        return CliRunner().invoke(app, ["convert", str(tmp_path / source), str(tmp_path / target)])

    for source, target in (("run", "hf"), ("hf", "back")):
        result = convert(source, target)
        assert result.exit_code == 0, result.output
        assert str(tmp_path / target) in result.stdout.replace("\n", "")
    tokens = torch.arange(50)[None]
    assert torch.equal(load_model(tmp_path / "back")(tokens), lm(tokens))
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    weights.pop("lm_head.weight")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    save_file(weights, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "broken" / "config.json").write_bytes((tmp_path / "hf" / "config.json").read_bytes())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "llama"}')
    for name in ("other-sizes", "cut-short", "pickle"):
        shutil.copytree(tmp_path / "hf", tmp_path / name)
    LongNetConfig(**{**TINY, "embed_dim": 64}).save_pretrained(tmp_path / "other-sizes")
    os.truncate(tmp_path / "cut-short" / "model.safetensors", 1000)
    (tmp_path / "pickle" / "model.safetensors").unlink()
    torch.save({"model": range(3)}, tmp_path / "pickle" / "pytorch_model.bin")  # whatever it holds: not opened
    LongNetForMaskedLM(LongNetConfig(**TINY)).save_pretrained(tmp_path / "masked")
    write_run(tmp_path / "few", vocab_size=50)
    for source, target, message in (
        ("run", "hf", "is not empty; name a folder that does not exist yet"),
        ("nowhere", "x", "is no folder; give a run's folder"),
        ("empty", "x", "is not a checkpoint of this command"),
        ("other", "x", "holds a model of type 'llama'; give a folder written by LongNetForCausalLM"),
        ("masked", "x", "holds a bidirectional LongNet; give"),
        ("broken", "x", "do not fit their configuration: missing_keys lm_head.weight"),
        ("other-sizes", "x", "do not fit their configuration: mismatched_keys lm_head.weight"),
        ("cut-short", "x", "cut-short' cannot be read: "),
        ("pickle", "x", "pickle' cannot be read: "),
        ("few", "x", "the vocabulary has 50 ids, which are no bytes"),
    ):
        result = convert(source, target)
        assert result.exit_code == 2
        assert message in result.stderr
        assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("specials", [[], ["<pad>", "<mask>", "<sep>"]], ids=str)
def test_ids_are_bytes_and_every_text_comes_back(specials: list[str], tmp_path: Path) -> None:
    byte_tokenizer(specials, padding_side="left").save_pretrained(tmp_path)
    everything = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x11000)])) + TEXT + "".join(specials)
    for tokenizer in (byte_tokenizer(specials, padding_side="left"), AutoTokenizer.from_pretrained(tmp_path)):
        ids = tokenizer(everything).input_ids
        assert ids == list(everything.encode())
        assert tokenizer.decode(ids) == everything
        assert tokenizer.decode([0, 104, 105, 0], skip_special_tokens=True) == "hi"
        assert len(tokenizer) == 256 + len(specials)
        pad = 256 if specials else 0
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 0, pad)
        assert tokenizer.mask_token_id == (257 if specials else None)
        batch = tokenizer(["ab", "c"], padding=True)
        assert batch["input_ids"] == [[97, 98], [pad, 99]]
        assert batch["attention_mask"] == [[1, 1], [0, 1]]
    if specials:
        assert tokenizer("a<mask><sep>", split_special_tokens=False).input_ids == [97, 257, 258]
    with pytest.raises(ValueError, match="give names of at least two letters, each once"):
        byte_tokenizer(["<x>", "<x>"])


@pytest.mark.parametrize("name", [module.name for module in pkgutil.iter_modules(package.__path__)])
def test_examples_of_docstrings_run(name: str) -> None:
    found = doctest.testmod(importlib.import_module(f"{package.__name__}.{name}"))
    assert found.failed == 0
    assert found.attempted > 0 or name in ("cache", "conversion")
