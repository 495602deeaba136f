"""Old functions that made an old class by name, and the few others that keep a meaning."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .attention import square_ordering
from .records import Record
from .resolve import old
from .table import OldName

_ATTENTIONS = {
    "auto": "ImprovedDilatedAttention",
    "standard": "DilatedAttention",
    "improved": "ImprovedDilatedAttention",
    "ring": "RingDilatedAttentionV2",
    "distributed": "DistributedImprovedDilatedAttention",
    "block_sparse": "BlockSparseDilatedAttention",
    "block_sparse_ring": "BlockSparseRingDilatedAttention",
}
_MULTIHEAD = {
    "auto": "ImprovedMultiheadDilatedAttention",
    "standard": "MultiheadDilatedAttention",
    "improved": "ImprovedMultiheadDilatedAttention",
    "ring": "RingMultiheadDilatedAttention",
    "distributed": "RingDistributedDilatedAttention",
    "multihead_ring": "RingMultiheadDilatedAttention",
    "block_sparse": "BlockSparseRingMultiheadDilatedAttention",
    "block_sparse_ring": "BlockSparseRingMultiheadDilatedAttention",
}
_RINGS = {
    "auto": "StandardRingAttention",
    "standard": "StandardRingAttention",
    "hilbert": "HilbertRingAttention",
    "distributed": "DistributedRingAttention",
}
_DIRECT = {
    "create_improved_dilated_attention": "ImprovedDilatedAttention",
    "create_improved_multihead_dilated_attention": "ImprovedMultiheadDilatedAttention",
    "create_production_ring_attention": "RingDilatedAttentionV2",
    "create_ring_dilated_attention_v2": "RingDilatedAttentionV2",
    "create_ring_dilated_attention_v2_collective": "RingDilatedAttentionV2Collective",
    "create_ring_distributed_attention": "RingMultiheadDilatedAttention",
    "create_ring_multihead_attention_hybrid": "RingMultiheadDilatedAttentionHybrid",
    "create_block_sparse_multihead_attention": "BlockSparseRingMultiheadDilatedAttention",
    "create_adaptive_sparse_multihead_attention": "BlockSparseRingMultiheadDilatedAttention",
    "create_multihead_block_sparse": "BlockSparseMultiheadAttention",
    "create_adaptive_sparse_attention": "BlockSparseRingMultiheadDilatedAttention",
    "create_adaptive_block_sparse": "BlockSparseAdaptive",
    "create_adaptive_block_sparse_consistent": "BlockSparseAdaptive",
    "create_hierarchical_attention": "BlockSparseHierarchical",
    "create_block_sparse_hilbert": "BlockSparseRingDilatedAttentionHilbert",
    "create_cached_block_sparse_hilbert": "BlockSparseRingDilatedAttentionHilbertCached",
    "create_dilation_aware_hilbert_attention": "BlockSparseRingDilatedAttentionHilbertDilationAware",
    "create_optimized_hilbert_attention": "BlockSparseRingDilatedAttentionHilbertOptimized",
    "create_post_pattern_hilbert_attention": "BlockSparseRingDilatedAttentionHilbertPostPattern",
    "create_memory_layout_optimized_attention": "BlockSparseRingDilatedAttentionMemoryLayout",
    "create_dynamic_dilated_attention": "DynamicDilatedAttention",
    "create_encoder_layer": "DilatedTransformerEncoderLayer",
    "create_decoder_layer": "DilatedTransformerDecoderLayer",
}
_PRESETS: dict[str, dict[str, Any]] = {
    "development": {"segment_lengths": [2048, 4096], "dilation_rates": [1, 2]},
    "production": {"segment_lengths": [2048, 4096, 8192], "dilation_rates": [1, 2, 4]},
    "large_scale": {"segment_lengths": [4096, 8192, 16384, 32768], "dilation_rates": [1, 2, 4, 8]},
    "hilbert_optimized": {"segment_lengths": [2048, 4096, 8192], "dilation_rates": [1, 2, 4], "use_hilbert": True},
}
_SPARSE_PRESETS: dict[str, dict[str, Any]] = {
    "local": {"pattern_type": "local_window", "window_size": 256},
    "dilated": {"pattern_type": "dilated_sparse"},
    "global_local": {"pattern_type": "global_local", "global_tokens": 64, "window_size": 256},
    "ultra_sparse": {"pattern_type": "dilated_sparse", "block_size": 128},
    "hilbert_standard": {"pattern_type": "dilated_sparse"},
    "hilbert_ultra": {"pattern_type": "dilated_sparse", "block_size": 128},
}
_POOLS = {
    "global": "UnifiedMemoryPool",
    "enhanced": "EnhancedMemoryPool",
    "numa": "NUMAAwareMemoryPool",
    "global_pattern": "PatternCache",
    "optimized_pattern": "PatternCache",
    "simple_gpu": "SimpleGPUPatternCache",
}
_POOL_OF = {
    "get_global_memory_pool": "global",
    "get_enhanced_memory_pool": "enhanced",
    "get_numa_aware_pool": "numa",
    "reset_global_memory_pool": "global",
    "reset_enhanced_memory_pool": "enhanced",
    "reset_numa_pool": "numa",
    "get_global_pattern_cache": "global_pattern",
    "clear_global_cache": "global_pattern",
    "get_optimized_pattern_cache": "optimized_pattern",
    "clear_optimized_cache": "optimized_pattern",
    "get_simple_gpu_cache": "simple_gpu",
    "clear_simple_gpu_cache": "simple_gpu",
}
"""Old functions of the pools and caches that a process shares, and which one each is about."""


def factory_function(entry: OldName) -> Callable[..., Any]:
    """The function that an old factory is now."""
    special = _SPECIAL.get(entry.name)
    make = functools.partial(special, entry) if special else functools.partial(_direct, entry)

    def factory(*args: Any, **kwargs: Any) -> Any:
        return make(*args, **kwargs)

    factory.__name__ = factory.__qualname__ = entry.name
    factory.__module__ = entry.paths[0]
    factory.__doc__ = f"Old name: use {entry.use}."
    return factory


def _named(entry: OldName, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, those given and the defaults that are not None, under the names the old function had."""
    signature = entry.signature()
    if len(args) > len(signature.defaults):
        raise TypeError(f"{entry.name} takes {len(signature.defaults)} positional arguments, {len(args)} were given")
    given = dict(zip(signature.defaults, args, strict=False))
    for name, value in kwargs.items():
        if name in given:
            raise TypeError(f"{entry.name} got {name} twice, by position and by name; give it once")
        given[name] = value
    defaults = {name: value for name, value in signature.defaults.items() if isinstance(value, (int, str, list))}
    return {**defaults, **{name: value for name, value in given.items() if value is not None}}


