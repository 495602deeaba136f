"""Windows: training ones depend on seed and step alone, held-out ones lie inside documents."""

from __future__ import annotations

from pathlib import Path

import torch

from dilated_attention_pytorch.training.corpus import Corpus, Document
from dilated_attention_pytorch.training.windows import held_out_windows, training_batch


def make_corpus(train: list[int], held_out: list[int]) -> Corpus:
    """Documents of the given lengths; the bytes count upward over the whole corpus, modulo 251."""
    documents, position = [], 0
    for n, length in enumerate(train + held_out):
        documents.append(Document(f"{n}", position + 1, length, n >= len(train)))
        position += length + 1
    tokens = (torch.arange(position) % 251).to(torch.uint8)
    return Corpus(tokens, tuple(documents), sum(train) + len(train), "")


def starts(windows: torch.Tensor, corpus: Corpus) -> list[int]:
    found = []
    for window in windows:
        places = corpus.tokens.unfold(0, len(window), 1).eq(window).all(dim=1).nonzero().flatten().tolist()
        assert len(places) == 1
        found += places
    return found


def test_a_batch_depends_on_seed_and_step_alone():
    corpus = make_corpus([200], [40])

    def batch(seed: int, step: int) -> torch.Tensor:
        return training_batch(corpus, context_length=16, batch_size=3, seed=seed, step=step)

    first = batch(5, 7)
    torch.manual_seed(1)
    torch.rand(3)
    assert batch(5, 7).equal(first)
    assert not batch(5, 8).equal(first)
    assert not batch(6, 7).equal(first)
    assert first.shape == (3, 17)
    assert first.dtype == torch.uint8


def test_training_windows_reach_all_of_the_training_text_and_nothing_else():
    corpus = make_corpus([25, 10], [60])
    found = set()
    for step in range(300):
        windows = training_batch(corpus, context_length=8, batch_size=4, seed=0, step=step)
        found.update(starts(windows, corpus))
    assert found == set(range(corpus.boundary - 8))  # the last one ends at the boundary


def test_held_out_windows_lie_inside_documents_from_their_beginning_on():
    corpus = make_corpus([50], [5, 33, 7, 16, 15])
    windows = held_out_windows(corpus, context_length=16, count=10)
    # Separators at 51 (5 bytes follow), 57 (33), 91 (7), 99 (16) and 116 (15); a window takes 17 bytes.
    assert starts(windows, corpus) == [57, 73, 99]
    assert starts(held_out_windows(corpus, context_length=16, count=1), corpus) == [73]


def test_held_out_windows_are_spread_evenly():
    corpus = make_corpus([30], [200])
    windows = held_out_windows(corpus, context_length=10, count=4)
    assert starts(windows, corpus) == [31 + 10 * n for n in (2, 7, 12, 17)]


def test_held_out_windows_cross_documents_where_all_are_short():
    corpus = make_corpus([50], [9, 9, 9])
    assert starts(held_out_windows(corpus, context_length=12, count=8), corpus) == [51, 63]


def test_batches_come_from_a_mapped_file_too(tmp_path: Path):
    corpus = make_corpus([200], [40])
    (tmp_path / "bytes").write_bytes(bytes(corpus.tokens.tolist()))
    mapped = torch.from_file(str(tmp_path / "bytes"), size=len(corpus.tokens), dtype=torch.uint8)
    same = Corpus(mapped, corpus.documents, corpus.boundary, "")
    for step in range(5):
        a, b = (training_batch(c, context_length=16, batch_size=2, seed=0, step=step) for c in (corpus, same))
        assert a.equal(b)
