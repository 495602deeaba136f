"""LongNet's encoder, with the options and the state-dict keys of torchscale's; causal, the stack of its decoder."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..merge import accumulator_dtype
from ..modules import DilatedAttention
from ..ordering import HilbertOrdering
from ..parallel import ContextParallel, Streaming, check_parallel
from .blocks import Documents, Factory
from .config import check_config
from .encoder_config import LongNetEncoderConfig
from .pointwise import Stream, add_norm_linear, norm_linear
from .xpos import XPos, XPosTables, apply_xpos, centred_positions


class DropPath(nn.Module):
    """Drops a residual update for whole documents (stochastic depth, arXiv 1603.09382), in training.

    What is kept is divided by the probability of being kept. A document is a batch row, or one of those packed in it.
    Ranks that share documents drop what the first of them draws.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(
        self, x_BNE: Tensor, cu_seqlens: Tensor | None = None, ranks: ContextParallel | None = None
    ) -> Tensor | None:
        """What multiplies an update ``(B, N, E)``: ``(B,)`` or, where documents are packed, ``(N,)``; None for 1."""
        if not self.training or self.rate == 0.0:
            return None
        documents = x_BNE.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        drawn = torch.rand(documents, device=x_BNE.device)
        kept = (drawn if ranks is None else ranks.ranks.first(drawn)) >= self.rate
        factor = kept.to(accumulator_dtype(x_BNE.dtype)) / (1.0 - self.rate)
        if cu_seqlens is None:
            return factor
        row = torch.arange(x_BNE.shape[1], device=x_BNE.device) if ranks is None else ranks.positions(x_BNE.device)
        return factor[torch.bucketize(row, cu_seqlens[1:].to(row), right=True)]

    def extra_repr(self) -> str:
        """The probability."""
        return f"rate={self.rate:.3g}"


class EncoderSelfAttention(nn.Module):
    """Dilated self-attention with separate projections, and under ``subln`` a norm before the last."""

    def __init__(self, config: LongNetEncoderConfig, factory: Factory) -> None:
        super().__init__()
        width, self.head_dim = config.embed_dim, config.head_dim
        self.k_proj = nn.Linear(width, width, **factory)
        self.v_proj = nn.Linear(width, width, **factory)
        self.q_proj = nn.Linear(width, width, **factory)
        self.out_proj = nn.Linear(width, width, **factory)
        self.inner_attn_ln = nn.LayerNorm(width, eps=config.layer_norm_eps, **factory) if config.subln else None
        self.xpos = XPos(self.head_dim, config.xpos_scale_base, factory["device"]) if config.xpos else None
        self.attention = DilatedAttention(
            config.segment_lengths,
            config.dilation_rates,
            is_causal=config.is_causal,
            dropout=config.attention_dropout,
            head_offsets=config.head_offsets,
            padding=config.padding,
            mixing_grad=config.mixing_grad,
            backend=config.backend,
        )

    def forward(
        self, stream: Stream, documents: Documents, tables: XPosTables | None, norm: nn.LayerNorm | None = None
    ) -> tuple[Tensor, Tensor]:
        """The stream's sum and its update, each ``(B, N, E)``; ``norm`` comes before the projections."""
        x, projected = _project(stream, norm, [self.q_proj, self.k_proj, self.v_proj])
        query, key, value = (part.unflatten(-1, (-1, self.head_dim)) for part in projected)
        if tables is not None:
            query, key = apply_xpos(query, key, tables)
        out = self.attention(
            query,
            key,
            value,
            key_padding_mask=documents.key_padding_mask,
            cu_seqlens=documents.cu_seqlens,
            key_start=documents.key_start,
            parallel=documents.parallel,
        ).flatten(-2)
        if self.inner_attn_ln is None:
            return x, self.out_proj(out)
        return x, norm_linear(out, self.inner_attn_ln, [self.out_proj])[0]


class EncoderFeedForward(nn.Module):
    """Two projections with a GELU between, and under ``subln`` a norm before the second."""

    def __init__(self, config: LongNetEncoderConfig, factory: Factory) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.embed_dim, config.ffn_width, **factory)
        self.fc2 = nn.Linear(config.ffn_width, config.embed_dim, **factory)
        self.ffn_layernorm: nn.LayerNorm | None = None
        if config.subln:
            self.ffn_layernorm = nn.LayerNorm(config.ffn_width, eps=config.layer_norm_eps, **factory)
        self.dropout = nn.Dropout(config.activation_dropout)

    def forward(self, stream: Stream, norm: nn.LayerNorm | None = None) -> tuple[Tensor, Tensor]:
        """The stream's sum and its update, each ``(B, N, E)``; ``norm`` comes before the first projection."""
        x, (hidden,) = _project(stream, norm, [self.fc1])
        dropping = self.training and self.dropout.p > 0
        if self.ffn_layernorm is not None and not dropping:
            return x, norm_linear(hidden, self.ffn_layernorm, [self.fc2], gelu=True)[0]
        hidden = self.dropout(F.gelu(hidden))
        return x, self.fc2(hidden if self.ffn_layernorm is None else self.ffn_layernorm(hidden))


