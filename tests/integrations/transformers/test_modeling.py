"""LongNet's base model in transformers: initial values, resizing, gradient checkpointing, the Trainer."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from dilated_attention_pytorch import LongNetLM
from dilated_attention_pytorch.integrations.transformers import LongNetConfig, LongNetForCausalLM, LongNetModel

TINY: dict[str, Any] = {
    "vocab_size": 50,
    "context_length": 64,
    "embed_dim": 32,
    "num_layers": 2,
    "num_heads": 4,
    "segment_lengths": (6, 15, 30),
    "dilation_rates": (1, 3, 4),
}
LOCAL = {"norm": "pre-rms", "num_kv_heads": 2, "ngram_sizes": (2, 3), "ngram_buckets": 64, "short_convolution": 3}
VARIANTS: dict[str, dict[str, Any]] = {"sub-ln": {}, "tied": {"tie_embeddings": True}, "local": LOCAL}


def build(variant: str = "sub-ln", **options: Any) -> LongNetForCausalLM:
    torch.manual_seed(0)
    config = LongNetConfig(**{**TINY, **VARIANTS[variant], **options})
    return LongNetForCausalLM(config).double().eval()


def draw(batch: int, rows: int, seed: int = 0) -> Tensor:
    return torch.randint(1, TINY["vocab_size"], (batch, rows), generator=torch.Generator().manual_seed(seed))


def refused(message: str) -> Any:
    return pytest.raises(ValueError, match=message)


def test_what_a_saved_model_lacks_is_drawn_and_the_rest_kept(tmp_path: Path) -> None:
    model = build("local").float()
    model.save_pretrained(tmp_path)
    again, found = LongNetForCausalLM.from_pretrained(
        tmp_path, num_layers=3, vocab_size=40, ignore_mismatched_sizes=True, output_loading_info=True
    )
    drawn = set(found["missing_keys"]) | {key[0] for key in found["mismatched_keys"]}
    state = model.state_dict()
    for name, value in again.state_dict().items():
        assert value.isfinite().all()
        assert value.abs().max() < 10  # no memory that nothing was written to
        if ".blocks.2." in name or name in ("lm_head.weight", "model.backbone.embedding.weight"):
            assert name in drawn
        else:
            assert torch.equal(value, state[name]), name
    std = float(again.get_input_embeddings().weight.detach().std())
    assert abs(std * 32**0.5 - 1) < 0.1
    assert again(draw(1, 20) % 40).logits.isfinite().all()


def test_a_new_model_begins_as_the_library_model_does() -> None:
    torch.manual_seed(3)
    lm = LongNetLM(dataclasses.replace(LongNetConfig(**TINY, **LOCAL).to_lm_config(), tie_embeddings=True))
    torch.manual_seed(3)
    model = LongNetModel(LongNetConfig(**TINY, **LOCAL))
    assert all(torch.equal(value, lm.state_dict()[name]) for name, value in model.backbone.state_dict().items())


def test_the_vocabulary_can_be_resized() -> None:
    model, tokens = build("tied"), draw(1, 20)
    before, embedding = model(tokens).logits, model.get_input_embeddings().weight.detach().clone()
    model.resize_token_embeddings(53)
    assert torch.equal(model.get_input_embeddings().weight[:50], embedding)
    # A product with more columns may be summed in another order, on some processors.
    torch.testing.assert_close(model(tokens).logits[..., :50], before, rtol=1e-12, atol=1e-13)
    assert model.to_longnet_lm().config.vocab_size == model.config.vocab_size == 53
    assert isinstance(model.get_output_embeddings(), nn.Linear)
    with refused("vocab_size is 53"):
        model(tokens + 60)


def test_gradient_checkpointing_stores_less_and_changes_no_bit() -> None:
    model, tokens = build(dropout=0.1, num_layers=4).train(), draw(2, 61)
    stored, losses, grads = [], [], []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        assert model.model.gradient_checkpointing == checkpointing
        sizes: list[int] = []

        def pack(x: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(x.numel())
            return x

        model.zero_grad()
        torch.manual_seed(7)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = model(tokens, labels=tokens).loss
        loss.backward()
        stored.append(sum(sizes))
        losses.append(loss.detach())
        grads.append([p.grad.clone() for p in model.parameters()])
    assert stored[1] < stored[0] / 3
    assert torch.equal(*losses)
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))
    model.gradient_checkpointing_disable()
    assert not model.model.gradient_checkpointing
    with refused("'use_reentrant': True.*leave other options out"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    if hasattr(model, "activation_checkpointing_enable"):  # of newer versions
        for option in ({"offload": True}, {"every_n_layers": 2}):
            with refused("leave other options out"):
                model.activation_checkpointing_enable(**option)


class Lines(torch.utils.data.Dataset):
    """Windows of a repeating line, for the Trainer."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        text = b"the cat sat on the mat. " * 4
        tokens = torch.tensor(list(text[index % 24 : index % 24 + 64])) % TINY["vocab_size"]
        return {"input_ids": tokens, "labels": tokens}


def test_twenty_steps_of_the_trainer_lower_the_loss(tmp_path: Path) -> None:
    model = build("local").float()
    first = copy.deepcopy(model.state_dict())
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=20, per_device_train_batch_size=2, per_device_eval_batch_size=64,
        gradient_accumulation_steps=2,
        learning_rate=1e-2, logging_steps=1, save_steps=20, report_to=[], use_cpu=True, disable_tqdm=True, seed=0,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=Lines(), eval_dataset=Lines())
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 20
    assert losses[0] == pytest.approx(before, abs=0.5)
    assert losses[-1] < losses[0] / 2
    assert trainer.evaluate()["eval_loss"] < before / 2
    assert trainer.predict(torch.utils.data.Subset(Lines(), range(3))).predictions.shape == (3, 64, TINY["vocab_size"])
    assert any(not torch.equal(value, first[name]) for name, value in model.state_dict().items())
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-20")
    assert torch.equal(saved(draw(1, 9)).logits, model.eval()(draw(1, 9)).logits)
