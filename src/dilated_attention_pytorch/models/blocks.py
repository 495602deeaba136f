"""The parts of a decoder-only transformer block: norms, causal dilated self-attention, feed-forward."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import DilatedAttention
from ..parallel import ContextParallel, Streaming
from .config import LongNetLMConfig
from .rope import RotaryTables, rotate

if TYPE_CHECKING:
    from .model_cache import LayerCache, RecentRows


class Factory(TypedDict):
    """Where parameters are made."""

    device: torch.device | str | None
    dtype: torch.dtype | None


class Documents(NamedTuple):
    """Where documents lie in the rows of a batch, and where the sequence lives; see :func:`dilated_attention`."""

    key_padding_mask: Tensor | None
    cu_seqlens: Tensor | None
    key_start: int | Tensor
    parallel: ContextParallel | Streaming | None = None

    @property
    def ranks(self) -> ContextParallel | None:
        """What shards the rows, if they are sharded."""
        return self.parallel if isinstance(self.parallel, ContextParallel) else None

    def length(self, rows: int) -> int:
        """Rows of the whole sequence, of which these are ``rows``."""
        return rows if self.ranks is None or self.ranks.length is None else self.ranks.length

    def rows(self, device: torch.device) -> Tensor | None:
        """Which rows of the whole sequence these are, int64, where it is sharded."""
        return None if self.ranks is None else self.ranks.positions(device)


class Gains(NamedTuple):
    """Initial gains over Xavier's; query and key projections keep 1.

    ``inner`` is that of the value and the first feed-forward projection, ``last`` that of the two projections
    whose output joins the residual stream.
    """

    inner: float
    last: float

    @classmethod
    def of(cls, config: LongNetLMConfig) -> Gains:
        """MAGNETO's sqrt(log(2 M)) for M layers (arXiv 2210.06423, fig. 2); 1 and 1/sqrt(2 M) without Sub-LN.

        The latter keeps the variance of the residual stream independent of the depth, as in GPT-2.
        """
        if config.norm == "sub-ln":
            gain = math.sqrt(math.log(2 * config.num_layers))
            return cls(gain, gain)
        return cls(1.0, 1.0 / math.sqrt(2 * config.num_layers))


def make_norm(config: LongNetLMConfig, width: int, factory: Factory) -> nn.Module:
    """LayerNorm under "sub-ln", RMSNorm under "pre-rms"."""
    if config.norm == "sub-ln":
        return nn.LayerNorm(width, **factory)
    return nn.RMSNorm(width, eps=1e-5, **factory)


def make_inner_norm(config: LongNetLMConfig, width: int, factory: Factory) -> nn.Module:
    """The second norm of a sub-layer, before its last projection: "sub-ln" alone has one."""
    return make_norm(config, width, factory) if config.norm == "sub-ln" else nn.Identity()


def _init_linear(linear: nn.Linear, gain: float) -> None:
    nn.init.xavier_normal_(linear.weight, gain=gain)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def shift(x_BN: Tensor, back: int, positions: Tensor | None, *, fill: int = 0) -> Tensor:
    """What ``x (B, N, ...)`` holds ``back`` rows before, ``fill`` where the document has no such row.

    ``positions`` in the document are ``(1 or B, N)``; None where every batch row begins its document.
    """
    back_rows = min(back, x_BN.shape[1])
    rest = [0, 0] * (x_BN.dim() - 2)
    shifted = F.pad(x_BN, (*rest, back_rows, -back_rows), value=fill)
    if positions is None:
        return shifted
    inside = (positions >= back).view(*positions.shape, *[1] * (x_BN.dim() - 2))
    return torch.where(inside, shifted, fill)


def before(positions: Tensor | None, rows: int) -> Tensor | None:
    """``positions (1 or B, N)``, for `shift`, with those of the ``rows`` rows before: ``(1 or B, rows + N)``."""
    if positions is None or rows == 0:
        return positions
    earlier = torch.arange(-rows, 0, device=positions.device)
    return torch.cat((positions[:, :1] + earlier, positions), 1)


class NgramEmbedding(nn.Module):
    """The sum of the embeddings of the n-grams that end at each token, by a hash of their tokens.

    N-grams that fall on one hash share an embedding; those that a document is too short for yet are n-grams of
    "no token" and tokens.
    """

    def __init__(self, config: LongNetLMConfig, factory: Factory) -> None:
        super().__init__()
        self.sizes, self.buckets = config.ngram_sizes, config.ngram_buckets
        self.embedding = nn.Embedding(len(self.sizes) * self.buckets, config.embed_dim, **factory)

    def ids(self, tokens: Tensor, positions: Tensor | None) -> Tensor:
        """Rows of the table, ``(B, N, len(sizes))``, for ``tokens (B, N)``."""
        prime = 2**31 - 1  # products of two numbers below it stay within int64
        numbers = tokens.long() + 1
        value = numbers
        ids: dict[int, Tensor] = {}
        for size in range(2, max(self.sizes) + 1):
            value = (value * 1_000_003 + shift(numbers, size - 1, positions)) % prime
            ids[size] = value * 48_271 % prime % self.buckets
        return torch.stack([ids[size] + n * self.buckets for n, size in enumerate(self.sizes)], dim=-1)

    def forward(self, tokens: Tensor, positions: Tensor | None, recent: RecentRows | None = None) -> Tensor:
        """``(B, N)`` to ``(B, N, E)``; ``recent`` holds the tokens before, and takes these."""
        joined = tokens if recent is None else recent.extend(tokens)
        rows = joined.shape[1] - tokens.shape[1]
        return self.embedding(self.ids(joined, before(positions, rows))[:, rows:]).sum(dim=-2)


class ShortConvolution(nn.Module):
    """Causal convolution of each channel over the last rows of its document, the row itself included."""

    def __init__(self, rows: int, channels: int, factory: Factory) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, channels, **factory))

    def reset_parameters(self, backs: list[int]) -> None:
        """Let equal parts of the channels begin as copies of the rows ``backs`` before; ``weight[i]`` is that of i."""
        with torch.no_grad():
            self.weight.zero_()
            for part, back in zip(self.weight.chunk(len(backs), dim=1), backs, strict=True):
                part[back] = 1

    def forward(self, x_BNC: Tensor, positions: Tensor | None, recent: RecentRows | None = None) -> Tensor:
        """Convolve; ``positions`` as for `shift`; ``recent`` holds the rows before, and takes these."""
        if recent is not None:
            joined = recent.extend(x_BNC)
            earlier = joined.shape[1] - x_BNC.shape[1]
            # Of a few rows the fused operation takes ten times as long as their sum.
            convolve = self._sum if joined.shape[1] < 64 else self
            return convolve(joined, before(positions, earlier))[:, earlier:]
        if positions is not None:
            return self._sum(x_BNC, positions)
        # The same sum in one operation, in about half the time on a CPU.
        rows, channels = self.weight.shape
        weight = self.weight.t().flip(-1)[:, None]
        return F.conv1d(F.pad(x_BNC.transpose(1, 2), (rows - 1, 0)), weight, groups=channels).transpose(1, 2)

    def _sum(self, x_BNC: Tensor, positions: Tensor | None) -> Tensor:
        out = x_BNC * self.weight[0]
        for back in range(1, len(self.weight)):
            out = out + shift(x_BNC, back, positions) * self.weight[back]
        return out


class CausalSelfAttention(nn.Module):
    """Rotary causal dilated self-attention with fused query, key and value projections."""

    def __init__(self, config: LongNetLMConfig, factory: Factory) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.heads = [config.num_heads, config.kv_heads, config.kv_heads]
        biases = config.norm == "sub-ln"
        self.in_proj = nn.Linear(config.embed_dim, sum(self.heads) * self.head_dim, bias=biases, **factory)
        self.short_convolution: ShortConvolution | None = None
        if config.short_convolution:
            channels = sum(self.heads) * self.head_dim
            self.short_convolution = ShortConvolution(config.short_convolution, channels, factory)
        # Over how many rows heads spread at the start, see reset_parameters().
        self.stagger = max(1, min(max(config.dilation_rates), config.short_convolution - 1))
        self.attention = DilatedAttention(
            config.segment_lengths,
            config.dilation_rates,
            is_causal=True,
            dropout=config.attention_dropout,
            head_offsets=config.head_offsets,
            backend=config.backend,
        )
        self.inner_norm = make_inner_norm(config, config.embed_dim, factory)
        self.out_proj = nn.Linear(config.embed_dim, config.embed_dim, bias=biases, **factory)

    def reset_parameters(self, gains: Gains) -> None:
        """Draw the projections anew; each part of the fused projection has the fans of its own.

        With a short convolution keys begin as queries of the row before: a fresh model attends to what followed
        when the last tokens occurred before, and learns from there (on such beginnings: arXiv 2305.09828). A head
        that sees every r-th row would miss most of these places, so heads begin one row further back in turn, with
        keys and values: together they find the token that followed wherever it is.
        """
        _init_linear(self.in_proj, 1.0)
        parts = self.in_proj.weight.detach().split([heads * self.head_dim for heads in self.heads])
        for weight, gain in zip(parts, (1.0, 1.0, gains.inner), strict=True):
            nn.init.xavier_normal_(weight, gain=gain)
        _init_linear(self.out_proj, gains.last)
        if self.short_convolution is not None:
            num_heads, num_kv_heads, _ = self.heads
            query, key, _ = parts
            groups = query.unflatten(0, (num_kv_heads, num_heads // num_kv_heads, self.head_dim))
            key.copy_(groups[:, 0].flatten(0, 1))
            turn = [head % self.stagger for head in range(num_kv_heads)]
            furthest = len(self.short_convolution.weight) - 1
            keys_back = [min(1 + back, furthest) for back in turn]
            self.short_convolution.reset_parameters([0] * num_heads + keys_back + turn)

    def forward(
        self,
        x: Tensor,
        tables: RotaryTables,
        documents: Documents,
        positions: Tensor | None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """``(B, N, E)`` to ``(B, N, E)``; ``positions`` as for `shift`; ``cache`` holds the rows before."""
        num_heads, num_kv_heads, _ = self.heads
        projected = self.in_proj(x)
        if self.short_convolution is not None:
            recent = None if cache is None else cache.projected
            projected = self.short_convolution(projected, positions, recent)
        heads_BNHD = projected.unflatten(-1, (-1, self.head_dim))
        turning, value = heads_BNHD.split([num_heads + num_kv_heads, num_kv_heads], dim=2)
        query, key = rotate(turning, tables).split([num_heads, num_kv_heads], dim=2)
        key_start = documents.key_start
        if cache is not None:
            key, value, key_start = cache.attention.update(key, value)
        out = self.attention(
            query,
            key,
            value,
            key_padding_mask=documents.key_padding_mask,
            cu_seqlens=documents.cu_seqlens,
            key_start=key_start,
            parallel=documents.parallel,
        )
        return self.out_proj(self.inner_norm(out.flatten(-2)))


class FeedForward(nn.Module):
    """Two projections with a GELU between, and under "sub-ln" a norm before the second."""

    def __init__(self, config: LongNetLMConfig, factory: Factory) -> None:
        super().__init__()
        biases = config.norm == "sub-ln"
        self.in_proj = nn.Linear(config.embed_dim, config.mlp_width, bias=biases, **factory)
        self.inner_norm = make_inner_norm(config, config.mlp_width, factory)
        self.out_proj = nn.Linear(config.mlp_width, config.embed_dim, bias=biases, **factory)

    def reset_parameters(self, gains: Gains) -> None:
        """Draw the projections anew."""
        _init_linear(self.in_proj, gains.inner)
        _init_linear(self.out_proj, gains.last)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, N, E)`` to ``(B, N, E)``."""
        return self.out_proj(self.inner_norm(F.gelu(self.in_proj(x))))


class Block(nn.Module):
    """One decoder layer: attention and feed-forward, each normalised first and added to its input."""

    def __init__(self, config: LongNetLMConfig, factory: Factory) -> None:
        super().__init__()
        self.attention_norm = make_norm(config, config.embed_dim, factory)
        self.attention = CausalSelfAttention(config, factory)
        self.feed_forward_norm = make_norm(config, config.embed_dim, factory)
        self.feed_forward = FeedForward(config, factory)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        tables: RotaryTables,
        documents: Documents,
        positions: Tensor | None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """``(B, N, E)`` to ``(B, N, E)``; ``positions`` as for `shift`; ``cache`` holds the rows before."""
        x = x + self.dropout(self.attention(self.attention_norm(x), tables, documents, positions, cache))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
