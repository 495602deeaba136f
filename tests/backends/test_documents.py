"""Where documents lie: from key_start, cu_seqlens and masks to integers."""

from __future__ import annotations

import torch

from dilated_attention_pytorch.backends.documents import read_documents
from dilated_attention_pytorch.types import Document, Shape

SHAPE = Shape(3, 10, 10, 2, 2, 8, 8)
NONE = {"key_start": 0, "key_starts": None, "cu_seqlens": None, "suffix_mask": None}


def read(shape=SHAPE, **given):
    return read_documents(shape, **{**NONE, **given})


def test_alike_rows_share_one_document():
    assert read() == (Document(batch=0, batches=3, row=0, rows=10, position=0, length=10),)
    assert read(key_starts=torch.tensor([5, 5, 5])) == (Document(0, 3, 0, 10, 5, 15),)


def test_left_padding_is_in_no_document():
    assert read(key_start=-4) == (Document(0, 3, 4, 6, 0, 6),)
    assert read(key_start=-10) == ()
    assert read(key_starts=torch.tensor([0, -12, -9])) == (Document(0, 1, 0, 10, 0, 10), Document(2, 1, 9, 1, 0, 1))


def test_packed_documents_start_anew_and_empty_ones_vanish():
    found = read(SHAPE.__class__(1, 10, 10, 2, 2, 8, 8), cu_seqlens=torch.tensor([0, 3, 3, 10], dtype=torch.int32))
    assert found == (Document(0, 1, 0, 3, 0, 3), Document(0, 1, 3, 7, 0, 7))


def test_a_suffix_mask_shortens_the_document_but_not_its_rows():
    mask = torch.arange(10) >= torch.tensor([[10], [4], [0]])
    assert read(suffix_mask=mask) == tuple(Document(b, 1, 0, 10, 0, n) for b, n in enumerate((10, 4, 0)))
