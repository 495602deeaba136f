"""Encoder and decoder layers with dilated self-attention, in place of PyTorch's ``nn.Transformer*Layer``.

Arguments, initial values, state-dict keys and results are theirs, the latter where one segment of rate 1 covers every
row: so a dense model's weights load, and what differs is the pattern alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import DilatedAttention, MultiheadDilatedAttention
from ..parallel import ContextParallel, Streaming, check_parallel
from ..types import HeadOffsets
from .blocks import Documents
from .config import check_count, check_number
from .masks import count_rows, read_causal, read_padding
from .xpos import XPos, apply_xpos, centred_positions

Activation = str | Callable[[Tensor], Tensor]
Parallel = ContextParallel | Streaming | None
CrossAttention = Literal["dense", "dilated"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}


def find_activation(activation: Activation) -> Callable[[Tensor], Tensor]:
    """The function of a name, or what is a function already."""
    if isinstance(activation, str):
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}; give 'relu', 'gelu' or a function")
        return _ACTIVATIONS[activation]
    if not callable(activation):
        raise ValueError(f"activation is {activation!r}; give 'relu', 'gelu' or a function")
    return activation


class TurnedAttention(nn.Module):
    """Dilated attention of queries and keys that xPos has turned by their positions (arXiv 2212.10554)."""

    def __init__(
        self, attention: DilatedAttention, head_dim: int, scale_base: float, device: torch.device | str | None
    ) -> None:
        super().__init__()
        self.attention = attention
        self.xpos = XPos(head_dim, scale_base, device)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """As :class:`DilatedAttention`; query and key have the same rows."""
        documents = Documents(None, options.get("cu_seqlens"), 0, options.get("parallel"))
        if documents.ranks is not None:
            documents.ranks.check_rows("key", key.shape[1])
        length, rows = documents.length(key.shape[1]), documents.rows(key.device)
        self.xpos.check_span(length, min(length, max(self.attention.pattern.segment_lengths)), query.dtype)
        positions = centred_positions(length, documents.cu_seqlens, key.device, rows=rows)
        tables = self.xpos.tables(positions, torch.promote_types(query.dtype, torch.float32))
        return self.attention(*apply_xpos(query, key, tables), value, **options)


def _self_attention(
    d_model: int, nhead: int, dropout: float, bias: bool, xpos_scale_base: float | None, **options: Any
) -> MultiheadDilatedAttention:
    attention = MultiheadDilatedAttention(d_model, nhead, dropout, bias, **options)
    if xpos_scale_base is not None:
        if attention.head_dim % 2 or not xpos_scale_base > 0:
            raise ValueError(
                f"xpos_scale_base is {xpos_scale_base}, the head dim {attention.head_dim}; give a positive number of "
                "rows, and an even d_model / nhead"
            )
        plain = attention.attention
        assert isinstance(plain, DilatedAttention)
        turned = TurnedAttention(plain, attention.head_dim, xpos_scale_base, options["device"])
        attention.attention = turned  # type: ignore[assignment]  # called in the same way
    return attention


class _Layer(nn.Module):
    """What both layers have: batch-first tensors inside, the feed-forward, and the order of norms."""

    def _set_up(
        self,
        d_model: int,
        dim_feedforward: int,
        dropout: float,
        activation: Activation,
        layer_norm_eps: float,
        batch_first: bool,
        norm_first: bool,
        bias: bool,
        sub_layers: int,
        factory: dict[str, Any],
    ) -> None:
        check_count("dim_feedforward", dim_feedforward)
        if not check_number("layer_norm_eps", layer_norm_eps) >= 0:
            raise ValueError(f"layer_norm_eps is {layer_norm_eps}; give a number of at least 0")
        self.batch_first, self.norm_first = batch_first, norm_first
        self.linear1 = nn.Linear(d_model, dim_feedforward, bias=bias, **factory)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model, bias=bias, **factory)
        for number in range(1, sub_layers + 1):
            setattr(self, f"norm{number}", nn.LayerNorm(d_model, eps=layer_norm_eps, bias=bias, **factory))
            setattr(self, f"dropout{number}", nn.Dropout(dropout))
        self.activation = find_activation(activation)

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(self.activation(self.linear1(x))))

    def _through(self, x: Tensor, *sub_layers: Callable[[Tensor], Tensor]) -> Tensor:
        """``x`` through the sub-layers, each added to its input, with its norm before it or behind."""
        for number, sub_layer in enumerate(sub_layers, 1):
            norm, dropout = getattr(self, f"norm{number}"), getattr(self, f"dropout{number}")
            x = x + dropout(sub_layer(norm(x))) if self.norm_first else norm(x + dropout(sub_layer(x)))
        return x

    def _rows(self, x: Tensor) -> int:
        return count_rows(x, batch_first=self.batch_first)

    def _turn(self, x: Tensor) -> Tensor:
        """Between the caller's axes and batch first; a tensor without a batch stays."""
        return x if self.batch_first or x.dim() == 2 else x.transpose(0, 1)


