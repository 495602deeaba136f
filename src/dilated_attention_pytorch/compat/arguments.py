"""Old arguments by name: what was given, which have no meaning any more, and what to say about them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .records import Record
from .table import OldName, Required, Signature, ignored_arguments
from .warning import warn

SAME_MEANING = {
    "q": "query",
    "k": "key",
    "v": "value",
    "x_local": "x",
    "causal": "is_causal",
    "attention_mask": "attn_mask",
    "sequence_lengths": "segment_lengths",
    "attention_dropout": "dropout",
    "softmax_scale": "scale",
    "attention_scale": "scale",
    "hidden_dim": "embed_dim",
    "dim": "embed_dim",
    "d_model": "embed_dim",
    "heads": "num_heads",
    "nhead": "num_heads",
    "sparsity_config": "sparse_config",
    "sparse_pattern_config": "sparse_config",
}
"""Old spellings of arguments that every old class understood in one way."""
_SETTINGS = ("config", "ring_config", "ring_attention_config", "multihead_config", "attention_config")


@dataclass
class Given:
    """Arguments of one call under the names of `SAME_MEANING`; `take` says which of them mean something."""

    where: str
    values: dict[str, Any]
    by_position: frozenset[str] = frozenset()
    explicit: frozenset[str] = frozenset()
    """Arguments the caller gave; the others have their old defaults."""
    taken: set[str] = field(default_factory=set)

    def take(self, name: str, default: Any = None) -> Any:
        """The value of an argument that has a meaning; ``default`` where it was not given or None."""
        self.taken.add(name)
        value = self.values.get(name)
        return default if value is None else value

    def need(self, name: str) -> Any:
        """The value of an argument that must be given.

        Raises:
            TypeError: it was not.
        """
        self.taken.add(name)
        if self.values.get(name) is None:
            raise TypeError(f"{self.where} needs {name}; give it")
        return self.values[name]

    def close(self, *, quiet: Collection[str] = ()) -> None:
        """Warn of arguments that were given and not taken, by name; ``quiet`` ones never mattered."""
        reasons: dict[str, list[str]] = {}
        known = ignored_arguments()
        for name in sorted(self.explicit - self.taken - set(quiet)):
            if self.values[name] is None or self.values[name] is False:
                continue  # switched off, which everything here is
            reasons.setdefault(known.get(name, "it has no meaning any more"), []).append(name)
        if reasons:
            text = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())
            warn(f"{self.where} ignores arguments ({text})", UserWarning)


def bind(entry: OldName, args: Sequence[Any], kwargs: Mapping[str, Any], *, where: str = "") -> Given:
    """Arguments of the old constructor, positional ones in the old order, settings objects taken apart.

    Raises:
        TypeError: too many arguments, an argument given twice, or one that the old class did not have.
    """
    return bind_to(entry.signature(), where or entry.name, args, kwargs)


def bind_to(signature: Signature, where: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Given:
    """Arguments of any old signature."""
    order = list(signature.defaults)
    if len(args) > len(order):
        raise TypeError(f"{where} takes {len(order)} positional arguments ({', '.join(order)}), {len(args)} were given")
    given = dict(zip(order, args, strict=False))
    for name, value in kwargs.items():
        if name in given:
            raise TypeError(f"{where} got {name} twice, by position and by name; give it once")
        if not (name in signature.names or signature.takes_more or name in ignored_arguments()):
            raise TypeError(f"{where} has no argument {name!r}; it has {', '.join(signature.names)}")
        given[name] = value
    values = {
        SAME_MEANING.get(name, name): default for name, default in signature.defaults.items() if default is not Required
    }
    own = {SAME_MEANING.get(name, name): value for name, value in given.items()}
    records = [own.pop(name) for name in _SETTINGS if isinstance(own.get(name), Record)]
    explicit = set(own)
    while records:
        record = records.pop()
        for name, value in vars(record).items():
            if isinstance(value, Record) and name in _SETTINGS:
                records.append(value)
            elif name != "use_hilbert":  # a choice of class, not of the layer
                known = SAME_MEANING.get(name, name)
                values[known] = value
                explicit |= {known} if value != record.signature.defaults[name] else set()
    values.update({name: value for name, value in own.items() if value is not None or name not in values})
    by_position = frozenset(SAME_MEANING.get(name, name) for name, _ in zip(order, args, strict=False))
    return Given(where, values, by_position, frozenset(explicit))


def pattern_of(given: Given) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Segment lengths and dilation rates; in order where both were given by position the wrong way round.

    Raises:
        ValueError: different numbers of them.
    """
    lengths, rates = (tuple(given.need(name)) for name in ("segment_lengths", "dilation_rates"))
    if len(lengths) != len(rates):
        raise ValueError(
            f"dilation_rates has {len(rates)} entries, segment_lengths has {len(lengths)}; give one rate a segment "
            "length"
        )

    def fits(lengths: tuple[int, ...], rates: tuple[int, ...]) -> bool:
        return all(1 <= rate <= length for length, rate in zip(lengths, rates, strict=True))

    both = {"segment_lengths", "dilation_rates"} <= given.by_position
    if both and not fits(lengths, rates) and fits(rates, lengths):
        warn(
            f"{given.where} takes dilation_rates before segment_lengths, and {rates} are no rates of segments of "
            f"{lengths} rows: taken the other way round; give both by name",
            UserWarning,
        )
        return rates, lengths
    return lengths, rates