def _project(stream: Stream, norm: nn.LayerNorm | None, linears: list[nn.Linear]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The stream's sum, and linears of its norm, or of itself where there is none."""
    if norm is not None:
        return add_norm_linear(stream, norm, linears)
    x = stream.total()
    return x, tuple(linear(x) for linear in linears)


class EncoderLayer(nn.Module):
    """Attention and feed-forward, each added to its input; ``final_layer_norm`` is that of the feed-forward."""

    def __init__(self, config: LongNetEncoderConfig, index: int, factory: Factory) -> None:
        super().__init__()
        self.normalize_before = config.normalize_before
        self.self_attn = EncoderSelfAttention(config, factory)
        self.self_attn_layer_norm = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps, **factory)
        self.ffn = EncoderFeedForward(config, factory)
        self.final_layer_norm = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps, **factory)
        self.dropout = nn.Dropout(config.dropout)
        self.drop_path = DropPath(config.drop_path(index))

    def forward(self, stream: Stream, documents: Documents, tables: XPosTables | None) -> Stream:
        """The stream ``(B, N, E)`` with both updates, the last of them still to be added."""
        before = self.normalize_before
        x, update = self.self_attn(stream, documents, tables, self.self_attn_layer_norm if before else None)
        stream = Stream(x, self.dropout(update), self.drop_path(x, documents.cu_seqlens, documents.ranks))
        if not before:
            stream = Stream(self.self_attn_layer_norm(stream.total()))
        x, update = self.ffn(stream, self.final_layer_norm if before else None)
        stream = Stream(x, self.dropout(update), self.drop_path(x, documents.cu_seqlens, documents.ranks))
        return stream if before else Stream(self.final_layer_norm(stream.total()))


