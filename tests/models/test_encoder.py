"""The encoder: against its formula in float64, its documents, its randomness, and torchscale's names."""

from __future__ import annotations

import math
import re
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dilated_attention_pytorch.models import LongNetEncoder, LongNetEncoderConfig
from dilated_attention_pytorch.models.blocks import Documents
from dilated_attention_pytorch.models.encoder import DropPath
from dilated_attention_pytorch.models.pointwise import Stream
from dilated_attention_pytorch.testing import oracle

WIDTH, HEADS, ROWS = 24, 3, 41
SIZES: dict[str, Any] = {
    "embed_dim": WIDTH,
    "num_layers": 2,
    "num_heads": HEADS,
    "ffn_dim": 40,
    "segment_lengths": (8, 32),
    "dilation_rates": (1, 2),
}


def make(**options: Any) -> LongNetEncoder:
    torch.manual_seed(0)
    model = LongNetEncoder(LongNetEncoderConfig(**SIZES | options), dtype=torch.float64)
    for parameter in model.parameters():  # norms and biases too: nothing may be hidden by a 1 or a 0
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def inputs(batch: int = 2, rows: int = ROWS) -> torch.Tensor:
    return torch.randn(batch, rows, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def plain(model: LongNetEncoder, x: torch.Tensor) -> list[torch.Tensor]:
    """The residual stream and, last, the output, from torchscale's names alone."""
    config, weights = model.config, model.state_dict()

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return F.layer_norm(x, (x.shape[-1],), weight, bias, config.layer_norm_eps)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def turn(x: torch.Tensor, sign: int) -> torch.Tensor:
        pair, at = torch.arange(config.head_dim // 2).double(), torch.arange(x.shape[1]).double()[:, None, None]
        angle = at * 10000 ** (-2 * pair / config.head_dim)
        decay = ((2 * pair + 0.4 * config.head_dim) / (1.4 * config.head_dim)) ** (sign * at / config.xpos_scale_base)
        turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(decay, angle)
        return torch.view_as_real(turned).flatten(-2)

    def attend(x: torch.Tensor, name: str) -> torch.Tensor:
        q, k, v = (linear(x, f"{name}.{p}_proj").unflatten(-1, (HEADS, -1)) for p in "qkv")
        if config.xpos:
            q, k = turn(q, 1), turn(k, -1)
        out = oracle(q, k, v, config.segment_lengths, config.dilation_rates, padding=config.padding).out.flatten(-2)
        return linear(norm(out, f"{name}.inner_attn_ln") if config.subln else out, f"{name}.out_proj")

    def feed(x: torch.Tensor, name: str) -> torch.Tensor:
        hidden = linear(x, f"{name}.fc1")
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        return linear(norm(hidden, f"{name}.ffn_layernorm") if config.subln else hidden, f"{name}.fc2")

    states = [x]
    for i in range(config.num_layers):
        for part, step, name in (
            ("self_attn", attend, "self_attn_layer_norm"),
            ("ffn", feed, "final_layer_norm"),
        ):
            if config.normalize_before:
                x = x + step(norm(x, f"layers.{i}.{name}"), f"layers.{i}.{part}")
            else:
                x = norm(x + step(x, f"layers.{i}.{part}"), f"layers.{i}.{name}")
        states.append(x)
    return [*states, norm(x, "layer_norm") if config.normalize_before and config.final_norm else x]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": "zeros"},
        {"xpos": True, "xpos_scale_base": 16},
        {"subln": False, "final_norm": False},
        {"subln": False, "normalize_before": False, "layer_norm_eps": 0.1},
    ],
    ids=str,
)
def test_it_is_its_formula(options: dict[str, Any]) -> None:
    model, x = make(**options), inputs()
    *states, out = plain(model, x)
    found = list(model.iter_states(x))
    assert len(found) == len(states) == 3
    tolerance = 1e-6 if model.config.xpos else 1e-11  # the buffer of xPos is float32, as torchscale's
    for actual, expected in zip([*found, model(x)], [*states, out], strict=True):
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", [{"padding": "zeros"}, {"xpos": True, "xpos_scale_base": 16}], ids=str)
def test_padded_and_packed_documents_are_as_alone(options: dict[str, Any]) -> None:
    model, lengths = make(**options), (41, 7, 30)
    documents = [inputs(1, n) for n in lengths]
    alone = [model(x) for x in documents]

    batch = torch.full((3, max(lengths), WIDTH), torch.nan, dtype=torch.float64)
    for row, x in enumerate(documents):
        batch[row, : x.shape[1]] = x[0]
    mask = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]
    together = model(batch, key_padding_mask=mask)
    assert torch.isfinite(together).all()
    for row, expected in enumerate(alone):
        torch.testing.assert_close(together[row, : expected.shape[1]], expected[0], rtol=1e-11, atol=1e-11)

    bounds = torch.tensor([0, *lengths]).cumsum(0)
    packed = model(torch.cat(documents, dim=1), cu_seqlens=bounds)
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_drop_path_drops_whole_documents_as_often_as_it_says(packed: bool) -> None:
    torch.manual_seed(0)
    count, rate = 4000, 0.3
    drop = DropPath(rate)
    if packed:
        factor = drop(torch.ones(1, 2 * count, 3), torch.arange(count + 1) * 2).view(count, 2)
    else:
        factor = drop(torch.ones(count, 2, 3))[:, None]
    kept = factor[:, 0] > 0
    assert torch.equal(factor, (kept / (1 - rate))[:, None].expand_as(factor))
    assert abs(float(kept.float().mean()) - (1 - rate)) < 5 * math.sqrt(rate * (1 - rate) / count)
    neighbours = (kept[1:] & kept[:-1]).float().mean()
    assert abs(float(neighbours) - (1 - rate) ** 2) < 0.04  # each draws for itself
    assert drop.eval()(torch.ones(count, 2, 3)) is None


