"""Configuration of the language model: a frozen record that validates itself, and the table of presets."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..patterns import DilatedPattern
from ..types import HeadOffsets

Norm = Literal["sub-ln", "pre-rms"]


@dataclass(frozen=True, kw_only=True)
class LongNetLMConfig:
    """Sizes and options of :class:`LongNetLM`.

    Attributes:
        vocab_size: number of token ids; 256 for bytes.
        context_length: tokens a training sequence holds. The model itself takes any length.
        embed_dim: width of the residual stream.
        num_layers: transformer blocks.
        num_heads: query heads; ``embed_dim / num_heads`` must be an even integer, for RoPE.
        num_kv_heads: key/value heads for grouped-query attention, a divisor of ``num_heads``; None: as many.
        mlp_dim: width of the feed-forward layer; None: four times ``embed_dim``.
        segment_lengths, dilation_rates, head_offsets: the pattern, see :class:`DilatedPattern`.
        norm: "sub-ln" (MAGNETO's Sub-LayerNorm and initial gains, arXiv 2210.06423; LayerNorm and biases)
            or "pre-rms" (pre-RMSNorm, no biases).
        tie_embeddings: use the token embedding as the output projection.
        dropout: probability of dropping an element of the embedding and of each residual update, in training.
        attention_dropout: probability of dropping an attention weight, in training.
        rope_base: base of the rotary frequencies (arXiv 2104.09864).
        ngram_sizes: lengths of n-grams, each at least 2, whose hashed embeddings join that of the token, so that
            the first layer knows the last few tokens (Byte Latent Transformer, arXiv 2412.09871, section 3.2.1).
        ngram_buckets: embeddings of each of these lengths.
        short_convolution: rows that a causal convolution of each query, key and value channel reads, its own
            included, before the rotation; 0: none. A key that knows the token before its own lets a single layer
            find what followed the last time, and it begins as that (as the shift of H3 does, arXiv 2212.14052,
            section 3).
        activation_checkpointing: recompute each block in the backward instead of storing its activations.
        backend: what computes the attention, see :func:`dilated_attention`.

    Raises:
        ValueError: a value out of range; the message says what was given and what is allowed.

    >>> config = LongNetLMConfig.preset("base", tie_embeddings=True)
    >>> config.segment_lengths, config.dilation_rates
    ((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12))
    >>> LongNetLMConfig.from_dict(config.to_dict()) == config
    True
    """

    vocab_size: int = 256
    context_length: int
    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None
    mlp_dim: int | None = None
    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    head_offsets: HeadOffsets = "contiguous"
    norm: Norm = "sub-ln"
    tie_embeddings: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0
    rope_base: float = 10000.0
    ngram_sizes: tuple[int, ...] = ()
    ngram_buckets: int = 4096
    short_convolution: int = 0
    activation_checkpointing: bool = False
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context_length", "embed_dim", "num_layers", "num_heads", "ngram_buckets"):
            check_count(name, getattr(self, name))
        for name in ("num_kv_heads", "mlp_dim"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        if self.embed_dim % self.num_heads or self.head_dim % 2:
            raise ValueError(
                f"embed_dim is {self.embed_dim}, num_heads is {self.num_heads}; embed_dim must be an even "
                "multiple of num_heads"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_kv_heads is {self.kv_heads}, num_heads is {self.num_heads}; give a divisor of num_heads"
            )
        for name in ("segment_lengths", "dilation_rates", "ngram_sizes"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        _ = self.pattern  # raises for a pattern that is none
        if any(isinstance(n, bool) or not isinstance(n, int) or n < 2 for n in self.ngram_sizes):
            raise ValueError(f"ngram_sizes is {self.ngram_sizes!r}; give integers of at least 2")
        rows = self.short_convolution
        if isinstance(rows, bool) or not isinstance(rows, int) or rows < 0:
            raise ValueError(f"short_convolution is {rows!r}; give a number of rows, 0 for none")
        if self.norm not in get_args(Norm):
            raise ValueError(f"norm is {self.norm!r}; choose one of {', '.join(map(repr, get_args(Norm)))}")
        for name in ("tie_embeddings", "activation_checkpointing"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; give True or False")
        for name in ("dropout", "attention_dropout"):
            value = getattr(self, name)
            if not 0.0 <= check_number(name, value) < 1.0:
                raise ValueError(f"{name} is {value!r}; give a probability of at least 0 and below 1")
        if not 1.0 < check_number("rope_base", self.rope_base) < math.inf:
            raise ValueError(f"rope_base is {self.rope_base!r}; give a finite number above 1")
        if not isinstance(self.backend, str) or not self.backend:
            raise ValueError(f"backend is {self.backend!r}; give 'auto' or the name of a backend")

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.embed_dim // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Key/value heads, with the default filled in."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def mlp_width(self) -> int:
        """Width of the feed-forward layer, with the default filled in."""
        return 4 * self.embed_dim if self.mlp_dim is None else self.mlp_dim

    @property
    def pattern(self) -> DilatedPattern:
        """Segment lengths, dilation rates and head offsets as one pattern."""
        return DilatedPattern(self.segment_lengths, self.dilation_rates, self.head_offsets)

    def to_dict(self) -> dict[str, Any]:
        """All fields as values that JSON can hold; tuples become lists."""
        fields = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> LongNetLMConfig:
        """The inverse of :meth:`to_dict`; an unknown or missing field is a ValueError."""
        known = {field.name: field.default is dataclasses.MISSING for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - set(known)):
            raise ValueError(f"the configuration has no {', '.join(unknown)}; its fields are {', '.join(known)}")
        if missing := [name for name, required in known.items() if required and name not in fields]:
            raise ValueError(f"the configuration lacks {', '.join(missing)}; these have no default")
        return cls(**fields)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> LongNetLMConfig:
        """A named configuration, with fields replaced by ``overrides``.

        "demo" trains on a CPU in minutes; "small" suits one GPU; "base" has the sizes of LongNet's language
        model (arXiv 2307.02486, section 4: 12 layers, 768 wide, 12 heads), over bytes.

        >>> LongNetLMConfig.preset("demo", dropout=0.1).dropout
        0.1
        """
        if name not in PRESETS:
            raise ValueError(f"preset is {name!r}; choose one of {', '.join(map(repr, PRESETS))}")
        return cls.from_dict({**PRESETS[name], **overrides})


def check_config(config: object, kind: type) -> None:
    """Raise ValueError unless ``config`` is one of ``kind``."""
    if not isinstance(config, kind):
        given = config.__name__ if isinstance(config, type) else f"of type {type(config).__name__}"
        raise ValueError(f"config is {given}; give an instance of {kind.__name__}")


def check_count(name: str, value: object) -> None:
    """Raise ValueError unless ``value`` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}; give an integer of at least 1")


def check_number(name: str, value: object) -> float:
    """``value`` if it is a number, else a ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} is {value!r}; give a number")
    return value


PRESETS: dict[str, dict[str, Any]] = {
    "demo": {
        "context_length": 4096,
        "embed_dim": 128,
        "num_layers": 2,
        "num_heads": 4,
        "segment_lengths": (512, 4096),
        "dilation_rates": (1, 2),
        "norm": "pre-rms",
        # Most pairs of a head hardly turn within the context: they find a token by what it is, however far away.
        "rope_base": 1e12,
        "ngram_sizes": (2, 3, 4),
        "short_convolution": 4,
    },
    "small": {
        "context_length": 16384,
        "embed_dim": 512,
        "num_layers": 8,
        "num_heads": 8,
        "segment_lengths": (1024, 2048, 4096, 8192, 16384),
        "dilation_rates": (1, 2, 4, 8, 8),
    },
    "base": {
        "context_length": 32768,
        "embed_dim": 768,
        "num_layers": 12,
        "num_heads": 12,
        "segment_lengths": (2048, 4096, 8192, 16384, 32768),
        "dilation_rates": (1, 2, 4, 6, 12),
    },
}
"""Sizes by name; whatever is not listed has its default."""