class LongNetEncoder(nn.Module):
    """Bidirectional transformer with dilated self-attention, over embeddings that it is given.

    State-dict keys are those of torchscale's ``LongNetEncoder``, so its weights load strictly and ours load there.
    Where the model is fresh, its initial values are Xavier's with MAGNETO's gains under ``subln``.

    With ``padding="zeros"`` outputs equal torchscale's except where a document is longer than a segment length that is
    no multiple of its rate: there torchscale returns rows at wrong places, which a warning says once for each model.

    Args:
        config: sizes and options.
        device, dtype: of the parameters. On the "meta" device they take no memory; after ``to_empty(device=...)``
            call :meth:`reset_parameters` or load a state dict.

    >>> config = LongNetEncoderConfig(
    ...     embed_dim=32, num_layers=2, num_heads=4, segment_lengths=(16, 64), dilation_rates=(1, 4)
    ... )
    >>> LongNetEncoder(config)(torch.randn(2, 100, 32)).shape
    torch.Size([2, 100, 32])
    """

    def __init__(
        self,
        config: LongNetEncoderConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_config(config, LongNetEncoderConfig)
        factory = Factory(device=device, dtype=dtype)
        self.config = config
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(EncoderLayer(config, i, factory) for i in range(config.num_layers))
        self.layer_norm: nn.LayerNorm | None = None
        if config.normalize_before and config.final_norm:
            self.layer_norm = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps, **factory)
        # Segments that torchscale pads in their middle, so that all that follows is shifted.
        branches = zip(config.segment_lengths, config.dilation_rates, strict=True)
        self._misplaced = sorted((w, r) for w, r in branches if w % r and config.padding == "zeros")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew from torch's generator; see the class for the distribution."""
        gain = math.sqrt(math.log(2 * self.config.num_layers)) if self.config.subln else 1.0
        for name, module in self.named_modules():
            if isinstance(module, (nn.LayerNorm, XPos)):
                module.reset_parameters()
            elif isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight, gain=1.0 if name.endswith(("q_proj", "k_proj")) else gain)
                nn.init.zeros_(module.bias)

    def forward(
        self,
        x: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        ordering: HilbertOrdering | None = None,
        parallel: ContextParallel | Streaming | None = None,
    ) -> Tensor:
        """Encode embeddings ``(B, N, embed_dim)``: ``(B, N, embed_dim)``, the final norm applied if there is one.

        Args:
            x: embeddings, positions included; what they hold at masked rows has no effect.
            key_padding_mask: ``(B, N)`` bool, True = padding; with ``padding="zeros"`` at the end of each row.
            cu_seqlens: ``(documents + 1,)`` boundaries of documents packed in one row of batch 1.
            ordering: in which order the layers see the rows. They are permuted once before the first layer and put
                back after the last, masks and xPos's positions with them.
            parallel: the rows of ``x`` and of the mask are this rank's of a sharded sequence (`ContextParallel.shard`),
                and so are those of the result; cu_seqlens are of the whole. Or a `Streaming`, with model and
                embeddings in host memory: attention goes through its device.

        Raises:
            ValueError: embeddings of another shape, document arguments that :func:`dilated_attention` refuses, an
                ordering of other rows or documents or over a sharded sequence, or with ``xpos`` documents so long that
                its scale overflows.
        """
        stream = Stream(x)
        for state in self._states(x, Documents(key_padding_mask, cu_seqlens, 0, parallel), ordering):
            stream = state
        x = stream.total()
        x = x if ordering is None else ordering.invert(x)
        return x if self.layer_norm is None else self.layer_norm(x)

    def iter_states(
        self,
        x: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        ordering: HilbertOrdering | None = None,
        parallel: ContextParallel | Streaming | None = None,
    ) -> Iterator[Tensor]:
        """The residual stream: the input, then the output of each layer, before the final norm; as :meth:`forward`.

        One at a time, so that whoever wants a summary of every layer need not hold all of them.
        """
        documents = Documents(key_padding_mask, cu_seqlens, 0, parallel)
        for stream in self._states(x, documents, ordering, summed=True):
            yield stream.x if ordering is None else ordering.invert(stream.x)

    def _states(
        self, x: Tensor, documents: Documents, ordering: HilbertOrdering | None, *, summed: bool = False
    ) -> Iterator[Stream]:
        """The residual stream, its rows in the order of ``ordering``; ``summed``: with no update still to be added."""
        config = self.config
        if x.dim() != 3 or x.shape[2] != config.embed_dim or 0 in x.shape:
            raise ValueError(
                f"the encoder's input has shape {tuple(x.shape)}; give (batch, rows, {config.embed_dim}), not empty"
            )
        check_parallel(documents.parallel)
        if documents.ranks is not None:
            documents.ranks.check_rows("the encoder's input", x.shape[1])
        mask = documents.key_padding_mask
        if ordering is not None:
            if documents.ranks is not None:
                raise ValueError(
                    "ordering is given, and parallel is a ContextParallel, whose ranks hold some rows each; apply the "
                    "ordering to the whole sequence before shard(), and undo it after unshard()"
                )
            ordering.check(is_causal=config.is_causal)
            _check_documents(ordering, documents.cu_seqlens)
            x = ordering.apply(x)
            mask = None if mask is None else ordering.apply(mask)
            documents = documents._replace(key_padding_mask=mask)
        longest = self._longest_document(documents.length(x.shape[1]), documents.cu_seqlens)
        self._warn_misplaced(longest)
        tables = self._xpos_tables(x, documents, longest, ordering)
        if mask is not None:
            x = x.masked_fill(mask[..., None], 0.0)
        stream = Stream(self.dropout(x))
        yield stream
        recompute = config.activation_checkpointing and torch.is_grad_enabled()
        for layer in self.layers:
            if recompute:  # what it starts from is kept: the sum alone
                stream = Stream(stream.total())
                stream = checkpoint(layer, stream, documents, tables, use_reentrant=False)
            else:
                stream = layer(stream, documents, tables)
            if summed:
                stream = Stream(stream.total())
            yield stream

    def _longest_document(self, rows: int, cu_seqlens: Tensor | None) -> int:
        """Rows of the longest document; for packed ones it waits for the device, so only where it matters."""
        needed = self.config.xpos or (self._misplaced and rows > self._misplaced[0][0])
        if cu_seqlens is None or not needed or cu_seqlens.is_meta or torch.compiler.is_compiling():
            return rows
        return int(cu_seqlens.diff().max()) if cu_seqlens.dim() == 1 and len(cu_seqlens) > 1 else rows

    def _xpos_tables(
        self, x: Tensor, documents: Documents, longest: int, ordering: HilbertOrdering | None
    ) -> XPosTables | None:
        xpos: XPos | None = self.layers[0].self_attn.xpos  # type: ignore[assignment,union-attr]  # of an EncoderLayer
        if xpos is None:
            return None
        autocast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        xpos.check_span(longest, max(self.config.segment_lengths), dtype)
        length, rows = documents.length(x.shape[1]), documents.rows(x.device)
        positions = centred_positions(length, documents.cu_seqlens, x.device, rows=rows)
        if ordering is not None:
            positions = positions[0, ordering.positions(x.device)].view(-1, x.shape[1])
        return xpos.tables(positions, accumulator_dtype(x.dtype))

    def _warn_misplaced(self, longest: int) -> None:
        shifted = [f"{w} (rate {r})" for w, r in self._misplaced if longest > w]
        if not shifted or torch.compiler.is_compiling():
            return
        self._misplaced = []
        warnings.warn(
            f"a document of {longest} rows is longer than segments of {', '.join(shifted)}, no multiple of their rate: "
            "torchscale returns what follows the first such segment at wrong rows. Here every row is at its own place, "
            "so the output differs from torchscale's.",
            stacklevel=3,
        )


def _check_documents(ordering: HilbertOrdering, cu_seqlens: Tensor | None) -> None:
    """An ordering must leave every row in its document."""
    if ordering.cu_seqlens is None and cu_seqlens is None:
        return
    if torch.compiler.is_compiling() and None not in (ordering.cu_seqlens, cu_seqlens):
        return
    bounds = None if cu_seqlens is None else tuple(cu_seqlens.tolist())
    if ordering.cu_seqlens != bounds:
        raise ValueError(
            f"the ordering's cu_seqlens are {ordering.cu_seqlens}, the encoder's {bounds}; give both the same documents"
        )
