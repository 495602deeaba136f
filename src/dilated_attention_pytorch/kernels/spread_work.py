"""Tiles of a persistent kernel whose weights only the device knows, dealt to programs without waiting for it."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .schedule import Schedule


@lru_cache(maxsize=64)
def _turns(tiles: int, programs: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(places of the tiles of program 0, then 1, ..., int64; where those of a program start, int32): back and forth."""
    rounds = -(-tiles // programs)
    turn, program = np.arange(rounds)[None, :], np.arange(programs)[:, None]
    place = turn * programs + np.where(turn % 2 == 0, program, programs - 1 - program)
    starts = np.concatenate(([0], np.cumsum((place < tiles).sum(1))))
    flat = place[place < tiles]
    return torch.from_numpy(flat).to(device), torch.from_numpy(starts.astype(np.int32)).to(device)


class SpreadWork:
    """What `kernels.schedule.Work` is, with numbers that only the device knows.

    Args:
        blocks: (heads, tiles) blocks that tiles meet.
        by_weight: whether the tiles of a head go out by their weight, the heaviest first; else as they lie.
        total, heaviest: blocks of all tiles, and of one that is known to be heavy; 0 where none is.
    """

    def __init__(self, blocks: Tensor, *, by_weight: bool, total: int = 0, heaviest: int = 0) -> None:
        self.blocks, self._by_weight = blocks, by_weight
        self.total, self.heaviest = total, heaviest

    def dealt(self, head: int, count: int, programs: int, device: torch.device) -> Schedule | None:
        """The tiles of ``count`` heads from ``head`` on, numbered within these."""
        blocks = self.blocks[head : head + count]
        if not blocks.numel():
            return None
        turns, starts = _turns(blocks.numel(), programs, device)
        if not self._by_weight:
            return Schedule(turns.int(), starts)
        order = blocks.argsort(dim=1, descending=True, stable=True)
        order += torch.arange(len(blocks), device=device)[:, None] * blocks.shape[1]
        return Schedule(order.reshape(-1)[turns].int(), starts)
