"""Constructor calls of old classes in terms of the new ones: which arguments stay, change their name, or go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..arguments import SAME_MEANING
from ..table import OldName, Required, ignored_arguments

NEW_CLASS = {"attention": "DilatedAttention", "multihead": "MultiheadDilatedAttention"}
"""Kinds whose constructor calls can be rewritten, and the class that they become."""
_KEPT_NAMES = {
    "attention": ("segment_lengths", "dilation_rates", "is_causal", "scale", "dropout"),
    "multihead": (
        *("embed_dim", "num_heads", "dropout", "bias", "add_bias_kv", "add_zero_attn", "kdim", "vdim", "batch_first"),
        *("device", "dtype", "segment_lengths", "dilation_rates"),
    ),
}
_POSITIONAL = {"attention": ("segment_lengths", "dilation_rates"), "multihead": ("embed_dim", "num_heads")}
_ONLY_NEW_DEFAULT = {"layer_norm_eps": "1e-05", "gamma_init": "1.0", "batch_first": "True", "need_weights": "False"}
"""Arguments that may go where they have the value the new class uses anyway."""
_WITHOUT_EFFECT = ("device", "dtype", "head_dim")


class Undecided(Exception):
    """A call that a person has to look at; the text says why."""


@dataclass(frozen=True)
class Argument:
    """An argument of a call: the name it was given with ("" by position, "*" or "**" unpacked) and its text."""

    name: str
    text: str


@dataclass(frozen=True)
class NewArgument:
    """An argument of the new call: its name ("" by position), and which old argument gives its value."""

    name: str
    source: int | None
    """Index among the old arguments, None for `text`."""
    text: str = ""


def rewritten(entry: OldName, arguments: Sequence[Argument]) -> tuple[list[NewArgument], list[str]]:
    """Arguments of the new call, and the names of old ones that are left out.

    Raises:
        Undecided: the call means something that the new class does not say, or cannot be read.
    """
    kind = entry.kind
    if kind not in NEW_CLASS:
        raise Undecided(f"{entry.name} has no single replacement: use {entry.use}")
    if entry.returns == "pair_if_weights" or (kind == "multihead" and entry.returns == "tensor"):
        raise Undecided(f"{entry.name} returned a tensor, MultiheadDilatedAttention returns (out, None)")
    named = _by_name(entry, arguments)
    if "config" in entry.signature().defaults:
        raise Undecided(f"{entry.name} takes a settings object: give segment_lengths and dilation_rates themselves")
    found: list[NewArgument] = []
    dropped: list[str] = []
    for name, (index, text, positional) in named.items():
        new = "sub_layer_norm" if (kind, name) == ("multihead", "layer_norm") else name
        if new == "sub_layer_norm" or new in _KEPT_NAMES[kind]:
            by_place = positional and len(found) < 2 and new == _POSITIONAL[kind][len(found)]
            found.append(NewArgument("" if by_place else new, index))
        elif name in ignored_arguments() or (kind == "attention" and name in _WITHOUT_EFFECT):
            dropped.append(name)
        elif _ONLY_NEW_DEFAULT.get(name) == text or (name in _ONLY_NEW_DEFAULT and name != "batch_first"):
            if _ONLY_NEW_DEFAULT[name] != text and name == "gamma_init":
                raise Undecided(f"{entry.name}: gamma_init={text} sets initial weights; set them after construction")
            dropped.append(name)
        else:
            raise Undecided(f"{entry.name}: {name} has no counterpart in {NEW_CLASS[kind]}")
    missing = [name for name in ("segment_lengths", "dilation_rates") if name not in named]
    if missing:
        raise Undecided(f"{entry.name}: {' and '.join(missing)} not given")
    signature = entry.signature()
    if kind == "multihead" and signature.defaults.get("layer_norm") is True and "layer_norm" not in named:
        found.append(NewArgument("sub_layer_norm", None, "True"))
    return found, dropped


def _by_name(entry: OldName, arguments: Sequence[Argument]) -> dict[str, tuple[int, str, bool]]:
    order = list(entry.signature().defaults)
    named: dict[str, tuple[int, str, bool]] = {}
    for index, argument in enumerate(arguments):
        if argument.name in ("*", "**"):
            raise Undecided(f"{entry.name}: the call unpacks {argument.name}{argument.text}")
        if not argument.name and index >= len(order):
            raise Undecided(f"{entry.name}: {len(arguments)} arguments by position, the old class had {len(order)}")
        name = argument.name or order[index]
        named[SAME_MEANING.get(name, name)] = (index, argument.text, not argument.name)
    required = {SAME_MEANING.get(n, n) for n, default in entry.signature().defaults.items() if default is Required}
    if absent := sorted(required - set(named)):
        raise Undecided(f"{entry.name}: {', '.join(absent)} not given")
    return named
