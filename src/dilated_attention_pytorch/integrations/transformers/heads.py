"""LongNet with a head over the vocabulary: causal with generate(), and masked."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast, MaskedLMOutput
from transformers.utils.generic import can_return_tuple

from ...models import LongNetLM
from .cache import LongNetCache
from .configuration import LongNetConfig
from .modeling import LongNetModel, LongNetPreTrainedModel

# Tokens that assisted generation drafts at once, and takes back where they are wrong, are a few tens.
_DRAFT_TOKENS = 128


class _WithHead(LongNetPreTrainedModel):
    """A backbone and a projection of its features to logits over the vocabulary."""

    _tied_weights_keys = {"lm_head.weight": "model.backbone.embedding.weight"}  # noqa: RUF012
    is_causal: ClassVar[bool]

    def __init__(self, config: LongNetConfig) -> None:
        config = copy.deepcopy(config)
        config.is_causal = self.is_causal
        super().__init__(config)
        self.model = LongNetModel(config)
        self.lm_head = nn.Linear(config.embed_dim, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The projection to logits."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the projection to logits."""
        self.lm_head = new_embeddings


class LongNetForCausalLM(_WithHead, GenerationMixin):
    """:class:`LongNetLM` as a causal language model of the transformers library, with its generate().

    >>> import torch
    >>> config = LongNetConfig(embed_dim=32, num_layers=1, num_heads=4)
    >>> model = LongNetForCausalLM(config).eval()
    >>> prompt = torch.tensor([list(b"def f(")])
    >>> model(prompt, labels=prompt).loss.shape
    torch.Size([])
    >>> model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False).shape
    torch.Size([1, 11])
    """

    is_causal = True

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: LongNetCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cu_seqlens: Tensor | None = None,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """Logits ``(B, N, vocab_size)`` of the token after each, and with ``labels (B, N)`` the loss in nats.

        Labels are the input_ids themselves, -100 where nothing is predicted; the model shifts them. With
        ``logits_to_keep`` n > 0 only the logits of the last n rows are made. Other arguments, and errors, as for
        :meth:`LongNetModel.forward`.
        """
        num_items = {key: options.pop(key) for key in ("num_items_in_batch",) if key in options}
        output = self.model(
            input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            cu_seqlens=cu_seqlens,
            **options,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **num_items)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=output.past_key_values, hidden_states=output.hidden_states
        )

    def _prepare_cache_for_generation(  # type: ignore[override]  # the rest is not looked at
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, *arguments: Any
    ) -> None:
        """Let generate() use the bounded cache, whose first filling reads the padding of the prompts."""
        if generation_config.cache_implementation not in (None, "dynamic", "dynamic_full"):
            raise ValueError(
                f"cache_implementation is {generation_config.cache_implementation!r}; LongNet models have one cache, "
                "which holds one longest segment: leave cache_implementation out"
            )
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            assisted = generation_mode == GenerationMode.ASSISTED_GENERATION or generation_config.is_assistant
            model_kwargs["past_key_values"] = LongNetCache(rollback=_DRAFT_TOKENS if assisted else 0)

    def prepare_inputs_for_generation(self, input_ids: Any, *arguments: Any, **kwargs: Any) -> Any:
        """What :meth:`forward` gets in a step of generate(), as transformers makes it.

        Raises:
            ValueError: a cache that has seen as much as the whole text, or more: it is that of another text.
        """
        cache = kwargs.get("past_key_values")
        seen = 0 if cache is None else cache.get_seq_length()
        if seen >= input_ids.shape[1] > 0:
            raise ValueError(
                f"past_key_values has seen {seen} tokens, and input_ids has {input_ids.shape[1]}; give the text that "
                "it has seen with at least one more token, or call its reset()"
            )
        made = GenerationMixin.prepare_inputs_for_generation
        return made(self, input_ids, *arguments, **kwargs)  # type: ignore[arg-type]

    def to_longnet_lm(self) -> LongNetLM:
        """The library's own model with these weights, copied."""
        model = LongNetLM(self.config.to_lm_config(), dtype=self.dtype, device="meta")
        weights = {name: value.clone() for name, value in self.model.backbone.state_dict().items()}
        if not self.config.tie_embeddings:
            weights["output.weight"] = self.lm_head.weight.detach().clone()
        model.load_state_dict(weights, assign=True)
        return model.train(self.training)

    @classmethod
    def from_longnet_lm(cls, model: LongNetLM, **options: Any) -> LongNetForCausalLM:
        """A model with the weights of ``model``, copied; ``options`` are further ones of :class:`LongNetConfig`."""
        made = cls(LongNetConfig.from_lm_config(model.config, **options))
        nn.Module.to(made, model.embedding.weight)
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        head = weights.pop("output.weight", None)
        made.model.backbone.load_state_dict(weights)
        if head is not None:
            made.lm_head.weight.data.copy_(head)
        return made.train(model.training)


class LongNetForMaskedLM(_WithHead):
    """LongNet's blocks without the causal mask, as a masked language model.

    The vocabulary needs an id for the mask token, e.g. ``vocab_size=257`` with ``byte_tokenizer(["<mask>"])``.

    >>> import torch
    >>> model = LongNetForMaskedLM(LongNetConfig(vocab_size=257, embed_dim=32, num_layers=1, num_heads=4))
    >>> tokens = torch.randint(257, (2, 50))
    >>> model(tokens, labels=tokens).logits.shape
    torch.Size([2, 50, 257])
    """

    is_causal = False

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        cu_seqlens: Tensor | None = None,
        **options: Any,
    ) -> MaskedLMOutput:
        """Logits ``(B, N, vocab_size)`` of every token, and with ``labels (B, N)`` the loss in nats.

        Labels are -100 where nothing is predicted. Other arguments, and errors, as for :meth:`LongNetModel.forward`.
        """
        num_items = {key: options.pop(key) for key in ("num_items_in_batch",) if key in options}
        output = self.model(
            input_ids,
            attention_mask=attention_mask,
            output_hidden_states=output_hidden_states,
            cu_seqlens=cu_seqlens,
            **options,
        )
        logits = self.lm_head(output.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **num_items)
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=output.hidden_states)
