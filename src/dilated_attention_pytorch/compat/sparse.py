"""Old block-sparse attentions: their settings as patterns, the same calls over `sparse_attention`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import patterns
from ..modules import MultiheadSparseAttention
from ..sparse import SparseAttention
from .arguments import Given, bind
from .attention import OldLayer
from .multihead import OldMultihead
from .warning import warn

_EVERYWHERE = 1 << 30
"""A window over any sequence."""
_KINDS = {
    "local_window": "local_window",
    "local": "local_window",
    "node_local": "local_window",
    "sliding_window": "local_window",
    "dilated_sparse": "dilated_sparse",
    "dilated": "dilated_sparse",
    "strided": "dilated_sparse",
    "bandwidth_aware": "dilated_sparse",
    "global_local": "global_local",
    "hierarchical": "hierarchical",
    "adaptive": "content",
    "content_adaptive": "content",
    "learned": "content",
    "adaptive_load_balanced": "content",
    "random": "random",
}
_OLD_LEVELS = ((256, 64), (1024, 256), (-1, 1024))
"""(window, stride) of the old default hierarchy; -1 is everywhere."""


def pattern_from(given: Given, kind: str | None = None) -> Any:
    """The pattern that old arguments ask for.

    Raises:
        ValueError: a pattern type that never existed.
    """
    config = given.take("sparse_config") or given.take("distributed_config")
    settings = config if isinstance(config, dict) else dict(vars(config)) if config is not None else {}

    def setting(name: str, default: Any) -> Any:
        value = given.take(name)
        value = settings.get(name) if value is None else value
        return default if value is None else value

    asked = setting("pattern_type", "local_window")
    asked = kind or str(getattr(asked, "value", asked))
    if asked not in _KINDS:
        raise ValueError(f"pattern_type is {asked!r}; choose one of {', '.join(sorted(_KINDS))}")
    block = _block_size(given, setting("block_size", 64))
    window = setting("window_size", None) or setting("local_window_size", 256)
    to_each_side = window // block // 2 * block
    found = _KINDS[asked]
    if found == "local_window":
        return patterns.LocalWindow(to_each_side, block_size=block)
    if found == "global_local":
        return patterns.GlobalLocal(
            to_each_side, num_global_tokens=max(setting("global_tokens", 1), 1), block_size=block
        )
    if found == "dilated_sparse":
        lengths, rates = dilated_blocks(given, settings, block)
        return patterns.DilatedBlocks(lengths, rates, block_size=block)
    if found == "hierarchical":
        levels = getattr(given.take("hierarchical_config"), "level_configs", None)
        pairs = [(level["window_size"], level["stride"]) for level in levels] if levels else _OLD_LEVELS
        return patterns.Hierarchical(tuple(_level(window, stride, block) for window, stride in pairs), block_size=block)
    kept = max(1.0 - float(getattr(given.take("adaptive_config"), "base_sparsity", 0.9)), 0.01)
    number = max(round(kept * 64), 1)  # of 64 blocks
    if found == "random":
        return patterns.RandomBlocks(number, block_size=block)
    return patterns.ContentTopK(number, block_size=block)


def dilated_blocks(given: Given, settings: dict[str, Any], block: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Segments of whole blocks, and rates that fit: those of the layer, else eight blocks times each rate."""
    lengths = given.take("segment_lengths") or ()
    rates = tuple(given.take("dilation_rates") or settings.get("dilation_rates") or (1, 2, 4, 8))
    lengths = tuple(-(-length // block) for length in lengths) or tuple(8 * rate for rate in rates)
    if len(lengths) != len(rates):
        raise ValueError(
            f"dilation_rates has {len(rates)} entries, segment_lengths has {len(lengths)}; give one rate a segment "
            "length"
        )
    return tuple(length * block for length in lengths), tuple(map(min, rates, lengths))


def _level(window: int, stride: int, block: int) -> tuple[int, int]:
    wide = _EVERYWHERE if window < 0 else window // block // 2 * block
    return wide, max(stride // block, 1) * block


def _block_size(given: Given, asked: int) -> int:
    """The largest block size there is, up to the one asked for; warns where that is another."""
    block = max((size for size in (16, 32, 64, 128) if size <= asked), default=16)
    if block != asked:
        warn(
            f"{given.where} asks for blocks of {asked} rows; blocks have 16, 32, 64 or 128, taken are {block}",
            UserWarning,
        )
    return block


class OldSparse(OldLayer):
    """An old class of bare block-sparse attention over `SparseAttention`, its `replacement`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        given = bind(self.entry, args, kwargs)
        kinds = {"sparse_hierarchical": "hierarchical", "sparse_adaptive": "adaptive"}
        kind = kinds.get(self.entry.kind) or ("dilated_sparse" if self.entry.group == "block_dilated" else None)
        self.replacement = SparseAttention(pattern_from(given, kind), dropout=given.take("dropout", 0.0))
        self.segment_lengths = list(given.take("segment_lengths") or ())
        self.dilation_rates = list(given.take("dilation_rates") or ())
        self.sparse_config = given.take("sparse_config")
        self.block_size, self.dropout = self.replacement.pattern.block_size, self.replacement.dropout
        self.ring_size = given.take("ring_size")
        given.close(quiet=("device", "dtype", "embed_dim", "num_heads", "head_dim"))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Query, key, value ``(B, N, H, D)`` to ``(B, N, H, D)``."""
        given = self.call(args, kwargs)
        query, key, value = (given.need(name) for name in ("query", "key", "value"))
        causal = bool(given.take("is_causal", False))
        return self.result(self.replacement(query, key, value, is_causal=causal), given)


class OldSparseMultihead(OldMultihead):
    """An old class of block-sparse attention with projections, over `MultiheadSparseAttention`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        OldLayer.__init__(self)
        given = bind(self.entry, args, kwargs)
        pattern = pattern_from(given)
        self.segment_lengths = list(given.take("segment_lengths") or ())
        self.dilation_rates = list(given.take("dilation_rates") or ())
        self.replacement = MultiheadSparseAttention(
            given.need("embed_dim"),
            given.need("num_heads"),
            dropout=given.take("dropout", 0.0),
            bias=given.take("bias", True),
            device=given.take("device"),
            dtype=given.take("dtype"),
            pattern=pattern,
        )
        self.embed_dim, self.num_heads = self.replacement.embed_dim, self.replacement.num_heads
        self.batch_first, self.ring_size = bool(given.take("batch_first", True)), 1
        given.close()

    def run(self, tensors: list[Tensor], given: Given, parallel: Any) -> Tensor:
        """The call of the replacement."""
        causal, mask = bool(given.take("is_causal", False)), given.take("key_padding_mask")
        return self.replacement(*tensors, mask, is_causal=causal)[0]
