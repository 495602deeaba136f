"""An ordering at the boundary of the encoder and of the vision transformer: the model on rows permuted by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dilated_attention_pytorch import HilbertOrdering, LongNetEncoder, LongNetEncoderConfig, LongNetViT, hilbert_order
from dilated_attention_pytorch.models import ImageEmbedding, TileEmbedding
from dilated_attention_pytorch.ordering import GRID_ORDERS, order_from_coordinates

SIZES: dict[str, Any] = {"embed_dim": 16, "num_layers": 2, "num_heads": 4, "ffn_dim": 24}
SIZES |= {"segment_lengths": (8, 32), "dilation_rates": (1, 2)}


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def encoder(**options: Any) -> LongNetEncoder:
    model = LongNetEncoder(LongNetEncoderConfig(**SIZES | options), dtype=torch.float64)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def gradients(model: nn.Module, out: torch.Tensor, x: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(out, [x, *model.parameters()], grad))


@pytest.mark.parametrize("padding", ["mask", "zeros"])
def test_the_encoder_under_an_ordering_is_the_encoder_on_permuted_rows(padding: str) -> None:
    model, ordering = encoder(padding=padding, activation_checkpointing=True), HilbertOrdering((6, 7), skip_first=1)
    order = torch.cat((torch.zeros(1, dtype=torch.int64), 1 + hilbert_order(6, 7)))
    x, grad = normal(2, 43, 16).requires_grad_(), normal(2, 43, 16)
    expected = torch.empty_like(x).index_copy(1, order, model(x[:, order]))
    found = model(x, ordering=ordering)
    torch.testing.assert_close(found, expected)
    assert float((found - model(x)).detach().abs().max()) > 1e-3  # the order matters to the layers
    for one, other in zip(gradients(model, found, x, grad), gradients(model, expected, x, grad), strict=True):
        torch.testing.assert_close(one, other)
    states = list(model.iter_states(x, ordering=ordering))
    torch.testing.assert_close(states[0], x)
    torch.testing.assert_close(model.layer_norm(states[-1]), found)


def test_masked_rows_go_with_the_others() -> None:
    model, x = encoder(), normal(3, 20, 16)
    hidden = torch.rand(3, 20) < 0.3
    points = torch.randint(0, 9, (3, 20, 2))
    ordering = HilbertOrdering.from_coordinates(points)
    found = model(x, key_padding_mask=hidden, ordering=ordering)
    for row in range(3):
        order = order_from_coordinates(points[row])
        expected = model(x[row : row + 1, order], key_padding_mask=hidden[row : row + 1, order])
        torch.testing.assert_close(found[row, order][~hidden[row, order]], expected[0, ~hidden[row, order]])


def test_xpos_keeps_the_original_positions() -> None:
    """With one segment of rate 1 the order of rows is no matter, unless their positions were lost."""
    model, x = encoder(xpos=True, segment_lengths=(64,), dilation_rates=(1,)), normal(2, 30, 16)
    torch.testing.assert_close(model(x, ordering=HilbertOrdering((5, 6))), model(x))
    each = HilbertOrdering(permutation=torch.stack((torch.randperm(30), torch.randperm(30))))
    torch.testing.assert_close(model(x, ordering=each), model(x))


def test_packed_documents_are_ordered_one_by_one() -> None:
    model, x = encoder(xpos=True), normal(1, 22, 16)
    bounds = torch.tensor([0, 10, 22])
    ordering = HilbertOrdering([(2, 5), (4, 3)], cu_seqlens=bounds)
    found = model(x, cu_seqlens=bounds, ordering=ordering)
    alone = [model(x[:, :10], ordering=HilbertOrdering((2, 5))), model(x[:, 10:], ordering=HilbertOrdering((4, 3)))]
    torch.testing.assert_close(found, torch.cat(alone, dim=1))
    with pytest.raises(ValueError, match=r"the ordering's cu_seqlens are None, the encoder's \(0, 10, 22\)"):
        model(x, cu_seqlens=bounds, ordering=HilbertOrdering(permutation=torch.randperm(22)))
    with pytest.raises(ValueError, match="give both the same documents"):
        model(x, ordering=ordering)


def test_an_ordering_of_other_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="is for 12 in dimension 1"):
        encoder()(normal(1, 13, 16), ordering=HilbertOrdering((3, 4)))


def slide_encoder(ordering: Any, **options: Any) -> LongNetViT:
    torch.manual_seed(0)
    embed = TileEmbedding(6, 16, slide_ngrids=20, dtype=torch.float64)
    model = LongNetViT(LongNetEncoderConfig(**SIZES, padding="zeros"), embed, ordering=ordering, **options)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize("curve", ["hilbert", "morton", "snake", "raster"])
@pytest.mark.parametrize("global_pool", [False, True])
def test_tiles_in_any_file_order_give_one_embedding(curve: Any, global_pool: bool) -> None:
    """Along a curve it is no matter in which order a file lists the tiles; along the file it is."""
    model, given = slide_encoder(curve, global_pool=global_pool), slide_encoder(None, global_pool=global_pool)
    cells = torch.randperm(400)[:45]
    coords = 256 * torch.stack((cells // 20, cells % 20), -1)[None]
    x, shuffled = normal(1, 45, 6), torch.randperm(45)
    order = order_from_coordinates(coords[0] // 256, curve=curve)
    for found, expected in zip(
        model(x, coords, all_layer_embed=True), given(x[:, order], coords[:, order], all_layer_embed=True), strict=True
    ):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(model(x[:, shuffled], coords[:, shuffled]), model(x, coords))
    assert float((given(x[:, shuffled], coords[:, shuffled])[0] - given(x, coords)[0]).detach().abs().max()) > 1e-4


def test_batches_and_packs_of_ordered_slides_equal_slides_alone() -> None:
    model = slide_encoder("hilbert")
    lengths = [17, 30, 5]
    slides = [(normal(1, n, 6), torch.randint(20 * 256, (1, n, 2))) for n in lengths]
    alone = torch.cat([model(x, coords)[0] for x, coords in slides])
    pad = nn.utils.rnn.pad_sequence
    x, coords = (pad([slide[i][0] for slide in slides], batch_first=True) for i in (0, 1))
    hidden = torch.arange(30) >= torch.tensor(lengths)[:, None]
    torch.testing.assert_close(model(x, coords, key_padding_mask=hidden)[0], alone)
    x, coords = (torch.cat([slide[i] for slide in slides], 1) for i in (0, 1))
    torch.testing.assert_close(model(x, coords, cu_seqlens=torch.tensor([0, 17, 47, 52]))[0], alone)


@pytest.mark.parametrize("curve", ["hilbert", "morton", "snake"])
def test_patches_of_an_image_come_back_row_by_row(curve: Any) -> None:
    torch.manual_seed(0)
    models = []
    for ordering in (None, curve):
        embed = ImageEmbedding(24, 4, embed_dim=16, dtype=torch.float64)
        models.append(LongNetViT(LongNetEncoderConfig(**SIZES), embed, num_classes=3, ordering=ordering).eval())
    given, model = models
    model.load_state_dict(given.state_dict())
    image = normal(2, 3, 24, 20)
    tokens = given.patch_embed(image, given.pos_embed)
    order = GRID_ORDERS[curve](6, 5)
    expected = torch.empty_like(tokens).index_copy(1, order, given.encoder(tokens[:, order]))
    torch.testing.assert_close(model(image), expected)
    assert model.classify(image).shape == (2, 3)


def test_the_raster_of_an_image_is_the_order_given_and_other_names_are_refused() -> None:
    embed = ImageEmbedding(8, 4, embed_dim=16)
    model = LongNetViT(LongNetEncoderConfig(**SIZES), embed, ordering="raster").eval()
    image = torch.randn(1, 3, 8, 8)
    assert torch.equal(model(image), model.encoder(model.patch_embed(image, model.pos_embed)))
    with pytest.raises(ValueError, match="the curve is 'zorder'; choose one of 'hilbert', 'morton', 'snake', 'raster'"):
        LongNetViT(LongNetEncoderConfig(**SIZES), embed, ordering="zorder")  # type: ignore[arg-type]
