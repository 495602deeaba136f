"""A pattern given block by block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .block_sparse import check_block_size
from .blocks import Entries, QueryBlocks, spread
from .codes import attach, register


@register
@dataclass(frozen=True, eq=False)
class BlockList:
    """Explicit lists: query block i of head h sees the key blocks ``columns[row_pointer[h, i]:row_pointer[h, i + 1]]``.

    Blocks count from the start of a document, and every document starts the lists anew. Blocks that a document does
    not have, and with ``is_causal`` those in the future, are left out; a document with more query blocks than the
    lists have rows raises.

    Args:
        row_pointer: (H, rows + 1) integers, or (1, rows + 1) for lists that all heads share.
        columns: (entries,) integers, in any order.
        block_size: tokens of a block: 16, 32, 64 or 128.

    `from_mask` and `from_coo` make one of a dense mask of blocks and of coordinates.

    >>> BlockList.from_mask(torch.ones(4, 4).tril().bool(), block_size=64).columns
    tensor([0, 0, 1, 0, 1, 2, 0, 1, 2, 3])
    """

    row_pointer: Tensor | None
    columns: Tensor | None
    block_size: int = 128
    code: str = field(init=False, repr=False)
    num_tensors = 2

    def __post_init__(self) -> None:
        check_block_size(self.block_size)
        for name, tensor, dims in (("row_pointer", self.row_pointer, 2), ("columns", self.columns, 1)):
            if tensor is not None and (
                not isinstance(tensor, Tensor) or tensor.dim() != dims or tensor.dtype not in (torch.int32, torch.int64)
            ):
                raise ValueError(f"{name} is {tensor!r}; give a tensor of integers with {dims} dimensions")
        attach(self)

    @classmethod
    def from_mask(cls, mask: Tensor, *, block_size: int = 128) -> BlockList:
        """Lists of the True entries of a mask of blocks, (rows, columns) or (H, rows, columns)."""
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() not in (2, 3):
            raise ValueError("mask is no bool tensor of shape (rows, columns) or (heads, rows, columns); give one")
        by_head = mask if mask.dim() == 3 else mask[None]
        head, row, column = by_head.nonzero(as_tuple=True)
        return cls._made(head, row, column, by_head.shape[0], by_head.shape[1], block_size)

    @classmethod
    def from_coo(
        cls, row: Tensor, column: Tensor, *, head: Tensor | None = None, size: Sequence[int], block_size: int = 128
    ) -> BlockList:
        """Lists of blocks (row, column), or (head, row, column), in any order.

        Args:
            row, column, head: (entries,) int64, on one device; without ``head`` all heads share the lists.
            size: (query blocks,) or, with ``head``, (heads, query blocks).
            block_size: tokens of a block.
        """
        if len(size) != (1 if head is None else 2):
            raise ValueError(f"size is {tuple(size)}; give (query blocks,), with head= (heads, query blocks)")
        heads, rows = (1, *size) if head is None else size
        head = torch.zeros_like(row) if head is None else head
        for name, tensor, most in (("head", head, heads), ("row", row, rows)):
            if tensor.numel() and not 0 <= int(tensor.min()) <= int(tensor.max()) < most:
                reach = f"{int(tensor.min())} to {int(tensor.max())}"
                raise ValueError(f"{name} has values from {reach}, size is {tuple(size)}; give 0 to {most - 1}")
        return cls._made(head, row, column, heads, rows, block_size)

    @classmethod
    def _made(cls, head: Tensor, row: Tensor, column: Tensor, heads: int, rows: int, block_size: int) -> BlockList:
        flat, order = torch.sort(head * rows + row, stable=True)
        edges = torch.searchsorted(flat, torch.arange(heads * rows + 1, device=flat.device))
        index = torch.arange(heads, device=flat.device)[:, None] * rows + torch.arange(rows + 1, device=flat.device)
        return cls(edges[index], column[order], block_size)

    @property
    def per_head(self) -> bool:
        """Whether heads have lists of their own."""
        return self.row_pointer is not None and self.row_pointer.shape[0] > 1

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What `bound` takes beside the pattern of `code`."""
        assert self.row_pointer is not None
        assert self.columns is not None
        return self.row_pointer, self.columns

    def bound(self, tensors: Sequence[Tensor]) -> BlockList:
        """The pattern with these tensors, for one that `codes.decode` has made."""
        return BlockList(tensors[0], tensors[1], self.block_size)

    def entries(self, query: QueryBlocks) -> Entries:
        """See `blocks.BlockPattern`."""
        device = query.block.device
        pointer, columns = (tensor.to(device).long() for tensor in self.tensors)
        heads, rows = pointer.shape[0], pointer.shape[1] - 1
        if heads not in (1, query.heads):
            raise ValueError(f"the block list has {heads} heads, the query {query.heads}; give as many, or 1")
        if len(query.block) and int(query.block.max()) >= rows:
            raise ValueError(
                f"the block list has {rows} query blocks of {self.block_size}, and a document has "
                f"{int(query.block.max()) + 1}; give a list for every block"
            )
        first = pointer[:, query.block].reshape(-1)
        row, place = spread(first, pointer[:, query.block + 1].reshape(-1) - first)
        return Entries(row, columns[place])
