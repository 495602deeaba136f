"""Files of embeddings: what they say about how they were made, and whether one is there already."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

_ABOUT = "dilated-attention slide 1"
"""The only entry of the metadata: the order of several would differ from file to file."""
_TENSORS = {"class_token", "pooled", "layers"}


@dataclass(frozen=True)
class Source:
    """A file of features as it was when it was encoded."""

    name: str
    size: int
    modified_ns: int

    @classmethod
    def of(cls, path: Path) -> Source:
        """As it is now."""
        state = path.stat()
        return cls(path.name, state.st_size, state.st_mtime_ns)


def pack(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], source: Source) -> bytes:
    """The content of a file of embeddings, in safetensors."""
    from safetensors.torch import save

    return save(dict(tensors), {_ABOUT: json.dumps({"settings": dict(settings), "source": asdict(source)})})


def is_complete(path: Path, source: Source, *, received: bool) -> bool:
    """Whether ``path`` holds all the embeddings of ``source`` as it is now; with ``received`` that too."""
    wanted = _TENSORS | ({"received_attention"} if received else set())
    read = _read(path)
    if read is None:
        return False
    about, names = read
    return about is not None and wanted <= names and about["source"] == asdict(source)


def check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Whether the file, if it is there and readable, was made with these settings.

    Raises:
        ValueError: it was not; the message names what differs.
    """
    read = _read(path)
    if read is None:
        return
    about, _ = read
    if about is None:
        raise ValueError(f"{str(path)!r} holds no embeddings of this command; give another --output, or --overwrite")
    old, new = about["settings"], json.loads(json.dumps(dict(settings)))
    for name, value in new.items():
        if old.get(name) != value:
            raise ValueError(
                f"{str(path)!r} was made with {name} {_short(old.get(name))}, now it is {_short(value)}; give another "
                "--output, or --overwrite"
            )


def _read(path: Path) -> tuple[dict[str, Any] | None, set[str]] | None:
    """What a file says about itself (None: it is not ours) and its tensors' names; None where there is no whole one."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_ABOUT)
            return None if text is None else json.loads(text), set(file.keys())
    except SafetensorError:
        return None


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
