"""Training over ranks: as one process does, resumed at other numbers of ranks, and after a rank was killed."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dilated_attention_pytorch.models import LongNetLM
from dilated_attention_pytorch.testing import error_bound, max_error
from dilated_attention_pytorch.training import RunConfig, Trainer, load_model, resume_run, start_run
from dilated_attention_pytorch.training.checkpoint import list_checkpoints, newest_checkpoint
from dilated_attention_pytorch.training.state import optimizer_tensors
from dilated_attention_pytorch.training.windows import training_batch

CPU = torch.device("cpu")
FULL = pytest.mark.full


def config_of(text_folder: Path, *, dropout: float = 0.0, **training: Any) -> RunConfig:
    """A run that one process and many can do alike without dropout: no layer reads a neighbour's rows."""
    from .conftest import make_config

    whole = make_config(text_folder, dropout=0.0, **training)
    model = dataclasses.replace(whole.model, ngram_sizes=(), short_convolution=0, dropout=dropout)
    return dataclasses.replace(whole, model=model)


class Ranks:
    """The process that forks ranks."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        script = Path(__file__).with_name("ranks.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def run(self, world: int, folder: Path, config: RunConfig | None, **case: Any) -> list[int]:
        """Begin a run with ``config``, or resume the one in the folder; the ranks' exit codes."""
        team = {"context_parallel": case.pop("context", world), "fsdp": case.pop("fsdp", False), "timeout": 4.0}
        given = {"world": world, "folder": str(folder), "team": team, "resume": config is None, **case}
        given |= {} if config is None else {"config": config.to_dict()}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(given) + "\n")
        self.process.stdin.flush()
        return json.loads(self._line())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(20)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    made = Ranks(tmp_path_factory.mktemp("ranks"))
    yield made
    made.close()


class Silent:
    def record(self, record):
        pass

    def note(self, message):
        pass


def train(trainer: Trainer, until: int | None = None) -> Trainer:
    trainer.train(Silent(), should_stop=lambda: until is not None and trainer.step >= until)
    return trainer


def first_moments(tensors):
    return {name: tensor for name, tensor in tensors.items() if name.endswith("exp_avg")}


TEAMS = [
    (4, 2, True),
    pytest.param(2, 2, False, marks=FULL),
    pytest.param(3, 1, False, marks=FULL),
    pytest.param(2, 2, True, marks=FULL),
]


@pytest.mark.parametrize(("world", "context", "fsdp"), TEAMS)
def test_gradients_are_those_of_one_process_within_b(ranks, text_folder, tmp_path, world, context, fsdp):
    """A tenth of the first gradient is AdamW's first moment after one step."""
    config = config_of(text_folder, steps=1, stages=(), optimizer="adamw", gradient_clip=1e9, batch_size=3)
    codes = ranks.run(world, tmp_path / "team", config, context=context, fsdp=fsdp, result=str(tmp_path / "result"))
    assert codes == [0] * world
    found = first_moments(torch.load(tmp_path / "result")["optimizer"])
    alone = train(start_run(config, tmp_path / "alone", device=CPU))
    eager = first_moments(optimizer_tensors(alone.model, alone.optimizers))
    torch.manual_seed(config.training.seed)
    exact = LongNetLM(config.model).double()
    windows = training_batch(alone.corpus, context_length=64, batch_size=3, seed=config.training.seed, step=0).long()
    torch.nn.functional.cross_entropy(exact(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten()).backward()
    assert found.keys() == eager.keys() == {f"{name}.exp_avg" for name, _ in exact.named_parameters()}
    for name, parameter in exact.named_parameters():
        gold = 0.1 * parameter.grad
        assert float(gold.abs().max()) > 0
        bound = error_bound(gold, eager[f"{name}.exp_avg"], torch.float32)
        assert max_error(found[f"{name}.exp_avg"], gold) <= bound, name


def test_a_checkpoint_of_four_ranks_goes_on_with_two_and_with_one(ranks, text_folder, tmp_path):
    config = config_of(text_folder, steps=6, checkpoint_every=2)
    folder, result = tmp_path / "run", tmp_path / "result"
    assert ranks.run(4, folder, config, until=3, context=4, result=str(result)) == [0] * 4
    saved = torch.load(result)
    same(saved, train(start_run(config, tmp_path / "never", device=CPU), until=3))
    loaded = load_model(folder)
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, saved["model"][name], rtol=0, atol=0)
    # One process goes on from the shards, two ranks with sharded weights go on from them too.
    alone_folder = tmp_path / "alone"
    copy(folder, alone_folder)
    alone, notes = resume_run(alone_folder, {}, device=CPU)
    assert alone.step == 3
    assert any("ranks" in note or "threads" in note for note in notes) or not notes
    train(alone, until=4)
    assert ranks.run(2, folder, None, until=4, context=2, fsdp=True, result=str(result)) == [0, 0]
    saved = torch.load(result)
    assert list_checkpoints(folder / "checkpoints")[0][0] == 4
    same(saved, alone)
    tokens = torch.randint(256, (2, 64))
    gold = load_model(folder).double()(tokens).detach()
    assert max_error(alone.model.eval()(tokens).detach(), gold) <= 1e-4 * float(gold.abs().max())


