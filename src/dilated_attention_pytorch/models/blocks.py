"""The parts of a decoder-only transformer block: norms, causal dilated self-attention, feed-forward."""

from __future__ import annotations

import math
from typing import NamedTuple, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import DilatedAttention
from .config import LongNetLMConfig
from .rope import RotaryTables, rotate


class Factory(TypedDict):
    """Where parameters are made."""

    device: torch.device | str | None
    dtype: torch.dtype | None


class Documents(NamedTuple):
    """Where documents lie in the rows of a batch; see :func:`dilated_attention` for each."""

    key_padding_mask: Tensor | None
    cu_seqlens: Tensor | None
    key_start: int | Tensor


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


class CausalSelfAttention(nn.Module):
    """Rotary causal dilated self-attention with fused query, key and value projections."""

    def __init__(self, config: LongNetLMConfig, factory: Factory) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.heads = [config.num_heads, config.kv_heads, config.kv_heads]
        biases = config.norm == "sub-ln"
        self.in_proj = nn.Linear(config.embed_dim, sum(self.heads) * self.head_dim, bias=biases, **factory)
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
        """Draw the projections anew; each part of the fused projection has the fans of its own."""
        _init_linear(self.in_proj, 1.0)
        parts = self.in_proj.weight.detach().split([heads * self.head_dim for heads in self.heads])
        for weight, gain in zip(parts, (1.0, 1.0, gains.inner), strict=True):
            nn.init.xavier_normal_(weight, gain=gain)
        _init_linear(self.out_proj, gains.last)

    def forward(self, x: Tensor, tables: RotaryTables, documents: Documents) -> Tensor:
        """``(B, N, E)`` to ``(B, N, E)``."""
        num_heads, num_kv_heads, _ = self.heads
        heads_BNHD = self.in_proj(x).unflatten(-1, (-1, self.head_dim))
        turning, value = heads_BNHD.split([num_heads + num_kv_heads, num_kv_heads], dim=2)
        query, key = rotate(turning, tables).split([num_heads, num_kv_heads], dim=2)
        out = self.attention(
            query,
            key,
            value,
            key_padding_mask=documents.key_padding_mask,
            cu_seqlens=documents.cu_seqlens,
            key_start=documents.key_start,
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

    def forward(self, x: Tensor, tables: RotaryTables, documents: Documents) -> Tensor:
        """``(B, N, E)`` to ``(B, N, E)``."""
        x = x + self.dropout(self.attention(self.attention_norm(x), tables, documents))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
