"""Configurations: presets, JSON, stages, and a message for every value out of range."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dilated_attention_pytorch.training.config import PRESETS, RunConfig, Stage, TrainingConfig


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_json(name: str):
    config = RunConfig.from_preset(name, data=("a", "b"), seed=3)
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.training.seed == 3
    assert config.model.context_length >= 4096


def test_another_context_length_gets_segments_of_its_own():
    preset = RunConfig.from_preset("demo")
    assert RunConfig.from_preset("demo", context_length=preset.model.context_length) == preset
    longer = RunConfig.from_preset("demo", context_length=16384).model
    assert longer.context_length == 16384
    assert longer.segment_lengths == (2048, 4096, 8192, 16384)
    assert max(longer.dilation_rates) <= longer.num_heads  # no offset without a head


def test_stages_take_their_share_of_the_steps(tiny: RunConfig):
    shapes = [tiny.window_shape(step) for step in range(8)]
    assert shapes == [(8, 16)] * 2 + [(4, 32)] * 2 + [(2, 64)] * 4
    assert [tiny.trained_bytes(step) for step in range(9)] == [128 * step for step in range(9)]


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 997])
def test_every_step_belongs_to_one_stage(steps: int):
    stages = (Stage(0.6, 256, 2), Stage(0.2, 1024), Stage(0.1, 100_000))
    config = RunConfig.from_preset("demo", steps=steps, stages=stages, batch_size=3)
    assert sum(config.training.stage_steps()) == steps
    assert min(config.training.stage_steps()) >= 0
    shapes = [config.window_shape(step) for step in range(steps)]
    assert all(length <= config.model.context_length for _, length in shapes)
    assert config.trained_bytes(steps) == sum(batch * length for batch, length in shapes)
    assert shapes[-1][0] in (3, 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps is 0; give an integer of at least 1"),
        ({"steps": 2.5}, "steps is 2.5; give an integer of at least 1"),
        ({"steps": True}, "steps is True; give an integer of at least 1"),
        ({"batch_size": -1}, "batch_size is -1; give an integer of at least 1"),
        ({"seed": -1}, "seed is -1; give an integer of at least 0"),
        ({"keep_checkpoints": 1}, "keep_checkpoints is 1; give an integer of at least 2"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; give a positive number"),
        ({"learning_rate": float("nan")}, "learning_rate is nan; give a positive number"),
        ({"learning_rate": float("inf")}, "learning_rate is inf; give a positive number"),
        ({"weight_decay": 1.0}, "weight_decay is 1.0; give a number of at least 0 and below 1"),
        ({"held_out_fraction": -0.1}, "held_out_fraction is -0.1; give a number of at least 0"),
        ({"dtype": "float16"}, "dtype is 'float16'; choose one of float32, bfloat16"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd'; choose one of adamw, muon"),
        ({"stages": ((0.5, 0, 1),)}, "lengths and factors at least 1"),
        ({"stages": ((0.5, 64, 1), (0.6, 64, 1))}, "their shares sum to at most 1"),
    ],
)
def test_a_value_out_of_range_is_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=r"is|has") as caught:
        TrainingConfig(**{"steps": 1, "batch_size": 1, "learning_rate": 1e-3, **options})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda fields: fields.pop("preset"),
        lambda fields: fields.pop("model"),
        lambda fields: fields["training"].pop("steps"),
        lambda fields: fields["training"].update(colour="blue"),
        lambda fields: fields["training"].update(steps="many"),
        lambda fields: fields["training"].update(stages=[[1, 2, 3, 4]]),
        lambda fields: fields["model"].update(num_layers=0),
        lambda fields: fields.update(data=3),
    ],
)
def test_foreign_json_is_refused(change):
    fields = json.loads(json.dumps(RunConfig.from_preset("demo").to_dict()))
    change(fields)
    with pytest.raises(ValueError, match=r".+"):
        RunConfig.from_dict(fields)
