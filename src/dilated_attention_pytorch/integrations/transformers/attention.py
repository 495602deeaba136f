"""Dilated attention for the models of the transformers library, as a value of ``attn_implementation``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from ...functional import dilated_attention
from ...patterns import DilatedPattern
from ...types import HeadOffsets
from .padding import Padding, read_padding

# What some models hand to their attention and this one does not compute, and what it is.
_REFUSED = {
    "softcap": "a cap on the scores",
    "s_aux": "attention sinks",
    "position_bias": "a bias on the scores",
    "head_mask": "a mask of heads",
    "sliding_window": "a sliding window",
    "cu_seq_lens_q": "packed documents",
    "cu_seq_lens_k": "packed documents",
    "cache": "a paged cache",
    "output_attentions": "attention weights as an output",
}


class DilatedMask(NamedTuple):
    """What stands for the mask between a model and its attention layers, made once a forward pass."""

    padding: Padding
    is_causal: bool


def dilated_mask(
    batch_size: int,
    kv_length: int,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    **sizes: Any,
) -> DilatedMask:
    """The mask that a model asks for, if dilated attention can express it; called by transformers.

    Raises:
        ValueError: a mask that is not causal or bidirectional with padding at the ends of rows, or query rows that do
            not end at the last key.
    """
    if mask_function not in (causal_mask_function, bidirectional_mask_function):
        raise ValueError(
            f"the model asks for a mask made by {_made_by(mask_function)}; attn_implementation='dilated' takes causal "
            "and bidirectional attention with padding at the ends of rows. Sliding windows and chunks are switched off "
            "in the model's configuration; give position_ids that restart (packed documents) as rows of a batch"
        )
    if "cache_position" in sizes:  # of the first versions 5
        last = int(sizes["cache_position"][-1]) + 1
    else:
        last = int(sizes["q_offset"]) + int(sizes["q_length"])
    if last != kv_length or kv_offset:
        raise ValueError(
            f"the last query row is at {last - 1}, the keys are rows {kv_offset} to {kv_offset + kv_length - 1}; query "
            "rows have to be the last rows of the key: use transformers' DynamicCache, not a static or sliding one, "
            "and no cross-attention"
        )
    return DilatedMask(read_padding(attention_mask, batch_size, kv_length), mask_function is causal_mask_function)


def _made_by(mask_function: Callable[..., Any]) -> str:
    """The names of the functions that a mask function of transformers is composed of."""
    cells = [cell.cell_contents for cell in mask_function.__closure__ or ()]
    parts = [part for cell in cells if isinstance(cell, tuple) for part in cell if callable(part)]
    return " and ".join(map(_made_by, parts)) or mask_function.__qualname__.partition(".")[0]


def register_attention(
    name: str = "dilated",
    *,
    segment_lengths: Sequence[int] | None = None,
    dilation_rates: Sequence[int] | None = None,
    head_offsets: HeadOffsets = "contiguous",
    backend: str = "auto",
) -> None:
    """Let models of the transformers library attend in a dilated pattern: ``attn_implementation="dilated"``.

    The pattern is that of the model's configuration, in the attributes ``dilated_segment_lengths`` and
    ``dilated_dilation_rates`` (and, if they are there, ``dilated_head_offsets`` and ``dilated_backend``), which are
    saved with it; where the configuration has none, the one given here. One segment length of at least the sequence, at
    rate 1, is dense attention.

    It serves self-attention, causal or bidirectional, without padding or with padding at the left or right of rows,
    grouped key/value heads, dropout, and generation with transformers' dynamic cache. Other masks and options are
    refused with a ValueError that names them.

    Args:
        name: what ``attn_implementation`` will be; register others under other names for several patterns.
        segment_lengths, dilation_rates, head_offsets, backend: as for :func:`dilated_attention`.

    Raises:
        ValueError: a pattern that is none.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> register_attention()
    >>> config = LlamaConfig(
    ...     vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    ...     dilated_segment_lengths=[16, 64], dilated_dilation_rates=[1, 4],
    ... )
    >>> model = LlamaForCausalLM._from_config(config, attn_implementation="dilated")
    >>> model(torch.randint(256, (1, 100))).logits.shape
    torch.Size([1, 100, 256])
    """
    default: DilatedPattern | None = None
    if segment_lengths is not None or dilation_rates is not None:
        default = DilatedPattern(tuple(segment_lengths or ()), tuple(dilation_rates or ()), head_offsets)

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: DilatedMask | Tensor | None,
        *,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """Query ``(B, H, N_q, D)``, key ``(B, H_kv, N, D)``, value ``(B, H_kv, N, D_v)`` to ``(B, N_q, H, D_v)``."""
        _check_options(module, options)
        if is_causal is None:
            is_causal = bool(getattr(module, "is_causal", True))
        padding = Padding()
        if isinstance(attention_mask, DilatedMask):
            padding, is_causal = attention_mask
        elif attention_mask is not None:
            raise ValueError(
                f"{type(module).__name__} was given a mask of shape {tuple(attention_mask.shape)}; "
                f"attn_implementation={name!r} takes attention_mask (batch, keys), 1 for tokens and 0 for padding"
            )
        if not is_causal and query.shape[2] != key.shape[2]:
            raise _cross_attention(module)
        pattern = _pattern(module, default)
        hidden = padding.key_padding_mask
        out = dilated_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            pattern.segment_lengths,
            pattern.dilation_rates,
            is_causal=is_causal,
            scale=scaling,
            dropout_p=dropout,
            key_padding_mask=None if hidden is None else hidden.to(key.device),
            key_start=padding.key_start,
            head_offsets=pattern.head_offsets,
            backend=getattr(module.config, "dilated_backend", backend),
        )
        return out, None

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, dilated_mask)


def _check_options(module: nn.Module, options: dict[str, Any]) -> None:
    """Refuse what the layer asks for and dilated attention does not compute."""
    for option, meaning in _REFUSED.items():
        given = options.get(option)
        if given is not None and given is not False:
            raise ValueError(
                f"{type(module).__name__} asks for {meaning} ({option}), which dilated attention does not compute; "
                "switch it off in the model's configuration, or choose another model or attn_implementation"
            )
    # Decoders whose class serves both kinds mark the one from another sequence as not causal.
    other = getattr(module, "is_decoder", False) and getattr(module, "is_causal", None) is False
    if other or "CrossAttention" in type(module).__name__:
        raise _cross_attention(module)


def _cross_attention(module: nn.Module) -> ValueError:
    return ValueError(
        f"{type(module).__name__} attends from one sequence to another; dilated attention takes query rows that are "
        "the last rows of the key. Choose a model without cross-attention"
    )


def _pattern(module: nn.Module, default: DilatedPattern | None) -> DilatedPattern:
    """The pattern of the layer's model, or the default; a ValueError without either."""
    config = module.config
    lengths = getattr(config, "dilated_segment_lengths", None)
    rates = getattr(config, "dilated_dilation_rates", None)
    if lengths is not None or rates is not None:
        offsets: HeadOffsets = getattr(config, "dilated_head_offsets", "contiguous")
        return DilatedPattern(tuple(lengths or ()), tuple(rates or ()), offsets)
    if default is None:
        raise ValueError(
            f"{type(config).__name__} has no pattern; set its dilated_segment_lengths and dilated_dilation_rates, or "
            "give segment_lengths and dilation_rates to register_attention"
        )
    return default
