"""LongNet as an encoder-decoder, in place of ``nn.Transformer`` (arXiv 2307.02486)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..parallel import ContextParallel
from ..types import HeadOffsets
from .masks import count_rows, read_causal, read_padding
from .transformer_layers import (
    Activation,
    CrossAttention,
    DilatedTransformerDecoderLayer,
    DilatedTransformerEncoderLayer,
    Parallel,
    check_alongside,
    gather_memory,
)


class _Stack(nn.Module):
    """Layers and a final norm, under the state-dict keys of ``nn.TransformerEncoder`` and ``...Decoder``."""

    def __init__(self, layers: list[nn.Module], norm: nn.LayerNorm) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm

    def forward(self, x: Tensor, *rest: Any, **options: Any) -> Tensor:
        for layer in self.layers:
            x = layer(x, *rest, **options)
        return self.norm(x)


class LongNet(nn.Module):
    """An encoder-decoder of dilated attention over embeddings; positions are the caller's business, or xPos's.

    With one segment of rate 1 over every row it computes what ``nn.Transformer`` does, whose state dicts it loads.
    Defaults are the sizes of the paper's language model.

    Args:
        d_model: width of the embeddings.
        nhead: heads of every attention.
        num_encoder_layers, num_decoder_layers: layers of the two stacks.
        dim_feedforward: width of the feed-forward layers.
        segment_lengths, dilation_rates: the pattern of self-attention, see :class:`DilatedAttention`.
        dropout: probability of dropping an attention weight, or an element of a sub-layer's result, in training.
        activation: "relu", "gelu" or a function.
        layer_norm_eps: of every norm.
        cross_attention: "dense" or "dilated", see :class:`DilatedTransformerDecoderLayer`.
        batch_first: tensors are ``(B, N, E)``; False: ``(N, B, E)``.
        norm_first, bias, device, dtype: as for ``nn.Transformer``.
        xpos_scale_base, head_offsets, backend: as for :class:`DilatedTransformerEncoderLayer`.

    Raises:
        ValueError: an argument out of range.

    >>> model = LongNet(64, 4, 2, 2, 128, segment_lengths=(32, 128), dilation_rates=(1, 4))
    >>> source, target = torch.randn(2, 200, 64), torch.randn(2, 50, 64)
    >>> model(source, target, tgt_is_causal=True).shape
    torch.Size([2, 50, 64])
    """

    def __init__(
        self,
        d_model: int = 768,
        nhead: int = 12,
        num_encoder_layers: int = 12,
        num_decoder_layers: int = 12,
        dim_feedforward: int = 3072,
        segment_lengths: Sequence[int] = (2048, 4096, 8192, 16384, 32768),
        dilation_rates: Sequence[int] = (1, 2, 4, 6, 12),
        dropout: float = 0.0,
        activation: Activation = "relu",
        layer_norm_eps: float = 1e-5,
        *,
        cross_attention: CrossAttention = "dense",
        batch_first: bool = True,
        norm_first: bool = False,
        bias: bool = True,
        xpos_scale_base: float | None = None,
        head_offsets: HeadOffsets = "contiguous",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        layers = {"num_encoder_layers": num_encoder_layers, "num_decoder_layers": num_decoder_layers}
        for name, count in layers.items():
            if isinstance(count, bool) or not isinstance(count, int) or count < 0:
                raise ValueError(f"{name} is {count!r}; give an integer of at least 0")
        options: dict[str, Any] = {
            "dim_feedforward": dim_feedforward,
            "dropout": dropout,
            "activation": activation,
            "layer_norm_eps": layer_norm_eps,
            "batch_first": batch_first,
            "norm_first": norm_first,
            "bias": bias,
            "segment_lengths": segment_lengths,
            "dilation_rates": dilation_rates,
            "xpos_scale_base": xpos_scale_base,
            "head_offsets": head_offsets,
            "backend": backend,
            "device": device,
            "dtype": dtype,
        }
        self.d_model, self.nhead, self.batch_first = d_model, nhead, batch_first
        self.cross_attention = cross_attention

        def norm() -> nn.LayerNorm:
            return nn.LayerNorm(d_model, eps=layer_norm_eps, bias=bias, device=device, dtype=dtype)

        self.encoder = _Stack(
            [DilatedTransformerEncoderLayer(d_model, nhead, **options) for _ in range(num_encoder_layers)], norm()
        )
        options["cross_attention"] = cross_attention
        self.decoder = _Stack(
            [DilatedTransformerDecoderLayer(d_model, nhead, **options) for _ in range(num_decoder_layers)], norm()
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights anew as ``nn.Transformer`` does: Xavier's uniform for every matrix."""
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(
        self,
        src: Tensor,
        tgt: Tensor,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        src_is_causal: bool | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
        *,
        parallel: Parallel = None,
        src_parallel: ContextParallel | None = None,
    ) -> Tensor:
        """Embeddings ``src (B, N_src, E)`` and ``tgt (B, N_tgt, E)``, or unbatched ``(N, E)``, to the shape of tgt.

        Masks are those of ``nn.Transformer``; ``src_mask`` and ``tgt_mask`` may only be causal ones, for which
        ``src_is_causal`` and ``tgt_is_causal`` say the same without a matrix. Padding masks are bool ``(B, N)``,
        True = ignore; what a padded source row holds has no effect where ``memory_key_padding_mask`` hides it too.

        Under ``parallel``, a `ContextParallel`, source and target are this rank's rows, with their padding masks, and
        so is the result. A source of another length has a `ContextParallel` of its own, ``src_parallel``; dilated
        cross-attention refuses that. A `Streaming` takes all attention but dense cross-attention through its device.

        Raises:
            ValueError: another mask, or tensors of the wrong shape.
        """
        over = parallel if src_parallel is None else src_parallel
        memory_parallel = over if isinstance(over, ContextParallel) else None
        self._check_cross_attention(parallel, memory_parallel)
        memory = self.encode(src, src_mask, src_key_padding_mask, src_is_causal, parallel=over)
        return self.decode(
            tgt,
            memory,
            tgt_mask,
            memory_mask,
            tgt_key_padding_mask,
            memory_key_padding_mask,
            tgt_is_causal,
            memory_is_causal,
            parallel=parallel,
            memory_parallel=memory_parallel,
        )

    def encode(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        src_is_causal: bool | None = None,
        *,
        parallel: Parallel = None,
    ) -> Tensor:
        """The memory that :meth:`decode` reads, of the shape of ``src``; arguments as for :meth:`forward`."""
        causal = read_causal("src_mask", src_mask, src_is_causal, count_rows(src, batch_first=self.batch_first))
        hidden = read_padding("src_key_padding_mask", src_key_padding_mask)
        return self.encoder(src, None, hidden, causal, parallel=parallel)

    def decode(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
        *,
        parallel: Parallel = None,
        memory_parallel: ContextParallel | None = None,
    ) -> Tensor:
        """The decoder's output for a memory of :meth:`encode`; arguments as for :meth:`forward`.

        ``memory_parallel`` is what shards the memory; None: it is whole on every rank.
        """
        self._check_cross_attention(parallel, memory_parallel)
        causal = read_causal("tgt_mask", tgt_mask, tgt_is_causal, count_rows(tgt, batch_first=self.batch_first))
        hidden = read_padding("tgt_key_padding_mask", tgt_key_padding_mask)
        memory_hidden = read_padding("memory_key_padding_mask", memory_key_padding_mask)
        if memory_parallel is not None and self.cross_attention == "dense":  # once for all layers
            rows = -2 if self.batch_first or memory.dim() == 2 else 0
            memory, memory_hidden = gather_memory(memory, memory_hidden, memory_parallel, dim=rows)
            memory_parallel = None
        return self.decoder(
            tgt, memory, None, memory_mask, hidden, memory_hidden, causal, memory_is_causal,
            parallel=parallel, memory_parallel=memory_parallel,
        )  # fmt: skip

    def _check_cross_attention(self, parallel: Parallel, memory_parallel: ContextParallel | None) -> None:
        if self.cross_attention == "dilated":
            check_alongside(parallel, memory_parallel)
