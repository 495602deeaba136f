"""LongNetViT: the numbers of GigaPath and LongViT from their own weights, batches of slides, and what is refused."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dilated_attention_pytorch import LongNetEncoderConfig, LongNetViT
from dilated_attention_pytorch.models import ImageEmbedding, TileEmbedding, WeightsError

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = 1e-5  # of the largest golden value
GRID: dict[str, Any] = {"slide_ngrids": 48, "max_wsi_size": 16384}


def golden(name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What the numbers were made with, the state dict, and inputs and results."""
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    state = {key.removeprefix("state/"): value for key, value in tensors.items() if key.startswith("state/")}
    return json.loads((GOLDEN / f"{name}.json").read_text()), state, tensors


GIGAPATH_OPTIONS, GIGAPATH, SLIDE = golden("gigapath_slide_encoder")
LONGVIT_OPTIONS, LONGVIT, IMAGES = golden("longvit")


def assert_golden(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all()
    assert float((actual.double() - expected).abs().max() / expected.abs().max()) <= TOLERANCE


def tiny(*, global_pool: bool = False, **options: Any) -> LongNetViT:
    """A slide encoder in float64 whose every parameter counts."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"embed_dim": 16, "num_layers": 2, "num_heads": 4, "ffn_dim": 24}
    pattern: dict[str, Any] = {"segment_lengths": (8, 16), "dilation_rates": (1, 2), "padding": "zeros"}
    embed = TileEmbedding(6, 16, slide_ngrids=20, dtype=torch.float64)
    model = LongNetViT(LongNetEncoderConfig(**sizes | pattern | options), embed, global_pool=global_pool)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def slide(tiles: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tiles)
    x = torch.randn(1, tiles, 6, dtype=torch.float64, generator=generator)
    return x, torch.randint(20 * 256, (1, tiles, 2), generator=generator)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gigapath_golden(backend: str) -> None:
    model = LongNetViT.from_gigapath(GIGAPATH, **GRID, backend=backend)
    assert list(model.encoder.config.segment_lengths) == GIGAPATH_OPTIONS["segment_lengths"]
    assert not model.training
    with torch.no_grad():
        layers = model(SLIDE["x"], SLIDE["coords"], all_layer_embed=True)
        assert len(layers) == 1 + GIGAPATH_OPTIONS["depth"]
        for i, embedding in enumerate(layers):
            assert_golden(embedding, SLIDE[f"layer{i}"])


def test_only_the_embedding_alone_has_passed_the_last_norm_of_the_encoder() -> None:
    model, (x, coords) = tiny(), slide(12)
    (alone,) = model(x, coords)
    *_, last = model(x, coords, all_layer_embed=True)
    assert float((alone - last).detach().abs().max()) > 1e-3
    nn.Module.__setattr__(model.encoder, "layer_norm", None)
    torch.testing.assert_close(model(x, coords)[0], last)


def test_gigapath_golden_pooled() -> None:
    model = LongNetViT.from_gigapath(GIGAPATH, **GRID, global_pool=True)
    with torch.no_grad():
        (pooled,) = model(SLIDE["x"], SLIDE["coords"])
        assert_golden(pooled, SLIDE["pooled"])
        (masked,) = model(
            *(nn.functional.pad(SLIDE[name], (0, 0, 0, 9), value=torch.nan) for name in ("x", "coords")),
            key_padding_mask=(torch.arange(1499 + 9) >= 1499)[None],
        )
    assert_golden(masked, SLIDE["pooled"])


def test_gigapath_differs_without_the_padding_that_it_was_trained_with() -> None:
    model = LongNetViT.from_gigapath(GIGAPATH, **GRID, padding="mask")
    with torch.no_grad():
        layers = model(SLIDE["x"], SLIDE["coords"], all_layer_embed=True)
    assert float((layers[2] - SLIDE["layer2"]).abs().max() / SLIDE["layer2"].abs().max()) > 100 * TOLERANCE


@pytest.mark.parametrize("wrapped", [True, False], ids=["wrapped", "bare"])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_gigapath_from_files_and_back(wrapped: bool, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"slide_encoder.{suffix}"
    if suffix == "pth":
        torch.save({"model": GIGAPATH} if wrapped else GIGAPATH, path)
    else:
        save_file(GIGAPATH, path)
    model = LongNetViT.from_gigapath(path, **GRID)
    saved = model.state_dict()
    assert saved.keys() == GIGAPATH.keys()
    assert all(torch.equal(saved[name], value) for name, value in GIGAPATH.items())
    assert model.patch_embed.proj.weight.data_ptr() != GIGAPATH["patch_embed.proj.weight"].data_ptr()


def test_strict_loading_names_what_does_not_fit(tmp_path: Path) -> None:
    state = dict(GIGAPATH)
    state["encoder.layers.1.ffn.fc3.bias"] = state.pop("encoder.layers.1.ffn.fc2.bias")
    state["norm.weight"] = torch.ones(47)
    path = tmp_path / "slide_encoder.pth"
    torch.save({"model": state}, path)
    with pytest.raises(ValueError, match=r"slide_encoder.pth' does not fit LongNetViT") as caught:
        LongNetViT.from_gigapath(path, **GRID)
    for problem in ("fc2.bias is missing", "fc3.bias is unknown", "norm.weight has shape (47,), not (48,)"):
        assert problem in str(caught.value)
    with pytest.raises(WeightsError, match="state dict is no slide encoder of GigaPath: it lacks patch_embed"):
        LongNetViT.from_gigapath({"conv1.weight": torch.ones(3, 3)})
    with pytest.raises(WeightsError, match="is no slide encoder of GigaPath: patch_embed"):
        LongNetViT.from_gigapath(LONGVIT)
    gap = {name.replace("layers.1.", "layers.7."): value for name, value in GIGAPATH.items()}
    with pytest.raises(WeightsError, match=r"layers\.1\.\S+ is missing"):
        LongNetViT.from_gigapath(gap, **GRID)


def test_a_pickle_bomb_does_not_go_off(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "exploded"),)

    path = tmp_path / "slide_encoder.pth"
    torch.save({"model": {**GIGAPATH, "bomb": Bomb()}}, path)
    for load in (LongNetViT.from_gigapath, lambda path: LongNetViT.from_longvit(path, img_size=64, patch_size=4)):
        with pytest.raises(ValueError, match="is no readable file of weights"):
            load(path)
    assert not (tmp_path / "exploded").exists()
    torch.load(path, weights_only=False)  # it would have
    assert (tmp_path / "exploded").exists()


def test_options_that_the_weights_cannot_have() -> None:
    with pytest.raises(ValueError, match="embed_dim is 48, num_heads is 5"):
        LongNetViT.from_gigapath(GIGAPATH, num_heads=5)
    with pytest.raises(ValueError, match="give one rate a segment length"):
        LongNetViT.from_gigapath(GIGAPATH, segment_lengths=(1024,))
    model = LongNetViT.from_gigapath(GIGAPATH, segment_lengths=[1024], dilation_rates=[1], drop_path_rate=0.3)
    assert (model.encoder.config.dropout, model.encoder.layers[1].drop_path.rate) == (0.25, 0.3)


@pytest.mark.parametrize("global_pool", [False, True], ids=["class token", "pool"])
@pytest.mark.parametrize("every", [False, True], ids=["last", "all layers"])
def test_slides_of_different_length_are_as_alone(global_pool: bool, every: bool) -> None:
    model, lengths = tiny(global_pool=global_pool), (37, 5, 1, 20)
    slides = [slide(n) for n in lengths]
    alone = [model(x, coords, every) for x, coords in slides]
    expected = [torch.cat(embeddings) for embeddings in zip(*alone, strict=True)]

    x = torch.full((4, 37, 6), torch.nan, dtype=torch.float64)
    coords = torch.full((4, 37, 2), -1, dtype=torch.int64)
    for row, (features, corners) in enumerate(slides):
        x[row, : lengths[row]], coords[row, : lengths[row]] = features[0], corners[0]
    mask = torch.arange(37) >= torch.tensor(lengths)[:, None]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    packed = (torch.cat(parts, dim=1) for parts in zip(*slides, strict=True))
    for found in (model(x, coords, every, key_padding_mask=mask), model(*packed, every, cu_seqlens=bounds)):
        assert len(found) == (3 if every else 1)
        for actual, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-11, atol=1e-12)


def test_packed_slides_have_the_gradients_of_slides_alone() -> None:
    model, slides = tiny(), [slide(9), slide(17)]
    sum(model(x, coords)[0].cos().sum() for x, coords in slides).backward()  # type: ignore[union-attr]
    expected = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    packed = (torch.cat(parts, dim=1) for parts in zip(*slides, strict=True))
    model(*packed, cu_seqlens=torch.tensor([0, 9, 26]))[0].cos().sum().backward()
    found = [parameter.grad for parameter in model.parameters()]
    assert len(expected) == len(found)
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-11)


def test_checkpointing_gives_equal_gradients() -> None:
    gradients = []
    for recompute in (False, True):
        model = tiny(activation_checkpointing=recompute, dropout=0.25, drop_path_rate=0.3).train()
        torch.manual_seed(3)
        x, coords = slide(30)
        model(x.expand(8, -1, -1), coords.expand(8, -1, -1))[0].cos().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert float(one.abs().max()) > 0
        torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-14)


def test_coordinates_matter_and_are_checked() -> None:
    model, (x, coords) = tiny(), slide(12)
    (embedding,) = model(x, coords)
    assert float((model(x, coords.flip(-1))[0] - embedding).detach().abs().max()) > 1e-3
    torch.testing.assert_close(model(x, coords // 256 * 256.0)[0], embedding)
    coords[0, 7, 1] = 20 * 256
    with pytest.raises(ValueError, match=r"tile 7 of batch row 0 .* below 5120"):
        model(x, coords)
    with pytest.raises(ValueError, match="coords is missing"):
        model(x)
    with pytest.raises(
        ValueError, match=r"key_padding_mask is torch.bool of shape \(1, 13\); give bool of shape \(1, 12\)"
    ):
        model(x, coords, key_padding_mask=torch.zeros(1, 13, dtype=torch.bool))


def test_slides_that_the_original_gets_wrong_are_warned_of_once() -> None:
    model = LongNetViT.from_gigapath(GIGAPATH, segment_lengths=(1024, 1023), dilation_rates=(1, 2), slide_ngrids=48)
    x, coords = SLIDE["x"], SLIDE["coords"]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x[:, :1022], coords[:, :1022])
        with pytest.warns(UserWarning, match=r"document of 1024 rows is longer than segments of 1023 \(rate 2\)"):
            model(x[:, :1023], coords[:, :1023])
        model(x[:, :1023], coords[:, :1023])


def test_longvit_golden() -> None:
    model = LongNetViT.from_longvit(LONGVIT, img_size=64, patch_size=4)
    assert list(model.encoder.config.segment_lengths) == LONGVIT_OPTIONS["segment_lengths"]
    assert model.state_dict().keys() == LONGVIT.keys()
    with torch.no_grad():
        assert_golden(model(IMAGES["image"]), IMAGES["tokens"])
        assert_golden(model(IMAGES["image_other_size"]), IMAGES["tokens_other_size"])


def test_longvit_with_a_classifier() -> None:
    state = {f"model.{name}": value for name, value in LONGVIT.items()}
    state |= {"fc_norm.weight": torch.randn(32), "fc_norm.bias": torch.randn(32)}
    state |= {"head.weight": torch.randn(3, 32), "head.bias": torch.randn(3)}
    model = LongNetViT.from_longvit({"module": state}, img_size=64, patch_size=4)
    with torch.no_grad():
        assert_golden(model(IMAGES["image"]), IMAGES["tokens"])
        pooled = nn.functional.layer_norm(
            IMAGES["tokens"].mean(1), (32,), state["fc_norm.weight"], state["fc_norm.bias"]
        )
        expected = pooled @ state["head.weight"].T + state["head.bias"]
        torch.testing.assert_close(model.classify(IMAGES["image"]), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="has no classifier"):
        LongNetViT.from_longvit(LONGVIT, img_size=64, patch_size=4).classify(IMAGES["image"])


def test_longvit_for_another_size_has_its_segments_and_positions() -> None:
    model = LongNetViT.from_longvit(LONGVIT, img_size=128, patch_size=4, segment_lengths=[64], dilation_rates=[2])
    assert model.pos_embed is not None
    assert model.pos_embed.shape == (1, 1024, 32)
    assert (model.encoder.config.segment_lengths, model.encoder.config.dilation_rates) == ((64,), (2,))
    coarse = {**LONGVIT, "patch_embed.proj.weight": torch.zeros(32, 3, 512, 512)}
    model = LongNetViT.from_longvit(coarse, img_size=4096, patch_size=512)
    assert model.encoder.config.segment_lengths == (1024, 2048, 4096, 8192, 16384)


def test_what_an_image_encoder_refuses() -> None:
    with pytest.raises(WeightsError, match="has patches of 4 pixels; patch_size is 8"):
        LongNetViT.from_longvit(LONGVIT, img_size=64, patch_size=8)
    with pytest.raises(ValueError, match="img_size is 66, patch_size is 4"):
        LongNetViT.from_longvit(LONGVIT, img_size=66, patch_size=4)
    with pytest.raises(WeightsError, match=r"is no LongViT: patch_embed\.proj.weight has shape"):
        LongNetViT.from_longvit(GIGAPATH, img_size=64, patch_size=4)
    model = LongNetViT.from_longvit(LONGVIT, img_size=64, patch_size=4)
    with pytest.raises(ValueError, match="this model takes images"):
        model(IMAGES["image"], torch.zeros(1, 4, 2))


def test_options_of_the_other_front_end_are_refused() -> None:
    config = LongNetEncoderConfig(
        embed_dim=16, num_layers=1, num_heads=4, segment_lengths=(8,), dilation_rates=(1,), xpos=True
    )
    for embed, options, message in (
        (TileEmbedding(6, 8), {}, "patch_embed is 8 wide, the encoder 16"),
        (TileEmbedding(6, 16), {"num_classes": 2}, "num_classes is 2; a slide encoder has no classifier"),
        (ImageEmbedding(8, 2, embed_dim=16), {"global_pool": True}, "global_pool is True; an image"),
    ):
        with pytest.raises(ValueError, match=message):
            LongNetViT(config, embed, **options)  # type: ignore[arg-type]
    fresh = LongNetViT(config, ImageEmbedding(8, 2, embed_dim=16), num_classes=2)
    assert fresh.classify(torch.randn(3, 3, 8, 8)).shape == (3, 2)
    assert all(torch.isfinite(parameter).all() for parameter in fresh.parameters())
