"""LongNet's blocks as a base model of the transformers library: :class:`LongNetLM` inside, nothing copied."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, initialization
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import can_return_tuple

from ...models import LongNetLM
from ...models.blocks import CausalSelfAttention, Documents, ShortConvolution
from .cache import LongNetCache
from .configuration import LongNetConfig
from .padding import read_padding


class LongNetPreTrainedModel(PreTrainedModel):
    """What all LongNet models of this package share: configuration, initial values, gradient checkpointing."""

    config: LongNetConfig
    config_class = LongNetConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_context_parallel = False  # transformers' own; this library's is another

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initial values where there are none yet: of a head, or of what a saved model lacks.

        Those of a new backbone were drawn when it was made and are marked as such, so they stay.
        """
        bias = getattr(module, "bias", None)
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            initialization.ones_(module.weight)
        elif isinstance(module, nn.Embedding) or (
            isinstance(module, nn.Linear) and module is self.get_output_embeddings()
        ):
            initialization.normal_(module.weight, std=self.config.embed_dim**-0.5)
        elif isinstance(module, nn.Linear):
            initialization.xavier_normal_(module.weight)
        elif isinstance(module, ShortConvolution) and not getattr(module.weight, "_is_hf_initialized", False):
            module.reset_parameters([0])
        if isinstance(bias, nn.Parameter):
            initialization.zeros_(bias)

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] | None = None,
        every_n_layers: int = 1,
    ) -> None:
        """Recompute every block in the backward pass; what transformers' methods and arguments for it end in."""
        asked = dict(getattr(gradient_checkpointing_func, "keywords", {}), every_n_layers=every_n_layers)
        function = getattr(gradient_checkpointing_func, "func", gradient_checkpointing_func)
        if function not in (None, checkpoint):  # transformers' own around it
            asked["offload"] = True
        if enable and asked not in ({"every_n_layers": 1}, {"every_n_layers": 1, "use_reentrant": False}):
            raise ValueError(
                f"gradient checkpointing was asked for with {asked}; LongNet models recompute every block with "
                "use_reentrant=False: leave other options out"
            )
        for module in self.modules():
            if isinstance(module, LongNetModel):
                module.gradient_checkpointing = enable


