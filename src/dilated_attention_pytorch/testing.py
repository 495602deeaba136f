"""Oracles and input makers for tests: the definition, written out densely, and the tolerance for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .backends.philox import keep_mask
from .functional import dilated_attention_with_lse
from .patterns import DilatedPattern
from .types import AttentionOutput, HeadOffsets, MixingGrad, Padding

RESULTS = ("out", "lse", "dq", "dk", "dv")
Layout = Literal["contiguous", "heads_first", "packed", "strided_rows", "columns", "expanded"]


def multiplicity(
    pattern: DilatedPattern,
    num_heads: int,
    position: Tensor,
    document: Tensor,
    num_queries: int,
    *,
    is_causal: bool = False,
    hidden: Tensor | None = None,
) -> Tensor:
    """Which branch lets which query row of which head attend to which key row: (branches, H, N_q, N) bool.

    ``position`` and ``document`` (N,) say where key rows lie; those at negative positions are in no document.
    """
    n = position.shape[0]
    query = torch.arange(n - num_queries, n)
    allowed = (document[query, None] == document) & (position[query, None] >= 0) & (position >= 0)
    if is_causal:
        allowed &= position <= position[query, None]
    if hidden is not None:
        allowed &= ~hidden
    result = torch.empty(len(pattern.branches), num_heads, num_queries, n, dtype=torch.bool)
    for i, branch in enumerate(pattern.branches):
        w, r = branch.segment_length, branch.dilation_rate
        offset = torch.tensor([pattern.head_offset(h, r, num_heads) for h in range(num_heads)])
        active = (position % w) % r == offset[:, None]
        segment = position // w
        same = allowed & (segment == segment[query, None])
        result[i] = same & active[:, None, :] & active[:, query, None]
    return result


def _zero_keys(pattern: DilatedPattern, num_heads: int, position: Tensor, length: Tensor) -> Tensor:
    """Zero keys that torchscale's padding shows a row: (branches, H, N_q), counted slot by slot."""
    counts = torch.zeros(len(pattern.branches), num_heads, position.shape[0])
    for i, branch in enumerate(pattern.branches):
        r = branch.dilation_rate
        w = length.clamp(min=0, max=branch.segment_length)
        start = position // branch.segment_length * branch.segment_length
        slots = torch.arange(r * math.ceil(int(w.max()) / r))[:, None]
        exists = (slots < (w + r - 1) // r * r) & (start < length) & (position >= 0)
        empty = exists & ((slots >= w) | (start + slots >= length))
        for h in range(num_heads):
            offset = pattern.head_offset(h, r, num_heads)
            active = position % branch.segment_length % r == offset
            counts[i, h] = (empty & (slots % r == offset) & active).sum(0)
    return counts


class _Structure(NamedTuple):
    """Who attends to whom in one batch row."""

    hidden: Tensor  # (N,)
    m: Tensor  # (branches, H, N_q, N) bool
    zeros: Tensor  # (branches, H, N_q)
    keep: Tensor  # (branches, H, N_q, N) bool


def _structures(
    query: Tensor,
    key: Tensor,
    pattern: DilatedPattern,
    *,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    key_start: int | Tensor = 0,
    padding: str = "mask",
    seed: int | None = None,
) -> Iterator[_Structure]:
    (batch, num_queries, heads, _), n = query.shape, key.shape[1]
    for b in range(batch):
        position, document = torch.arange(n), torch.zeros(n, dtype=torch.int64)
        if cu_seqlens is not None:
            for i, (first, last) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)):
                position[first:last] -= first
                document[first:last] = i
        else:
            position = position + (int(key_start[b]) if isinstance(key_start, Tensor) else key_start)
        hidden = key_padding_mask[b] if key_padding_mask is not None else torch.zeros(n, dtype=torch.bool)
        length = torch.bincount(document)[document] + position[0] - hidden.sum()
        m = multiplicity(pattern, heads, position, document, num_queries, is_causal=is_causal, hidden=hidden)
        zeros = torch.zeros(m.shape[:3])
        if padding == "zeros" and not is_causal:
            zeros = _zero_keys(pattern, heads, position[n - num_queries :], length[n - num_queries :])
        keep = torch.ones_like(m)
        if dropout_p:
            assert seed is not None
            rows, batch_heads = torch.arange(n), b * heads + torch.arange(heads)
            queries = rows[n - num_queries :]
            for i in range(len(pattern.branches)):
                keep[i] = keep_mask(
                    seed, dropout_p, branch=i, batch_heads=batch_heads, query_rows=queries, key_rows=rows
                )
        yield _Structure(hidden, m, zeros, keep)


