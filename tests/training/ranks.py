"""Ranks of a training in real processes: one process with torch loaded forks those of each case, for speed.

Reads a case a line from stdin; answers with the exit code of every rank once all have ended.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import safetensors.torch  # noqa: F401  (loaded here once, not in every rank)
import torch
import torch._dynamo
import torch.distributed.fsdp
from torch.distributed.checkpoint import hf_storage, state_dict_loader, state_dict_saver  # noqa: F401

from dilated_attention_pytorch.training import RunConfig, Team, TeamConfig, distributed, loop, resume_run, start_run
from dilated_attention_pytorch.training.state import MODEL, OPTIMIZER, optimizer_tensors

POINTS = ("step", "exchange", "gradients", "before-write", "in-write", "after-write", "before-rename")


def kill() -> None:
    """As if the machine took it."""
    os.kill(os.getpid(), signal.SIGKILL)


def arm(point: str, at: int) -> None:
    """Let this process be killed at a point of step ``at`` (from 0), or of the checkpoint behind that many steps."""
    step, armed = [-1], [False]
    train_step, add_up = loop.Trainer._train_step, Team.add_up

    def stepping(trainer: Any) -> Any:
        step[0] = trainer.step
        if point == "step" and step[0] == at:
            kill()
        armed[0] = step[0] == at
        return train_step(trainer)

    def adding(team: Any, tensors: Any) -> None:
        if point == "gradients" and step[0] == at:
            kill()
        add_up(team, tensors)

    loop.Trainer._train_step, Team.add_up = stepping, adding
    from dilated_attention_pytorch.parallel import comm

    exchange = comm.Operation.wait

    def waiting(operation: Any) -> None:
        if point == "exchange" and armed[0]:
            kill()
        exchange(operation)

    comm.Operation.wait = waiting
    from dilated_attention_pytorch.training import distributed_checkpoint

    save, finish = distributed_checkpoint.save, distributed_checkpoint.finish_folder

    def saving(state: Any, *arguments: Any, **options: Any) -> Any:
        now = int(state.get("optimizer.embedding.weight.step", 0))
        if point == "before-write" and now == at:
            kill()
        if point == "in-write" and now == at:
            write = hf_storage.HuggingFaceStorageWriter.write_data

            def halfway(writer: Any, *rest: Any) -> Any:
                write(writer, *rest).wait()
                kill()

            hf_storage.HuggingFaceStorageWriter.write_data = halfway
        result = save(state, *arguments, **options)
        if point == "after-write" and now == at:
            kill()
        return result

    def finishing(beside: Any, target: Any, number: int, *rest: Any, **options: Any) -> None:
        if point == "before-rename" and number == at:
            kill()
        finish(beside, target, number, *rest, **options)

    distributed_checkpoint.save, distributed_checkpoint.finish_folder = saving, finishing


class Silent:
    """A reporter for nobody."""

    def record(self, record: dict[str, Any]) -> None:
        """Nothing."""

    def note(self, message: str) -> None:
        """Nothing."""


def run_rank(case: dict[str, Any]) -> None:
    """One rank of a run, to its end or to the step where the case stops it."""
    torch.set_num_threads(1)
    if case.get("kill") and case["kill"][0] == int(os.environ["RANK"]):
        arm(case["kill"][1], case["kill"][2])
    distributed.GRACE = 0.5
    team = Team(TeamConfig(**case["team"]), torch.device("cpu"))
    folder = Path(case["folder"])
    if case["resume"]:
        trainer, _ = resume_run(folder, {}, device=team.device, team=team)
    else:
        trainer = start_run(RunConfig.from_dict(case["config"]), folder, device=team.device, team=team)
    until = case.get("until")
    trainer.train(Silent(), should_stop=lambda: until is not None and trainer.step >= until)
    weights = trainer.full_weights()
    moments = {n: distributed.full(t) for n, t in optimizer_tensors(trainer.model, trainer.optimizers).items()}
    team.close()
    if team.is_main and case.get("result"):
        torch.save({MODEL: weights, OPTIMIZER: moments}, case["result"])


def run_case(case: dict[str, Any]) -> list[int]:
    """Exit codes of the ranks; those that do not end are killed and count as -9."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(case["world"]):
        pid = os.fork()
        if pid == 0:
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(case["world"]),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
            run_rank(case)
            sys.exit(0)
        children.append(pid)
    codes: list[int | None] = [None] * len(children)
    deadline = time.monotonic() + case.get("patience", 100)
    while None in codes and time.monotonic() < deadline:
        for rank, pid in enumerate(children):
            if codes[rank] is None:
                found, status = os.waitpid(pid, os.WNOHANG)
                codes[rank] = os.waitstatus_to_exitcode(status) if found else None
        time.sleep(0.01)
    for rank, pid in enumerate(children):
        if codes[rank] is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return [-1000 if code is None else code for code in codes]


def main() -> None:
    """Serve."""
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(run_case(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
