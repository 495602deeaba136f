"""The public functions of block-sparse attention: structure pair by pair, causality, joins, errors."""

from __future__ import annotations

import pytest
import torch

from dilated_attention_pytorch import (
    BlockList,
    ContentTopK,
    DilatedBlocks,
    DilatedPattern,
    GlobalLocal,
    Hierarchical,
    LocalWindow,
    MultiheadDilatedAttention,
    MultiheadSparseAttention,
    RandomBlocks,
    SparseAttention,
    Union,
    dilated_attention_with_lse,
    get_pattern,
    sparse_attention,
    sparse_attention_with_lse,
)
from dilated_attention_pytorch.parallel import Streaming
from dilated_attention_pytorch.patterns.formula import block_mask

HEADS = 2
MARKED = 3
PATTERNS = {
    "local": LocalWindow(256, 64),
    "global": GlobalLocal(128, 64, (4000,), 64),
    "wide global": GlobalLocal(256, 256, block_size=64),
    "dilated": DilatedBlocks((960, 4032), (1, 4), 64),
    "hierarchical": Hierarchical(((128, 64), (2048, 512)), 64),
    "random": RandomBlocks(5, seed=7, block_size=64),
    "union": Union((LocalWindow(128, 64), RandomBlocks(3, block_size=128), GlobalLocal(0, 1, block_size=64))),
}