def _direct(entry: OldName, *args: Any, **kwargs: Any) -> Any:
    named = _named(entry, args, kwargs)
    named.pop("attention_type", None)
    return old(_DIRECT[entry.name])(**named)


def _create(entry: OldName, *args: Any, **kwargs: Any) -> Any:
    """create_dilated_attention and create_multihead_dilated_attention, of both signatures."""
    named = _named(entry, args, kwargs)
    plain = entry.name == "create_dilated_attention"
    kinds, registered = (_ATTENTIONS, _ATTENTION_CLASSES) if plain else (_MULTIHEAD, _MULTIHEAD_CLASSES)
    default = "auto" if "attention_type" in entry.signature().names else "standard"
    kind = named.pop("attention_type", default)
    if kind in registered:
        return _registered(registered[kind], named, plain)
    if kind not in kinds:
        known = ", ".join(map(repr, sorted({*kinds, *registered})))
        raise ValueError(f"attention_type is {kind!r}; choose one of {known}")
    return old(kinds[kind])(**named)


def _registered(cls: Any, named: dict[str, Any], plain: bool) -> Any:
    """A class of the user's own: it gets settings objects, as before."""
    fields = {name: named.pop(name) for name in ("segment_lengths", "dilation_rates", "dropout") if name in named}
    attention = old("DilatedAttentionConfig")(**fields)
    if plain:
        return cls(attention, **named)
    heads = {name: named.pop(name) for name in ("embed_dim", "num_heads", "bias", "layer_norm") if name in named}
    return cls(old("MultiheadConfig")(**heads), attention, **named)


_ATTENTION_CLASSES: dict[str, Any] = {}
_MULTIHEAD_CLASSES: dict[str, Any] = {}


def _register(entry: OldName, name: str, cls: Any) -> None:
    (_ATTENTION_CLASSES if entry.name == "register_attention" else _MULTIHEAD_CLASSES)[name] = cls


def _create_sparse(entry: OldName, *args: Any, **kwargs: Any) -> Any:
    """create_block_sparse_attention: with a width the multi-head class, else the bare one; by variant."""
    named = _named(entry, args, kwargs)
    variants = {"adaptive": "BlockSparseAdaptive", "hierarchical": "BlockSparseHierarchical"}
    variants |= {"distributed": "BlockSparseRingDistributedDilatedAttention", "dilated": "BlockSparseDilatedAttention"}
    variant = named.pop("variant", "auto" if "variant" in entry.signature().names else "multihead")
    if variant in ("auto", "multihead") and "embed_dim" in named:
        return old("BlockSparseRingMultiheadDilatedAttention")(**named)
    return old(variants.get(variant, "BlockSparseRingDilatedAttention"))(**named)


