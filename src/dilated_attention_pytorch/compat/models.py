"""Old transformer layers and LongNet models: the same constructors and calls over the models of this package."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .arguments import Given, bind, pattern_of
from .attention import OldLayer

_XPOS_SCALE_BASE = 512.0
"""Of xPos in its paper (arXiv 2212.10554), which the old language model added to its embeddings."""


def _sizes(given: Given) -> dict[str, Any]:
    """Options that layers and models share."""
    lengths, rates = pattern_of(given)
    options = {name: given.take(name) for name in ("dim_feedforward", "dropout", "layer_norm_eps", "activation")}
    options = {name: value for name, value in options.items() if value is not None}
    given.take("gamma_init")  # of initial weights, which are those of nn.Transformer
    return {
        **options,
        "segment_lengths": lengths,
        "dilation_rates": rates,
        "norm_first": True,
        "device": given.take("device"),
        "dtype": given.take("dtype"),
    }


class OldEncoderLayer(OldLayer):
    """An old encoder layer, batch first and norm first."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        from ..models import DilatedTransformerEncoderLayer

        given = bind(self.entry, args, kwargs)
        width, heads, options = given.need("embed_dim"), given.need("num_heads"), _sizes(given)
        self.replacement = DilatedTransformerEncoderLayer(width, heads, batch_first=True, **options)
        given.close()

    def forward(self, src: Tensor, is_causal: bool = False) -> Tensor:
        """``src (B, N, E)`` to ``(B, N, E)``."""
        return self.replacement(src, is_causal=is_causal)


class OldDecoderLayer(OldLayer):
    """An old decoder layer: its cross attention has the pattern of its self-attention."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        from ..models import DilatedTransformerDecoderLayer

        given = bind(self.entry, args, kwargs)
        width, heads, options = given.need("embed_dim"), given.need("num_heads"), _sizes(given)
        self.replacement = DilatedTransformerDecoderLayer(
            width, heads, batch_first=True, cross_attention="dilated", **options
        )
        given.close()

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
        is_causal: bool = False,
    ) -> Tensor:
        """``tgt (B, N, E)`` to ``(B, N, E)``; ``is_causal`` is another old name of ``tgt_is_causal``."""
        causal = tgt_is_causal or is_causal
        return self.replacement(tgt, memory, tgt_is_causal=causal, memory_is_causal=memory_is_causal)


class OldLongNet(OldLayer):
    """The old encoder-decoder: both halves read the same input."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        given = bind(self.entry, args, kwargs)
        self.replacement = _longnet(given)
        given.close()

    def forward(self, x: Tensor, is_causal: bool = True) -> Tensor:
        """``x (B, N, E)`` to ``(B, N, E)``."""
        return _same_input(self.replacement, x, is_causal)


class OldLongNetLM(OldLayer):
    """The old language model: an embedding, the old encoder-decoder with xPos, a norm and a projection."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        given = bind(self.entry, args, kwargs)
        vocabulary, width = given.need("num_tokens"), given.take("embed_dim", 768)
        placed = {"device": given.take("device"), "dtype": given.take("dtype")}
        self.token_embedding = nn.Embedding(vocabulary, width, **placed)
        self.replacement = _longnet(given, xpos_scale_base=_XPOS_SCALE_BASE)
        self.norm = nn.LayerNorm(width, eps=given.take("layer_norm_eps", 1e-5), **placed)
        self.out = nn.Linear(width, vocabulary, **placed)
        given.close()

    def forward(self, x: Tensor, is_causal: bool = True) -> Tensor:
        """Tokens ``(B, N)`` to logits ``(B, N, num_tokens)``."""
        return self.out(self.norm(_same_input(self.replacement, self.token_embedding(x), is_causal)))


def _longnet(given: Given, **more: Any) -> Any:
    from ..models import LongNet

    counts = {name: given.take(name, 12) for name in ("num_encoder_layers", "num_decoder_layers")}
    return LongNet(
        given.take("embed_dim", 768),
        given.take("num_heads", 12),
        cross_attention="dilated",
        **counts,
        **_sizes(given),
        **more,
    )


def _same_input(model: Any, x: Tensor, is_causal: bool) -> Tensor:
    return model(x, x, src_is_causal=is_causal, tgt_is_causal=is_causal, memory_is_causal=is_causal)