def _by_head(tensor: Tensor, heads: int, hidden: Tensor) -> Tensor:
    """(N, G, D) -> (H, N, D), hidden rows 0."""
    shown = tensor.masked_fill(hidden[:, None, None], 0).transpose(0, 1)
    return shown.repeat_interleave(heads // tensor.shape[1], 0)


def oracle(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    key_start: int | Tensor = 0,
    head_offsets: HeadOffsets = "contiguous",
    padding: Padding = "mask",
    mixing_grad: MixingGrad = "exact",
    seed: int | None = None,
) -> AttentionOutput:
    """The definition, dense and differentiable, in the dtype of its inputs (float64 for an oracle).

    On PyTorch's default device. Products are taken in the input's dtype, softmax and mixing in float32 or better, as
    an eager implementation would; ``seed`` is that of the dropout mask.
    """
    pattern = DilatedPattern(tuple(segment_lengths), tuple(dilation_rates), head_offsets)
    acc = torch.promote_types(query.dtype, torch.float32)
    heads = query.shape[2]
    scale = 1 / math.sqrt(query.shape[3]) if scale is None else scale
    outs, lses = [], []
    structures = _structures(
        query, key, pattern, is_causal=is_causal, dropout_p=dropout_p, key_padding_mask=key_padding_mask,
        cu_seqlens=cu_seqlens, key_start=key_start, padding=padding, seed=seed,
    )  # fmt: skip
    for b, (hidden, m, zeros, keep) in enumerate(structures):
        q, k, v = query[b].transpose(0, 1), _by_head(key[b], heads, hidden), _by_head(value[b], heads, hidden)
        scores = (q @ k.transpose(-1, -2)).to(acc) * scale
        out, lse = _mix(scores, v, m, zeros, keep.to(acc) / (1 - dropout_p), mixing_grad == "detached")
        outs.append(out.transpose(0, 1))
        lses.append(lse)
    return AttentionOutput(torch.stack(outs), torch.stack(lses))


def _mix(scores: Tensor, v: Tensor, m: Tensor, zeros: Tensor, keep: Tensor, detached: bool) -> tuple[Tensor, Tensor]:
    """Softmax over the multiset of keys and zero keys; detached: per branch, mixed by constant weights."""
    acc = scores.dtype

    def softmax(m: Tensor, zeros: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """m and keep (branches, H, Nq, N): out, lse over all of these branches."""
        count = m.sum(0)
        weight = torch.where(count > 0, count, 1).to(acc).log().masked_fill(count == 0, -torch.inf)
        logits = torch.cat([scores + weight, zeros.sum(0).to(acc).log().unsqueeze(-1)], -1)
        empty = (logits == -torch.inf).all(-1)
        lse = torch.logsumexp(logits.masked_fill(empty.unsqueeze(-1), 0.0), -1).masked_fill(empty, -torch.inf)
        shown = scores.masked_fill(count == 0, -torch.inf) - lse.masked_fill(empty, 0.0).unsqueeze(-1)
        p = torch.exp(shown) * (m * keep).sum(0).to(acc)
        return (p.to(v.dtype) @ v).to(acc), lse

    out, lse = softmax(m, zeros, keep)
    if detached:
        parts = [softmax(m[i : i + 1], zeros[i : i + 1], keep[i : i + 1]) for i in range(m.shape[0])]
        weights = [torch.exp(part_lse - lse).detach().nan_to_num(nan=0.0) for _, part_lse in parts]
        out = torch.stack([w.unsqueeze(-1) * part_out for w, (part_out, _) in zip(weights, parts, strict=True)]).sum(0)
        lse = lse.detach()
    return out.to(v.dtype), lse


def largest_summands(
    tensors: Sequence[Tensor],
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    grad_lse: bool = False,
    scale: float | None = None,
    head_offsets: HeadOffsets = "contiguous",
    mixing_grad: MixingGrad = "exact",
    **options: Any,
) -> tuple[float, ...]:
    """How large the terms are whose sums give out, lse, dq, dk, dv: rounding noise is measured by them.

    A gradient can be exactly 0 by cancellation: a row with a single key has P = 1, dS = dP - delta = 0, where
    dP and delta = rowsum(dO * O) are sums over the head dim that nobody computes without rounding. Bound B is
    0 there: neither the gold gradient nor (where it adds in the same order) the eager error shows the terms.
    So a sum over the head dim counts as that of its absolute values, P = exp(s - lse) as P times s and lse
    (their errors are its relative error), and every other sum as its largest term. ``tensors`` as for `results`, in
    float64; options as for `oracle`.
    """
    query, key, value, grad_out, grad_of_lse = tensors
    pattern = DilatedPattern(tuple(segment_lengths), tuple(dilation_rates), head_offsets)
    scale = 1 / math.sqrt(query.shape[3]) if scale is None else scale
    survivors, heads = 1 / (1 - options.get("dropout_p", 0.0)), query.shape[2]
    rest: dict[str, Any] = {"scale": scale, "head_offsets": head_offsets, **options}
    out, lse = oracle(query, key, value, segment_lengths, dilation_rates, **rest)
    found = torch.zeros(query.shape[0], 5, dtype=torch.float64)
    for b, (hidden, m, _, _) in enumerate(_structures(query, key, pattern, **options)):
        q, k, v = query[b].transpose(0, 1), _by_head(key[b], heads, hidden), _by_head(value[b], heads, hidden)
        do, o, count = grad_out[b].transpose(0, 1), out[b].transpose(0, 1), m.sum(0)
        logits = (q @ k.mT * scale).masked_fill(count == 0, -torch.inf)
        p = survivors * count * torch.exp(logits - lse[b].nan_to_num(neginf=0.0).unsqueeze(-1))
        scores, dp = q.abs() @ k.abs().mT * abs(scale) * (count > 0), do.abs() @ v.abs().mT
        delta = (do.abs() * o.abs()).sum(-1) + (grad_of_lse[b].abs() if grad_lse else 0.0)
        p_noise = p * (scores + lse[b].nan_to_num(neginf=0.0).abs().unsqueeze(-1)).clamp(min=1)
        difference = do @ v.mT - ((do * o).sum(-1) - (grad_of_lse[b] if grad_lse else 0.0)).unsqueeze(-1)
        ds = (p * (dp + delta.unsqueeze(-1)) + p_noise * difference.abs()) * abs(scale)
        factors = ((p_noise, v), (ds, k), (ds.mT, q), (p_noise.mT, do))
        terms = [weight * rows.abs().amax(-1).unsqueeze(1) for weight, rows in factors]
        found[b] = torch.stack([term.max() for term in (terms[0], scores, *terms[1:])])
    return tuple(found.amax(0).tolist())


def error_bound(gold: Tensor, eager: Tensor, dtype: torch.dtype, *, summand: float = 0.0) -> float:
    """Bound B: twice the error of an eager implementation in ``dtype`` and 4 eps of the largest gold value.

    Or, if that is more, 4 eps of the ``summand`` (see `largest_summands`; half an eps for 16-bit numbers, which
    only results are rounded to: the gradients, and the out that enters delta). In float64, where gold and eager
    have rounded alike, 16 times the eps.
    """
    finite = torch.isfinite(gold)
    shown = torch.stack([eager.double() - gold, gold]).where(finite, 0.0).abs().flatten(1).amax(1).tolist()
    eps = torch.finfo(dtype).eps * (16 if dtype == torch.float64 else 1)
    return max(2 * shown[0] + 4 * eps * shown[1], eps * summand * (0.5 if dtype.itemsize == 2 else 4))


def least_bound(name: str, dtype: torch.dtype, device: str) -> float:
    """What any result may be off: PyTorch's CPU kernel takes exponentials of 16-bit inputs to some 15 bits.

    Its lse is up to 4.1e-5 off, and of one or two rows the eager error, which bound B has, may be less by chance.
    """
    return 2**-14 if name == "lse" and dtype.itemsize == 2 and device == "cpu" else 0.0


def max_error(actual: Tensor, gold: Tensor) -> float:
    """Largest difference; inf where one is finite and the other is not, so that a NaN never passes."""
    same = actual.double() == gold
    difference = torch.where(same, 0.0, (actual.double() - gold).abs())
    return float(difference.nan_to_num(nan=torch.inf, posinf=torch.inf).max())


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of the operator with random tensors: everything that reproduces it, as its repr."""

    seed: int
    key_rows: int
    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    batch: int = 1
    query_rows: int | None = None
    kv_heads: int = 1
    group: int = 1
    head_dim: int = 8
    value_dim: int | None = None
    dtype: torch.dtype = torch.float32
    is_causal: bool = False
    scale: float | None = None
    dropout_p: float = 0.0
    hidden: tuple[int, ...] | Literal["random"] | None = None
    """Masked rows at the end of every batch row, or rows masked at random."""
    cuts: tuple[int, ...] | None = None
    """Inner bounds of packed documents."""
    key_start: int | tuple[int, ...] = 0
    head_offsets: HeadOffsets = "contiguous"
    padding: Padding = "mask"
    mixing_grad: MixingGrad = "exact"
    layouts: tuple[Layout, Layout, Layout, Layout] = ("contiguous",) * 4
    """Of query, key, value and the gradient of out."""
    grad_lse: bool = False

    def options(self) -> dict[str, Any]:
        """Every argument of `dilated_attention` but tensors' values and the backend; tensors on the CPU."""
        names = (
            "segment_lengths",
            "dilation_rates",
            "is_causal",
            "scale",
            "dropout_p",
            "head_offsets",
            "padding",
        )
        options: dict[str, Any] = {name: getattr(self, name) for name in (*names, "mixing_grad")}
        options["key_start"] = torch.tensor(self.key_start) if isinstance(self.key_start, tuple) else self.key_start
        if self.cuts is not None:
            options["cu_seqlens"] = torch.tensor([0, *self.cuts, self.key_rows])
        if self.hidden == "random":
            draw = torch.rand(self.batch, self.key_rows, generator=torch.Generator().manual_seed(self.seed))
            options["key_padding_mask"] = draw < 0.4
        elif self.hidden is not None:
            first = self.key_rows - torch.tensor(self.hidden)
            options["key_padding_mask"] = torch.arange(self.key_rows) >= first[:, None]
        return options

    def tensors(self, device: str = "cpu") -> list[Tensor]:
        """query, key, value, the gradients of out and of lse (B, H, N_q)."""
        generator = torch.Generator().manual_seed(self.seed)
        rows, heads = self.query_rows or self.key_rows, self.kv_heads * self.group
        value_dim = self.value_dim or self.head_dim
        sizes = (
            (rows, heads, self.head_dim), (self.key_rows, self.kv_heads, self.head_dim),
            (self.key_rows, self.kv_heads, value_dim), (rows, heads, value_dim),
        )  # fmt: skip
        drawn = [
            lay_out((self.batch, *size), layout, self.dtype, generator, device)
            for size, layout in zip(sizes, self.layouts, strict=True)
        ]
        acc = torch.promote_types(self.dtype, torch.float32)
        grad_lse = torch.randn(self.batch, heads, rows, generator=generator, dtype=torch.float64).to(acc)
        return [*drawn, grad_lse.to(device)]


def lay_out(
    size: tuple[int, ...], layout: Layout, dtype: torch.dtype, generator: torch.Generator, device: str = "cpu"
) -> Tensor:
    """Normal random numbers of shape (B, N, H, D), in memory as models produce them."""

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(device, dtype)

    b, n, h, d = size
    match layout:
        case "contiguous":
            return draw(b, n, h, d)
        case "heads_first":
            return draw(b, h, n, d).transpose(1, 2)
        case "packed":  # one projection for query, key and value
            return draw(b, n, h, 3 * d)[..., d : 2 * d]
        case "strided_rows":  # the batch stride is more than the rows
            return draw(b, 2 * n + 1, h, d)[:, 1::2]
        case "columns":
            return draw(b, n, d, h).transpose(2, 3)
        case "expanded":
            return draw(1, n, 1, d).expand(b, n, h, d)


def results(attend: Callable[..., AttentionOutput], tensors: Sequence[Tensor], *, grad_lse: bool) -> dict[str, Tensor]:
    """out, lse, dq, dk, dv of ``attend``; ``tensors`` are query, key, value, the gradients of out and lse."""
    query, key, value, grad_out, grad_of_lse = tensors
    leaves = [t.detach().requires_grad_() for t in (query, key, value)]
    out, lse = attend(*leaves)
    outputs, grads = [out], [grad_out]
    if grad_lse and lse.requires_grad:
        outputs, grads = [out, lse], [grad_out, grad_of_lse]
    found = (out.detach(), lse.detach(), *torch.autograd.grad(outputs, leaves, grads))
    return dict(zip(RESULTS, found, strict=True))


def violations(case: Case, backends: Sequence[str], *, device: str = "cpu") -> list[str]:
    """Where results of ``backends`` leave bound B of the dense oracle; empty when all is well.

    Every line reproduces itself: it holds the backend and the case.
    """
    tensors, grad_lse = case.tensors(device), case.grad_lse
    options = {name: t.to(device) if name == "key_padding_mask" else t for name, t in case.options().items()}
    # torch.manual_seed would do, but on a machine without a GPU it writes a traceback for each absent device.
    manual_seed = torch.default_generator.manual_seed if device == "cpu" else torch.cuda.manual_seed
    manual_seed(case.seed)
    seed = int(torch.randint(2**62, (1,), device=device)) if case.dropout_p else None
    dense, exact = partial(oracle, seed=seed, **options), [t.double() for t in tensors]
    with torch.device(device):
        gold, eager = (results(dense, inputs, grad_lse=grad_lse) for inputs in (exact, tensors))
    dtypes = {name: torch.promote_types(case.dtype, torch.float32) if name == "lse" else case.dtype for name in gold}
    bounds = {name: error_bound(gold[name], eager[name], dtype) for name, dtype in dtypes.items()}
    found = []
    for backend in backends:
        manual_seed(case.seed)
        attend = partial(dilated_attention_with_lse, backend=backend, **options)
        got = results(attend, case.tensors(device), grad_lse=grad_lse)
        for index, (name, actual) in enumerate(got.items()):
            error, bound = max_error(actual, gold[name]), max(bounds[name], least_bound(name, case.dtype, device))
            if not error <= bound:
                with torch.device(device):
                    summand = largest_summands(exact, grad_lse=grad_lse, seed=seed, **options)[index]
                bound = error_bound(gold[name], eager[name], dtypes[name], summand=summand)
            if not (error <= bound < math.inf and actual.dtype == dtypes[name]):
                found.append(f"{name} ({actual.dtype}) of {backend}: error {error:.3g}, bound {bound:.3g}, {case}")
    return found
