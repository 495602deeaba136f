"""A pool of gloo processes that live as long as the test session: spawning them anew would cost seconds a test."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

import pytest

WORLD = 4


class Pool:
    """Ranks 0 to 3, each behind a connection."""

    def __init__(self, folder: Path) -> None:
        address = str(folder / "socket")
        with Listener(address, family="AF_UNIX", authkey=b"pool") as listener:
            script = Path(__file__).with_name("worker.py")
            command = [sys.executable, str(script), address]
            self.processes = [
                subprocess.Popen([*command, str(rank), str(WORLD), str(folder / "store")]) for rank in range(WORLD)
            ]
            self.connections: dict[int, Connection] = {}
            for _ in range(WORLD):
                connection = listener.accept()
                self.connections[connection.recv()] = connection

    def run(self, task: str, world: int, *arguments: Any) -> list[tuple[str, Any]]:
        """What each of the first ``world`` ranks gives back: ("done", result) or ("raised", traceback).

        A list among the arguments has one entry a rank.
        """
        for rank in range(world):
            given = [argument[rank] if isinstance(argument, list) else argument for argument in arguments]
            self.connections[rank].send((task, world, *given))
        answers = []
        for rank in range(world):
            assert self.connections[rank].poll(100), f"rank {rank} does not answer"
            answers.append(self.connections[rank].recv())
        return answers

    def close(self) -> None:
        for connection in self.connections.values():
            connection.close()
        for process in self.processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    made = Pool(tmp_path_factory.mktemp("pool"))
    yield made
    made.close()
