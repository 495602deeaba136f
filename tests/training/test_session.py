"""A run that is stopped and resumed equals one that is not, bit for bit; what does not fit is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dilated_attention_pytorch.training import (
    CheckpointError,
    RunConfig,
    Trainer,
    load_model,
    parse_device,
    resume_run,
    start_run,
)
from dilated_attention_pytorch.training.checkpoint import list_checkpoints
from dilated_attention_pytorch.training.metrics import read_metrics

CPU = torch.device("cpu")


class Quiet:
    """A reporter that keeps what it hears."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def record(self, record: dict[str, Any]) -> None:
        self.records.append(record)

    def note(self, message: str) -> None:
        raise AssertionError(message)


def run(trainer: Trainer, *, until: int | None = None) -> None:
    trainer.train(Quiet(), should_stop=lambda: trainer.step == until)


def digest(trainer: Trainer) -> str:
    state = hashlib.sha256()
    for tensor in trainer.model.state_dict().values():
        state.update(tensor.numpy().tobytes())
    for parameter in trainer.model.parameters():
        for optimizer in trainer.optimizers:
            for tensor in optimizer.state.get(parameter, {}).values():
                state.update(tensor.numpy().tobytes())
    state.update(torch.get_rng_state().numpy().tobytes())
    return state.hexdigest()


def values(folder: Path) -> list[dict[str, Any]]:
    """The metrics without what depends on the clock."""
    records = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in r.items() if k not in ("seconds", "tokens_per_second")} for r in records]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> tuple[str, list[dict[str, Any]]]:
    """An uninterrupted run: the digest of its end and its metrics."""
    from .conftest import make_config

    folder = tmp_path_factory.mktemp("whole")
    trainer = start_run(make_config(text_folder), folder, device=CPU)
    run(trainer)
    return digest(trainer), values(folder)


@pytest.mark.parametrize("stop", [1, 4, 6])
def test_stopped_after_any_step_it_resumes_to_the_same_bits(tmp_path: Path, tiny: RunConfig, whole, stop: int):
    run(start_run(tiny, tmp_path, device=CPU), until=stop)
    torch.manual_seed(99)  # a new process would start with another state
    trainer, notes = resume_run(tmp_path, {}, device=CPU)
    assert (trainer.step, notes) == (stop, [])
    run(trainer)
    assert trainer.done
    assert (digest(trainer), values(tmp_path)) == whole


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("kill", [1, 3, 4, 6, 8])
def test_killed_in_any_step_it_resumes_to_the_same_bits(
    tmp_path: Path, tiny: RunConfig, whole, kill: int, monkeypatch: pytest.MonkeyPatch
):
    trainer = start_run(tiny, tmp_path, device=CPU)
    real = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW) -> None:
        if trainer.step + 1 == kill:
            raise Killed
        real(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(Killed):
        run(trainer)
    monkeypatch.undo()
    torch.manual_seed(99)
    trainer, _ = resume_run(tmp_path, {}, device=CPU)
    assert trainer.step == (kill - 1) // 3 * 3  # the last checkpoint
    run(trainer)
    assert (digest(trainer), values(tmp_path)) == whole


def test_metrics_have_every_step_once_and_the_loss_falls(whole):
    records = whole[1]
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(1, 9))
    held_out = [r for r in records if r["kind"] == "held-out"]
    assert [r["step"] for r in held_out] == [0, 4, 8]
    assert held_out[-1]["bits_per_byte"] < held_out[0]["bits_per_byte"] - 1
    assert [r["tokens"] for r in records if r["kind"] == "train"] == [128 * n for n in range(1, 9)]


