"""torchscale's own models, and GigaPath's, on this library's attention: one call replaces it, one puts it back."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..functional import dilated_attention
from ..models.weights import WeightsError
from ..types import MixingGrad, Padding

_MODULE = "component.dilated_attention"
_MARK = "_dilated_attention_pytorch_patch"
_WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_fpw_module|_checkpoint_wrapped_module)\.")
_STACK = re.compile(
    r"layers\.\d+\.(self_attn\.([kvq]_proj|out_proj|inner_attn_ln)|self_attn_layer_norm|final_layer_norm|"
    r"ffn\.(fc1|fc2|ffn_layernorm))\.(weight|bias)|layers\.\d+\.self_attn\.xpos\.scale|layer_norm\.(weight|bias)"
)
_AROUND = re.compile(
    r"embed_tokens\.weight|embed_positions\..+|layernorm_embedding\.(weight|bias)|output_projection\..+"
)
_REFUSED = {
    r"\.moe_layer\.": "a mixture of experts",
    r"\.[AB]\.": "multiway branches",
    r"encoder_attn": "cross-attention",
    r"relative_position\.": "relative position biases",
    r"\.ffn\.gate\.": "a gated feed-forward layer",
}
_REFUSED_ARGUMENTS = {"deepnorm": "DeepNorm", "multiway": "multiway branches", "moe_freq": "a mixture of experts"}


class Patch:
    """What :func:`patch` did: ``undo()`` puts the original back, and so does leaving a ``with`` block."""

    def __init__(self, originals: dict[type[nn.Module], Callable[..., Any]]) -> None:
        self._originals = originals

    @property
    def classes(self) -> tuple[type[nn.Module], ...]:
        """The classes whose forward is replaced at present."""
        return tuple(self._originals)

    def undo(self) -> None:
        """Put every original forward back; a second call does nothing."""
        while self._originals:
            cls, forward = self._originals.popitem()
            cls.forward = forward
            delattr(cls, _MARK)

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def patch(
    tree: ModuleType | None = None,
    *,
    padding: Padding = "zeros",
    mixing_grad: MixingGrad = "detached",
    backend: str = "auto",
) -> Patch:
    """Let ``DilatedAttention`` of an imported torchscale, or of the copy inside gigapath, compute with this library.

    Models that exist and models made later are both affected; parameters, state dicts and call signatures stay. Neither
    flash-attn nor a GPU is needed any more, and any dtype will do. With the defaults, outputs and gradients are the
    original's, except where that is wrong (see the page on semantics): rows behind a segment whose length is no
    multiple of its rate stay at their places, a ``key_padding_mask`` is obeyed rather than ignored, and dropout acts in
    training alone.

    Args:
        tree: the package whose class is replaced, ``torchscale`` or ``gigapath``; None: every one that is imported.
        padding: "zeros", torchscale's, counts the zero keys that fill its segments up; "mask" does not.
        mixing_grad: "detached", torchscale's, takes the weights of branches for constants; "exact" is the gradient.
        backend: what computes the attention, see :func:`dilated_attention`.

    Raises:
        ValueError: no such class is imported (import the models first), or it is patched already.

    >>> import types
    >>> from dilated_attention_pytorch.integrations.torchscale import patch
    >>> patch(types.ModuleType("scaletorch"))
    Traceback (most recent call last):
        ...
    ValueError: no module of 'scaletorch' that is imported defines torchscale's DilatedAttention; import its models \
first, e.g. torchscale.model.LongNet
    """
    classes = _classes(tree)
    if not classes:
        where = "no imported module" if tree is None else f"no module of {tree.__name__!r} that is imported"
        raise ValueError(
            f"{where} defines torchscale's DilatedAttention; import its models first, e.g. torchscale.model.LongNet"
        )
    if any(_MARK in vars(cls) for cls in classes):
        raise ValueError("torchscale's DilatedAttention is patched already; undo() that patch first")

    def forward(
        self: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        incremental_state: dict[str, Tensor] | None = None,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        rel_pos: Tensor | None = None,
        is_first_step: bool = False,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """(B, N, E) to (B, N, E), and None, as the method this replaces."""
        _refuse(self, attn_mask, rel_pos)
        projected = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)) for x in projected)
        if incremental_state is not None:
            k, v = _extended(incremental_state, k, v)
        if self.xpos is not None:
            q = _turned(self.xpos, q, offset=k.shape[1] - q.shape[1], downscale=False)
            k = _turned(self.xpos, k, offset=0, downscale=True)
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask.bool()
        out = dilated_attention(
            q,
            k,
            v,
            _integers(self.args.segment_length),
            _integers(self.args.dilated_ratio),
            is_causal=is_causal,
            dropout_p=self.dropout if self.training else 0.0,
            key_padding_mask=key_padding_mask,
            padding=padding,
            mixing_grad=mixing_grad,
            backend=backend,
        ).flatten(-2)
        return self.out_proj(out if self.inner_attn_ln is None else self.inner_attn_ln(out)), None

    originals = {cls: vars(cls)["forward"] for cls in classes}
    for cls in classes:
        cls.forward = forward
        setattr(cls, _MARK, True)
    return Patch(originals)


class Converted(NamedTuple):
    """What :func:`convert_state_dict` returns."""

    stack: dict[str, Tensor]
    """The layers and the last norm: what :class:`LongNetEncoder` loads strictly."""
    around: dict[str, Tensor]
    """Embeddings, learned positions and the output projection, under torchscale's names."""


