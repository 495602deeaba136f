"""LongNet as a decoder-only language model (arXiv 2307.02486)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..merge import accumulator_dtype
from ..parallel import ContextParallel, Streaming, check_parallel
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
from .config import LongNetLMConfig, check_config
from .generation import Prompts, Sampling, stream_tokens
from .model_cache import ModelCache
from .rope import document_positions, rotary_tables


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
        check_config(config, LongNetLMConfig)
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
        parallel: ContextParallel | Streaming | None = None,
        cache: ModelCache | None = None,
    ) -> Tensor:
        """Logits ``(B, N, vocab_size)`` of the token that follows each of ``tokens (B, N)`` int64.

        Args:
            tokens: token ids, 0 to ``vocab_size - 1``, padding included.
            key_padding_mask: ``(B, N)`` bool, True = padding, for rows padded at the end.
            cu_seqlens: ``(documents + 1,)`` boundaries of documents packed in one row of batch 1.
            key_start: position in the document of row 0, int or ``(B,)`` int64; ``-n`` for n tokens of
                padding at the left, so that the document behind it is computed as if alone.
            parallel: ``tokens`` are this rank's rows of a sharded sequence (``ContextParallel.shard``), and so are
                the logits; cu_seqlens and key_start are those of the whole sequence. Or a `Streaming`, with the model
                and the tokens in host memory: attention goes through its device, all else stays on the CPU.
            cache: what the tokens continue (see :meth:`make_cache`), and join. No other argument goes with it.

        Raises:
            ValueError: tokens of the wrong shape, dtype or range (the range on the CPU only: elsewhere a look
                would wait for the device), document arguments that :func:`dilated_attention` refuses or that do not
                go together, or n-grams or a short convolution over a sharded sequence, which would read rows of the
                neighbour.
        """
        return self.logits(self.features(tokens, Documents(key_padding_mask, cu_seqlens, key_start, parallel), cache))

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        key_start: int | Tensor = 0,
        parallel: ContextParallel | Streaming | None = None,
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

    def make_cache(self, *, key_start: int | Tensor = 0, rollback: int = 0) -> ModelCache:
        """An empty cache for :meth:`forward`: each call then gives the logits of the tokens that continue the text.

        It holds at most one longest segment of keys and values a layer, so neither memory nor the time of a step
        grows with the text, and the result is that of one pass over it. Use it in eval mode, without gradients.

        Args:
            key_start: position of the first token to come, as for :meth:`forward`.
            rollback: how many of the last tokens ``cache.crop`` can always take back.

        >>> model = LongNetLM(LongNetLMConfig.preset("demo")).eval()
        >>> tokens, cache = torch.randint(256, (1, 20)), model.make_cache()
        >>> parts = [model(part, cache=cache) for part in tokens.split([17, 1, 2], dim=1)]
        >>> torch.allclose(torch.cat(parts, dim=1), model(tokens), atol=1e-4)
        True
        """
        config = self.config
        return ModelCache(
            config.segment_lengths,
            num_layers=config.num_layers,
            token_rows=max(config.ngram_sizes, default=1) - 1,
            projected_rows=max(config.short_convolution, 1) - 1,
            key_start=key_start,
            rollback=rollback,
        )

    def stream(
        self,
        prompts: Prompts,
        *,
        max_new_tokens: int,
        min_new_tokens: int = 0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        end_token: int | Sequence[int] | None = None,
        generator: torch.Generator | int | None = None,
    ) -> Iterator[Tensor]:
        """The tokens of :meth:`generate` as they are drawn: int64 ``(B,)`` on the CPU, -1 for a text that has ended.

        The model is in eval mode until the iterator is used up or closed.
        """
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
        ends = () if end_token is None else (end_token,) if isinstance(end_token, int) else tuple(end_token)
        return stream_tokens(
            self, prompts, max_new_tokens=max_new_tokens, min_new_tokens=min_new_tokens, sampling=sampling,
            end_tokens=ends, generator=generator,
        )  # fmt: skip

    def generate(
        self,
        prompts: Prompts,
        *,
        max_new_tokens: int,
        min_new_tokens: int = 0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        end_token: int | Sequence[int] | None = None,
        generator: torch.Generator | int | None = None,
    ) -> list[Tensor]:
        """Continue prompts of any lengths: the new tokens of each, int64 ``(at most max_new_tokens,)`` on the CPU.

        Keys and values of past tokens are kept as :meth:`make_cache` says, so a step costs the same after a million
        tokens. Shorter prompts are padded at the left, and continue as they would alone.

        Args:
            prompts: token ids, ``(B, N)`` or a list of B sequences or 1-D tensors, none empty.
            max_new_tokens: most tokens to add to each prompt.
            min_new_tokens: no end token is drawn before as many.
            temperature: the logits are divided by it; 0 takes the most probable token (greedy).
            top_k: draw from so many most probable tokens only.
            top_p: draw from the fewest most probable tokens that have this probability together.
            end_token: the token, or one of those, that ends a text; it is not returned.
            generator: of the model's device, or a seed for one; None: torch's own.

        Raises:
            ValueError: an empty prompt, token ids out of range, or an option out of range.
            FloatingPointError: logits that are NaN or infinite.

        >>> model = LongNetLM(LongNetLMConfig.preset("demo"))
        >>> [len(text) for text in model.generate([[1, 2, 3], [4]], max_new_tokens=5, temperature=0)]
        [5, 5]
        >>> for tokens in model.stream([[1, 2, 3], [4]], max_new_tokens=2, top_p=0.9, generator=0):
        ...     assert tokens.shape == (2,)
        """
        stream = self.stream(
            prompts, max_new_tokens=max_new_tokens, min_new_tokens=min_new_tokens, temperature=temperature,
            top_k=top_k, top_p=top_p, end_token=end_token, generator=generator,
        )  # fmt: skip
        steps = [torch.full((len(prompts),), -1), *stream]
        return [row[row >= 0] for row in torch.stack(steps, dim=1)]

    def features(self, tokens: Tensor, documents: Documents, cache: ModelCache | None = None) -> Tensor:
        """The normalised residual stream ``(B, N, embed_dim)`` that the logits are projected from."""
        config = self.config
        check_parallel(documents.parallel)
        if documents.ranks is not None and (config.ngram_sizes or config.short_convolution):
            name = "ngram_sizes" if config.ngram_sizes else "short_convolution"
            raise ValueError(f"{name} reads rows that the neighbour rank holds; leave it out of the configuration")
        if cache is not None:
            documents = _continued(documents, cache)
        embedded = self._embed(tokens)
        rows = documents.rows(tokens.device)
        positions = document_positions(
            tokens, cu_seqlens=documents.cu_seqlens, key_start=documents.key_start, rows=rows
        )
        # Where every batch row is one document from its first row on, there is nothing of another to keep out.
        whole = documents.cu_seqlens is None and isinstance(documents.key_start, int) and documents.key_start >= 0
        inside = None if whole and not (cache is not None and cache.padded) else positions
        if self.ngrams is not None:
            terms = 1 + len(config.ngram_sizes)
            recent = None if cache is None else cache.tokens
            embedded = (embedded + self.ngrams(tokens, inside, recent)) * terms**-0.5
        x = self.dropout(embedded * config.embed_dim**0.5)
        table_dtype = accumulator_dtype(self.embedding.weight.dtype)
        tables = rotary_tables(positions, config.head_dim, base=config.rope_base, dtype=table_dtype)
        recompute = config.activation_checkpointing and torch.is_grad_enabled() and cache is None
        for block, layer in zip(self.blocks, [None] * len(self.blocks) if cache is None else cache.layers, strict=True):
            if recompute:
                x = checkpoint(block, x, tables, documents, inside, use_reentrant=False)
            else:
                x = block(x, tables, documents, inside, layer)
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


def _continued(documents: Documents, cache: ModelCache) -> Documents:
    """Where the rows that continue a cache lie; an int key_start where all batch rows agree."""
    alone = isinstance(documents.key_start, int) and documents == (None, None, 0, None)
    if not alone:
        raise ValueError(
            "cache= goes with no other argument; key_start is given to make_cache, and padding at the left by it"
        )
    starts = cache.next_position
    return Documents(None, None, int(starts[0]) if len(starts.unique()) == 1 else starts)
