"""Who attends to whom, pair by pair, straight from the definitions: for tests and pictures, never for computing.

Nothing here is shared with the lists that backends compute from, so that the two can be compared.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .block_list import BlockList
from .block_sparse import DilatedBlocks, GlobalLocal, Hierarchical, LocalWindow, RandomBlocks
from .dilated import DilatedPattern
from .union import Union

_WORD = 0xFFFFFFFF


def _mixed(word: int) -> int:
    word = (word ^ word >> 16) * 0x85EBCA6B & _WORD
    word = (word ^ word >> 13) * 0xC2B2AE35 & _WORD
    return word ^ word >> 16


def _random_block(seed: int, head: int, block: int, draw: int, choices: int) -> int:
    word = _mixed(_mixed(seed & _WORD) ^ (seed >> 32 & _WORD))
    return _mixed(_mixed(_mixed(word ^ head) ^ block) ^ draw) * choices >> 32


def dilated_counts(pattern: DilatedPattern, head: int, heads: int, query: Tensor, key: Tensor) -> Tensor:
    """How many branches let each position of ``query`` attend to each of ``key``."""
    total = torch.zeros(len(query), len(key), dtype=torch.int64)
    for branch in pattern.branches:
        length, rate = branch.segment_length, branch.dilation_rate
        offset = pattern.head_offset(head, rate, heads)
        same = query[:, None] // length == key // length
        total += same & (query % length % rate == offset)[:, None] & (key % length % rate == offset)
    return total


def block_mask(pattern: Any, head: int, heads: int, blocks: int, *, is_causal: bool = False) -> Tensor:
    """(blocks, blocks) bool: which key block each query block of a document of ``blocks`` blocks sees."""
    i, j = torch.arange(blocks)[:, None], torch.arange(blocks)[None, :]
    size = pattern.block_size
    match pattern:
        case LocalWindow():
            mask = (i - j).abs() <= pattern.window // size
        case GlobalLocal():
            held = [p // size for p in (*range(pattern.num_global_tokens), *pattern.global_indices)]
            is_global = torch.tensor([block in held for block in range(blocks)], dtype=torch.bool)
            mask = ((i - j).abs() <= pattern.window // size) | is_global[:, None] | is_global
        case DilatedBlocks():
            lengths = tuple(length // size for length in pattern.segment_lengths)
            lone = DilatedPattern(lengths, pattern.dilation_rates, pattern.head_offsets)
            mask = dilated_counts(lone, head, heads, torch.arange(blocks), torch.arange(blocks)) > 0
        case Hierarchical():
            mask = torch.zeros(blocks, blocks, dtype=torch.bool)
            for window, stride in pattern.levels:
                mask |= ((i - j).abs() * size <= window) & ((i - j) * size % stride == 0)
        case RandomBlocks():
            mask = torch.zeros(blocks, blocks, dtype=torch.bool)
            for row in range(blocks):
                for draw in range(pattern.num_blocks):
                    choices = row + 1 if is_causal else blocks
                    mask[row, _random_block(pattern.seed, head, row, draw, choices)] = True
        case BlockList():
            mask = torch.zeros(blocks, blocks, dtype=torch.bool)
            assert pattern.row_pointer is not None
            assert pattern.columns is not None
            edges = pattern.row_pointer[head if pattern.per_head else 0].tolist()
            for row in range(blocks):
                for column in pattern.columns[edges[row] : edges[row + 1]].tolist():
                    if column < blocks:
                        mask[row, column] = True
        case _:
            raise ValueError(f"{type(pattern).__name__} has no formula that knows nothing of the tensors")
    return mask & (j <= i) if is_causal else mask


def pair_counts(
    pattern: Any, heads: int, query: Tensor, key: Tensor, length: int, *, is_causal: bool = False
) -> Tensor:
    """How often each head lets position q of a document attend to position k: (heads, queries, keys) int64.

    Args:
        pattern: any pattern but those that depend on the content of the tensors.
        heads: number of query heads.
        query, key: (queries,) and (keys,) int64 positions in one document, 0 or more.
        length: positions of the document, to its last key.
        is_causal: whether a query attends only to keys at or before it.
    """
    total = torch.zeros(heads, len(query), len(key), dtype=torch.int64)
    members = pattern.patterns if isinstance(pattern, Union) else (pattern,)
    for head in range(heads):
        for member in members:
            if isinstance(member, DilatedPattern):
                total[head] += dilated_counts(member, head, heads, query, key)
            else:
                size = member.block_size
                mask = block_mask(member, head, heads, -(-length // size), is_causal=is_causal)
                total[head] += mask[query // size][:, key // size]
    if not (isinstance(pattern, Union) and pattern.multiplicity):
        total = total.clamp(max=1)
    return total * (key <= query[:, None]) if is_causal else total
