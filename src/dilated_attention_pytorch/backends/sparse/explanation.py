"""What a block-sparse call will do, before it is done: the backend and why, lists, pairs, work, coverage."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ...patterns.block_counts import keys_of_rows
from .dispatch import choose_sparse
from .problem import SparseProblem


@dataclass(frozen=True, kw_only=True)
class SparseExplanation:
    """What `explain_sparse` found. Bytes are bytes, operations are floating-point operations; ``str()`` is readable.

    Keys that a key_padding_mask hides are counted as any others.
    """

    backend: str
    backend_backward: str
    """The backend of the backward pass, which "auto" chooses by itself."""
    skipped: tuple[tuple[str, str], ...]
    """(backend, reason) for each backend that "auto" passed over."""
    block_size: int
    shared_lists: bool
    """Whether one list of each query block serves all heads."""
    blocks: int
    """Listed (query block, key block) pairs over all heads and batch rows."""
    dense_blocks: int
    """Those that exist, within documents; causal: without those in the future."""
    pairs: int
    """Attended (query, key) pairs over all heads and batch rows."""
    dense_pairs: int
    """Pairs of dense attention on the same shape."""
    flops_forward: int
    """Of the attended pairs; choosing blocks by content is left out."""
    flops_backward: int
    bytes_lists: int
    """The lists as they are kept, tile tables included."""
    bytes_lists_backward: int
    """The same with the lists by key block, where the backend of the backward pass needs them."""
    rows: int
    """(batch, query row, head) triples."""
    rows_without_keys: int
    """Those that attend to nothing: their out is 0 and their lse -inf."""

    def to_dict(self) -> dict[str, Any]:
        """Everything as numbers, strings and lists, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"backend  {self.backend}", *(f"         not {name}: {reason}" for name, reason in self.skipped)]
        if self.backend_backward != self.backend:
            lines.append(f"backward {self.backend_backward}")
        owner = "one list for all heads" if self.shared_lists else "lists for every head"
        share = self.blocks / self.dense_blocks if self.dense_blocks else 0.0
        lines += [
            f"blocks   {self.blocks:,} of {self.block_size} x {self.block_size}, {share:.2%} of all; {owner}",
            f"pairs    {self.pairs:,}, {self.pairs / self.dense_pairs:.2%} of dense attention",
            f"work     forward {self.flops_forward / 1e9:,.3f} GFLOP, backward {self.flops_backward / 1e9:,.3f} GFLOP",
            f"lists    {self.bytes_lists / 2**20:,.1f} MiB, with those of the backward pass "
            f"{self.bytes_lists_backward / 2**20:,.1f} MiB",
            f"coverage {self.rows - self.rows_without_keys:,} of {self.rows:,} (row, head) pairs have a key",
        ]
        return "\n".join(lines)


def explain_problem(problem: SparseProblem, backend: str) -> SparseExplanation:
    """The numbers of one problem; ValueError where ``backend`` cannot compute it."""
    chosen, skipped = choose_sparse(backend, problem)
    backwards, _ = choose_sparse(backend, problem, backward=True)
    shape, plan, is_causal = problem.shape, problem.plan, problem.options.is_causal
    keys = keys_of_rows(plan, shape.heads, is_causal=is_causal)
    alike = shape.heads // keys.shape[0]
    pairs, covered = alike * int(keys.sum()), alike * int((keys > 0).sum())
    entries, lists = len(plan.columns), plan.row_pointer.shape[0]
    kept = (plan.query_tiles, plan.key_tiles, plan.row_pointer, plan.columns, plan.whole, plan.row_bits)
    size = sum(tensor.nbytes for tensor in kept if tensor is not None)
    if chosen == "gluon":
        size += sum(tensor.nbytes for tensor in problem.listed.forward_lists[:2])
    turned = 4 * (lists * (len(plan.key_tiles) + 1) + 2 * entries) if backwards == "triton" else 0
    if backwards == "gluon":
        turned = sum(tensor.nbytes for tensor in problem.listed.backward_lists[:3])
    last, first = shape.key_rows, shape.key_rows - shape.query_rows
    causal_pairs = (last * (last + 1) - first * (first + 1)) // 2
    dense = causal_pairs if is_causal else shape.query_rows * shape.key_rows
    return SparseExplanation(
        backend=chosen,
        backend_backward=backwards,
        skipped=skipped,
        block_size=plan.block_size,
        shared_lists=not plan.per_head,
        blocks=entries * (shape.heads // lists),
        dense_blocks=_dense_blocks(problem),
        pairs=pairs,
        dense_pairs=dense * shape.batch * shape.heads,
        flops_forward=2 * pairs * (shape.head_dim + shape.value_dim),
        flops_backward=2 * pairs * (3 * shape.head_dim + 2 * shape.value_dim),
        bytes_lists=size,
        bytes_lists_backward=size + turned,
        rows=shape.batch * shape.query_rows * shape.heads,
        rows_without_keys=shape.batch * shape.query_rows * shape.heads - covered,
    )


def _dense_blocks(problem: SparseProblem) -> int:
    """(query block, key block) pairs of all documents, heads and batch rows."""
    shape, size, total = problem.shape, problem.plan.block_size, 0
    for document in problem.documents:
        skipped = max(0, shape.key_rows - shape.query_rows - document.row)
        if skipped >= document.rows:
            continue
        end = -(-(document.position + document.rows) // size)
        low, first = document.position // size, (document.position + skipped) // size
        rows = end - first
        future = rows * (rows - 1) // 2 if problem.options.is_causal else 0
        total += document.batches * (rows * (end - low) - future)
    return total * shape.heads