class DilatedTransformerEncoderLayer(_Layer):
    """:class:`torch.nn.TransformerEncoderLayer` with dilated self-attention (LongNet, arXiv 2307.02486).

    Args:
        d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias, device,
            dtype: as for ``nn.TransformerEncoderLayer``; ``activation`` is "relu", "gelu" or a function.
        segment_lengths, dilation_rates: the pattern, see :class:`DilatedAttention`.
        xpos_scale_base: turn queries and keys by xPos (arXiv 2212.10554), whose decay acts once in so many rows; 512
            in the paper. None: positions are the caller's business.
        head_offsets, backend: as for :func:`dilated_attention`.

    Raises:
        ValueError: an argument out of range.

    >>> pattern = {"segment_lengths": (32, 128), "dilation_rates": (1, 4)}
    >>> layer = DilatedTransformerEncoderLayer(64, 4, batch_first=True, **pattern)
    >>> layer(torch.randn(2, 100, 64)).shape
    torch.Size([2, 100, 64])
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        xpos_scale_base: float | None = None,
        head_offsets: HeadOffsets = "contiguous",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.self_attn = _self_attention(
            d_model, nhead, dropout, bias, xpos_scale_base, segment_lengths=segment_lengths,
            dilation_rates=dilation_rates, head_offsets=head_offsets, backend=backend, **factory,
        )  # fmt: skip
        self._set_up(
            d_model, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias, 2, factory
        )

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        parallel: Parallel = None,
    ) -> Tensor:
        """``src (B, N, E)``, ``(N, B, E)`` without ``batch_first``, or ``(N, E)``, to the same shape.

        Args:
            src_mask: None, or the causal mask ``(N, N)``, which then means ``is_causal``.
            src_key_padding_mask: bool ``(B, N)``, or ``(N,)`` of an ``(N, E)``; True = ignore.
            is_causal: each row attends only to rows at or before it.
            parallel: the rows of ``src`` and of its padding mask are this rank's (`ContextParallel.shard`), and so are
                those of the result; or a `Streaming`, as for :func:`dilated_attention`.

        Raises:
            ValueError: another mask, or tensors of the wrong shape.
        """
        check_parallel(parallel)
        causal = read_causal("src_mask", src_mask, is_causal, self._rows(src))
        hidden = read_padding("src_key_padding_mask", src_key_padding_mask)

        def attend(x: Tensor) -> Tensor:
            return self.self_attn(x, x, x, key_padding_mask=hidden, is_causal=causal, parallel=parallel)[0]

        return self._turn(self._through(self._turn(src), attend, self._feed_forward))


class DilatedTransformerDecoderLayer(_Layer):
    """:class:`torch.nn.TransformerDecoderLayer` with dilated self-attention, and dense or dilated cross-attention.

    Args:
        d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias, device,
            dtype: as for ``nn.TransformerDecoderLayer``; ``activation`` is "relu", "gelu" or a function.
        segment_lengths, dilation_rates: the pattern, see :class:`DilatedAttention`.
        cross_attention: "dense": every row attends to the whole memory (PyTorch's fused kernels, cost N_tgt x N_src);
            "dilated": row n of the target sees the memory as row n of a text would, by the same pattern, which suits
            memories that run alongside the target.
        xpos_scale_base, head_offsets, backend: as for :class:`DilatedTransformerEncoderLayer`; xPos turns
            self-attention only.

    Raises:
        ValueError: an argument out of range.

    >>> pattern = {"segment_lengths": (32, 128), "dilation_rates": (1, 4)}
    >>> layer = DilatedTransformerDecoderLayer(64, 4, batch_first=True, **pattern)
    >>> layer(torch.randn(2, 80, 64), torch.randn(2, 100, 64), tgt_is_causal=True).shape
    torch.Size([2, 80, 64])
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        cross_attention: CrossAttention = "dense",
        xpos_scale_base: float | None = None,
        head_offsets: HeadOffsets = "contiguous",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if cross_attention not in get_args(CrossAttention):
            raise ValueError(f"cross_attention is {cross_attention!r}; choose 'dense' or 'dilated'")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        pattern: dict[str, Any] = {
            "segment_lengths": segment_lengths, "dilation_rates": dilation_rates, "head_offsets": head_offsets,
            "backend": backend,
        }  # fmt: skip
        self.self_attn = _self_attention(d_model, nhead, dropout, bias, xpos_scale_base, **pattern, **factory)
        self.multihead_attn: nn.MultiheadAttention | MultiheadDilatedAttention
        if cross_attention == "dense":
            self.multihead_attn = nn.MultiheadAttention(d_model, nhead, dropout, bias=bias, batch_first=True, **factory)
        else:
            self.multihead_attn = MultiheadDilatedAttention(d_model, nhead, dropout, bias, **pattern, **factory)
        self._set_up(
            d_model, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias, 3, factory
        )

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
        *,
        parallel: Parallel = None,
        memory_parallel: ContextParallel | None = None,
    ) -> Tensor:
        """``tgt (B, N_tgt, E)`` and ``memory (B, N_src, E)``, laid out as for the encoder layer, to the shape of tgt.

        Args:
            tgt_mask: None, or the causal mask ``(N_tgt, N_tgt)``, which then means ``tgt_is_causal``.
            memory_mask: for dense cross-attention any mask that ``nn.MultiheadAttention`` takes.
            tgt_key_padding_mask, memory_key_padding_mask: bool ``(B, N)``, True = ignore.
            tgt_is_causal: each row attends only to target rows at or before it.
            memory_is_causal: for dilated cross-attention: and only to memory rows at or before its own position; for
                dense as in ``nn.TransformerDecoderLayer``, a hint about ``memory_mask``.
            parallel: where the target lives: its rows and those of its padding mask are this rank's of a sharded
                sequence, and so are those of the result and of ``memory_mask``; or a `Streaming`.
            memory_parallel: what shards the memory and its padding mask; None: they are whole on every rank. Dense
                attention then gathers the memory, of any length, on every rank. Dilated attention takes a memory that
                is sharded like the target alone.

        Raises:
            ValueError: another mask, tensors of the wrong shape, or dilated attention over another sharding.
        """
        check_parallel(parallel)
        check_parallel(memory_parallel)
        dilated = isinstance(self.multihead_attn, MultiheadDilatedAttention)
        if dilated:
            check_alongside(parallel, memory_parallel)
        causal = read_causal("tgt_mask", tgt_mask, tgt_is_causal, self._rows(tgt))
        hidden = read_padding("tgt_key_padding_mask", tgt_key_padding_mask)
        memory, memory_hidden = self._turn(memory), read_padding("memory_key_padding_mask", memory_key_padding_mask)
        if memory_parallel is not None and not dilated:
            memory, memory_hidden = gather_memory(memory, memory_hidden, memory_parallel)

        def attend(x: Tensor) -> Tensor:
            return self.self_attn(x, x, x, key_padding_mask=hidden, is_causal=causal, parallel=parallel)[0]

        def look(x: Tensor) -> Tensor:
            if isinstance(self.multihead_attn, MultiheadDilatedAttention):
                along = read_causal("memory_mask", memory_mask, memory_is_causal, memory.shape[-2])
                return attend_alongside(
                    self.multihead_attn, x, memory, memory_hidden, is_causal=along, parallel=parallel
                )
            return self.multihead_attn(
                x, memory, memory, key_padding_mask=memory_hidden, attn_mask=memory_mask,
                is_causal=memory_is_causal, need_weights=False,
            )[0]  # fmt: skip

        return self._turn(self._through(self._turn(tgt), attend, look, self._feed_forward))