def draw(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def expected(pattern, head, rows, *, is_causal):
    """(rows,) keys of each row: whole blocks, the last of them short, and up to itself in its own when causal."""
    size = 64
    blocks = -(-rows // size)
    members = pattern.patterns if isinstance(pattern, Union) else (pattern,)
    mask = torch.zeros(blocks, blocks, dtype=torch.bool)
    for member in members:
        factor = member.block_size // size
        coarse = block_mask(member, head, HEADS, -(-blocks // factor), is_causal=is_causal)
        mask |= coarse.repeat_interleave(factor, 0).repeat_interleave(factor, 1)[:blocks, :blocks]
    lengths = torch.full((blocks,), size)
    lengths[-1] = rows - size * (blocks - 1)
    row = torch.arange(rows)
    block = row // size
    if not is_causal:
        return (mask.long() @ lengths)[block], mask
    mask = mask.tril()
    return ((mask.tril(-1).long() @ lengths)[block] + mask.diagonal()[block] * (row % size + 1)), mask


@pytest.mark.parametrize("is_causal", [False, True], ids=["both", "causal"])
@pytest.mark.parametrize("name", PATTERNS)
def test_every_pair_is_there_once(name, is_causal):
    """With a query of zeros exp(lse) is the number of a row's keys, and out the share of them in a marked block.

    For a gradient of out that is that number, the gradient of a value is the number of rows that see its key.
    """
    rows, pattern = 5100, PATTERNS[name]
    q = torch.zeros(1, rows, HEADS, 8)
    value = torch.ones(1, rows, HEADS, 8)
    value[..., 1] = 0.0
    value[:, 64 * MARKED : 64 * MARKED + 64, :, 1] = 1.0
    value.requires_grad_()
    out, lse = sparse_attention_with_lse(q, draw(1, rows, HEADS, 8), value, pattern, is_causal=is_causal)
    counts, masks = zip(*(expected(pattern, head, rows, is_causal=is_causal) for head in range(HEADS)), strict=True)
    total = torch.stack(counts)
    assert torch.equal(lse[0].double().exp().round().long(), total)
    block, place = torch.arange(rows) // 64, torch.arange(rows) % 64
    for head, mask in enumerate(masks):
        inside = mask[block, MARKED] * 64
        if is_causal:
            inside = torch.where(block == MARKED, mask[block, MARKED] * (place + 1), inside)
        torch.testing.assert_close(out[0, :, head, 1], inside / total[head].clamp(min=1), rtol=1e-5, atol=1e-7)
    (dv,) = torch.autograd.grad(out, value, total.T[None, :, :, None].expand_as(out).float())
    lengths = torch.full((len(masks[0]),), 64)
    lengths[-1] = rows - 64 * (len(lengths) - 1)
    for head, mask in enumerate(masks):
        if is_causal:
            seen = (mask.tril(-1).long().T @ lengths)[block] + mask.diagonal()[block] * (lengths[block] - place)
        else:
            seen = (mask.long().T @ lengths)[block]
        torch.testing.assert_close(dv[0, :, head, 0], seen.float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("name", PATTERNS)
def test_the_future_changes_no_bit(name, backend):
    rows = 500
    q, k, v = (draw(1, rows, HEADS, 8, seed=i) for i in range(3))
    before = sparse_attention_with_lse(q, k, v, PATTERNS[name], is_causal=True, backend=backend)
    for t in (1, 64, 300, 499):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, t] = 3.0
        after = sparse_attention_with_lse(*changed, PATTERNS[name], is_causal=True, backend=backend)
        assert torch.equal(after.out[:, :t], before.out[:, :t])
        assert torch.equal(after.lse[..., :t], before.lse[..., :t])


@pytest.mark.parametrize("name", PATTERNS)
def test_token_by_token_equals_the_whole_pass(name):
    rows = 300
    q, k, v = (draw(1, rows, HEADS, 8, seed=i) for i in range(3))
    whole = sparse_attention(q, k, v, PATTERNS[name], is_causal=True)
    for t in (1, 64, 65, 200, 300):
        step = sparse_attention(q[:, t - 1 : t], k[:, :t], v[:, :t], PATTERNS[name], is_causal=True)
        torch.testing.assert_close(step, whole[:, t - 1 : t], rtol=1e-5, atol=1e-6)


def test_documents_packed_padded_or_alone_are_the_same():
    pattern = PATTERNS["union"]
    q, k, v = (draw(1, 500, HEADS, 8, seed=i) for i in range(3))
    packed = sparse_attention(q, k, v, pattern, cu_seqlens=torch.tensor([0, 177, 500]), is_causal=True)
    for first, last in ((0, 177), (177, 500)):
        alone = sparse_attention(*(t[:, first:last] for t in (q, k, v)), pattern, is_causal=True)
        torch.testing.assert_close(packed[:, first:last], alone, rtol=1e-5, atol=1e-6)
    padded = sparse_attention(q, k, v, pattern, key_start=-177, is_causal=True)
    torch.testing.assert_close(padded[:, 177:], packed[:, 177:], rtol=1e-5, atol=1e-6)
    assert not padded[:, :177].any()


def test_multiplicity_joins_the_members_with_their_counts():
    members = (LocalWindow(64, 64), LocalWindow(128, 64), DilatedPattern((256, 512), (1, 2)))
    tensors = [draw(1, 500, HEADS, 8, seed=i).double().requires_grad_() for i in range(3)]
    out, lse = sparse_attention_with_lse(*tensors, Union(members, multiplicity=True), is_causal=True)
    parts = [sparse_attention_with_lse(*tensors, m, is_causal=True) for m in members[:2]]
    parts.append(dilated_attention_with_lse(*tensors, (256, 512), (1, 2), is_causal=True))
    weights = torch.stack([p.lse for p in parts]).softmax(0).transpose(2, 3)[..., None]
    expected_out = (weights * torch.stack([p.out for p in parts])).sum(0)
    torch.testing.assert_close(lse, torch.stack([p.lse for p in parts]).logsumexp(0))
    torch.testing.assert_close(out, expected_out)
    grads = (torch.autograd.grad(x.square().sum(), tensors, retain_graph=True) for x in (out, expected_out))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_rows_without_keys_are_zero_and_so_are_their_gradients():
    pattern = DilatedBlocks((128,), (2,), 64)
    tensors = [draw(1, 256, HEADS, 8, seed=i).requires_grad_() for i in range(3)]
    out, lse = sparse_attention_with_lse(*tensors, pattern)
    empty = lse[0] == -torch.inf
    assert 0 < empty.sum() < empty.numel()
    assert not out[0].transpose(0, 1)[empty].any()
    for grad in torch.autograd.grad([out, lse], tensors, [torch.ones_like(out), torch.ones_like(lse)]):
        assert torch.isfinite(grad).all()
    summed = sparse_attention_with_lse(*tensors, Union((pattern, pattern), multiplicity=True))
    assert torch.equal(summed.lse[0] == -torch.inf, empty)
    for grad in torch.autograd.grad(summed.out.sum(), tensors):
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LocalWindow(100, 64), "window is 100, no multiple of block_size 64"),
        (lambda: LocalWindow(96, 48), "block_size is 48; choose one of 16, 32, 64, 128"),
        (lambda: LocalWindow(-64, 64), "window is -64; give an integer of at least 0"),
        (lambda: GlobalLocal(64, block_size=64), "there are no global tokens"),
        (lambda: GlobalLocal(64, global_indices=(-1,), block_size=64), "entry of global_indices is -1"),
        (lambda: Hierarchical((), 64), "give at least one"),
        (lambda: Hierarchical(((64, 0),), 64), "stride is 0"),
        (lambda: DilatedBlocks((128,), (3,), 64), "dilation rate 3 is larger"),
        (lambda: DilatedBlocks((100,), (1,), 64), "segment length is 100"),
        (lambda: RandomBlocks(0), "num_blocks is 0"),
        (lambda: BlockList(torch.zeros(3), torch.zeros(2).long()), "row_pointer is"),
        (lambda: BlockList.from_mask(torch.ones(3)), "mask is no bool tensor"),
        (lambda: BlockList.from_coo(torch.tensor([4]), torch.tensor([0]), size=(3,)), "row has values from 4 to 4"),
        (lambda: Union(()), "give a tuple of patterns"),
        (lambda: Union((DilatedPattern((4,), (1,)),)), "no block-sparse pattern; use dilated_attention"),
        (lambda: Union((LocalWindow(64, 64), "local")), "patterns has 'local'"),
    ],
)
def test_patterns_refuse_what_they_cannot_mean(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("pattern", "options", "message"),
    [
        ("local", {}, "pattern is 'local'; give a block-sparse pattern"),
        (DilatedPattern((4,), (1,)), {}, "call dilated_attention, or put it in a Union"),
        (LocalWindow(64, 64), {"backend": "flash"}, "backend is 'flash'; choose one of 'auto'"),
        (LocalWindow(64, 64), {"dropout_p": 1.0}, "dropout_p is 1.0"),
        (LocalWindow(64, 64), {"dropout_p": 0.1, "backend": "sdpa"}, "draw dropout masks of their own"),
        (BlockList.from_mask(torch.ones(1, 1).bool(), block_size=64), {}, "1 query blocks of 64, and a document has 2"),
        (BlockList.from_mask(torch.ones(3, 4, 4).bool(), block_size=64), {}, "has 3 heads, the query 2"),
        (Union((LocalWindow(0, 64), DilatedPattern((8,), (2,)))), {"backend": "sdpa"}, "shows parts of blocks"),
    ],
)  # fmt: skip
def test_calls_refuse_what_does_not_fit(pattern, options, message):
    q = draw(1, 100, HEADS, 8)
    with pytest.raises(ValueError, match=message):
        sparse_attention(q, q, q, pattern, **options)


def test_a_list_from_coordinates_is_the_list_of_its_mask():
    mask = torch.rand(2, 5, 6, generator=torch.Generator().manual_seed(3)) < 0.5
    head, row, column = mask.nonzero(as_tuple=True)
    order = torch.randperm(len(row), generator=torch.Generator().manual_seed(4))
    made = BlockList.from_coo(row[order], column[order], head=head[order], size=(2, 5), block_size=64)
    q = draw(1, 300, HEADS, 8)
    from_mask = BlockList.from_mask(mask, block_size=64)
    assert torch.equal(sparse_attention(q, q, q, made), sparse_attention(q, q, q, from_mask))


def test_plans_of_long_rows_stay_small():
    """A million rows: the lists, and nothing of the size of a dense block mask."""
    from dilated_attention_pytorch.patterns.blocks import block_plan
    from dilated_attention_pytorch.types import Document, Shape

    rows = 1 << 20
    shape, documents = Shape(1, rows, rows, 16, 16, 128, 128), (Document(0, 1, 0, rows, 0, rows),)
    plan = block_plan(GlobalLocal(4096, 256), shape, documents, is_causal=True, device="cpu")
    window, first = 32, 2
    block = torch.arange(rows // 128)
    counts = torch.where(block < first, block + 1, (block + 1).clamp(max=window + 1) + (block - window).clamp(0, first))
    assert torch.equal(plan.counts[0].long(), counts)
    assert plan.columns.dtype == torch.int32
    assert torch.equal(plan.key_tiles[-1], torch.tensor([0, rows - 128, rows - 128, 128], dtype=torch.int32))


def test_modules_hold_the_pattern_and_project_as_the_dilated_ones_do():
    pattern = GlobalLocal(64, 1, block_size=64)
    q, k, v = (draw(2, 100, 4, 8, seed=i) for i in range(3))
    module = SparseAttention(pattern, is_causal=True, dropout=0.5).eval()
    assert torch.equal(module(q, k, v), sparse_attention(q, k, v, pattern, is_causal=True))
    assert repr(module) == f"SparseAttention({pattern!r}, is_causal=True, dropout=0.5)"
    sparse = MultiheadSparseAttention(32, 4, pattern=LocalWindow(128, 64), num_kv_heads=2)
    dense = MultiheadDilatedAttention(32, 4, segment_lengths=(128,), dilation_rates=(1,), num_kv_heads=2)
    dense.load_state_dict(sparse.state_dict())
    x = draw(2, 100, 32)
    torch.testing.assert_close(sparse(x, x, x, is_causal=True)[0], dense(x, x, x, is_causal=True)[0])
    sparse(x, x, x)[0].sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in sparse.parameters())
    with pytest.raises(ValueError, match=r"\['padding'\] are of dilated attention"):
        MultiheadSparseAttention(32, 4, pattern=pattern, padding="zeros")
    with pytest.raises(ValueError, match="streams dilated attention alone"):
        module(q, k, v, parallel=Streaming("cpu", memory_budget=1 << 20))


def test_presets_are_the_patterns_of_their_papers():
    assert get_pattern("longformer") == GlobalLocal(256, 1, block_size=64)
    bigbird = get_pattern("bigbird", random_blocks=2)
    assert bigbird == Union((GlobalLocal(64, 128, block_size=64), RandomBlocks(2, 0, 64)))
    assert get_pattern("local", window=256) == LocalWindow(256, 128)
    assert get_pattern("hierarchical").levels == ((1024, 128), (8192, 1024), (65536, 8192))
    assert get_pattern("moba") == ContentTopK(8, block_size=128)
    with pytest.raises(ValueError, match="name is 'sparse'; choose one of 'longformer', 'bigbird'"):
        get_pattern("sparse")
    with pytest.raises(ValueError, match="unexpected keyword argument 'windows'"):
        get_pattern("local", windows=3)