def test_a_finished_run_resumes_with_nothing_left(tmp_path: Path, tiny: RunConfig, whole):
    run(start_run(tiny, tmp_path, device=CPU))
    trainer, _ = resume_run(tmp_path, {}, device=CPU)
    assert trainer.done
    run(trainer)
    assert (digest(trainer), values(tmp_path)) == whole


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(tmp_path: Path, tiny: RunConfig, whole):
    run(start_run(tiny, tmp_path, device=CPU))
    (step, folder), (earlier, _) = list_checkpoints(tmp_path / "checkpoints")
    assert (step, earlier) == (8, 6)
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match="is not what was written; the one of step 6 is loaded in its place"):
        load_model(tmp_path)
    trainer, notes = resume_run(tmp_path, {}, device=CPU)
    assert trainer.step == 6
    assert len(notes) == 1
    assert "model.safetensors is not what was written; continuing from step 6" in notes[0]
    run(trainer)
    assert (digest(trainer), values(tmp_path)) == whole


def test_the_packed_text_outlives_its_sources(tmp_path: Path, text_folder: Path, whole):
    from .conftest import make_config

    source = shutil.copytree(text_folder, tmp_path / "source")
    run(start_run(make_config(source), tmp_path / "run", device=CPU), until=2)
    (source / "3.txt").write_text("changed")
    trainer, notes = resume_run(tmp_path / "run", {}, device=CPU)
    assert notes == []
    run(trainer)
    assert (digest(trainer), values(tmp_path / "run")) == whole


def test_lost_packed_text_is_packed_again_if_it_is_the_same(tmp_path: Path, text_folder: Path):
    from .conftest import make_config

    source = shutil.copytree(text_folder, tmp_path / "source")
    run(start_run(make_config(source), tmp_path / "run", device=CPU), until=2)
    (tmp_path / "run" / "data" / "corpus.bin").write_bytes(b"damage")
    trainer, notes = resume_run(tmp_path / "run", {}, device=CPU)
    assert trainer.step == 2
    assert "is damaged; packing the text again" in notes[0]

    shutil.rmtree(tmp_path / "run" / "data")
    (source / "3.txt").write_text("changed")
    with pytest.raises(CheckpointError, match="the text changed since the checkpoint was written"):
        resume_run(tmp_path / "run", {}, device=CPU)

    shutil.rmtree(source)
    shutil.rmtree(tmp_path / "run" / "data")
    with pytest.raises(ValueError, match="it does not exist"):
        resume_run(tmp_path / "run", {}, device=CPU)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> Path:
    """A run stopped after two steps, not to be changed."""
    from .conftest import make_config

    folder = tmp_path_factory.mktemp("begun")
    run(start_run(make_config(text_folder), folder, device=CPU), until=2)
    return folder


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 9}, "--steps is 9, but the run in"),
        ({"batch_size": 3}, "--batch-size is 3"),
        ({"learning_rate": 1e-3}, "--learning-rate is 0.001"),
        ({"context_length": 32}, "--context-length is 32"),
        ({"preset": "base"}, "--preset is 'base'"),
        ({"seed": 1}, "--seed is 1"),
        ({"dtype": "bfloat16"}, "--dtype is 'bfloat16'"),
        ({"data": ("/elsewhere",)}, "--data is '/elsewhere'"),
    ],
)
def test_another_option_than_the_runs_is_refused(begun: Path, given: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=r"leave .* out, or start a new run in another folder") as caught:
        resume_run(begun, given, device=CPU)
    assert str(caught.value).startswith(message)


def test_options_that_do_not_change_what_is_learned_may_differ(begun: Path):
    given = {"checkpoint_every": 100, "eval_every": 7, "sample_bytes": 0, "steps": 8}
    trainer, _ = resume_run(begun, given, device=CPU)
    assert trainer.config.training.checkpoint_every == 100
    assert trainer.config.training.eval_every == 7


def test_a_folder_with_a_run_is_not_overwritten(begun: Path, tiny: RunConfig):
    with pytest.raises(ValueError, match="already holds a run at step 2; continue it with --resume or name another"):
        start_run(tiny, begun, device=CPU)


def test_a_file_in_the_way_is_named(tmp_path: Path, tiny: RunConfig):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot make the folder .*file/run"):
        start_run(tiny, tmp_path / "file" / "run", device=CPU)


