"""Tokens from logits, and text from a model with a cache, token by token."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..merge import accumulator_dtype
from .blocks import Documents
from .config import check_number

if TYPE_CHECKING:
    from .longnet_lm import LongNetLM

_ROWS_AT_ONCE = 8192
"""Tokens of a prompt that go through the model together: a bound on memory, not on the prompt."""

Prompts = Tensor | Sequence[Tensor | Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn from logits.

    Attributes:
        temperature: the logits are divided by it; 0 takes the most probable token.
        top_k: only that many most probable tokens are drawn from; None: all.
        top_p: only the fewest most probable tokens whose probabilities sum to at least this are drawn from (nucleus
            sampling, arXiv 1904.09751, section 3.1), of those that ``top_k`` leaves; 1: all.

    Raises:
        ValueError: a value out of range.

    >>> logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    >>> Sampling(top_p=0.75).probabilities(logits)
    tensor([[0.6250, 0.3750, 0.0000, 0.0000]])
    >>> Sampling(temperature=0).draw(logits)
    tensor([0])
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= check_number("temperature", self.temperature) < math.inf:
            raise ValueError(f"temperature is {self.temperature!r}; give a number of at least 0")
        if self.top_k is not None and (isinstance(self.top_k, bool) or self.top_k != int(self.top_k) or self.top_k < 1):
            raise ValueError(f"top_k is {self.top_k!r}; give an integer of at least 1, or None")
        if not 0 < check_number("top_p", self.top_p) <= 1:
            raise ValueError(f"top_p is {self.top_p!r}; give a probability above 0, at most 1")

    def probabilities(self, logits: Tensor) -> Tensor:
        """Of each token to be drawn: ``(B, vocab_size)``, from logits of that shape."""
        logits = logits.to(accumulator_dtype(logits.dtype))
        if self.temperature == 0:
            return torch.zeros_like(logits).scatter(-1, logits.argmax(-1, keepdim=True), 1.0)
        # Divided after the subtraction, a low temperature cannot overflow; one that rounds to 0 would give 0 / 0.
        least = torch.finfo(logits.dtype).tiny
        logits = (logits - logits.amax(-1, keepdim=True)) / max(self.temperature, least)
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            best = logits.topk(self.top_k, dim=-1)
            logits = torch.full_like(logits, -torch.inf).scatter(-1, best.indices, best.values)
        found = logits.softmax(-1)
        if self.top_p < 1:
            falling, order = found.sort(dim=-1, descending=True, stable=True)
            enough_before = falling.cumsum(-1) - falling >= self.top_p
            enough_before[..., 0] = False  # also where top_p rounds to 0
            found = torch.zeros_like(found).scatter(-1, order, falling.masked_fill(enough_before, 0.0))
            found = found / found.sum(-1, keepdim=True)
        return found

    def draw(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Tokens ``(B,)`` int64 from logits ``(B, vocab_size)``; the generator is of the device of the logits."""
        if self.temperature == 0:
            return logits.argmax(-1)
        return torch.multinomial(self.probabilities(logits), 1, generator=generator)[:, 0]


def pad_left(prompts: Prompts, device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts as tokens ``(B, N)``, padded at the left, and the key_start ``(B,)`` that says so.

    >>> pad_left([[7, 8, 9], [5]], torch.device("cpu"))
    (tensor([[7, 8, 9],
            [0, 0, 5]]), tensor([ 0, -2]))
    """
    if isinstance(prompts, Tensor) and prompts.dim() != 2:
        raise ValueError(f"prompts has shape {tuple(prompts.shape)}; give (B, N), or a list of prompts")
    given = list(prompts)
    if any(isinstance(prompt, (str, bytes)) for prompt in given):
        raise ValueError("prompts hold text; give token ids: of a model over bytes list(text.encode())")
    rows = [torch.as_tensor(prompt) for prompt in given]
    if not rows:
        raise ValueError("there are no prompts; give at least one")
    for number, row in enumerate(rows):
        if row.dim() != 1 or not len(row):
            what = "empty" if row.dim() == 1 else f"of shape {tuple(row.shape)}"
            raise ValueError(f"prompts[{number}] is {what}; give a list of prompts, each of at least one token")
    if any(row.dtype not in (torch.int64, torch.int32, torch.uint8) for row in rows):
        raise ValueError(f"prompts hold {sorted({str(row.dtype) for row in rows})}; give token ids, int64")
    longest = max(map(len, rows))
    tokens = torch.stack([F.pad(row.to(device, torch.int64), (longest - len(row), 0)) for row in rows])
    return tokens, torch.tensor([len(row) - longest for row in rows])


def stream_tokens(
    model: LongNetLM,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    min_new_tokens: int,
    sampling: Sampling,
    end_tokens: Sequence[int],
    generator: torch.Generator | int | None,
) -> Iterator[Tensor]:
    """See :meth:`LongNetLM.stream`; what is wrong is raised before the first step."""
    for name, value in (("max_new_tokens", max_new_tokens), ("min_new_tokens", min_new_tokens)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{name} is {value!r}; give a number of tokens, at least 0")
    if wrong := [token for token in end_tokens if not 0 <= token < model.config.vocab_size]:
        raise ValueError(f"end_token has {wrong}; give token ids of at least 0 and below {model.config.vocab_size}")
    if min_new_tokens and len(set(end_tokens)) == model.config.vocab_size:
        raise ValueError(f"every token is an end_token, and min_new_tokens is {min_new_tokens}; leave one to be drawn")
    device = model.embedding.weight.device
    tokens, key_start = pad_left(prompts, device)
    if isinstance(generator, int):
        if not -(2**63) <= generator < 2**64:
            raise ValueError(f"the seed is {generator}; give an integer of at most 64 bits")
        generator = torch.Generator(device).manual_seed(generator)
    ends = torch.tensor(sorted(set(end_tokens)), dtype=torch.int64, device=device)
    banned = (ends if count < min_new_tokens else None for count in range(max_new_tokens))
    return _draw_steps(model, tokens, key_start, sampling, ends, banned, generator)


@torch.no_grad()
def _draw_steps(
    model: LongNetLM,
    tokens: Tensor,
    key_start: Tensor,
    sampling: Sampling,
    ends: Tensor,
    banned: Iterable[Tensor | None],
    generator: torch.Generator | None,
) -> Iterator[Tensor]:
    """A step for each of ``banned``, the tokens that it must not draw.

    Raises:
        FloatingPointError: logits that are NaN or infinite, of which nothing can be drawn.
    """
    done = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        cache = model.make_cache(key_start=key_start)
        for none_of in banned:
            *first, last = tokens.split(_ROWS_AT_ONCE, dim=1)
            for part in first:
                model.features(part, Documents(None, None, 0), cache)
            logits = model.logits(model.features(last, Documents(None, None, 0), cache)[:, -1])
            if not bool(logits.amax(-1).isfinite().all()):
                raise FloatingPointError(
                    "the logits are not finite; the weights of the model or its dtype are to blame"
                )
            if none_of is not None:
                logits = logits.index_fill(-1, none_of, -torch.inf)
            drawn = sampling.draw(logits, generator)
            done = done | torch.isin(drawn, ends)
            shown = drawn.masked_fill(done, -1).cpu()
            if bool((shown == -1).all()):
                return
            yield shown
            tokens = drawn[:, None]
    finally:
        for module in in_training:
            module.training = True
