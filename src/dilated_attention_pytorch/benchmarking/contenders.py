"""Who takes part: our backends, torchscale, dense attention by kernel, FlexAttention with the same pattern."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor

from ..backends import available_backends
from ..backends.dispatch import BACKENDS
from ..backends.vendor import find_kernel
from ..explanation import explain
from ..functional import dilated_attention
from ..patterns import DilatedPattern

PROBE_ROWS = 4096
"""Rows of the problem that a backend is asked about; some have no kernel for a few rows."""

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Family = Literal["ours", "dense", "other"]


@dataclass(frozen=True)
class Setting:
    """What is computed at every length."""

    batch: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    is_causal: bool
    pattern: DilatedPattern

    def shape(self, length: int) -> tuple[int, int, int, int]:
        """(batch, rows, heads, head dim)."""
        return self.batch, length, self.heads, self.head_dim

    def flops(self, family: Family, length: int) -> tuple[int, int]:
        """Useful operations forward and backward: 4 D and 10 D for every attended pair."""
        shape, pattern = self.shape(length), self.pattern
        plan = explain(
            shape, shape, shape, pattern.segment_lengths, pattern.dilation_rates,
            device=self.device, dtype=self.dtype, is_causal=self.is_causal,
        )  # fmt: skip
        if family == "dense":
            return 4 * self.head_dim * plan.dense_pairs, 10 * self.head_dim * plan.dense_pairs
        return plan.flops_forward, plan.flops_backward


@dataclass(frozen=True)
class Contender:
    """One way to compute attention.

    Attributes:
        name: as the user names it.
        label: as tables and plots name it.
        family: "ours", "dense", or "other"; the work of all but "dense" is that of the pattern.
        absent: the reason why it cannot run in a setting, or None.
        prepare: the function for a length and the shape of its three inputs; what it builds here is not timed.
        note: what to know when comparing it.
        backend: of ours, the backend that is asked for.
    """

    name: str
    label: str
    family: Family
    absent: Callable[[Setting], str | None]
    prepare: Callable[[Setting, int], tuple[Attention, tuple[int, ...]]]
    note: str = ""
    backend: str = ""


def _ours_absent(backend: str, setting: Setting) -> str | None:
    if backend != "auto" and backend not in available_backends(setting.device):
        return f"the backend does not run on {setting.device}"
    shape, pattern = setting.shape(PROBE_ROWS), setting.pattern
    try:
        explain(
            shape, shape, shape, pattern.segment_lengths, pattern.dilation_rates,
            device=setting.device, dtype=setting.dtype, is_causal=setting.is_causal, backend=backend,
        )  # fmt: skip
    except ValueError as error:
        return str(error)
    return None


def _ours(backend: str, setting: Setting, length: int) -> tuple[Attention, tuple[int, ...]]:
    pattern = setting.pattern

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return dilated_attention(
            query, key, value, pattern.segment_lengths, pattern.dilation_rates,
            is_causal=setting.is_causal, backend=backend,
        )  # fmt: skip

    return attention, setting.shape(length)


def _dense_absent(kernel: str, setting: Setting) -> str | None:
    if setting.device.type == "cpu" and kernel == "cudnn":
        return "cuDNN runs on CUDA only"
    name = "cpu_flash" if setting.device.type == "cpu" else kernel
    found = find_kernel(str(setting.device), setting.dtype, setting.head_dim, name=name)
    return found if isinstance(found, str) else None


def _dense(kernel: str, setting: Setting, length: int) -> tuple[Attention, tuple[int, ...]]:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    backend = SDPBackend.CUDNN_ATTENTION if kernel == "cudnn" else SDPBackend.FLASH_ATTENTION

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(query, key, value, is_causal=setting.is_causal)

    return attention, (setting.batch, setting.heads, length, setting.head_dim)


def _torchscale_absent(setting: Setting) -> str | None:
    try:
        importlib.import_module("torchscale")
    except ImportError:
        return "torchscale is not installed"
    try:
        importlib.import_module("torchscale.component.dilated_attention")
        flash = importlib.import_module("torchscale.component.flash_attention")
    except ImportError as error:
        return f"this torchscale cannot load its dilated attention ({error}); its repository has it, its package not"
    if flash.flash_attn_func is None:
        return "torchscale's dilated attention needs CUDA and flash-attn"
    if setting.dtype not in (torch.bfloat16, torch.float16):
        return "flash-attn takes bfloat16 and float16"
    return None


def _torchscale(setting: Setting, length: int) -> tuple[Attention, tuple[int, ...]]:
    module = importlib.import_module("torchscale.component.dilated_attention")
    options = SimpleNamespace(
        multiway=False, xpos_rel_pos=False, flash_attention=True, seq_parallel=False, layernorm_eps=1e-5,
        segment_length=list(setting.pattern.segment_lengths), dilated_ratio=list(setting.pattern.dilation_rates),
    )  # fmt: skip
    width = setting.heads * setting.head_dim
    layer = module.DilatedAttention(options, width, setting.heads, self_attention=True)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        setattr(layer, name, torch.nn.Identity())  # attention alone, as for everyone else

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Tensor = layer(query, key, value, is_causal=setting.is_causal)[0]
        return out

    return attention, (setting.batch, length, width)


def pattern_mask(pattern: DilatedPattern, heads: int, *, is_causal: bool) -> Callable[..., Tensor]:
    """FlexAttention's mask_mod of the pattern: pairs that any branch attends."""

    def attended(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        found = torch.zeros_like(query, dtype=torch.bool)
        for w, r in zip(pattern.segment_lengths, pattern.dilation_rates, strict=True):
            offset = head % r if pattern.head_offsets == "interleaved" else head // -(-heads // r)
            found = found | ((query // w == key // w) & (query % w % r == offset) & (key % w % r == offset))
        return found & (query >= key) if is_causal else found

    return attended


def _flex_absent(setting: Setting) -> str | None:
    if setting.device.type != "cuda":
        return "compared on CUDA only, where it has a backward pass"
    return "it does not take float64" if setting.dtype == torch.float64 else None


def _flex(setting: Setting, length: int) -> tuple[Attention, tuple[int, ...]]:
    from torch._functorch import config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch.compiler.reset()  # every length is compiled for itself, and torch stops compiling after a few of them
    mask = pattern_mask(setting.pattern, setting.heads, is_causal=setting.is_causal)
    # Compiled, because eager code would write a mask of N x N entries out.
    blocks = torch.compile(create_block_mask, dynamic=False)(
        mask, None, setting.heads, length, length, device=str(setting.device)
    )
    compiled: Any = torch.compile(flex_attention, dynamic=False)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # The backward pass is timed again and again on one recorded graph, so it must not reuse saved tensors.
        with config.patch(donated_buffer=False):
            out: Tensor = compiled(query, key, value, block_mask=blocks)
            return out

    return attention, (setting.batch, setting.heads, length, setting.head_dim)


def _our_contender(name: str, backend: str) -> Contender:
    absent, prepare = partial(_ours_absent, backend), partial(_ours, backend)
    return Contender(name, f"ours ({backend})", "ours", absent, prepare, backend=backend)


CONTENDERS: dict[str, Contender] = {
    contender.name: contender
    for contender in (
        _our_contender("ours", "auto"),
        *(_our_contender(f"ours-{backend}", backend) for backend in BACKENDS),
        Contender(
            "torchscale", "torchscale", "other", _torchscale_absent, _torchscale,
            "its attention without the linear layers; short segments count keys of zeros",
        ),
        Contender(
            "dense-cudnn", "dense (cuDNN)", "dense", partial(_dense_absent, "cudnn"), partial(_dense, "cudnn"),
            "every pair, from tensors laid out by heads",
        ),
        Contender(
            "dense-flash", "dense (flash)", "dense", partial(_dense_absent, "flash"), partial(_dense, "flash"),
            "every pair, from tensors laid out by heads; on the CPU PyTorch's one flash kernel",
        ),
        Contender(
            "flex", "FlexAttention", "other", _flex_absent, _flex,
            "counts a pair once where ours counts it once a branch: comparable in time, not in value; its rate "
            "is of the pattern's work; compiling and the block mask are not timed",
        ),
    )
}  # fmt: skip
"""Everyone, by name."""

DEFAULT = ("ours", "torchscale", "dense-cudnn", "dense-flash", "flex")


def choose_contenders(names: Sequence[str] | None = None) -> list[Contender]:
    """The contenders of some names, each once; by default ours as "auto" picks it and all others.

    Raises:
        ValueError: an unknown name, or none.

    >>> [contender.label for contender in choose_contenders(["flex", "ours"])]
    ['FlexAttention', 'ours (auto)']
    """
    chosen = dict.fromkeys(DEFAULT if names is None else names)
    for name in chosen:
        if name not in CONTENDERS:
            raise ValueError(f"contender {name!r} is unknown; choose from {', '.join(CONTENDERS)}")
    if not chosen:
        raise ValueError(f"no contender is named; choose from {', '.join(CONTENDERS)}")
    return [CONTENDERS[name] for name in chosen]