def _edit(folder: Path, name: str, change) -> None:
    """Change a JSON file of the newest checkpoint and let the manifest vouch for it."""
    checkpoint = list_checkpoints(folder / "checkpoints")[0][1]
    fields = json.loads((checkpoint / name).read_text())
    change(fields)
    content = json.dumps(fields).encode()
    (checkpoint / name).write_bytes(content)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "run.json",
            lambda f: f["model"].update(num_layers=3),
            "does not fit its own configuration: blocks.2",
        ),
        ("run.json", lambda f: f["model"].update(mlp_dim=99), "the model has torch.float32 (99, 32)"),
        ("run.json", lambda f: f.pop("training"), "is not one of this command"),
        ("run.json", lambda f: f["training"].update(other=1), "is not one of this command"),
        ("progress.json", lambda f: f.pop("corpus"), "is not one of this command"),
        ("progress.json", lambda f: f.update(environment=None), "is not one of this command"),
        ("progress.json", lambda f: f.update(corpus="another"), "the text changed since"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(begun: Path, tmp_path: Path, name: str, change, message: str):
    folder = shutil.copytree(begun, tmp_path / "run")
    _edit(folder, name, change)
    with pytest.raises(CheckpointError) as caught:
        resume_run(folder, {}, device=CPU)
    assert message in str(caught.value)


def test_another_number_of_threads_is_noted(begun: Path, tmp_path: Path):
    folder = shutil.copytree(begun, tmp_path / "run")
    _edit(folder, "progress.json", lambda fields: fields["environment"].update(threads=333))
    notes = resume_run(folder, {}, device=CPU)[1]
    assert notes == [
        f"threads was 333 and is {torch.get_num_threads()}: results may differ in the last bits",
    ]


def test_a_loss_that_is_no_number_stops_before_the_weights_take_it(tmp_path: Path, tiny: RunConfig):
    training = dataclasses.replace(tiny.training, learning_rate=1e30)
    trainer = start_run(dataclasses.replace(tiny, training=training), tmp_path, device=CPU)
    with pytest.raises(FloatingPointError, match=r"start a new run with a learning rate below 1e\+30"):
        run(trainer)
    assert trainer.step >= 1
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_a_trained_model_loads_from_its_folder_and_from_a_checkpoint(begun: Path):
    trainer, _ = resume_run(begun, {}, device=CPU)
    tokens = torch.arange(20)[None]
    expected = trainer.model.eval()(tokens)
    for path in (begun, str(list_checkpoints(begun / "checkpoints")[0][1])):
        model = load_model(path)
        assert not model.training
        assert model.config == trainer.config.model
        assert model(tokens).equal(expected)


def test_bfloat16_trains_in_autocast_with_float32_weights(tmp_path: Path, tiny: RunConfig):
    training = dataclasses.replace(tiny.training, dtype="bfloat16")
    trainer = start_run(dataclasses.replace(tiny, training=training), tmp_path, device=CPU)
    run(trainer)
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    held_out = [r["bits_per_byte"] for r in values(tmp_path) if r["kind"] == "held-out"]
    assert held_out[-1] < held_out[0] - 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_on_cuda_resumes_there_and_loads_on_the_cpu(tmp_path: Path, tiny: RunConfig, dtype: str):
    cuda = parse_device("cuda")
    training = dataclasses.replace(tiny.training, dtype=dtype)
    run(start_run(dataclasses.replace(tiny, training=training), tmp_path, device=cuda), until=5)
    trainer, notes = resume_run(tmp_path, {}, device=cuda)
    assert notes == []
    run(trainer)
    records = values(tmp_path)
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(1, 9))
    held_out = [r["bits_per_byte"] for r in records if r["kind"] == "held-out"]
    assert held_out[-1] < held_out[0] - 1
    tokens = torch.arange(20)[None]
    expected = trainer.model.eval()(tokens.to(cuda)).cpu()
    torch.testing.assert_close(load_model(tmp_path)(tokens), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["nonsense", "meta", "cuda:99", ""])
def test_a_device_that_is_not_there_is_refused(name: str):
    with pytest.raises(ValueError, match="device"):
        parse_device(name)
