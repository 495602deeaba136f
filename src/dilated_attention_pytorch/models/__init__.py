"""Models built of dilated attention."""

from .cache import KeyValueCache
from .config import LongNetLMConfig
from .encoder import LongNetEncoder
from .encoder_config import LongNetEncoderConfig
from .front_ends import ImageEmbedding, TileEmbedding
from .gigapath import gigapath_segment_lengths
from .longnet import LongNet
from .longnet_lm import LongNetLM
from .longnet_vit import LongNetViT
from .longvit import longvit_segment_lengths
from .transformer_layers import DilatedTransformerDecoderLayer, DilatedTransformerEncoderLayer
from .weights import WeightsError

__all__ = [
    "DilatedTransformerDecoderLayer",
    "DilatedTransformerEncoderLayer",
    "ImageEmbedding",
    "KeyValueCache",
    "LongNet",
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
