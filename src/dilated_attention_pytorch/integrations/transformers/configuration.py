"""The configuration of LongNet models in the form of the transformers library."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from ...models import LongNetLMConfig

_FIELDS = tuple(field.name for field in dataclasses.fields(LongNetLMConfig))


class LongNetConfig(PreTrainedConfig):
    """:class:`LongNetLMConfig` as transformers keeps it: the same fields, of the same names and meanings.

    Args:
        **options: fields of :class:`LongNetLMConfig`, by default those of its preset "small"; ``is_causal``, which says
            whether a bare :class:`LongNetModel` sees only rows before (True by default; models with a head know what
            they need); ``use_cache``; and what every configuration of transformers takes. ``hidden_size``,
            ``num_hidden_layers``, ``num_attention_heads`` and ``tie_word_embeddings`` are other names of ``embed_dim``,
            ``num_layers``, ``num_heads`` and ``tie_embeddings``.

    Raises:
        ValueError: a value out of range, as of :class:`LongNetLMConfig`.

    >>> config = LongNetConfig(embed_dim=64, num_heads=4, num_layers=2)
    >>> config.hidden_size, config.to_lm_config().head_dim
    (64, 16)
    """

    model_type = "longnet"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "embed_dim",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "tie_word_embeddings": "tie_embeddings",
    }
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    def __init__(self, **options: Any) -> None:
        for alias, name in self.attribute_map.items():
            if alias in options:
                options[name] = options.pop(alias)
        given = {name: options.pop(name) for name in _FIELDS if name in options}
        is_causal, use_cache = options.pop("is_causal", True), options.pop("use_cache", True)
        tokens = {f"{which}_token_id": options.pop(f"{which}_token_id", None) for which in ("bos", "eos", "pad")}
        super().__init__(**options)
        for name, value in LongNetLMConfig.preset("small", **given).to_dict().items():
            setattr(self, name, value)
        self.is_causal, self.use_cache = is_causal, use_cache
        for name, value in tokens.items():
            setattr(self, name, value)

    @classmethod
    def from_lm_config(cls, config: LongNetLMConfig, **options: Any) -> LongNetConfig:
        """The same sizes and options; ``options`` are further ones of this class."""
        return cls(**config.to_dict(), **options)

    def to_lm_config(self) -> LongNetLMConfig:
        """The configuration of the library's own model; a ValueError where a field was set to what it cannot be."""
        return LongNetLMConfig.from_dict({name: getattr(self, name) for name in _FIELDS})