def gather_memory(
    memory: Tensor, hidden: Tensor | None, ranks: ContextParallel, *, dim: int = -2
) -> tuple[Tensor, Tensor | None]:
    """All rows, along ``dim``, of a sharded memory and of its mask ``(..., n)``, on every rank."""
    memory = ranks.unshard(memory, dim, differentiable=True)
    return memory, None if hidden is None else ranks.unshard(hidden, -1)


def check_alongside(parallel: Parallel, memory_parallel: ContextParallel | None) -> None:
    """Raise ValueError unless a target and the memory that it attends to row by row are sharded alike, or not at all.

    It compares what all ranks know, so all of them raise, before anything is sent.
    """
    target, memory = (
        None if not isinstance(one, ContextParallel) else (one.length, one.layout, one.ranks.shape)
        for one in (parallel, memory_parallel)
    )
    if target != memory:
        texts = ["whole" if one is None else f"{one[0]} rows {one[1]} over {one[2]} ranks" for one in (target, memory)]
        raise ValueError(
            f"cross_attention is 'dilated', the target is {texts[0]}, the memory {texts[1]}; give both one length and "
            "one sharding (the shorter of them padded, its rows masked), or use cross_attention='dense'"
        )


def attend_alongside(
    attention: MultiheadDilatedAttention,
    x: Tensor,
    memory: Tensor,
    hidden: Tensor | None,
    *,
    is_causal: bool,
    parallel: Parallel = None,
) -> Tensor:
    """Row n of ``x (..., N_tgt, E)`` attends to ``memory (..., N_src, E)`` as row n of the memory would.

    The shorter of the two is padded at its end: queries with rows that are thrown away, the memory with hidden ones. A
    row without any memory row in its segments gets the output projection's bias. Over ranks both have the same rows.
    """
    rows, keys = x.shape[-2], memory.shape[-2]
    if rows > keys:
        memory = F.pad(memory, (0, 0, 0, rows - keys))
        if hidden is None:
            hidden = torch.zeros(memory.shape[:-1], dtype=torch.bool, device=memory.device)
            hidden[..., keys:] = True
        else:
            hidden = F.pad(hidden, (0, rows - keys), value=True)
    query = F.pad(x, (0, 0, 0, max(0, keys - rows)))
    out, _ = attention(query, memory, memory, key_padding_mask=hidden, is_causal=is_causal, parallel=parallel)
    return out[..., :rows, :]