@pytest.mark.full
def test_ranks_go_on_from_what_one_process_wrote(ranks, text_folder, tmp_path):
    config = config_of(text_folder, steps=4, checkpoint_every=2)
    train(start_run(config, tmp_path / "run", device=CPU), until=2)
    copy(tmp_path / "run", tmp_path / "alone")
    result = tmp_path / "result"
    assert ranks.run(2, tmp_path / "run", None, context=2, result=str(result)) == [0, 0]
    same(torch.load(result), train(resume_run(tmp_path / "alone", {}, device=CPU)[0]))


def test_sharded_weights_train_and_resume_alike(ranks, text_folder, tmp_path):
    config = config_of(text_folder, steps=5, checkpoint_every=2, eval_every=3, optimizer="adamw")
    whole, result = tmp_path / "whole", tmp_path / "result"
    assert ranks.run(2, whole, config, context=2, fsdp=True, result=str(whole / "result")) == [0, 0]
    same(torch.load(whole / "result"), train(start_run(config, tmp_path / "alone", device=CPU)))
    assert ranks.run(2, tmp_path / "run", config, context=2, fsdp=True, until=3) == [0, 0]
    assert ranks.run(2, tmp_path / "run", None, context=2, fsdp=True, result=str(result)) == [0, 0]
    result.replace(tmp_path / "run" / "result")
    assert weights_of(tmp_path / "run") == weights_of(whole)


def copy(source: Path, target: Path) -> None:
    """A run's folder once more."""
    shutil.copytree(source, target)


def same(saved, trainer: Trainer) -> None:
    """Weights and moments of ranks are those of one process but for rounding."""
    for name, tensor in trainer.model.state_dict().items():
        torch.testing.assert_close(
            saved["model"][name], tensor, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
    for name, tensor in optimizer_tensors(trainer.model, trainer.optimizers).items():
        scale = float(tensor.abs().max())
        torch.testing.assert_close(saved["optimizer"][name], tensor, rtol=1e-3, atol=1e-4 * scale)


def recover(ranks: Ranks, config: RunConfig, folder: Path, kill: tuple[int, str, int]) -> bytes:
    """Run two ranks, kill one, start them again; the weights at the end as bytes."""
    codes = ranks.run(2, folder, config, kill=kill)
    assert codes[kill[0]] == -9
    assert codes[1 - kill[0]] == 1, codes
    checkpoints = folder / "checkpoints"
    if kill[1] in ("before-write", "in-write", "after-write", "before-rename"):
        assert kill[2] not in [step for step, _ in list_checkpoints(checkpoints)], "a part of a checkpoint"
        assert [path for path in checkpoints.iterdir() if path.name.startswith(".")]
    resumed = None if list_checkpoints(checkpoints) else config
    assert ranks.run(2, folder, resumed, result=str(folder / "result")) == [0, 0]
    assert not [path for path in checkpoints.iterdir() if path.name.startswith(".")]
    return weights_of(folder)


def weights_of(folder: Path) -> bytes:
    state = torch.load(folder / "result")
    return b"".join(
        name.encode() + tensor.numpy().tobytes() for part in state.values() for name, tensor in sorted(part.items())
    )


def test_after_a_kill_inside_a_checkpoint_the_same_weights(ranks, text_folder, tmp_path):
    # With dropout the random generator of every rank counts too.
    config = config_of(text_folder, steps=5, checkpoint_every=2, eval_every=5, dropout=0.2)
    assert ranks.run(2, tmp_path / "whole", config, result=str(tmp_path / "whole" / "result")) == [0, 0]
    got = recover(ranks, config, tmp_path / "killed", (1, "in-write", 4))
    assert got == weights_of(tmp_path / "whole")


KILLS = [
    (0, "step", 0),
    (1, "exchange", 1),
    (0, "before-write", 2),
    (1, "gradients", 2),
    (0, "gradients", 3),
    (1, "step", 3),
    (1, "in-write", 4),
    (0, "after-write", 4),
    (0, "before-rename", 4),
    (0, "exchange", 5),
]


def torchrun(folder: Path, text: Path, kill: tuple[int, str, int]) -> list[tuple[str, bytes]]:
    """Train two ranks with the command, of which one may be killed; name and bytes of all that is in the checkpoint."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    command += [str(Path(__file__).with_name("torchrun_rank.py")), *map(str, kill), "train", "--output", str(folder)]
    command += ["--data", str(text), "--context-parallel", "2", "--context-length", "64", "--batch-size", "2"]
    command += [
        "--steps",
        "6",
        "--checkpoint-every",
        "2",
        "--eval-every",
        "6",
        "--sample-bytes",
        "0",
        "--device",
        "cpu",
    ]
    environment = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--peer-timeout", "5"], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("restarted by torchrun" in done.stdout) == (kill[0] >= 0), done.stdout
    checkpoint = newest_checkpoint(folder / "checkpoints")[0]
    assert checkpoint.step == 6
    return [
        (f"{kind}.{name}", tensor.numpy().tobytes())
        for kind in ("model", "optimizer")
        for name, tensor in sorted(checkpoint.tensors[kind].items())
    ]


@pytest.fixture(scope="module")
def without_faults(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, bytes]]:
    """What a run leaves that nobody disturbs."""
    return torchrun(tmp_path_factory.mktemp("whole") / "run", text_folder, (-1, "none", 0))


@pytest.mark.full
@pytest.mark.timeout(2000)
@pytest.mark.parametrize("kill", KILLS, ids=[f"{point}-{step}-rank{rank}" for rank, point, step in KILLS])
def test_torchrun_restarts_to_the_same_weights(text_folder, tmp_path, without_faults, kill):
    assert torchrun(tmp_path / "run", text_folder, kill) == without_faults
