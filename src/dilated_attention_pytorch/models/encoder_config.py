"""Configuration of the bidirectional encoder: a frozen record that validates itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

from ..patterns import DilatedPattern
from ..types import HeadOffsets, MixingGrad, Padding
from .config import check_count, check_number


@dataclass(frozen=True, kw_only=True)
class LongNetEncoderConfig:
    """Sizes and options of :class:`LongNetEncoder`; in brackets torchscale's names where they differ.

    Attributes:
        embed_dim: width of the residual stream [encoder_embed_dim].
        num_layers: transformer layers [encoder_layers].
        num_heads: attention heads, a divisor of ``embed_dim`` [encoder_attention_heads].
        ffn_dim: width of the feed-forward layer; None: four times ``embed_dim`` [encoder_ffn_embed_dim].
        segment_lengths, dilation_rates, head_offsets: the pattern, see :class:`DilatedPattern` [segment_length,
            dilated_ratio].
        padding: "mask", or "zeros" for weights that torchscale trained, see :func:`dilated_attention`.
        is_causal: a row attends to itself and those before it, which makes the layers a decoder's.
        mixing_grad: "exact", or "detached" for torchscale's gradients; the output is the same.
        subln: a second LayerNorm in each sub-layer, before its last projection, and MAGNETO's initial gains (arXiv
            2210.06423); needs ``normalize_before``.
        normalize_before: normalise the input of each sub-layer; False: its output with the residual added
            [encoder_normalize_before].
        final_norm: normalise the output; without ``normalize_before`` there is none either way [normalize_output].
        layer_norm_eps: added to the variance in every LayerNorm [layernorm_eps].
        dropout: probability of dropping an element of the input and of each residual update, in training.
        attention_dropout: probability of dropping an attention weight, in training.
        activation_dropout: probability of dropping an activation of the feed-forward layer, in training.
        drop_path_rate: probability of dropping a residual update for a whole document, in training: that of the last
            layer, falling linearly to 0 at the first. A single layer has 0.
        xpos: relative positions by rotation and decay (arXiv 2212.10554) [xpos_rel_pos].
        xpos_scale_base: rows over which xPos's decay acts once.
        activation_checkpointing: recompute each layer in the backward instead of storing its activations
            [checkpoint_activations].
        backend: what computes the attention, see :func:`dilated_attention`.

    Raises:
        ValueError: a value out of range; the message says what was given and what is allowed.

    >>> config = LongNetEncoderConfig(
    ...     embed_dim=768, num_layers=12, num_heads=16, segment_lengths=(1024, 4096), dilation_rates=(1, 4)
    ... )
    >>> config.ffn_width, config.head_dim
    (3072, 48)
    """

    embed_dim: int
    num_layers: int
    num_heads: int
    ffn_dim: int | None = None
    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    head_offsets: HeadOffsets = "contiguous"
    padding: Padding = "mask"
    is_causal: bool = False
    mixing_grad: MixingGrad = "exact"
    subln: bool = True
    normalize_before: bool = True
    final_norm: bool = True
    layer_norm_eps: float = 1e-5
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    drop_path_rate: float = 0.0
    xpos: bool = False
    xpos_scale_base: float = 512
    activation_checkpointing: bool = False
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name in ("embed_dim", "num_layers", "num_heads"):
            check_count(name, getattr(self, name))
        if self.ffn_dim is not None:
            check_count("ffn_dim", self.ffn_dim)
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim is {self.embed_dim}, num_heads is {self.num_heads}; embed_dim must be a multiple of it"
            )
        for name in ("segment_lengths", "dilation_rates"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        _ = self.pattern  # raises for a pattern that is none
        for name, kind in (("padding", Padding), ("mixing_grad", MixingGrad)):
            if getattr(self, name) not in get_args(kind):
                choices = ", ".join(map(repr, get_args(kind)))
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {choices}")
        for name in ("is_causal", "subln", "normalize_before", "final_norm", "xpos", "activation_checkpointing"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; give True or False")
        if self.subln and not self.normalize_before:
            raise ValueError("subln is True and normalize_before is False; sub-LayerNorm is pre-norm, so change one")
        for name in ("dropout", "attention_dropout", "activation_dropout", "drop_path_rate"):
            value = getattr(self, name)
            if not 0.0 <= check_number(name, value) < 1.0:
                raise ValueError(f"{name} is {value!r}; give a probability of at least 0 and below 1")
        for name in ("layer_norm_eps", "xpos_scale_base"):
            value = getattr(self, name)
            if not 0.0 < check_number(name, value) < math.inf:
                raise ValueError(f"{name} is {value!r}; give a finite number above 0")
        if self.xpos and self.head_dim % 2:
            raise ValueError(f"xpos turns pairs, and a head is {self.head_dim} wide; give heads of an even width")
        if not isinstance(self.backend, str) or not self.backend:
            raise ValueError(f"backend is {self.backend!r}; give 'auto' or the name of a backend")

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.embed_dim // self.num_heads

    @property
    def ffn_width(self) -> int:
        """Width of the feed-forward layer, with the default filled in."""
        return 4 * self.embed_dim if self.ffn_dim is None else self.ffn_dim

    @property
    def pattern(self) -> DilatedPattern:
        """Segment lengths, dilation rates and head offsets as one pattern."""
        return DilatedPattern(self.segment_lengths, self.dilation_rates, self.head_offsets)

    def drop_path(self, layer: int) -> float:
        """Probability with which layer ``layer`` drops a residual update, from 0 to ``drop_path_rate``."""
        return self.drop_path_rate * layer / max(1, self.num_layers - 1)