def test_drop_path_grows_linearly_and_each_update_draws_for_itself() -> None:
    model = make(num_layers=5, drop_path_rate=0.4)
    rates = [layer.drop_path.rate for layer in model.layers]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert make(num_layers=1, drop_path_rate=0.4).layers[0].drop_path.rate == 0.0

    model = make(drop_path_rate=0.5).train()
    layer = model.layers[1]
    x = torch.zeros(600, 8, WIDTH, dtype=torch.float64)
    layer.self_attn.register_forward_hook(lambda module, given, found: (found[0], torch.ones_like(x)))
    layer.ffn.register_forward_hook(lambda module, given, found: (found[0], 3 * torch.ones_like(x)))
    updates = layer(Stream(x), Documents(None, None, 0), None).total()[:, 0, 0] / 2  # kept ones count twice
    attention, feed = updates % 2 == 1, updates >= 3
    assert set(updates.tolist()) == {0.0, 1.0, 3.0, 4.0}
    for share in (attention, feed):
        assert abs(float(share.float().mean()) - 0.5) < 0.1


@pytest.mark.parametrize("name", ["dropout", "attention_dropout", "activation_dropout", "drop_path_rate"])
def test_randomness_is_in_training_only(name: str) -> None:
    model, x = make(**{name: 0.5}), inputs(8)
    expected = make()(x)
    assert torch.equal(model(x), expected)
    assert not torch.allclose(model.train()(x), expected)


def test_checkpointing_gives_the_same_gradients() -> None:
    options: dict[str, Any] = {"dropout": 0.3, "attention_dropout": 0.2, "drop_path_rate": 0.5, "xpos": True}
    results = []
    for recompute in (False, True):
        model, x = make(**options, activation_checkpointing=recompute).train(), inputs().requires_grad_()
        calls = []
        model.layers[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(5)
        (model(x) * inputs().cos()).sum().backward()
        assert len(calls) == 1 + recompute
        results.append([x.grad, *(parameter.grad for parameter in model.parameters())])
    for one, other in zip(*results, strict=True):
        assert one is not None
        assert float(one.abs().max()) > 0
        torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-14)


def test_names_are_torchscale_s() -> None:
    pairs = [f"self_attn.{name}" for name in ("k_proj", "v_proj", "q_proj", "out_proj", "inner_attn_ln")]
    pairs += ["self_attn_layer_norm", "ffn.fc1", "ffn.fc2", "ffn.ffn_layernorm", "final_layer_norm"]
    expected = {f"layers.{i}.{name}.{kind}" for i in (0, 1) for name in pairs for kind in ("weight", "bias")}
    expected |= {"layer_norm.weight", "layer_norm.bias"}
    assert set(make().state_dict()) == expected
    assert set(make(xpos=True).state_dict()) - expected == {f"layers.{i}.self_attn.xpos.scale" for i in (0, 1)}
    assert not {
        name for name in make(subln=False, final_norm=False).state_dict() if re.search("inner|ffn_l|^layer_n", name)
    }


def test_wrong_names_are_refused() -> None:
    state = make().state_dict()
    state["layers.0.ffn.fc3.weight"] = state.pop("layers.0.ffn.fc1.weight")
    with pytest.raises(RuntimeError, match=r"(?s)Missing.*layers\.0\.ffn\.fc1\.weight.*Unexpected.*fc3"):
        make().load_state_dict(state)


def test_rows_that_torchscale_misplaces_are_named_once() -> None:
    pattern: dict[str, Any] = {"segment_lengths": (8, 9, 35, 60), "dilation_rates": (2, 2, 4, 8), "padding": "zeros"}
    model = make(**pattern)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(inputs(1, 9))  # no longer than the segment: torchscale is right
        model(torch.cat((inputs(1, 9), inputs(1, 9)), dim=1), cu_seqlens=torch.tensor([0, 9, 18]))
    with pytest.warns(
        UserWarning, match=r"41 rows is longer than segments of 9 \(rate 2\), 35 \(rate 4\), no multiple"
    ):
        model(inputs())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(inputs())
        make(**pattern | {"padding": "mask"})(inputs())


@pytest.mark.parametrize("shape", [(2, ROWS, WIDTH + 1), (ROWS, WIDTH), (0, ROWS, WIDTH), (1, 0, WIDTH)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"shape {shape}; give (batch, rows, {WIDTH})")):
        make()(torch.zeros(shape, dtype=torch.float64))


def test_meta_device_and_fresh_values() -> None:
    config = LongNetEncoderConfig(**SIZES | {"xpos": True})
    model = LongNetEncoder(config, device="meta").to_empty(device="cpu")
    model.reset_parameters()
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    gain = math.sqrt(math.log(4))
    for name, expected in (("q_proj", 1.0), ("v_proj", gain), ("out_proj", gain)):
        weight = getattr(model.layers[0].self_attn, name).weight.detach()
        assert float(weight.std()) == pytest.approx(expected * math.sqrt(1 / WIDTH), rel=0.15)