def convert_state_dict(weights: Mapping[str, Tensor], *, prefix: str = "", args: Any = None) -> Converted:
    """Weights of torchscale's ``LongNetEncoder`` or ``LongNetDecoder`` for :class:`LongNetEncoder`, checked by name.

    A decoder's layers are those of an encoder with ``is_causal=True``. Names below the prefix are the same in both
    libraries, sub-LN and xPos included, so the way back is ``{prefix + name: value}`` of both parts; what this function
    does is to take off the wrappers of fairscale and FSDP, to part layers from what is around them, and to refuse what
    would load and compute something else.

    Args:
        weights: a state dict.
        prefix: of the stack in it, e.g. "encoder.".
        args: torchscale's configuration, where there is one. DeepNorm leaves no trace in weights, only there.

    Raises:
        WeightsError: a ValueError; DeepNorm, mixtures of experts, multiway branches, cross-attention, relative
            positions, gated feed-forward layers, or a name that is none of torchscale's.

    >>> from dilated_attention_pytorch import LongNetEncoder, LongNetEncoderConfig
    >>> model = LongNetEncoder(
    ...     LongNetEncoderConfig(embed_dim=8, num_layers=1, num_heads=2, segment_lengths=(4,), dilation_rates=(1,))
    ... )
    >>> weights = {f"encoder.{name}": value for name, value in model.state_dict().items()}
    >>> model.load_state_dict(convert_state_dict(weights, prefix="encoder.").stack)
    <All keys matched successfully>
    """
    for option, what in _REFUSED_ARGUMENTS.items():
        if getattr(args, option, False):
            raise WeightsError(
                f"args.{option} is {getattr(args, option)!r}: {what} is not what LongNetEncoder computes"
            )
    stack: dict[str, Tensor] = {}
    around: dict[str, Tensor] = {}
    for given, value in weights.items():
        if not given.startswith(prefix):
            continue
        name = _WRAPPERS.sub("", given.removeprefix(prefix))
        for pattern, what in _REFUSED.items():
            if re.search(pattern, f".{name}"):
                raise WeightsError(f"{given} belongs to {what}, which LongNetEncoder has not")
        if _STACK.fullmatch(name):
            stack[name] = value
        elif _AROUND.fullmatch(name):
            around[name] = value
        else:
            raise WeightsError(f"{given} is no name of torchscale's LongNet; give the prefix of its encoder or decoder")
    if not stack:
        some = ", ".join(list(weights)[:4])
        raise WeightsError(f"no weight below the prefix {prefix!r} is of a LongNet stack; there are {some}")
    return Converted(stack, around)


def _classes(tree: ModuleType | None) -> list[type[nn.Module]]:
    """Every DilatedAttention of an imported ``...torchscale.component.dilated_attention``, once."""
    found: list[type[nn.Module]] = []
    for name, module in list(sys.modules.items()):
        if module is None or not name.endswith(_MODULE) or "torchscale" not in name.split("."):
            continue
        cls = getattr(module, "DilatedAttention", None)
        if isinstance(cls, type) and "forward" in vars(cls) and cls not in found and _belongs(name, module, tree):
            found.append(cls)
    return found


def _belongs(name: str, module: ModuleType, tree: ModuleType | None) -> bool:
    """Whether a module is of the tree: by name, or by its file, for gigapath imports its torchscale by that name."""
    if tree is None or name.startswith(f"{tree.__name__}."):
        return True
    file = getattr(module, "__file__", None)
    return file is not None and any(Path(folder) in Path(file).parents for folder in getattr(tree, "__path__", ()))


def _refuse(module: Any, attn_mask: Tensor | None, rel_pos: Tensor | None) -> None:
    if attn_mask is not None or rel_pos is not None:
        given = "attn_mask" if attn_mask is not None else "rel_pos"
        raise ValueError(f"{given} is given; dilated attention takes is_causal and key_padding_mask, no dense bias")
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if getattr(module.args, "seq_parallel", False) and ranks > 1:
        raise ValueError(
            f"args.seq_parallel is True over {ranks} ranks; set it to False, and for sequences over ranks use "
            "dilated_attention with parallel=ContextParallel(...)"
        )


def _extended(state: dict[str, Tensor], key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values with those of earlier steps before them, kept as torchscale keeps them, (B, H, N, D)."""
    if "prev_key" in state:
        key = torch.cat((state["prev_key"].transpose(1, 2), key), 1)
        value = torch.cat((state["prev_value"].transpose(1, 2), value), 1)
    state["prev_key"], state["prev_value"] = key.transpose(1, 2), value.transpose(1, 2)
    return key, value


def _turned(xpos: nn.Module, x_BNHD: Tensor, *, offset: int, downscale: bool) -> Tensor:
    """torchscale's xPos, which wants (B * H, N, D)."""
    batch, _, heads, _ = x_BNHD.shape
    turned = xpos(x_BNHD.transpose(1, 2).flatten(0, 1), offset=offset, downscale=downscale)
    return turned.unflatten(0, (batch, heads)).transpose(1, 2)


def _integers(given: str | Sequence[int]) -> tuple[int, ...]:
    """Lists of torchscale's arguments, which may also be their text."""
    return tuple(map(int, ast.literal_eval(given) if isinstance(given, str) else given))  # numpy's too
