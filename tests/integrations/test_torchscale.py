"""`convert_state_dict` by name; `patch`: a module of torchscale's shape computes what torchscale computed.

The class stands in for torchscale's: the same attributes, names and call. What it should compute comes from vectors
that torchscale itself produced.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dilated_attention_pytorch import HilbertOrdering, LongNetEncoder, LongNetEncoderConfig
from dilated_attention_pytorch.integrations.torchscale import convert_state_dict, patch
from dilated_attention_pytorch.models.pointwise import Stream
from dilated_attention_pytorch.testing import oracle

GOLDEN = Path(__file__).parents[1] / "golden"


class DilatedAttention(nn.Module):
    def __init__(self, width: int, heads: int, *, subln: bool = True, **args: Any) -> None:
        super().__init__()
        self.args = argparse.Namespace(**{"seq_parallel": False, "flash_attention": True} | args)
        self.num_heads, self.head_dim, self.dropout, self.xpos = heads, width // heads, 0.0, None
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))
        self.inner_attn_ln = nn.LayerNorm(width) if subln else None

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        raise AssertionError("flash-attn is not installed")


@pytest.fixture(params=["torchscale", "gigapath.torchscale"])
def tree(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    name = ""
    for part in [*request.param.split("."), "component", "dilated_attention"]:
        name = f"{name}.{part}".lstrip(".")
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    own = type("DilatedAttention", (DilatedAttention,), {"forward": DilatedAttention.forward})
    sys.modules[name].DilatedAttention = own
    return sys.modules[request.param.split(".")[0]]


def attention_class(tree: ModuleType) -> type[DilatedAttention]:
    name = next(name for name in sys.modules if name.startswith(tree.__name__) and name.endswith("dilated_attention"))
    return importlib.import_module(name).DilatedAttention


def test_slide_encoder_of_gigapath_with_patched_attention(tree: ModuleType) -> None:
    """The encoder's layers of the golden slide encoder, put together from the patched class, give its embeddings."""
    from dilated_attention_pytorch import LongNetViT

    options = json.loads((GOLDEN / "gigapath_slide_encoder.json").read_text())
    tensors = load_file(GOLDEN / "gigapath_slide_encoder.safetensors")
    state = {key.removeprefix("state/"): value for key, value in tensors.items() if key.startswith("state/")}
    model = LongNetViT.from_gigapath(state, slide_ngrids=48, max_wsi_size=16384)
    config = model.encoder.config
    with patch(tree) as patched:
        assert patched.classes == (attention_class(tree),)
        for layer in model.encoder.layers:
            ours = layer.self_attn
            theirs = attention_class(tree)(
                config.embed_dim, config.num_heads,
                segment_length=str(list(options["segment_lengths"])), dilated_ratio=list(config.dilation_rates),
            )  # fmt: skip
            theirs.load_state_dict(ours.state_dict())
            layer.self_attn = Adapter(theirs.eval())
        with torch.no_grad():
            layers = model(tensors["x"], tensors["coords"], all_layer_embed=True)
    for i, embedding in enumerate(layers):
        expected = tensors[f"layer{i}"]
        assert float((embedding - expected).abs().max() / expected.abs().max()) <= 1e-5


