"""LongNet as a decoder-only language model (arXiv 2307.02486)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..merge import accumulator_dtype
from .blocks import (
    Block,
    CausalSelfAttention,
    Documents,
    Factory,
    FeedForward,
    Gains,
    NgramEmbedding,
    make_norm,
)
from .config import LongNetLMConfig
from .rope import document_positions, rotary_tables

if TYPE_CHECKING:
    from ..parallel import ContextParallel


class LongNetLM(nn.Module):
    """Decoder-only transformer with dilated self-attention and rotary positions, MAGNETO's or pre-norm.

    It differs from the paper's model in its positions (RoPE, not xPos) and, by default, its vocabulary.
    Positions are those in the document: they restart with each packed document and shift with ``key_start``.

    Args:
        config: sizes and options.
        device, dtype: of the parameters. On the "meta" device they take no memory; after
            ``to_empty(device=...)`` call :meth:`reset_parameters` or load a state dict.

    >>> model = LongNetLM(LongNetLMConfig.preset("demo"))
    >>> tokens = torch.randint(256, (1, 300))
    >>> model(tokens).shape
    torch.Size([1, 300, 256])
    >>> model.loss(tokens[:, :-1], tokens[:, 1:]).shape
    torch.Size([])
    """

    def __init__(
        self,
        config: LongNetLMConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = Factory(device=device, dtype=dtype)
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.embed_dim, **factory)
        self.ngrams = NgramEmbedding(config, factory) if config.ngram_sizes else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, factory) for _ in range(config.num_layers))
        self.norm = make_norm(config, config.embed_dim, factory)
        # Tied, the weight has no second name: state dicts hold it once, and to_empty() cannot untie it.
        self.output: nn.Linear | None = None
        if not config.tie_embeddings:
            self.output = nn.Linear(config.embed_dim, config.vocab_size, bias=False, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew from torch's generator, with the gains that ``config.norm`` asks for."""
        gains = Gains.of(self.config)
        for module in self.modules():
            if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                module.reset_parameters()
            elif isinstance(module, (CausalSelfAttention, FeedForward)):
                module.reset_parameters(gains)
        # Gives logits of unit variance, tied or not; features() scales its input back.
        std = self.config.embed_dim**-0.5
        tables = (self.embedding, None if self.ngrams is None else self.ngrams.embedding, self.output)
        for weight in (None if table is None else table.weight for table in tables):
            if weight is not None:
                nn.init.normal_(weight, std=std)

    def forward(
        self,
        tokens: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        key_start: int | Tensor = 0,
        parallel: ContextParallel | None = None,
    ) -> Tensor:
        """Logits ``(B, N, vocab_size)`` of the token that follows each of ``tokens (B, N)`` int64.

        Args:
            tokens: token ids, 0 to ``vocab_size - 1``, padding included.
            key_padding_mask: ``(B, N)`` bool, True = padding, for rows padded at the end.
            cu_seqlens: ``(documents + 1,)`` boundaries of documents packed in one row of batch 1.
            key_start: position in the document of row 0, int or ``(B,)`` int64; ``-n`` for n tokens of
                padding at the left, so that the document behind it is computed as if alone.
            parallel: ``tokens`` are this rank's rows of a sharded sequence (``ContextParallel.shard``), and so are
                the logits; cu_seqlens and key_start are those of the whole sequence.

        Raises:
            ValueError: tokens of the wrong shape, dtype or range (the range on the CPU only: elsewhere a look
                would wait for the device), document arguments that :func:`dilated_attention` refuses, or n-grams or
                a short convolution over a sharded sequence, which would read rows of the neighbour.
        """
        return self.logits(self.features(tokens, Documents(key_padding_mask, cu_seqlens, key_start, parallel)))

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        key_start: int | Tensor = 0,
        parallel: ContextParallel | None = None,
        reduction: Literal["mean", "sum", "none"] = "mean",
        ignore_index: int = -100,
        chunk: int = 4096,
    ) -> Tensor:
        """Cross entropy in nats of ``targets (B, N)``, the tokens that follow ``tokens (B, N)``.

        Logits exist for ``chunk`` rows at a time and are recomputed in the backward, so a long context and a
        large vocabulary cost no ``N x vocab_size`` memory. Targets of ``ignore_index`` count 0. The mean is
        over the others, 0 when there are none; "none" gives ``(B, N)``. Further arguments are
        :meth:`forward`'s; under ``parallel`` the loss is that of this rank's rows.

        Raises:
            ValueError: as :meth:`forward`; targets of another shape or dtype; an unknown reduction; a chunk
                below 1.
        """
        if targets.shape != tokens.shape or targets.dtype != torch.int64:
            raise ValueError(
                f"targets has shape {tuple(targets.shape)} and dtype {targets.dtype}; give one torch.int64 "
                f"target a token, shape {tuple(tokens.shape)}"
            )
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction is {reduction!r}; choose 'mean', 'sum' or 'none'")
        if chunk < 1:
            raise ValueError(f"chunk is {chunk!r}; give at least 1 row")

        def rows_loss(features_RE: Tensor, targets_R: Tensor) -> Tensor:
            logits = self.logits(features_RE)
            logits = logits.to(accumulator_dtype(logits.dtype))
            return F.cross_entropy(logits, targets_R, reduction="none", ignore_index=ignore_index)

        features = self.features(tokens, Documents(key_padding_mask, cu_seqlens, key_start, parallel)).flatten(0, 1)
        pairs = zip(features.split(chunk), targets.flatten().split(chunk), strict=True)
        if features.shape[0] <= chunk:
            losses = rows_loss(*next(pairs))
        else:
            losses = torch.cat([checkpoint(rows_loss, *pair, use_reentrant=False) for pair in pairs])
        if reduction == "none":
            return losses.view_as(targets)
        if reduction == "sum":
            return losses.sum()
        return losses.sum() / (targets != ignore_index).sum().clamp(min=1)

    def features(self, tokens: Tensor, documents: Documents) -> Tensor:
        """The normalised residual stream ``(B, N, embed_dim)`` that the logits are projected from."""
        config, parallel = self.config, documents.parallel
        if parallel is not None and (config.ngram_sizes or config.short_convolution):
            name = "ngram_sizes" if config.ngram_sizes else "short_convolution"
            raise ValueError(f"{name} reads rows that the neighbour rank holds; leave it out of the configuration")
        embedded = self._embed(tokens)
        rows = None if parallel is None else parallel.positions(tokens.device)
        positions = document_positions(
            tokens, cu_seqlens=documents.cu_seqlens, key_start=documents.key_start, rows=rows
        )
        # Where every batch row is one document from its first row on, there is nothing of another to keep out.
        whole = documents.cu_seqlens is None and isinstance(documents.key_start, int) and documents.key_start >= 0
        inside = None if whole else positions
        if self.ngrams is not None:
            terms = 1 + len(config.ngram_sizes)
            embedded = (embedded + self.ngrams(tokens, inside)) * terms**-0.5
        x = self.dropout(embedded * config.embed_dim**0.5)
        table_dtype = accumulator_dtype(self.embedding.weight.dtype)
        tables = rotary_tables(positions, config.head_dim, base=config.rope_base, dtype=table_dtype)
        recompute = config.activation_checkpointing and torch.is_grad_enabled()
        for block in self.blocks:
            if recompute:
                x = checkpoint(block, x, tables, documents, inside, use_reentrant=False)
            else:
                x = block(x, tables, documents, inside)
        return self.norm(x)

    def logits(self, features: Tensor) -> Tensor:
        """Project features ``(..., embed_dim)`` to logits ``(..., vocab_size)``."""
        return F.linear(features, self.embedding.weight if self.output is None else self.output.weight)

    def _embed(self, tokens: Tensor) -> Tensor:
        if tokens.dim() != 2 or 0 in tokens.shape or tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"tokens has shape {tuple(tokens.shape)} and dtype {tokens.dtype}; give (batch, rows), at "
                "least (1, 1), of torch.int64"
            )
        try:
            return self.embedding(tokens)
        except IndexError as error:  # from the CPU's kernel, which checks for free
            raise ValueError(
                f"tokens has ids from {tokens.min()} to {tokens.max()}; vocab_size is "
                f"{self.config.vocab_size}, so give 0 to {self.config.vocab_size - 1}"
            ) from error
