"""Wrong input: a ValueError that says what was given and what is allowed, before anything is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dilated_attention_pytorch as package
from dilated_attention_pytorch import DilatedPattern, dilated_attention, dilated_attention_with_lse, explain, verify

Q = torch.zeros(2, 10, 4, 8)


def changed(**changes: Any) -> dict[str, Any]:
    return {"query": Q, "key": Q, "value": Q, "segment_lengths": [4, 8], "dilation_rates": [1, 2], **changes}


TABLE: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    # ranks and sizes
    (changed(query=Q[0]), ("query has shape (10, 4, 8)", "(batch, rows, heads, head dim)")),
    (changed(value=Q[..., None]), ("value has shape (2, 10, 4, 8, 1)", "(batch, rows, heads, head dim)")),
    (changed(query=Q[:, :0]), ("(2, 0, 4, 8)", "at least 1")),
    (changed(key=Q[:1], value=Q[:1]), ("(1, 10, 4, 8)", "do not fit", "(B, N, H_kv, D)")),
    (changed(value=Q[:, 1:]), ("(2, 9, 4, 8)", "do not fit")),
    (changed(key=Q[..., :4]), ("(2, 10, 4, 4)", "do not fit")),
    (changed(key=Q[:, :, :3], value=Q[:, :, :3]), ("4 heads", "has 3", "multiple")),
    (changed(key=Q[:, :, :2]), ("(2, 10, 2, 8)", "do not fit")),
    (changed(key=Q[:, 1:], value=Q[:, 1:]), ("query has 10 rows, key has 9", "last rows")),
    # dtypes and devices
    (changed(query=Q.long()), ("int64", "float32")),
    (changed(key=Q.double()), ("key is torch.float64", "query is torch.float32", "one dtype")),
    (changed(value=Q.to("meta")), ("meta", "cpu", "one device")),
    (changed(query=Q.to(torch.complex64)), ("complex64", "bfloat16")),
    # the pattern
    (changed(segment_lengths=[4, 8, 16]), ("dilation_rates has 2 entries, segment_lengths has 3", "one rate")),
    (changed(dilation_rates=[1]), ("dilation_rates has 1 entry, segment_lengths has 2",)),
    (changed(segment_lengths=[], dilation_rates=[]), ("segment_lengths is empty",)),
    (changed(segment_lengths=[0, 8]), ("segment_lengths has 0", "at least 1")),
    (changed(dilation_rates=[1, -2]), ("dilation_rates has -2", "at least 1")),
    (changed(segment_lengths=[4.0, 8]), ("4.0 of type float", "integers")),
    (changed(dilation_rates=[True, 2]), ("True of type bool", "integers")),
    (changed(segment_lengths=8, dilation_rates=2), ("segment_lengths is 8", "list or tuple")),
    (changed(segment_lengths="48"), ("segment_lengths is '48'", "list or tuple")),
    (changed(dilation_rates=[5, 2]), ("dilation rate 5 is larger than its segment length 4",)),
    (changed(head_offsets="random"), ("'random'", "'contiguous', 'interleaved'")),
    # options
    (changed(padding="none"), ("'none'", "'mask', 'zeros'")),
    (changed(mixing_grad="none"), ("'none'", "'exact', 'detached'")),
    (changed(backend="cuda"), ("'cuda'", "'auto', 'gluon', 'sdpa', 'triton', 'reference'")),
    (changed(scale=float("nan")), ("scale is nan", "finite")),
    (changed(scale="1"), ("scale is '1'", "finite")),
    (changed(dropout_p=1.0), ("dropout_p is 1.0", "below 1")),
    (changed(dropout_p=-0.1), ("dropout_p is -0.1", "at least 0")),
    (changed(dropout_p=0.1, backend="sdpa"), ("backend 'sdpa'", "dropout", "'reference'")),
    (changed(backend=["sdpa"]), ("['sdpa']", "'auto', 'gluon', 'sdpa', 'triton', 'reference'")),
    (changed(is_causal="yes"), ("is_causal is 'yes'", "True or False")),
    (changed(scale=10**400), ("scale is 1000", "finite")),
    (changed(segment_lengths=[4, 2**63]), ("9223372036854775808", "2**62")),
    (changed(query=Q.numpy()), ("query is of type ndarray", "torch.Tensor")),
    (changed(query=Q.to_sparse()), ("query has layout torch.sparse_coo", "dense")),
    (changed(key_padding_mask=[[False] * 10] * 2), ("key_padding_mask is of type list", "torch.Tensor")),
    (changed(cu_seqlens=[0, 10]), ("cu_seqlens is of type list", "torch.Tensor")),
    (changed(key_start=2**64), ("key_start is 18446744073709551616", "2**62")),
    # masks and documents
    (changed(key_padding_mask=torch.zeros(2, 9, dtype=torch.bool)), ("(2, 9)", "(2, 10)")),
    (changed(key_padding_mask=torch.zeros(2, 10)), ("float32", "bool")),
    (changed(key_padding_mask=torch.zeros(2, 10, dtype=torch.bool, device="meta")), ("on meta", "on cpu")),
    (changed(key_padding_mask=torch.arange(10).expand(2, -1) < 3, padding="zeros"), ("suffix", "row 0", '"mask"')),
    (changed(cu_seqlens=torch.tensor([0, 10])), ("the batch has 2", "batch 1")),
    (changed(key_start=1.5), ("key_start is 1.5", "int")),
    (changed(key_start=True), ("key_start is True", "int")),
    (changed(key_start=torch.zeros(3, dtype=torch.int64)), ("shape (3,)", "(2,)")),
    (changed(key_start=torch.zeros(2)), ("key_start has dtype torch.float32", "int64")),
]
ONE = {"query": Q[:1], "key": Q[:1], "value": Q[:1]}
TABLE += [
    (changed(**ONE, cu_seqlens=torch.tensor(bounds)), fragments)
    for bounds, fragments in [
        ([0, 9], ("[0, 9]", "end at the 10 key rows")),
        ([1, 10], ("[1, 10]", "start at 0")),
        ([0, 7, 5, 10], ("[0, 7, 5, 10]", "never decrease")),
        ([0, 11], ("[0, 11]", "10 key rows")),
        ([10], ("shape (1,)", "at least 2")),
        ([[0, 10]], ("shape (1, 2)", "(documents + 1,)")),
        ([0.0, 10.0], ("cu_seqlens has dtype torch.float32", "int64")),
    ]
]
TABLE += [
    (changed(**ONE, cu_seqlens=torch.tensor([0, 10]), key_start=3), ("key_start", "position 0")),
    (
        changed(**ONE, cu_seqlens=torch.tensor([0, 10]), key_padding_mask=torch.arange(10)[None] > 8, padding="zeros"),
        ("cu_seqlens", "key_padding_mask"),
    ),
]


@pytest.mark.parametrize("function", [dilated_attention, dilated_attention_with_lse, explain, verify])
@pytest.mark.parametrize(("arguments", "fragments"), TABLE, ids=lambda value: value[0] if type(value) is tuple else "")
def test_wrong_input(function, arguments, fragments):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the fragments are checked below
        function(**arguments)
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        ({"seq_len": 0}, "seq_len is 0"),
        ({"seq_len": 4096.0}, "seq_len is 4096.0"),
        ({"seq_len": 4096, "ratio": 1}, "ratio is 1"),
        ({"seq_len": 4096, "rule": "linear"}, "'linear'; choose 'longnet' or 'gigapath'"),
        ({"seq_len": 4096, "num_branches": 0}, "num_branches is 0"),
        ({"seq_len": 4096, "first_segment": -1}, "first_segment is -1"),
        ({"seq_len": 4096, "max_rate": 0}, "max_rate is 0"),
    ],
)
def test_wrong_geometry(arguments, fragment):
    with pytest.raises(ValueError, match=fragment):
        DilatedPattern.geometric(**arguments)


def test_a_second_derivative_raises():
    x = torch.randn(1, 8, 2, 8, requires_grad=True)
    out = dilated_attention(x, x, x, [4], [1])
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


@pytest.mark.parametrize("function", [dilated_attention, explain])
def test_what_is_no_place_of_a_sequence(function):
    with pytest.raises(ValueError, match=r"parallel is 3; give ContextParallel\(mesh\).*Streaming\(device.*None"):
        function(**changed(parallel=3))


@pytest.mark.parametrize("attend", [
    lambda q: dilated_attention(q, Q, Q, [4], [1]),
    lambda q: package.sparse_attention(q, Q, Q, package.LocalWindow(16, 16)),
], ids=["dilated", "block-sparse"])  # fmt: skip
def test_a_forward_mode_derivative_raises(attend):
    tangent = torch.ones_like(Q)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(attend, (Q,), (tangent,))
    with torch.autograd.forward_ad.dual_level():
        attend(Q)
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            attend(torch.autograd.forward_ad.make_dual(Q, tangent))


PAIR = {"segment_lengths": [4], "dilation_rates": [1]}
ENCODER = package.LongNetEncoderConfig(embed_dim=8, num_layers=1, num_heads=2, **PAIR)
WINDOW = package.LocalWindow


@pytest.mark.parametrize(
    ("make", "fragment"),
    [
        (lambda: package.sparse_attention(Q, Q, Q, WINDOW), "give a block-sparse pattern such as LocalWindow(1024)"),
        (lambda: package.explain_sparse(Q, Q, Q, WINDOW), "give a block-sparse pattern such as LocalWindow(1024)"),
        (lambda: package.SparseAttention(WINDOW), "give a block-sparse pattern such as LocalWindow(1024)"),
        (lambda: package.MultiheadSparseAttention(8, 2, pattern=WINDOW), "give a block-sparse pattern such as"),
        (lambda: package.DilatedBlocks(128, 1), "segment_lengths is 128; give a list or tuple of integers"),
        (lambda: package.DilatedBlocks([128], 1), "dilation_rates is 1; give a list or tuple of integers"),
        (lambda: package.DilatedAttention(16, 1), "segment_lengths is 16; give a list or tuple of integers"),
        (lambda: package.DilatedAttention([16], "1"), "dilation_rates is '1'; give a list or tuple of integers"),
        (lambda: package.DilatedAttention([16], [1], dropout=[0.1]), "dropout is [0.1]; give a probability"),
        (lambda: package.MultiheadDilatedAttention([8], 2, **PAIR), "embed_dim is [8]; give an integer of at least 1"),
        (lambda: package.MultiheadDilatedAttention(8.0, 2, **PAIR), "embed_dim is 8.0; give an integer of at least 1"),
        (lambda: package.MultiheadDilatedAttention(8, "2", **PAIR), "num_heads is '2'; give an integer of at least 1"),
        (
            lambda: package.DilatedTransformerEncoderLayer(8, 2, segment_lengths=4, dilation_rates=1),
            "segment_lengths is 4; give a list or tuple of integers",
        ),
        (lambda: package.LongNetLM({"embed_dim": 8}), "config is of type dict; give an instance of LongNetLMConfig"),
        (lambda: package.LongNetLM(package.LongNetLMConfig), "config is LongNetLMConfig; give an instance of"),
        (lambda: package.LongNetEncoder({}), "config is of type dict; give an instance of LongNetEncoderConfig"),
        (lambda: package.LongNetViT({}, None), "config is of type dict; give an instance of LongNetEncoderConfig"),
        (lambda: package.LongNetViT(ENCODER, 3), "patch_embed is 3; give an ImageEmbedding or a TileEmbedding"),
        (lambda: package.recommend_ordering(64, 64, segment_lengths=256), "segment_lengths is 256; give integers"),
        (lambda: package.ContextParallel(4), "mesh is 4; give a DeviceMesh"),
        (lambda: package.Streaming("nowhere", memory_budget=9), "device is 'nowhere'; streaming computes on 'cpu'"),
        (lambda: package.available_backends(3), "device is 3; give a name such as 'cuda'"),
    ],
)
def test_a_wrong_type_is_said_to_be_one(make: Any, fragment: str):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the fragment is checked below
        make()
    assert fragment in str(caught.value)
