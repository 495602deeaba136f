"""Old multi-head attentions: projections and attention, over `MultiheadDilatedAttention`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..modules import DilatedAttention, MultiheadDilatedAttention
from ..patterns import DilatedPattern
from .arguments import Given, bind, pattern_of
from .attention import OldLayer, attend, bounds_of, geometric_pattern, square_ordering

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_WHOLE = 1 << 30
"""A segment longer than any sequence."""


def multihead(given: Given, lengths: tuple[int, ...], rates: tuple[int, ...]) -> MultiheadDilatedAttention:
    """The module that old arguments ask for, initialised as MAGNETO does (arXiv 2210.06423, figure 2)."""
    layer_norm = bool(given.take("layer_norm", False))
    made = MultiheadDilatedAttention(
        given.need("embed_dim"),
        given.need("num_heads"),
        dropout=given.take("dropout", 0.0),
        bias=given.take("bias", True),
        add_bias_kv=given.take("add_bias_kv", False),
        add_zero_attn=given.take("add_zero_attn", False),
        kdim=given.take("kdim"),
        vdim=given.take("vdim"),
        device=given.take("device"),
        dtype=given.take("dtype"),
        segment_lengths=lengths,
        dilation_rates=rates,
        sub_layer_norm=layer_norm,
    )
    epsilon, gain = given.take("layer_norm_eps"), given.take("gamma_init")
    if made.sub_norm is not None and epsilon is not None:
        made.sub_norm.eps = epsilon
    if gain is not None and made.in_proj_weight is not None:
        query, key, value = made.in_proj_weight.chunk(3)
        for weight, gamma in ((query, 1.0), (key, 1.0), (value, gain), (made.out_proj.weight, gain)):
            nn.init.xavier_normal_(weight, gain=gamma)
    return made


class _Projected(OldLayer):
    """What old classes with projections share: their state dicts load under the old keys too."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Old keys become new ones: three projections, or one of all three, are ``in_proj``; a norm ``sub_norm``."""
        for end in ("weight", "bias"):
            parts = [f"{prefix}{name}.{end}" for name in _PROJECTIONS]
            if all(part in state_dict for part in parts):
                state_dict[f"{prefix}qkv_proj.{end}"] = torch.cat([state_dict.pop(part) for part in parts])
            renamed = {"qkv_proj.": "in_proj_", "out_proj.": "out_proj.", "norm.": "sub_norm."}
            for old, new in renamed.items():
                if (key := f"{prefix}{old}{end}") in state_dict:
                    state_dict[f"{prefix}replacement.{new}{end}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class OldMultihead(_Projected):
    """An old class of ``(query, key, value)`` of width E over `MultiheadDilatedAttention`, its `replacement`."""

    replacement: MultiheadDilatedAttention

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        given = bind(self.entry, args, kwargs)
        lengths, rates = self.pattern(given)
        self.replacement = multihead(given, lengths, rates)
        self.segment_lengths, self.dilation_rates = list(lengths), list(rates)
        self.embed_dim, self.num_heads = self.replacement.embed_dim, self.replacement.num_heads
        self.head_dim, self.dropout = self.replacement.head_dim, given.take("dropout", 0.0)
        self.batch_first = bool(given.take("batch_first", True))
        self.ring_size = given.take("ring_size")
        given.close()

    def pattern(self, given: Given) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The pattern that the constructor was given."""
        return pattern_of(given)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Query ``(B, N, E)``, and key and value or neither, to ``(B, N, E)``, or a pair with None."""
        given = self.call(args, kwargs)
        query = given.need("query")
        key = given.take("key", query)
        tensors = [query, key, given.take("value", key)]
        if not self.batch_first:
            tensors = [tensor.transpose(0, 1) for tensor in tensors]
        parallel = self.place(tensors[0], given)
        tensors = self.rows_of_rank(tensors, given, parallel)
        out = self.run(tensors, given, parallel)
        return self.result(out if self.batch_first else out.transpose(0, 1), given)

    def run(self, tensors: list[Tensor], given: Given, parallel: Any) -> Tensor:
        """The call of the replacement."""
        causal, mask = bool(given.take("is_causal", False)), given.take("key_padding_mask")
        query, key, value = tensors
        if key is query and value is query:
            key = value = query  # one projection of one input
        return self.replacement(query, key, value, mask, is_causal=causal, parallel=parallel)[0]


class DynamicMultihead(OldMultihead):
    """Segments by the length of the sequence: see `geometric_pattern`."""

    def pattern(self, given: Given) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A pattern until the length is known."""
        self.bounds = bounds_of(given)
        return geometric_pattern(self.bounds[0], *self.bounds)

    def run(self, tensors: list[Tensor], given: Given, parallel: Any) -> Tensor:
        """The call of the replacement, with the pattern of this length."""
        lengths, rates = geometric_pattern(tensors[1].shape[1], *self.bounds)
        self.replacement.attention.pattern = DilatedPattern(lengths, rates)
        return super().run(tensors, given, parallel)


class OldSelfAttention(_Projected):
    """An old class of self-attention on ``x (B, N, E)``.

    Some of these classes took query, key and value at another time: so does this one, and without a width
    (``embed_dim``) it is bare attention.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        if args and isinstance(args[0], (list, tuple)):  # the constructor of before it had projections
            kwargs = {**dict(zip(("segment_lengths", "dilation_rates", "dropout"), args, strict=False)), **kwargs}
            args = ()
        given = bind(self.entry, args, kwargs)
        if given.values.get("segment_lengths") is None:
            size, rate = given.take("segment_size", _WHOLE), given.take("dilation_rate", 1)
            given.values.update(segment_lengths=(size,), dilation_rates=(rate,))
        lengths, rates = pattern_of(given)
        self.segment_lengths, self.dilation_rates = list(lengths), list(rates)
        self.replacement: MultiheadDilatedAttention | DilatedAttention
        if given.values.get("embed_dim") is None:
            self.replacement = DilatedAttention(lengths, rates, dropout=given.take("dropout", 0.0))
        else:
            self.replacement = multihead(given, lengths, rates)
            self.embed_dim, self.num_heads = self.replacement.embed_dim, self.replacement.num_heads
            self.head_dim = self.replacement.head_dim
        self.ring_size = given.take("ring_size")
        self.use_hilbert = bool(given.take("use_hilbert", True)) and self.entry.kind == "hilbert_self"
        given.close(quiet=("device", "dtype", "num_heads"))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """``x (B, N, E)`` to ``(B, N, E)``; query, key, value ``(B, N, H, D)`` to ``(B, N, H, D)``."""
        bare = [*args[:3], *(kwargs.get(long, kwargs.get(long[0])) for long in ("query", "key", "value")[len(args) :])]
        if len(bare) == 3 and all(isinstance(tensor, Tensor) and tensor.dim() == 4 for tensor in bare):
            made = self.replacement
            attention = made if isinstance(made, DilatedAttention) else made.attention
            options = {"is_causal": bool(kwargs.get("is_causal", args[3] if len(args) > 3 else False))}
            return attend(attention, bare, self.use_hilbert, None, options)
        if isinstance(self.replacement, DilatedAttention):
            raise TypeError(
                f"{type(self).__name__} was made without a width; give query, key and value of 4 dimensions"
            )
        given = self.call(args, kwargs)
        x, causal = given.need("x"), bool(given.take("is_causal", False))
        parallel = self.place(x, given)
        (x,) = self.rows_of_rank([x], given, parallel)
        if not (self.use_hilbert and given.take("use_hilbert", True)):
            return self.result(self.replacement(x, x, x, is_causal=causal, parallel=parallel)[0], given)
        if parallel is not None:
            raise ValueError("a Hilbert order moves rows between ranks; order the sequence before it is cut")
        ordering = square_ordering(x.shape[1])
        ordering.check(is_causal=causal)
        x = ordering.apply(x)
        return self.result(ordering.invert(self.replacement(x, x, x)[0]), given)