def _sparse_preset(entry: OldName, *args: Any, **kwargs: Any) -> Any:
    named = _named(entry, args, kwargs)
    name = named.pop("preset_name", named.pop("preset", "standard"))
    if name in ("adaptive_standard",):
        return old("BlockSparseAdaptive")(**named)
    if name in ("standard", "fine_grained", "long_range") or name.startswith("hierarchical"):
        return old("BlockSparseHierarchical")(**named)
    if name not in _SPARSE_PRESETS:
        raise ValueError(f"preset is {name!r}; choose one of {', '.join(map(repr, _SPARSE_PRESETS))}")
    return old("BlockSparseRingDilatedAttention")(**{**_SPARSE_PRESETS[name], **named})


def _ring(entry: OldName, *args: Any, **kwargs: Any) -> Any:
    """create_ring_attention, its preset and its standardised form."""
    named = _named(entry, args, kwargs)
    if preset := named.pop("preset", None):
        named["config"] = _preset(entry, preset)
    kind = named.pop("implementation", named.pop("attention_type", "auto"))
    config = named.pop("config", None) or old("RingAttentionConfig", "ring.base.ring_config")(
        named.pop("segment_lengths", [2048, 4096]), named.pop("dilation_rates", [1, 2])
    )
    if kind == "auto" and (named.get("sparsity_ratio") or getattr(config, "use_hilbert", False)):
        kind = "block_sparse" if named.get("sparsity_ratio") else "hilbert"
    if kind == "block_sparse":
        return old("BlockSparseRingAttention", "ring.block_sparse_ring_attention")(config, **named)
    if kind not in _RINGS:
        raise ValueError(f"implementation is {kind!r}; choose one of {', '.join(map(repr, (*_RINGS, 'block_sparse')))}")
    return old(_RINGS[kind])(config, **named)


def _preset(entry: OldName, name: str, **kwargs: Any) -> Record:
    if name not in _PRESETS:
        raise KeyError(f"preset is {name!r}; choose one of {', '.join(map(repr, _PRESETS))}")
    return old("RingAttentionConfig", "ring.base.ring_config")(**{**_PRESETS[name], **kwargs})


def _ring_config(entry: OldName, *args: Any, **kwargs: Any) -> Record:
    return old("RingAttentionConfig", "ring.base.ring_config")(*args, **kwargs)


def _validate_ring(entry: OldName, config: Record, seq_len: int, world_size: int | None = None) -> bool:
    for name, size in (("longest segment", config.max_segment_length), ("world_size", world_size or 1)):
        if seq_len % size:
            raise ValueError(f"seq_len is {seq_len}, no multiple of the {name}, {size}; the old rings need one")
    return True


def _implementations(entry: OldName) -> dict[str, bool]:
    return {
        **dict.fromkeys(("standard", "hilbert", "distributed", "block_sparse"), True),
        "distributed_deepspeed": False,
    }


def _hierarchies(entry: OldName) -> dict[str, Record]:
    return {"standard": old("HierarchicalConfig")()}


_KEPT: dict[str, Any] = {}


def _pool(entry: OldName, *args: Any, **kwargs: Any) -> Any:
    """The pool or cache that the whole process shares, made at the first call."""
    kind = _POOL_OF[entry.name]
    if kind not in _KEPT:
        _KEPT[kind] = old(_POOLS[kind])(*args, **kwargs)
    return _KEPT[kind]


def _reset_pool(entry: OldName) -> None:
    pool = _KEPT.pop(_POOL_OF[entry.name], None)
    if pool is not None:
        pool.clear()


def _curve(entry: OldName, *sizes: int, **kwargs: int) -> Tensor | list[int]:
    """The order of ``sizes`` rows laid out in a square, or of the cells of a grid."""
    from ..ordering import hilbert_order

    sizes = (*sizes, *kwargs.values())
    square = len(sizes) == 1
    order = square_ordering(sizes[0]).positions() if square else hilbert_order(sizes[1], sizes[0])
    as_list = entry.homes == ("utils.hilbert_curve",)
    return order.tolist() if as_list else order


_SPECIAL: dict[str, Callable[..., Any]] = {
    "create_dilated_attention": _create,
    "create_multihead_dilated_attention": _create,
    "create_block_sparse_attention": _create_sparse,
    "create_hierarchical_block_sparse": _sparse_preset,
    "get_block_sparse_preset": _sparse_preset,
    "create_ring_attention": _ring,
    "create_ring_attention_from_preset": _ring,
    "create_standardized_ring_attention": _ring,
    "create_ring_config": _ring_config,
    "get_preset_config": _preset,
    "get_available_implementations": _implementations,
    "validate_ring_configuration": _validate_ring,
    "get_hierarchical_presets": _hierarchies,
    "register_attention": _register,
    "register_multihead_attention": _register,
    **{name: _pool if name.startswith("get_") else _reset_pool for name in _POOL_OF},
    "create_hilbert_mapping": _curve,
    "create_hilbert_mapping_fixed": _curve,
    "generate_hilbert_curve_mapping": _curve,
    "generate_hilbert_mapping_simple": _curve,
    "generate_hilbert_indices": _curve,
    "generate_hilbert_indices_rectangular": _curve,
}
