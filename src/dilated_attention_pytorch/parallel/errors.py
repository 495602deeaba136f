"""What goes wrong between ranks, as exceptions that name the rank."""

from __future__ import annotations

import torch

_WORDS = ("out of memory", "not enough memory", "can't allocate memory")


class PeerFailed(RuntimeError):
    """A rank died, stopped, raised, or did not take part; every other rank of the job raises this and names it.

    From then on every call over these ranks raises it again: what was under way is lost, and nothing takes its place.
    Leave the process and start the ranks again, from the last complete checkpoint (`torchrun --max-restarts`).

    Attributes:
        rank: the rank that failed, counted in the whole job as torchrun does.
        step: where this rank was: the number that `ContextParallel.step` declared, else that of its last exchange.
        reason: what is known of it, in words.
    """

    def __init__(self, *, rank: int, step: int, reason: str) -> None:
        super().__init__(f"rank {rank} failed: {reason}; noticed in step {step}")
        self.rank, self.step, self.reason = rank, step, reason

    def __reduce__(self) -> tuple[object, ...]:
        return _peer_failed, (self.rank, self.step, self.reason)


def _peer_failed(rank: int, step: int, reason: str) -> PeerFailed:
    return PeerFailed(rank=rank, step=step, reason=reason)


class ConfigurationMismatch(ValueError):
    """Ranks were asked for different things; all of them raise this, before anything is sent.

    Attributes:
        rank: the rank that differs from the first of the group, as a rank of the group.
        name: what differs: "shape", "dtype", "options", ...
    """

    def __init__(self, message: str, *, rank: int, name: str) -> None:
        super().__init__(message)
        self.rank, self.name = rank, name


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the CPU or a GPU; torch has no one type for both."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)
