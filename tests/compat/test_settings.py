"""Old arguments, settings objects, factories, pools, caches, and names that nothing replaces."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dilated_attention_pytorch import HilbertOrdering, MultiheadDilatedAttention, dilated_attention, hilbert_order
from dilated_attention_pytorch.compat.refused import RefusedError
from dilated_attention_pytorch.compat.resolve import old, resolve
from dilated_attention_pytorch.compat.table import OldName, Required, load

LENGTHS, RATES = [8, 32], [1, 4]


def entries(*kinds: str) -> list[OldName]:
    return [entry for entry in load().names if entry.kind in kinds]


def label(entry: OldName) -> str:
    return f"{entry.modules[0] or 'package'}.{entry.name}"


def qkv() -> list[torch.Tensor]:
    return [torch.randn(1, 32, 4, 8) for _ in range(3)]


@pytest.mark.parametrize("entry", entries("record"), ids=label)
def test_records_take_the_old_fields(entry: OldName):
    fields = entry.signature().defaults
    given = {name: f"<{name}>" for name, default in fields.items() if default is Required}
    if "segment_lengths" in given:
        given |= {"segment_lengths": LENGTHS, "dilation_rates": RATES}
    record = resolve(entry)(**given)
    assert list(record.to_dict()) == list(fields)
    for name, default in fields.items():
        assert getattr(record, name) == given.get(name, default)
    assert record == resolve(entry)(*given.values()) if list(given) == list(fields)[: len(given)] else True
    with pytest.raises(TypeError, match=r"nonsense is no field; it has"):
        resolve(entry)(**given, nonsense=1)


def test_records_raise_for_what_does_not_fit():
    config = old("DilatedAttentionConfig")
    with pytest.raises(ValueError, match="dilation_rates has 1 entries, segment_lengths has 2; give one rate"):
        config([8, 16], [1])
    with pytest.raises(ValueError, match=r"dropout is 1.5; give a number from 0.0 to 1.0"):
        config([8], [1], dropout=1.5)
    with pytest.raises(TypeError, match="needs dilation_rates; give it"):
        config([8])
    assert (config(LENGTHS, RATES).num_groups, config(LENGTHS, RATES).max_segment_length) == (2, 32)


def test_enumerations_have_the_old_members():
    assert [member.value for member in old("DistributedSparsePattern")] == [
        *("hierarchical", "node_local", "bandwidth_aware", "adaptive_load_balanced")
    ]
    assert old("PatternType").GLOBAL_LOCAL.value == "global_local"


@pytest.mark.parametrize("entry", entries("refused"), ids=label)
def test_refused_names_raise_and_say_what_to_do(entry: OldName):
    with pytest.raises(RefusedError, match=f"{entry.name} has no replacement, because .+; use .+"):
        resolve(entry)(1, some=2)
    with pytest.raises(RefusedError, match="has no replacement"):
        type("Mine", (resolve(entry),), {})


@pytest.mark.parametrize("entry", entries("constant"), ids=label)
def test_flags_are_plain_values(entry: OldName):
    value = resolve(entry)
    assert value is None or isinstance(value, (bool, str, dict))
    if entry.name == "HAS_XFORMERS":
        assert value is False


def test_arguments_without_a_meaning_are_named_once():
    with pytest.warns(UserWarning, match="RingDilatedAttentionV2 ignores arguments") as caught:
        old("RingDilatedAttentionV2")(LENGTHS, RATES, ring_size=4, enable_memory_pool=True, use_pattern_cache=False)
    (warning,) = caught
    text = str(warning.message)
    assert "enable_memory_pool: the kernels read the tensors in place" in text
    assert "use_pattern_cache" not in text  # switched off: nothing is ignored
    assert warning.filename == __file__


def test_settings_objects_say_what_has_no_meaning_too():
    config = old("RingAttentionConfig", "ring.base.ring_config")(LENGTHS, RATES, enable_watchdog=True)
    with pytest.warns(UserWarning, match="enable_watchdog: a failure is an error"):
        attention = old("StandardRingAttention")(config)
    assert attention.segment_lengths == LENGTHS


def test_unknown_arguments_raise():
    with pytest.raises(TypeError, match="RingDilatedAttentionV2 has no argument 'colour'; it has segment_lengths"):
        old("RingDilatedAttentionV2")(LENGTHS, RATES, colour="red")
    with pytest.raises(TypeError, match="got segment_lengths twice"):
        old("RingDilatedAttentionV2")(LENGTHS, RATES, segment_lengths=LENGTHS)
    with pytest.raises(TypeError, match="takes 3 positional arguments"):
        old("HilbertRingAttention")(*[None] * 9)
    with pytest.raises(TypeError, match="RingDilatedAttentionV2 needs segment_lengths"):
        old("RingDilatedAttentionV2")()


def test_two_lists_by_position_the_wrong_way_round():
    multihead = old("MultiheadDilatedAttention", "dilated_attention")
    with pytest.warns(UserWarning, match="takes dilation_rates before segment_lengths"):
        attention = multihead(32, 4, LENGTHS, RATES)
    assert (attention.segment_lengths, attention.dilation_rates) == (LENGTHS, RATES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        right = multihead(32, 4, RATES, LENGTHS)
    assert (right.segment_lengths, right.dilation_rates) == (LENGTHS, RATES)
    with pytest.raises(ValueError, match="rate"):
        multihead(32, 4, dilation_rates=LENGTHS, segment_lengths=RATES)


def test_dense_masks_and_weights_asked_for_raise():
    attention, x = old("RingDilatedAttentionV2")(LENGTHS, RATES), qkv()
    with pytest.raises(ValueError, match="dense attention mask"):
        attention(*x, attention_mask=torch.zeros(32, 32))
    with pytest.raises(ValueError, match="along a curve through space a row has no past"):
        old("RingDilatedAttentionHilbertV2")(LENGTHS, RATES)(*x, is_causal=True)
    plain = old("RingDilatedAttentionHilbertV2")(LENGTHS, RATES, use_hilbert=False)
    assert torch.equal(plain(*x, is_causal=True), dilated_attention(*x, LENGTHS, RATES, is_causal=True))


def test_scale_dropout_and_batch_first_keep_their_meaning():
    x = qkv()
    attention = old("DilatedAttention", "dilated_attention")(LENGTHS, RATES, softmax_scale=0.5, attention_dropout=0.9)
    assert torch.equal(attention.eval()(*x), dilated_attention(*x, LENGTHS, RATES, scale=0.5))
    assert not torch.equal(attention.train()(*x), attention.eval()(*x))
    layer = old("TrueRingMultiheadDilatedAttention")(32, 4, LENGTHS, RATES, batch_first=False)
    y = torch.randn(32, 2, 32)
    out = layer.replacement(*[y.transpose(0, 1)] * 3)[0].transpose(0, 1)
    assert torch.equal(layer(y, y, y)[0], out)


@pytest.mark.parametrize("packed", [False, True])
def test_old_state_dicts_load(packed: bool):
    names = ("qkv_proj",) if packed else ("q_proj", "k_proj", "v_proj")
    rows = 96 if packed else 32
    weights = {f"{n}.weight": torch.randn(rows, 32) for n in names} | {f"{n}.bias": torch.randn(rows) for n in names}
    weights |= {"out_proj.weight": torch.randn(32, 32), "out_proj.bias": torch.randn(32)}
    weights |= {"norm.weight": torch.randn(32), "norm.bias": torch.randn(32)}
    layer = old("MultiheadDilatedAttention", "dilated_attention")(32, 4, RATES, LENGTHS)
    layer.load_state_dict(dict(weights))
    new = MultiheadDilatedAttention(32, 4, segment_lengths=LENGTHS, dilation_rates=RATES, sub_layer_norm=True)
    joined = {
        **{f"in_proj_{end}": torch.cat([weights[f"{n}.{end}"] for n in names]) for end in ("weight", "bias")},
        **{f"out_proj.{end}": weights[f"out_proj.{end}"] for end in ("weight", "bias")},
        **{f"sub_norm.{end}": weights[f"norm.{end}"] for end in ("weight", "bias")},
    }
    new.load_state_dict(joined)
    x = torch.randn(2, 32, 32)
    assert torch.equal(layer(x, x, x)[0], new(x, x, x)[0])


FACTORIES: dict[str, dict[str, Any]] = {
    "create_dilated_attention": {"segment_lengths": LENGTHS, "dilation_rates": RATES},
    "create_improved_dilated_attention": {"segment_lengths": LENGTHS, "dilation_rates": RATES},
    "create_production_ring_attention": {"segment_lengths": LENGTHS, "dilation_rates": RATES, "dropout": 0.0},
    "create_ring_dilated_attention_v2": {"segment_lengths": LENGTHS, "dilation_rates": RATES},
    "create_ring_dilated_attention_v2_collective": {"segment_lengths": LENGTHS, "dilation_rates": RATES},
    "create_ring_attention": {"implementation": "standard"},
    "create_standardized_ring_attention": {
        "attention_type": "standard",
        "segment_lengths": LENGTHS,
        "dilation_rates": RATES,
    },
}


@pytest.mark.parametrize("entry", [e for e in entries("factory") if e.name in FACTORIES], ids=label)
def test_factories_of_bare_attention(entry: OldName):
    given = FACTORIES[entry.name]
    lengths, rates = given.get("segment_lengths", [2048, 4096]), given.get("dilation_rates", [1, 2])
    x = qkv()
    assert torch.equal(resolve(entry)(**given)(*x), dilated_attention(*x, lengths, rates))


MULTIHEAD = {"embed_dim": 32, "num_heads": 4, "segment_lengths": LENGTHS, "dilation_rates": RATES}


@pytest.mark.parametrize(
    "entry",
    [
        e
        for e in entries("factory")
        if e.name
        in (
            "create_multihead_dilated_attention",
            "create_improved_multihead_dilated_attention",
            "create_ring_multihead_attention_hybrid",
            "create_ring_distributed_attention",
            "create_block_sparse_multihead_attention",
            "create_multihead_block_sparse",
        )
    ],
    ids=label,
)
def test_factories_of_attention_with_projections(entry: OldName):
    layer = resolve(entry)(**MULTIHEAD)
    x = torch.randn(1, 64, 32, requires_grad=True)
    result = layer(x, x, x)
    out = result[0] if isinstance(result, tuple) else result
    torch.testing.assert_close(out, layer.replacement(x, x, x)[0])
    out.sum().backward()
    assert torch.isfinite(x.grad).all()


REST: dict[str, tuple[dict[str, Any], Callable[[Any], bool]]] = {
    "create_block_sparse_attention": (
        {"sparsity_ratio": 0.5, **MULTIHEAD},
        lambda made: type(made).__name__ == "BlockSparseRingMultiheadDilatedAttention",
    ),
    "create_adaptive_sparse_attention": (MULTIHEAD, lambda made: made.num_heads == 4),
    "create_adaptive_sparse_multihead_attention": (MULTIHEAD, lambda made: made.num_heads == 4),
    "create_dynamic_dilated_attention": ({}, lambda made: made(*qkv()).shape == (1, 32, 4, 8)),
    "create_ring_config": (
        {"segment_lengths": LENGTHS, "dilation_rates": RATES},
        lambda made: made.segment_lengths == LENGTHS,
    ),
    "get_preset_config": ({"name": "production"}, lambda made: made.dilation_rates == [1, 2, 4]),
    "get_block_sparse_preset": (
        {"preset_name": "local"},
        lambda made: type(made).__name__ == "BlockSparseRingDilatedAttention",
    ),
    "create_hierarchical_block_sparse": ({}, lambda made: type(made).__name__ == "BlockSparseHierarchical"),
    "get_hierarchical_presets": ({}, lambda made: "standard" in made),
    "get_available_implementations": ({}, lambda made: made["standard"]),
    "create_ring_attention_from_preset": (
        {"preset": "development"},
        lambda made: made.segment_lengths == [2048, 4096],
    ),
    "create_encoder_layer": (
        {"d_model": 32, "nhead": 4, "segment_lengths": LENGTHS, "dilation_rates": RATES},
        lambda made: made(torch.randn(1, 32, 32)).shape == (1, 32, 32),
    ),
    "create_decoder_layer": (
        {"d_model": 32, "nhead": 4, "segment_lengths": LENGTHS, "dilation_rates": RATES},
        lambda made: made(torch.randn(1, 32, 32), torch.randn(1, 32, 32)).shape == (1, 32, 32),
    ),
    "create_adaptive_block_sparse": (
        {"embed_dim": 32, "num_heads": 4},
        lambda made: type(made).__name__ == "BlockSparseAdaptive",
    ),
    "create_hierarchical_attention": (
        {"embed_dim": 32, "num_heads": 4},
        lambda made: type(made).__name__ == "BlockSparseHierarchical",
    ),
}
SPARSE = {
    *("create_adaptive_block_sparse_consistent", "create_block_sparse_hilbert", "create_cached_block_sparse_hilbert"),
    *("create_dilation_aware_hilbert_attention", "create_optimized_hilbert_attention"),
    *("create_post_pattern_hilbert_attention", "create_memory_layout_optimized_attention"),
}
SHARED = {"get_global_memory_pool", "get_enhanced_memory_pool", "get_numa_aware_pool"}
CURVES = {
    *("create_hilbert_mapping", "create_hilbert_mapping_fixed", "generate_hilbert_curve_mapping"),
    *("generate_hilbert_mapping_simple", "generate_hilbert_indices"),
}


@pytest.mark.parametrize("entry", [e for e in entries("factory") if e.name in REST], ids=label)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_other_factories(entry: OldName):
    given, holds = REST[entry.name]
    assert holds(resolve(entry)(**given))


@pytest.mark.parametrize("entry", [e for e in entries("factory") if e.name in SPARSE], ids=label)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_factories_of_block_sparse_attention(entry: OldName):
    attention = resolve(entry)([64, 128], [1, 2])
    assert attention(*[torch.randn(1, 64, 2, 8) for _ in range(3)]).abs().sum() > 0


@pytest.mark.parametrize("entry", [e for e in entries("factory") if e.name in CURVES], ids=label)
def test_curves(entry: OldName):
    order = torch.as_tensor(resolve(entry)(16))
    assert torch.equal(order, hilbert_order(4, 4))
    assert sorted(torch.as_tensor(resolve(entry)(11)).tolist()) == list(range(11))


def test_rectangular_curve_and_its_ordering():
    order = old("generate_hilbert_indices_rectangular")(6, 4)
    assert order == HilbertOrdering((4, 6)).positions().tolist()


def test_every_factory_is_tested():
    pooled = {"clear_global_cache", "clear_optimized_cache", "clear_simple_gpu_cache"}
    pooled |= {"get_global_pattern_cache", "get_optimized_pattern_cache", "get_simple_gpu_cache"}
    pooled |= {"reset_global_memory_pool", "reset_enhanced_memory_pool", "reset_numa_pool"}
    tested = {*FACTORIES, *REST, *SPARSE, *SHARED, *CURVES, *pooled}
    tested |= {"register_attention", "register_multihead_attention", "validate_ring_configuration"}
    tested |= {"generate_hilbert_indices_rectangular", "create_multihead_dilated_attention"}
    tested |= {"create_improved_multihead_dilated_attention", "create_ring_multihead_attention_hybrid"}
    tested |= {"create_ring_distributed_attention", "create_block_sparse_multihead_attention"}
    tested |= {"create_multihead_block_sparse"}
    assert {entry.name for entry in entries("factory")} <= tested


def test_classes_of_the_users_own_can_be_registered():
    class Mine(old("BaseDilatedAttention")):  # type: ignore[misc]
        def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            return value * len(self.segment_lengths)

    old("register_attention")("mine", Mine)
    x = qkv()
    made = old("create_dilated_attention", "core.factory")("mine", segment_lengths=LENGTHS, dilation_rates=RATES)
    assert torch.equal(made(*x), x[2] * 2)
    with pytest.raises(ValueError, match="attention_type is 'theirs'; choose one of"):
        old("create_dilated_attention", "core.factory")("theirs", segment_lengths=LENGTHS, dilation_rates=RATES)


def test_ring_configurations_are_checked():
    config = old("RingAttentionConfig", "ring.base.ring_config")(LENGTHS, RATES)
    check = old("validate_ring_configuration")
    assert check(config, seq_len=64, world_size=4)
    with pytest.raises(ValueError, match="seq_len is 40, no multiple of the longest segment, 32"):
        check(config, seq_len=40)


@pytest.mark.parametrize("entry", entries("pool"), ids=label)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_pools_hand_out_and_take_back(entry: OldName):
    given = {"device": torch.device("cpu")} if "device" in entry.signature().names else {}
    pool = resolve(entry)(**given)
    tensor = pool.get_buffer((4, 8), torch.float64, torch.device("cpu"))
    assert (tensor.shape, tensor.dtype) == ((4, 8), torch.float64)
    address = tensor.data_ptr()
    pool.return_buffer(tensor)
    with pytest.raises(ValueError, match="not on loan from this pool"):
        pool.return_buffer(tensor)
    again = pool.allocate((8, 4), torch.float64, "cpu")
    assert again.data_ptr() == address  # the same memory
    pool.deallocate(again)
    pool.clear()
    assert pool.get_stats()["cpu"].held == 0


@pytest.mark.parametrize("name", sorted(SHARED))
def test_shared_pools_are_one_until_reset(name: str):
    get, reset = old(name), old("reset_" + name.removeprefix("get_").replace("aware_", ""))
    pool = get()
    assert get() is pool
    reset()
    assert get() is not pool
    reset()


@pytest.mark.parametrize("entry", entries("cache"), ids=label)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_caches_forget_what_was_not_used(entry: OldName):
    size = next((name for name in entry.signature().names if name.startswith("max_")), None)
    cache = resolve(entry)(**({size: 2} if size else {}))
    assert cache.get("a") is None
    cache.put("a", 1)
    cache.put("b", 2)
    assert cache.get("a") == 1
    cache.put("c", 3)
    assert ("b" in cache) == (size is None)
    assert cache.get("d", lambda: 4) == 4
    assert cache.get_stats()["hits"] == 1


@pytest.mark.parametrize(
    ("get", "clear"),
    [
        ("get_global_pattern_cache", "clear_global_cache"),
        ("get_optimized_pattern_cache", "clear_optimized_cache"),
        ("get_simple_gpu_cache", "clear_simple_gpu_cache"),
    ],
)
def test_shared_caches_are_one_until_cleared(get: str, clear: str):
    cache = old(get)()
    cache.put("a", 1)
    assert old(get)().get("a") == 1
    old(clear)()
    assert old(get)().get("a") is None
    old(clear)()
