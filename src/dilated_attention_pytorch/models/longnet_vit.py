"""Vision transformer on LongNet's encoder: slides of tile features (GigaPath), large images (LongViT)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..merge import accumulator_dtype
from ..ordering import Curve, HilbertOrdering, checked_curve, grid_ordering
from ..parallel import ContextParallel, Streaming, check_parallel
from ..types import MixingGrad, Padding
from .config import check_config
from .encoder import LongNetEncoder
from .encoder_config import LongNetEncoderConfig
from .front_ends import ImageEmbedding, TileEmbedding
from .gigapath import gigapath_segment_lengths, read_gigapath
from .longvit import longvit_segment_lengths, read_longvit
from .positions import grid_cells
from .slides import Slides, tiles_of_rank
from .weights import WeightsError, WeightsSource, describe, materialise


class LongNetViT(nn.Module):
    """LongNet's encoder behind a front end that embeds the tiles of a slide or the patches of an image.

    State-dict keys are those of the originals, prov-gigapath's ``LongNetViT`` and torchscale's ``LongViT``.

    * On a :class:`TileEmbedding` the model has a class token and a last norm, and ``model(x, coords)`` is a list of
      slide embeddings: see :meth:`forward`.
    * On an :class:`ImageEmbedding` it has learned positions and, with ``num_classes``, a classifier;
      ``model(image)`` is the encoded patches, ``model.classify(image)`` the logits.

    Args:
        config: the encoder's sizes and options.
        patch_embed: the front end, of the same width.
        global_pool: a slide's embedding is the norm of the mean over its tiles, not its class token.
        norm_eps: added to the variance in the norm of a slide's embedding.
        num_classes: of the classifier on images; 0: none.
        ordering: the curve along which the encoder sees tiles (by their coordinates; the class token stays first) or
            patches (by their place); None: as they are given, and patches row by row. Outputs are in the given order.

    Raises:
        ValueError: widths that differ, an option of the other front end, or a curve that is none.

    >>> config = LongNetEncoderConfig(
    ...     embed_dim=32, num_layers=2, num_heads=4, segment_lengths=(16, 64), dilation_rates=(1, 4)
    ... )
    >>> model = LongNetViT(config, TileEmbedding(8, 32))
    >>> corners = 256 * torch.stack((torch.arange(50) // 10, torch.arange(50) % 10), dim=-1)
    >>> [embedding.shape for embedding in model(torch.randn(1, 50, 8), corners[None])]
    [torch.Size([1, 32])]
    """

    def __init__(
        self,
        config: LongNetEncoderConfig,
        patch_embed: TileEmbedding | ImageEmbedding,
        *,
        global_pool: bool = False,
        norm_eps: float = 1e-6,
        num_classes: int = 0,
        ordering: Curve | None = None,
    ) -> None:
        super().__init__()
        check_config(config, LongNetEncoderConfig)
        if not isinstance(patch_embed, (ImageEmbedding, TileEmbedding)):
            raise ValueError(f"patch_embed is {patch_embed!r}; give an ImageEmbedding or a TileEmbedding")
        width = config.embed_dim
        if patch_embed.embed_dim != width:
            raise ValueError(f"patch_embed is {patch_embed.embed_dim} wide, the encoder {width}; give both one width")
        tiles = isinstance(patch_embed, TileEmbedding)
        if num_classes and tiles:
            raise ValueError(f"num_classes is {num_classes}; a slide encoder has no classifier, put one behind it")
        if global_pool and not tiles:
            raise ValueError("global_pool is True; an image is encoded to all of its patches, so leave it False")
        weight = patch_embed.proj.weight
        device, dtype = weight.device, weight.dtype
        self.global_pool = global_pool
        self.ordering = None if ordering is None else checked_curve(ordering)
        self.patch_embed = patch_embed
        self.cls_token: nn.Parameter | None = None
        self.pos_embed: nn.Parameter | None = None
        self.norm: nn.LayerNorm | None = None
        self.fc_norm: nn.LayerNorm | None = None
        self.head: nn.Linear | None = None
        if isinstance(patch_embed, TileEmbedding):
            self.cls_token = nn.Parameter(torch.empty(1, 1, width, device=device, dtype=dtype))
            self.norm = nn.LayerNorm(width, eps=norm_eps, device=device, dtype=dtype)
        else:
            self.pos_embed = nn.Parameter(torch.empty(1, patch_embed.num_patches, width, device=device, dtype=dtype))
        self.encoder = LongNetEncoder(config, device=device, dtype=dtype)
        if num_classes:
            self.fc_norm = nn.LayerNorm(width, device=device, dtype=dtype)
            self.head = nn.Linear(width, num_classes, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew: the encoder's as it does, class token, positions and classifier small."""
        self.patch_embed.reset_parameters()
        self.encoder.reset_parameters()
        for norm in (self.norm, self.fc_norm):
            if norm is not None:
                norm.reset_parameters()
        for weight in (self.cls_token, self.pos_embed, None if self.head is None else self.head.weight):
            if weight is not None:
                nn.init.normal_(weight, std=0.02)
        if self.head is not None:
            nn.init.zeros_(self.head.bias)

    def forward(
        self,
        x: Tensor,
        coords: Tensor | None = None,
        all_layer_embed: bool = False,
        *,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        parallel: ContextParallel | Streaming | None = None,
    ) -> list[Tensor] | Tensor:
        """Embeddings of slides from tile features, or encoded patches of images.

        Args:
            x: on tiles features ``(B, L, in_chans)``; on images ``(B, in_chans, height, width)`` and nothing else.
            coords: ``(B, L, 2)`` corners of the tiles in pixels, at least 0 and below ``slide_ngrids * tile_size``;
                float32, float64, int32 or int64.
            all_layer_embed: embeddings from the encoder's input and from the output of every layer.
            key_padding_mask: ``(B, L)`` bool, True = no tile, at the end of slides that are shorter than the others.
            cu_seqlens: ``(slides + 1,)`` boundaries of slides packed in one row of batch 1.
            parallel: tiles are sharded over ranks, with the class tokens: x, coords and mask are those of the tiles
                that :meth:`tiles_of_rank` says; cu_seqlens are of all. Embeddings of slides come out on every rank,
                so what all ranks make of them adds up in the gradients. Images are given whole to every rank, which
                gets its rows of the patches (``parallel.positions()``). Or a `Streaming`, with model and inputs in
                host memory: attention goes through its device.

        Returns:
            On tiles a list of ``(slides, embed_dim)``: one, or the input's and each layer's. As in the original, the
            last of all layers is *not* the one alone, for only that has passed the encoder's own final norm. On images
            ``(B, patches, embed_dim)``, row by row of patches.

        Raises:
            ValueError: shapes or dtypes that do not fit, coordinates outside the grid (the message names the tile),
                document arguments that :func:`dilated_attention` refuses, or an ``ordering`` over sharded rows.
        """
        check_parallel(parallel)
        ranks = parallel if isinstance(parallel, ContextParallel) else None
        if ranks is not None and self.ordering is not None:
            raise ValueError(
                f"the model has ordering {self.ordering!r}, which needs all rows, and parallel is a ContextParallel; "
                "give tiles in the order of a curve to a model without one"
            )
        if isinstance(self.patch_embed, ImageEmbedding):
            if coords is not None or all_layer_embed or key_padding_mask is not None or cu_seqlens is not None:
                raise ValueError("this model takes images; give model(image) without coordinates and further options")
            assert self.pos_embed is not None
            patches = self.patch_embed(x, self.pos_embed)
            size = self.patch_embed.patch_size
            ordering = grid_ordering(self.ordering, x.shape[2] // size, x.shape[3] // size) if self.ordering else None
            patches = patches if ranks is None else ranks.shard(patches, 1)
            return self.encoder(patches, ordering=ordering, parallel=parallel)
        if coords is None:
            raise ValueError("coords is missing; give the corners of the tiles in pixels, (batch, tiles, 2)")
        assert self.cls_token is not None
        assert self.norm is not None
        slides = Slides.of(x, key_padding_mask, cu_seqlens, ranks)
        tokens = slides.insert(self.cls_token, self.patch_embed(x, coords, key_padding_mask))
        documents: dict[str, Any] = {"key_padding_mask": slides.key_padding_mask, "cu_seqlens": slides.cu_seqlens}
        documents["parallel"] = parallel
        ordering = self._order_of_tiles(coords, key_padding_mask, slides)
        if all_layer_embed:
            states = self.encoder.iter_states(tokens, **documents, ordering=ordering)
        else:
            states = iter([self.encoder(tokens, **documents, ordering=ordering)])
        # Taken from each state as it comes: the states of all layers together would be many times as large.
        pool = slides.mean_of_tiles if self.global_pool else slides.class_tokens
        return [self.norm(pool(state)) for state in states]

    def _order_of_tiles(self, coords: Tensor, padding: Tensor | None, slides: Slides) -> HilbertOrdering | None:
        if self.ordering is None or not isinstance(self.patch_embed, TileEmbedding):
            return None
        cells = grid_cells(
            coords, tile_size=self.patch_embed.tile_size, grid=self.patch_embed.slide_ngrids, padding=padding
        )
        return HilbertOrdering.from_coordinates(
            cells[0] if slides.cu_seqlens is not None else cells,
            curve=self.ordering,
            key_padding_mask=padding,
            skip_first=1,
            cu_seqlens=slides.cu_seqlens,
        )

    @staticmethod
    def tiles_of_rank(parallel: ContextParallel, tiles: int, *, cu_seqlens: Tensor | None = None) -> Tensor:
        """Which of ``tiles`` this rank gives to :meth:`forward`: int64 indices, to load or to cut them by.

        Tiles and class tokens are the rows that are sharded; ``parallel.length`` is set to their number. With
        ``cu_seqlens`` slides are packed, else each batch row is one.
        """
        return tiles_of_rank(parallel, tiles, cu_seqlens)

    def classify(self, image: Tensor, *, parallel: ContextParallel | Streaming | None = None) -> Tensor:
        """Logits ``(B, num_classes)`` of images: the classifier on the norm of the mean over their patches.

        ``parallel`` as for :meth:`forward`; the logits come out on every rank.

        Raises:
            ValueError: the model has no classifier, or the image is one that :meth:`forward` refuses.
        """
        if self.head is None or self.fc_norm is None:
            raise ValueError("this model has no classifier; make one with num_classes, on an ImageEmbedding")
        tokens = self(image, parallel=parallel)
        wide = tokens.to(accumulator_dtype(tokens.dtype))
        if isinstance(parallel, ContextParallel):
            assert parallel.length is not None
            mean = parallel.add_up(wide.sum(1)) / parallel.length
        else:
            mean = wide.mean(1)
        return self.head(self.fc_norm(mean.to(tokens.dtype)))

    @classmethod
    def from_gigapath(
        cls,
        path_or_state_dict: WeightsSource,
        *,
        num_heads: int = 16,
        segment_lengths: Sequence[int] | None = None,
        dilation_rates: Sequence[int] = (1, 2, 4, 8, 16),
        slide_ngrids: int = 1000,
        tile_size: int = 256,
        max_wsi_size: int = 262144,
        global_pool: bool = False,
        dropout: float = 0.25,
        drop_path_rate: float = 0.1,
        norm_eps: float | None = None,
        padding: Padding = "zeros",
        mixing_grad: MixingGrad = "exact",
        activation_checkpointing: bool = False,
        backend: str = "auto",
        ordering: Curve | None = None,
    ) -> LongNetViT:
        """GigaPath's slide encoder, from its own checkpoint; on the CPU, in float32, in eval mode.

        Args:
            path_or_state_dict: a file of torch.save or safetensors, or a state dict, with or without the wrapper
                ``model``. Width, depth and features of a tile are read off the weights.
            num_heads: attention heads; they leave no trace in the weights, nor do the further options.
            segment_lengths: by default :func:`gigapath_segment_lengths` of ``max_wsi_size`` and ``tile_size``.
            dilation_rates: one for each segment length.
            slide_ngrids, tile_size: the grid of tiles, see :class:`TileEmbedding`.
            max_wsi_size: pixels along a side of the largest slide, for the segment lengths.
            global_pool: see the class.
            dropout, drop_path_rate: in training, see :class:`LongNetEncoderConfig`.
            norm_eps: of the last norm; by default 1e-6 in the three published sizes (12 layers 768 or 1536 wide, 24
                layers 1024 wide) and otherwise 1e-5, as in the original.
            padding: "zeros" is what the weights were trained with.
            mixing_grad, activation_checkpointing, backend: see :class:`LongNetEncoderConfig`.
            ordering: see the class; the published weights saw tiles as their files list them.

        Raises:
            WeightsError: a ValueError; unreadable or foreign weights, or names or shapes that do not fit.
            ValueError: options that are not allowed.
        """
        weights, sizes = read_gigapath(path_or_state_dict, slide_ngrids=slide_ngrids)
        if segment_lengths is None:
            segment_lengths = gigapath_segment_lengths(max_wsi_size, tile_size)
        config = LongNetEncoderConfig(
            **sizes.encoder,
            num_heads=num_heads,
            segment_lengths=tuple(segment_lengths),
            dilation_rates=tuple(dilation_rates),
            padding=padding,
            mixing_grad=mixing_grad,
            dropout=dropout,
            drop_path_rate=drop_path_rate,
            activation_checkpointing=activation_checkpointing,
            backend=backend,
        )
        embed = TileEmbedding(
            sizes.in_chans,
            config.embed_dim,
            slide_ngrids=slide_ngrids,
            tile_size=tile_size,
            device="meta",
            dtype=torch.float32,
        )
        norm_eps = sizes.norm_eps if norm_eps is None else norm_eps
        model = cls(config, embed, global_pool=global_pool, norm_eps=norm_eps, ordering=ordering)
        materialise(model, weights, path_or_state_dict)
        return model.eval()

    @classmethod
    def from_longvit(
        cls,
        path_or_state_dict: WeightsSource,
        *,
        img_size: int,
        patch_size: int,
        num_heads: int = 16,
        segment_lengths: Sequence[int] | None = None,
        dilation_rates: Sequence[int] = (1, 2, 4, 8, 16),
        drop_path_rate: float = 0.0,
        padding: Padding = "zeros",
        mixing_grad: MixingGrad = "exact",
        activation_checkpointing: bool = False,
        backend: str = "auto",
        ordering: Curve | None = None,
    ) -> LongNetViT:
        """LongViT of torchscale's examples, from its own checkpoint; on the CPU, in float32, in eval mode.

        Args:
            path_or_state_dict: a file of torch.save or safetensors, or a state dict: of the bare model, of a classifier
                (names begin with ``model.``), or of its pretraining (``backbone.``).
            img_size: pixels along a side of the images the positions are for; those of a checkpoint for another size
                are resized.
            patch_size: pixels along a side of a patch.
            num_heads: attention heads.
            segment_lengths: by default :func:`longvit_segment_lengths` of ``img_size``.
            dilation_rates: one for each segment length.
            drop_path_rate, padding, mixing_grad, activation_checkpointing, backend: as for :meth:`from_gigapath`.
            ordering: see the class; the published weights saw patches row by row.

        Raises:
            WeightsError: a ValueError; unreadable or foreign weights, or names or shapes that do not fit.
            ValueError: options that are not allowed.
        """
        # Before the weights are read: their positions may have to be resized to it.
        ImageEmbedding(img_size, patch_size, embed_dim=1, device="meta")
        weights, sizes = read_longvit(path_or_state_dict, img_size=img_size, patch_size=patch_size)
        if sizes.patch_size != patch_size:
            raise WeightsError(
                f"{describe(path_or_state_dict)} has patches of {sizes.patch_size} pixels; patch_size is {patch_size}"
            )
        config = LongNetEncoderConfig(
            **sizes.encoder,
            num_heads=num_heads,
            segment_lengths=tuple(longvit_segment_lengths(img_size) if segment_lengths is None else segment_lengths),
            dilation_rates=tuple(dilation_rates),
            final_norm=False,
            padding=padding,
            mixing_grad=mixing_grad,
            drop_path_rate=drop_path_rate,
            activation_checkpointing=activation_checkpointing,
            backend=backend,
        )
        embed = ImageEmbedding(
            img_size,
            patch_size,
            in_chans=sizes.in_chans,
            embed_dim=config.embed_dim,
            device="meta",
            dtype=torch.float32,
        )
        model = cls(config, embed, num_classes=sizes.num_classes, ordering=ordering)
        materialise(model, weights, path_or_state_dict)
        return model.eval()
