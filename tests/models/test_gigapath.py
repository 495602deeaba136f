"""The rule for segment lengths, and the table of positions that old checkpoints hold."""

from __future__ import annotations

import pytest
import torch

from dilated_attention_pytorch.models import WeightsError, gigapath_segment_lengths
from dilated_attention_pytorch.models.gigapath import gigapath_sizes, read_gigapath
from dilated_attention_pytorch.models.positions import plane_positions

WEIGHTS = {
    "cls_token": torch.zeros(1, 1, 8),
    "patch_embed.proj.weight": torch.zeros(8, 5),
    **{f"encoder.layers.{i}.ffn.fc1.weight": torch.zeros(16, 8) for i in range(3)},
}


def table(grid: int, width: int = 8) -> torch.Tensor:
    index = torch.arange(grid * grid)
    cells = torch.stack((index // grid, index % grid), dim=-1)
    return torch.cat((torch.zeros(1, width), plane_positions(cells, grid, width, torch.float32)))[None]


def test_segment_lengths() -> None:
    assert gigapath_segment_lengths() == (1024, 5792, 32768, 185363, 1048576)
    assert gigapath_segment_lengths(250_000) == (
        1024,
        4870,
        23170,
        110217,
        524288,
    )  # those that users have seen printed
    assert gigapath_segment_lengths(16384) == (1024, 1448, 2048, 2896, 4096)
    assert gigapath_segment_lengths(4096) == (1024, 724, 512, 362, 256)
    with pytest.raises(ValueError, match="max_wsi_size is 100, tile_size is 256"):
        gigapath_segment_lengths(100)
    with pytest.raises(ValueError, match="tile_size is 0"):
        gigapath_segment_lengths(100, 0)


def test_sizes_are_read_off_the_weights() -> None:
    sizes = gigapath_sizes(WEIGHTS, WEIGHTS)
    assert sizes.in_chans == 5
    assert sizes.encoder == {"embed_dim": 8, "num_layers": 3, "ffn_dim": 16}
    assert sizes.norm_eps == 1e-5
    published = {"embed_dim": 768, "num_layers": 12, "ffn_dim": 3072}
    assert sizes._replace(encoder=published).norm_eps == 1e-6  # type: ignore[typeddict-item]


@pytest.mark.parametrize("name", WEIGHTS)
def test_what_the_sizes_need_is_named_when_it_is_missing(name: str) -> None:
    rest = {key: value for key, value in WEIGHTS.items() if key != name}
    if name.startswith("encoder") and ".0." not in name:
        assert gigapath_sizes(rest, rest).encoder["num_layers"] == 2
        return
    with pytest.raises(WeightsError, match=f"no slide encoder of GigaPath: it lacks {name}; it has "):
        gigapath_sizes(rest, rest)
    with pytest.raises(WeightsError, match=rf"{name} has shape \(3,\)"):
        gigapath_sizes({**rest, name: torch.zeros(3)}, rest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_table_of_positions_is_checked_and_left_out(dtype: torch.dtype) -> None:
    found, sizes = read_gigapath({**WEIGHTS, "pos_embed": table(12).to(dtype)}, slide_ngrids=12)
    assert sizes == gigapath_sizes(WEIGHTS, WEIGHTS)
    assert found.keys() == WEIGHTS.keys()


def test_a_table_of_other_positions_is_refused() -> None:
    with pytest.raises(
        WeightsError, match=r"shape \(1, 145, 8\); for slide_ngrids 1000 it would be \(1, 1000001, width"
    ):
        read_gigapath({**WEIGHTS, "pos_embed": table(12)}, slide_ngrids=1000)
    for row, value in ((0, 0.1), (77, 0.1), (144, torch.nan)):
        other = table(12)
        other[0, row, 3] += value
        with pytest.raises(WeightsError, match=r"not GigaPath's sine-cosine positions: it is off by up to (0.1|nan)"):
            read_gigapath({**WEIGHTS, "pos_embed": other}, slide_ngrids=12)