class LongNetModel(LongNetPreTrainedModel):
    """The residual stream of :class:`LongNetLM` behind its last norm, without a head.

    Causal, or bidirectional where ``config.is_causal`` is False. N-grams and short convolutions, if the configuration
    has them, look at rows before their own in both.

    >>> model = LongNetModel(LongNetConfig(embed_dim=32, num_layers=1, num_heads=4))
    >>> model(torch.randint(256, (2, 50))).last_hidden_state.shape
    torch.Size([2, 50, 32])
    """

    def __init__(self, config: LongNetConfig) -> None:
        super().__init__(config)
        # Tied, the backbone has no projection to logits: a model with a head brings its own.
        self.backbone = LongNetLM(dataclasses.replace(config.to_lm_config(), tie_embeddings=True))
        for module in self.backbone.modules():
            if isinstance(module, CausalSelfAttention):
                module.attention.is_causal = config.is_causal
        for parameter in self.backbone.parameters():
            if not parameter.is_meta:
                parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        self.post_init()

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether blocks are recomputed in the backward pass; ``config.activation_checkpointing`` to begin with."""
        return self.backbone.config.activation_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self.backbone.config = dataclasses.replace(self.backbone.config, activation_checkpointing=bool(value))

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of tokens."""
        return self.backbone.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding of tokens, e.g. by one of another size."""
        assert isinstance(value, nn.Embedding)
        self.backbone.embedding = value
        self.backbone.config = dataclasses.replace(self.backbone.config, vocab_size=value.num_embeddings)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: LongNetCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cu_seqlens: Tensor | None = None,
        **options: Any,
    ) -> BaseModelOutputWithPast:
        """Features ``(B, N, embed_dim)`` of ``input_ids (B, N)`` int64.

        Args:
            input_ids: token ids, padding included.
            attention_mask: ``(B, past + N)``, 1 for tokens and 0 for padding at the left or right of a row.
            past_key_values: what was seen before, in front of these tokens.
            use_cache: return a cache to go on with; by default where the model is causal and in eval mode.
            output_hidden_states: also return the embeddings and the output of every block.
            cu_seqlens: ``(documents + 1,)`` boundaries of documents packed in one row of batch 1.

        Raises:
            ValueError: another mask, inputs that this model does not take, or a cache where it cannot serve.
        """
        tokens = _check_inputs(input_ids, options)
        if use_cache is None:
            use_cache = self.config.use_cache and self.config.is_causal and not self.training and cu_seqlens is None
        if past_key_values is not None and not isinstance(past_key_values, LongNetCache):
            raise ValueError(
                f"past_key_values is a {type(past_key_values).__name__}; LongNet models take a LongNetCache, which "
                "holds one longest segment: leave it out, or give LongNetCache()"
            )
        documents, cache = self._documents(tokens, attention_mask, cu_seqlens, past_key_values, use_cache)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        with _recorded(self.backbone.blocks, output_hidden_states) as states:
            features = self.backbone.features(tokens, documents, cache=None if cache is None else cache.state)
        return BaseModelOutputWithPast(
            last_hidden_state=features,
            past_key_values=cache,
            hidden_states=tuple(states) if output_hidden_states else None,
        )

    def _documents(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        cache: LongNetCache | None,
        use_cache: bool,
    ) -> tuple[Documents, LongNetCache | None]:
        """Where documents lie in the rows of ``tokens``, and the cache to use, made if it has to be."""
        batch, rows = tokens.shape
        past = 0 if cache is None else cache.get_seq_length()
        if past:
            if attention_mask is not None and tuple(attention_mask.shape) != (batch, past + rows):
                raise ValueError(
                    f"attention_mask has shape {tuple(attention_mask.shape)}; give ({batch}, {past} + {rows}), with "
                    "the columns of the tokens that the cache has seen"
                )
            if attention_mask is not None and not bool((attention_mask[:, past:] != 0).all()):
                raise ValueError("attention_mask hides new tokens; with a cache, padding lies at the left of prompts")
            return Documents(None, None, 0), cache
        padding = read_padding(attention_mask, batch, rows)
        if cu_seqlens is not None and attention_mask is not None and not bool((attention_mask != 0).all()):
            raise ValueError("cu_seqlens packs documents, attention_mask pads them; give one of the two")
        if (use_cache or cache is not None) and padding.key_padding_mask is None and cu_seqlens is None:
            if not self.config.is_causal:
                raise ValueError("use_cache is True, but the model is bidirectional; leave use_cache out")
            cache = LongNetCache() if cache is None else cache
            cache.state = self.backbone.make_cache(key_start=padding.key_start, rollback=cache.rollback)
            return Documents(None, None, 0), cache
        if cache is not None:
            raise ValueError(
                "a cache needs prompts that end at the last row; pad at the left (tokenizer.padding_side = 'left'), "
                "and give packed documents without past_key_values"
            )
        return Documents(padding.key_padding_mask, cu_seqlens, padding.key_start), None


def _check_inputs(input_ids: Tensor | None, options: dict[str, Any]) -> Tensor:
    """The tokens, or a ValueError for inputs that would be left unheard."""
    if input_ids is None:
        raise ValueError("input_ids is None; give token ids (batch, rows): n-grams and positions are made of them")
    reasons = {
        "inputs_embeds": "give input_ids",
        "position_ids": "positions count from the first token of each row; give attention_mask or cu_seqlens",
        "output_attentions": "attention weights are never formed",
        "head_mask": "heads are not masked",
        "token_type_ids": "the model has no types of tokens",
    }
    for name, reason in reasons.items():
        if options.get(name) is not None and options[name] is not False:
            raise ValueError(f"{name} is given, but {reason}")
    return input_ids


@contextmanager
def _recorded(blocks: nn.ModuleList, enabled: bool | None) -> Iterator[list[Tensor]]:
    """The input of the first block and the output of every block, while it is open."""
    states: list[Tensor] = []
    handles = []
    if enabled:
        handles.append(blocks[0].register_forward_pre_hook(lambda module, inputs: states.append(inputs[0])))
        for block in blocks:
            handles.append(block.register_forward_hook(lambda module, inputs, output: states.append(output)))
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()
