"""Slides to embeddings: tile features read and checked, encoded, and kept in files. The command line calls it."""

from .embedding import embed_slide
from .picture import heat_map
from .reading import SlideError, TileFeatures, check_against, find_slides, read_slide
from .results import Source, check_settings, is_complete, pack

__all__ = [
    "SlideError",
    "Source",
    "TileFeatures",
    "check_against",
    "check_settings",
    "embed_slide",
    "find_slides",
    "heat_map",
    "is_complete",
    "pack",
    "read_slide",
]