class Adapter(nn.Module):
    def __init__(self, attention: DilatedAttention) -> None:
        super().__init__()
        self.attention, self.xpos = attention, None

    def forward(
        self, stream: Stream, documents: Any, tables: Any, norm: nn.Module
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total = stream.total()
        x = norm(total)
        return total, self.attention(query=x, key=x, value=x, key_padding_mask=documents.key_padding_mask)[0]


def heads_of(module: DilatedAttention, x: torch.Tensor) -> list[torch.Tensor]:
    return [
        project(x).unflatten(-1, (module.num_heads, -1)) for project in (module.q_proj, module.k_proj, module.v_proj)
    ]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("mixing_grad", ["detached", "exact"])
def test_outputs_and_gradients(tree: ModuleType, is_causal: bool, mixing_grad: Any) -> None:
    module = attention_class(tree)(12, 3, subln=False, segment_length=[8, 20], dilated_ratio=[1, 2]).double()
    x = torch.randn(2, 30, 12, dtype=torch.float64, requires_grad=True)
    options: dict[str, Any] = {"is_causal": is_causal, "padding": "zeros", "mixing_grad": mixing_grad}
    expected = module.out_proj(oracle(*heads_of(module, x), (8, 20), (1, 2), **options).out.flatten(-2))
    grad = torch.randn_like(expected)
    leaves = [x, *module.parameters()]
    with patch(tree, mixing_grad=mixing_grad):
        found, nothing = module(x, x, x, is_causal=is_causal)
        gradients = torch.autograd.grad(found, leaves, grad)
    assert nothing is None
    torch.testing.assert_close(found, expected)
    for one, other in zip(gradients, torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(one, other)


def test_step_by_step_equals_all_at_once(tree: ModuleType) -> None:
    """The state is kept as torchscale's decoder keeps it."""
    module = attention_class(tree)(12, 3, segment_length=[4, 16], dilated_ratio=[1, 2]).double().eval()
    x = torch.randn(2, 21, 12, dtype=torch.float64)
    with patch(tree), torch.no_grad():
        expected, _ = module(x, x, x, is_causal=True)
        state: dict[str, torch.Tensor] = {}
        steps = [module(row, row, row, incremental_state=state, is_causal=True)[0] for row in x.split(1, dim=1)]
    torch.testing.assert_close(torch.cat(steps, 1), expected)
    assert state["prev_key"].shape == (2, 3, 21, 4)


def test_a_mask_is_obeyed(tree: ModuleType) -> None:
    module = attention_class(tree)(12, 3, segment_length=[8], dilated_ratio=[1]).eval()
    x = torch.randn(2, 30, 12)
    hidden = torch.arange(30) >= torch.tensor([[30], [11]])
    with patch(tree), torch.no_grad():
        found, _ = module(x, x, x, key_padding_mask=hidden.float())  # torchscale's masks may be numbers
        alone, _ = module(x[1:, :11], x[1:, :11], x[1:, :11])
    torch.testing.assert_close(found[1:, :11], alone)


def test_dropout_acts_in_training_alone(tree: ModuleType) -> None:
    module = attention_class(tree)(12, 3, segment_length=[8], dilated_ratio=[1])
    module.dropout = 0.5
    x = torch.randn(1, 16, 12)
    with patch(tree), torch.no_grad():
        assert not torch.equal(module(x, x, x)[0], module(x, x, x)[0])
        module.eval()
        assert torch.equal(module(x, x, x)[0], module(x, x, x)[0])


def test_undo_and_double_patch(tree: ModuleType) -> None:
    cls = attention_class(tree)
    original = cls.forward
    patched = patch()
    assert cls.forward is not original
    with pytest.raises(ValueError, match="patched already"):
        patch(tree)
    patched.undo()
    patched.undo()
    assert cls.forward is original
    assert patched.classes == ()
    with patch(tree):
        assert cls.forward is not original
    assert cls.forward is original


def test_what_cannot_be_is_refused(tree: ModuleType) -> None:
    module = attention_class(tree)(12, 3, segment_length=[8], dilated_ratio=[1])
    x = torch.randn(1, 16, 12)
    with patch(tree):
        for name in ("attn_mask", "rel_pos"):
            with pytest.raises(ValueError, match=f"{name} is given"):
                module(x, x, x, **{name: torch.zeros(16, 16)})
    with pytest.raises(ValueError, match="that is imported defines torchscale's DilatedAttention"):
        patch(ModuleType("other"))


def test_without_torchscale_it_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"import its models first, e\.g\. torchscale\.model\.LongNet"):
        patch()


def test_our_encoder_takes_weights_of_a_patched_module(tree: ModuleType) -> None:
    """Names of parameters are the same on both sides."""
    config = LongNetEncoderConfig(
        embed_dim=12, num_layers=1, num_heads=3, segment_lengths=(8,), dilation_rates=(1,), padding="zeros"
    )
    layer = LongNetEncoder(config).layers[0].self_attn
    module = attention_class(tree)(12, 3, segment_length=[8], dilated_ratio=[1])
    assert set(module.state_dict()) == set(layer.state_dict())


def stack(**options: Any) -> LongNetEncoder:
    sizes: dict[str, Any] = {"embed_dim": 12, "num_layers": 2, "num_heads": 3, "ffn_dim": 20}
    pattern: dict[str, Any] = {"segment_lengths": (8, 20), "dilation_rates": (1, 2)}
    return LongNetEncoder(LongNetEncoderConfig(**sizes | pattern | options)).eval()


@pytest.mark.parametrize("xpos", [False, True])
def test_weights_go_there_and_back(xpos: bool) -> None:
    model, fresh = stack(xpos=xpos), stack(xpos=xpos)
    table = {"embed_tokens.weight": torch.randn(5, 12), "output_projection.weight": torch.randn(5, 12)}
    given = model.state_dict() | table
    wrapped = {"decoder." + name.replace(".ffn.", "._fsdp_wrapped_module.ffn."): v for name, v in given.items()}
    found = convert_state_dict(wrapped | {"encoder.layers.0.moe_layer.x": torch.ones(1)}, prefix="decoder.")
    fresh.load_state_dict(found.stack)
    assert found.around == table
    assert {f"decoder.{name}" for name in found.stack | found.around} == {f"decoder.{name}" for name in given}
    x = torch.randn(1, 30, 12)
    assert torch.equal(fresh(x), model(x))


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("layers.0.moe_layer.gate.wg.weight", "a mixture of experts"),
        ("layers.0.self_attn.q_proj.A.weight", "multiway branches"),
        ("layers.0.encoder_attn.q_proj.weight", "cross-attention"),
        ("self_attn_relative_position.relative_attention_bias.weight", "relative position biases"),
        ("relative_position.relative_attention_bias.weight", "relative position biases"),
        ("layers.0.ffn.gate.weight", "a gated feed-forward layer"),
        ("layers.0.self_attn.in_proj.weight", "no name of torchscale's LongNet"),
    ],
)
def test_other_weights_are_refused_by_name(name: str, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        convert_state_dict(stack().state_dict() | {name: torch.ones(1)})


def test_deepnorm_is_seen_in_the_arguments_alone() -> None:
    with pytest.raises(ValueError, match=r"args\.deepnorm is True: DeepNorm is not"):
        convert_state_dict(stack().state_dict(), args=argparse.Namespace(deepnorm=True, moe_freq=0))
    with pytest.raises(ValueError, match=r"no weight below the prefix 'encoder\.'"):
        convert_state_dict(stack().state_dict(), prefix="encoder.")


@pytest.mark.parametrize("xpos", [False, True])
def test_a_causal_stack_sees_no_later_row(xpos: bool) -> None:
    model, x = stack(is_causal=True, xpos=xpos), torch.randn(2, 30, 12)
    changed = x.clone()
    changed[:, 17] += torch.randn(12)
    found, other = model(x), model(changed)
    torch.testing.assert_close(found[:, :17], other[:, :17], atol=1e-6, rtol=1e-5)
    assert float((found[:, 17] - other[:, 17]).detach().abs().max()) > 1e-3
    assert not torch.equal(stack(xpos=xpos)(x)[:, 0], stack(xpos=xpos)(changed)[:, 0])
    with pytest.raises(ValueError, match="is_causal=True: along a curve"):
        model(x, ordering=HilbertOrdering((5, 6)))
