"""nn.Modules over :func:`dilated_attention`: the bare operator, and multi-head attention with projections.

Shape letters: B batch, N rows (Nq of the query, Nk of the key), E embedding width, H query heads, G key/value
heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backends.dispatch import check_backend
from .functional import check_choices, dilated_attention
from .patterns import DilatedPattern
from .patterns.block_sparse import check_integer
from .sparse import SparseAttention
from .types import HeadOffsets, MixingGrad, Padding

if TYPE_CHECKING:
    from .parallel import ContextParallel, Streaming


class DilatedAttention(nn.Module):
    """:func:`dilated_attention` with its pattern and options stored; it has no parameters.

    Args:
        segment_lengths: segment length of every branch, in rows.
        dilation_rates: dilation rate of every branch, 1 to its segment length.
        is_causal: whether a query attends only to keys at or before it; the call can override it.
        scale: factor on the scores, by default ``1 / sqrt(D)``.
        dropout: probability with which an attention weight is dropped, in training mode only.
        head_offsets, padding, mixing_grad, backend: as for :func:`dilated_attention`.

    Raises:
        ValueError: a pattern or an option that is not allowed; the message says what is.

    >>> attention = DilatedAttention((64, 256), (1, 4), is_causal=True)
    >>> query = key = value = torch.randn(2, 256, 8, 16)
    >>> attention(query, key, value).shape
    torch.Size([2, 256, 8, 16])
    """

    def __init__(
        self,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        *,
        is_causal: bool = False,
        scale: float | None = None,
        dropout: float = 0.0,
        head_offsets: HeadOffsets = "contiguous",
        padding: Padding = "mask",
        mixing_grad: MixingGrad = "exact",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if not isinstance(dropout, (int, float)) or not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout is {dropout!r}; give a probability of at least 0 and below 1")
        check_choices(padding, mixing_grad)
        check_backend(backend)
        lengths, rates = (
            tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else given
            for given in (segment_lengths, dilation_rates)
        )
        self.pattern = DilatedPattern(lengths, rates, head_offsets)
        self.is_causal = is_causal
        self.scale = scale
        self.dropout = dropout
        self.padding: Padding = padding
        self.mixing_grad: MixingGrad = mixing_grad
        self.backend = backend

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        is_causal: bool | None = None,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        key_start: int | Tensor = 0,
        parallel: ContextParallel | Streaming | None = None,
    ) -> Tensor:
        """Query ``(B, Nq, H, D)``, key ``(B, Nk, G, D)``, value ``(B, Nk, G, D_v)`` to ``(B, Nq, H, D_v)``.

        ``is_causal`` None takes the value given at construction. ``key_padding_mask`` is ``(B, Nk)`` bool,
        True = ignore; ``cu_seqlens`` and ``key_start`` say where documents begin, and ``parallel`` that the rows are
        one rank's of a sharded sequence, as for :func:`dilated_attention`, which also raises for whatever does not
        fit together.
        """
        return dilated_attention(
            query,
            key,
            value,
            self.pattern.segment_lengths,
            self.pattern.dilation_rates,
            is_causal=self.is_causal if is_causal is None else is_causal,
            scale=self.scale,
            dropout_p=self.dropout if self.training else 0.0,
            key_padding_mask=key_padding_mask,
            cu_seqlens=cu_seqlens,
            key_start=key_start,
            head_offsets=self.pattern.head_offsets,
            padding=self.padding,
            mixing_grad=self.mixing_grad,
            backend=self.backend,
            parallel=parallel,
        )

    def extra_repr(self) -> str:
        """Pattern, and the options that differ from their defaults."""
        parts = [f"{self.pattern.segment_lengths}, {self.pattern.dilation_rates}"]
        options = {
            "is_causal": (self.is_causal, False),
            "scale": (self.scale, None),
            "dropout": (self.dropout, 0.0),
            "head_offsets": (self.pattern.head_offsets, "contiguous"),
            "padding": (self.padding, "mask"),
            "mixing_grad": (self.mixing_grad, "exact"),
            "backend": (self.backend, "auto"),
        }
        parts += [f"{name}={value!r}" for name, (value, default) in options.items() if value != default]
        return ", ".join(parts)


class MultiheadDilatedAttention(nn.Module):
    """Multi-head attention with a dilated pattern, in place of :class:`torch.nn.MultiheadAttention`.

    Arguments, initial values and state-dict keys are those of ``nn.MultiheadAttention``: its state dicts load
    here, and with one segment over the whole sequence at rate 1 the output is the same. It differs where a
    long sequence must: tensors are batch first, attention weights are never formed, ``is_causal`` is the mask
    rather than a hint about one (aligned at the last key), and a row with every key masked gives the output
    bias instead of NaN.

    Args:
        embed_dim: width E of the query and of the output.
        num_heads: query heads H; E must be a multiple.
        dropout: probability with which an attention weight is dropped, in training mode only.
        bias: whether the projections have biases.
        add_bias_kv, add_zero_attn: must be False: an added key has no position, hence no segment.
        kdim, vdim: widths of key and value, by default E.
        batch_first: must be True.
        device, dtype: of the parameters.
        segment_lengths, dilation_rates: the pattern, see :class:`DilatedAttention`.
        num_kv_heads: key/value heads G for grouped-query attention, a divisor of H; by default H.
        sub_layer_norm: LayerNorm over the concatenated heads before the output projection (MAGNETO,
            arXiv 2210.06423), under the state-dict keys ``sub_norm.weight`` and ``sub_norm.bias``.
        head_offsets, padding, mixing_grad, backend: as for :func:`dilated_attention`.

    Raises:
        ValueError: an argument that is not allowed; the message says what is.

    >>> attention = MultiheadDilatedAttention(64, 4, segment_lengths=(32, 128), dilation_rates=(1, 4))
    >>> x = torch.randn(2, 128, 64)
    >>> out, weights = attention(x, x, x, is_causal=True)
    >>> out.shape, weights
    (torch.Size([2, 128, 64]), None)
    """

    in_proj_weight: Tensor | None
    in_proj_bias: Tensor | None
    q_proj_weight: Tensor | None
    k_proj_weight: Tensor | None
    v_proj_weight: Tensor | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        num_kv_heads: int | None = None,
        sub_layer_norm: bool = False,
        head_offsets: HeadOffsets = "contiguous",
        padding: Padding = "mask",
        mixing_grad: MixingGrad = "exact",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if add_bias_kv or add_zero_attn:
            name = "add_bias_kv" if add_bias_kv else "add_zero_attn"
            raise ValueError(f"{name} is True; an added key has no position in the sequence, leave it False")
        if not batch_first:
            raise ValueError("batch_first is False; give batch_first=True and tensors (batch, rows, width)")
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        for name, value in (("embed_dim", embed_dim), ("num_heads", num_heads), ("num_kv_heads", kv_heads)):
            check_integer(name, value, 1)
        if embed_dim % num_heads:
            raise ValueError(
                f"embed_dim is {embed_dim}, num_heads is {num_heads}; embed_dim must be a multiple of num_heads"
            )
        if num_heads % kv_heads:
            raise ValueError(f"num_kv_heads is {kv_heads}, num_heads is {num_heads}; give a divisor of num_heads")
        self.embed_dim, self.num_heads, self.num_kv_heads = embed_dim, num_heads, kv_heads
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.head_dim = embed_dim // num_heads
        self.batch_first = True

        kv_dim = kv_heads * self.head_dim
        self._sizes = [embed_dim, kv_dim, kv_dim]
        shapes: dict[str, tuple[int, ...] | None] = dict.fromkeys(
            ("q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_weight", "in_proj_bias")
        )
        if self.kdim == self.vdim == embed_dim:
            shapes["in_proj_weight"] = (sum(self._sizes), embed_dim)
        else:
            shapes["q_proj_weight"] = (embed_dim, embed_dim)
            shapes["k_proj_weight"] = (kv_dim, self.kdim)
            shapes["v_proj_weight"] = (kv_dim, self.vdim)
        if bias:
            shapes["in_proj_bias"] = (sum(self._sizes),)
        for name, shape in shapes.items():
            weight = None if shape is None else nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            self.register_parameter(name, weight)
        self.attention: DilatedAttention | SparseAttention = DilatedAttention(
            segment_lengths,
            dilation_rates,
            dropout=dropout,
            head_offsets=head_offsets,
            padding=padding,
            mixing_grad=mixing_grad,
            backend=backend,
        )
        self.sub_norm = nn.LayerNorm(embed_dim, device=device, dtype=dtype) if sub_layer_norm else None
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self._reset_in_projections()

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as at construction and as ``nn.MultiheadAttention`` does."""
        if self.sub_norm is not None:
            self.sub_norm.reset_parameters()
        self.out_proj.reset_parameters()
        self._reset_in_projections()

    def _own_weights(self) -> tuple[Tensor, ...]:
        """Weights of the three projections where they are not packed into one, else none."""
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        return tuple(weight for weight in weights if weight is not None)

    def _reset_in_projections(self) -> None:
        for weight in self._own_weights() if self.in_proj_weight is None else (self.in_proj_weight,):
            nn.init.xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        packed, bias = self.in_proj_weight, self.in_proj_bias
        if packed is not None and query is key and key is value:
            return F.linear(query, packed, bias).split(self._sizes, dim=-1)
        weights = self._own_weights() if packed is None else packed.split(self._sizes)
        biases = (None, None, None) if bias is None else bias.split(self._sizes)
        return tuple(map(F.linear, (query, key, value), weights, biases))

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        widths = {"query": (query, self.embed_dim), "key": (key, self.kdim), "value": (value, self.vdim)}
        for name, (tensor, width) in widths.items():
            if tensor.dim() not in (2, 3) or tensor.dim() != query.dim() or tensor.shape[-1] != width:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}; give (batch, rows, {width}), or all three "
                    "inputs without the batch"
                )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        cu_seqlens: Tensor | None = None,
        key_start: int | Tensor = 0,
        parallel: ContextParallel | Streaming | None = None,
    ) -> tuple[Tensor, None]:
        """Project, attend, project: query ``(B, Nq, E)`` to ``(out (B, Nq, E), None)``.

        Args:
            query, key, value: ``(B, Nq, E)``, ``(B, Nk, kdim)``, ``(B, Nk, vdim)`` with Nq <= Nk, the query
                being the last rows; or all three unbatched ``(N, width)``, for an unbatched output.
            key_padding_mask: bool ``(B, Nk)``, unbatched ``(Nk,)``; True = ignore.
            need_weights, attn_mask, average_attn_weights: there for callers of ``nn.MultiheadAttention``;
                weights and dense masks are refused, the last has no effect without weights.
            is_causal: each query attends only to keys at or before it.
            cu_seqlens, key_start, parallel: where documents begin and the sequence lives, as for
                :func:`dilated_attention`.

        Raises:
            ValueError: inputs of the wrong shape, ``need_weights=True``, an ``attn_mask``.
        """
        if need_weights:
            raise ValueError(
                "need_weights is True, but the weights are never formed; give need_weights=False, and where "
                "a weight is needed compute exp(score - lse) with the lse of dilated_attention_with_lse"
            )
        if attn_mask is not None:
            raise ValueError(
                "attn_mask is given, but dense masks are not supported; use is_causal, key_padding_mask or cu_seqlens"
            )
        self._check(query, key, value)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in self._project(query, key, value))
        unbatched = query.dim() == 2
        if unbatched:
            q, k, v = q[None], k[None], v[None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        out = self.attention(
            q,
            k,
            v,
            is_causal=is_causal,
            key_padding_mask=key_padding_mask,
            cu_seqlens=cu_seqlens,
            key_start=key_start,
            parallel=parallel,
        ).flatten(-2)
        if self.sub_norm is not None:
            out = self.sub_norm(out)
        out = self.out_proj(out)
        return (out[0] if unbatched else out), None

    def extra_repr(self) -> str:
        """Widths and heads."""
        text = f"embed_dim={self.embed_dim}, num_heads={self.num_heads}"
        for name, value, default in (
            ("num_kv_heads", self.num_kv_heads, self.num_heads),
            ("kdim", self.kdim, self.embed_dim),
            ("vdim", self.vdim, self.embed_dim),
        ):
            text += "" if value == default else f", {name}={value}"
        return text


class MultiheadSparseAttention(MultiheadDilatedAttention):
    """Multi-head attention with a block-sparse pattern, in place of :class:`torch.nn.MultiheadAttention`.

    Projections, arguments and state-dict keys are those of :class:`MultiheadDilatedAttention`; what attends is
    :class:`SparseAttention`.

    Args:
        embed_dim: width E of the query and of the output.
        num_heads: query heads H; E must be a multiple.
        dropout: probability with which an attention weight is dropped, in training mode only.
        pattern: a block-sparse pattern.
        backend: as for :func:`sparse_attention`.
        **options: the other arguments of :class:`MultiheadDilatedAttention` but those of its pattern.

    >>> from dilated_attention_pytorch import LocalWindow
    >>> attention = MultiheadSparseAttention(64, 4, pattern=LocalWindow(32, block_size=32))
    >>> x = torch.randn(2, 128, 64)
    >>> out, weights = attention(x, x, x, is_causal=True)
    >>> out.shape, weights
    (torch.Size([2, 128, 64]), None)
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        *,
        pattern: Any,
        backend: str = "auto",
        **options: Any,
    ) -> None:
        refused = {"segment_lengths", "dilation_rates", "head_offsets", "padding", "mixing_grad"} & options.keys()
        if refused:
            raise ValueError(f"{sorted(refused)} are of dilated attention; give the pattern alone")
        super().__init__(embed_dim, num_heads, dropout, segment_lengths=(1,), dilation_rates=(1,), **options)
        self.attention = SparseAttention(pattern, dropout=dropout, backend=backend)
