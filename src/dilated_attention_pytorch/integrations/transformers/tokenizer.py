"""A tokenizer whose ids are the bytes of the text, for models over bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ...training.corpus import SEPARATOR

BYTES = 256


def byte_tokenizer(special_tokens: Sequence[str] = (), **options: Any) -> PreTrainedTokenizerFast:
    """Text to the ids of its UTF-8 bytes, 0 to 255, and special tokens at the ids that follow.

    The separator that begins a document in training (byte 0) is the token of beginning and end, and of padding unless
    there is a special token for it. Special tokens are never read out of text, so every text comes back as it was;
    prepend them by id, or call the tokenizer with ``split_special_tokens=False``.

    Args:
        special_tokens: names of the ids from 256 on. Those called ``"<pad>"``, ``"<mask>"``, ``"<bos>"`` and
            ``"<eos>"`` get these roles; a model needs ``vocab_size = 256 + len(special_tokens)``.
        **options: arguments of ``PreTrainedTokenizerFast``, e.g. ``padding_side``.

    Raises:
        ValueError: a special token that occurs twice, or is empty.

    >>> tokenizer = byte_tokenizer(["<mask>"])
    >>> tokenizer("é!").input_ids, tokenizer.mask_token_id, len(tokenizer)
    ([195, 169, 33], 256, 257)
    >>> tokenizer.decode([195, 169, 33])
    'é!'
    """
    letters = _letters()
    specials = list(special_tokens)
    if len(set(specials)) != len(specials) or not all(specials) or set(specials) & set(letters):
        raise ValueError(f"special_tokens is {specials}; give names of at least two letters, each once")
    vocabulary = {letter: byte for byte, letter in enumerate(letters)}
    vocabulary |= {name: BYTES + index for index, name in enumerate(specials)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    separator = letters[SEPARATOR]
    roles = {"bos_token": separator, "eos_token": separator, "pad_token": separator}
    roles |= {f"{name[1:-1]}_token": name for name in specials if name in ("<pad>", "<mask>", "<bos>", "<eos>")}
    others = [name for name in specials if name not in roles.values()]
    if others:
        roles["additional_special_tokens"] = others  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{
            "clean_up_tokenization_spaces": False,
            "split_special_tokens": True,
            "model_input_names": ["input_ids", "attention_mask"],
            **roles,
            **options,
        },
    )


def _letters() -> list[str]:
    """The letter that stands for each byte in byte-level vocabularies (GPT-2's): itself, where it can be shown."""
    shown = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(BYTES, 2 * BYTES))
    return [chr(byte if byte in shown else next(others)) for byte in range(BYTES)]
