"""Models built of dilated attention."""

from .config import LongNetLMConfig
from .encoder import LongNetEncoder
from .encoder_config import LongNetEncoderConfig
from .front_ends import ImageEmbedding, TileEmbedding
from .gigapath import gigapath_segment_lengths
from .longnet_lm import LongNetLM
from .longnet_vit import LongNetViT
from .longvit import longvit_segment_lengths
from .weights import WeightsError

__all__ = [
    "ImageEmbedding",
    "LongNetEncoder",
    "LongNetEncoderConfig",
    "LongNetLM",
    "LongNetLMConfig",
    "LongNetViT",
    "TileEmbedding",
    "WeightsError",
    "gigapath_segment_lengths",
    "longvit_segment_lengths",
]
