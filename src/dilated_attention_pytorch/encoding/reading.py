"""Tile features of slides from files of HDF5, torch and NumPy; nothing that a file contains is executed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

FIELDS = ("features", "coords")
HDF5 = (".h5", ".hdf5")
SUFFIXES = (*HDF5, ".pt", ".npz")

# What NumPy and HDF5 may hold; torch's own names are the same.
_FEATURES = ("float16", "bfloat16", "float32", "float64")
_COORDS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "float32", "float64")


class SlideError(ValueError):
    """A slide that cannot be encoded: which file, which field of it (None: all of it), and why."""

    def __init__(self, path: Path, field: str | None, reason: str) -> None:
        self.path, self.field, self.reason = path, field, reason
        super().__init__(f"{str(path)!r}: {field + ': ' if field else ''}{reason}")


class TileFeatures(NamedTuple):
    """A slide: ``features (tiles, channels)`` float32 and ``coords (tiles, 2)`` in pixels, int64 or float64."""

    features: Tensor
    coords: Tensor


def find_slides(given: Sequence[Path]) -> dict[str, Path]:
    """Files of slides by the name of their results: the path below the folder that was given, without its suffix.

    Folders are searched to the bottom for files of a known suffix; what begins with a dot is left out.

    Raises:
        ValueError: nothing there, a file of another suffix, or two files of one name.
    """
    found: dict[str, Path] = {}
    for path in given:
        if path.is_dir():
            files = _below(path)
            if not files:
                raise ValueError(f"there are no slides in {str(path)!r}; their files end in {', '.join(SUFFIXES)}")
        elif not path.exists():
            raise ValueError(f"there is no {str(path)!r}")
        elif path.suffix.lower() not in SUFFIXES:
            raise ValueError(f"{str(path)!r} is no file of features; their names end in {', '.join(SUFFIXES)}")
        else:
            files = [(path.stem, path)]
        for name, file in files:
            other = found.setdefault(name, file)
            if other != file and not os.path.samefile(other, file):
                raise ValueError(
                    f"{str(other)!r} and {str(file)!r} would both be written to {name}.safetensors; rename one, or "
                    "encode them into different folders"
                )
    return found


def _below(folder: Path) -> list[tuple[str, Path]]:
    found = []
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in inside.parts)
        there = path.is_file() or not path.exists()  # a link to nothing is reported like a damaged file
        if path.suffix.lower() in SUFFIXES and there and not hidden:
            found.append((inside.with_suffix("").as_posix(), path))
    return found


def read_slide(path: Path) -> TileFeatures:
    """The tiles of a slide, their shapes and dtypes checked.

    Raises:
        SlideError: a file that is damaged or of another format, or a field that is missing or of the wrong kind.
    """
    read = {".pt": _torch, ".npz": _numpy}.get(path.suffix.lower(), _hdf5)
    features, coords = read(path)
    tiles = features.shape[0]
    if coords.shape[0] != tiles:
        raise SlideError(path, "coords", f"has {coords.shape[0]:,} tiles and features has {tiles:,}; give one of each")
    return TileFeatures(features.float(), coords.double() if coords.is_floating_point() else coords.long())


def check_against(path: Path, slide: TileFeatures, *, channels: int, tile_size: int, grid: int) -> None:
    """Compare a slide with what the model takes.

    Raises:
        SlideError: other channels, a feature that is not finite, or a tile outside the grid; the message names it.
    """
    features, coords = slide
    if features.shape[1] != channels:
        raise SlideError(
            path, "features", f"has {features.shape[1]:,} channels; these weights take {channels:,} a tile"
        )
    _refuse_tiles(path, "features", ~features.isfinite().all(1), "NaN or infinite values", lambda tile: "")
    # As in the model: NaN fails both comparisons.
    inside = ((coords >= 0) & (coords < grid * tile_size)).all(1)
    _refuse_tiles(
        path,
        "coords",
        ~inside,
        f"coordinates outside the grid of {grid} x {grid} tiles of {tile_size} pixels",
        lambda tile: f", at {coords[tile].tolist()}",
    )


def _refuse_tiles(path: Path, field: str, wrong: Tensor, what: str, detail: Callable[[int], str]) -> None:
    if bool(wrong.any()):
        first = int(wrong.nonzero()[0])
        raise SlideError(path, field, f"{int(wrong.sum()):,} of {len(wrong):,} tiles have {what}; the first is "
                         f"tile {first}{detail(first)}")  # fmt: skip


def _check_kind(path: Path, field: str, dtype: str, shape: Sequence[int]) -> None:
    """Shape and dtype of a field, before it is read where the format allows it."""
    allowed, wanted = {"features": (_FEATURES, "(tiles, channels)"), "coords": (_COORDS, "(tiles, 2)")}[field]
    if dtype not in allowed:
        raise SlideError(path, field, f"has dtype {dtype}; give one of {', '.join(allowed)}")
    if len(shape) != 2 or 0 in shape or (field == "coords" and shape[1] != 2):
        raise SlideError(path, field, f"has shape {tuple(shape)}; give {wanted}, none of them 0")


def _check_names(path: Path, names: Sequence[str]) -> None:
    for field in FIELDS:
        if field not in names:
            there = f"it has {', '.join(sorted(names)[:6])}" if names else "it is empty"
            raise SlideError(path, field, f"is missing in the file; {there}")


@contextmanager
def _damage(path: Path, field: str | None, reason: str) -> Iterator[None]:
    """Errors of a reader, of many types because the content decides where it stumbles, as one of ours."""
    try:
        yield
    except (SlideError, MemoryError):
        raise
    except Exception as error:
        lines = str(error).splitlines()
        raise SlideError(path, field, reason + (f" ({lines[0]})" if lines else "")) from None


def _hdf5(path: Path) -> list[Tensor]:
    import h5py

    with _damage(path, None, "is damaged, cut short or no HDF5 file"):
        file = h5py.File(path, "r")
    with file:
        fields = []
        with _damage(path, None, "is damaged"):
            _check_names(path, list(file))
        for name in FIELDS:
            with _damage(path, name, "cannot be read"):
                dataset = file[name]
                if not isinstance(dataset, h5py.Dataset):
                    raise SlideError(path, name, f"is a {type(dataset).__name__}, not a dataset")
                _check_kind(path, name, str(dataset.dtype.newbyteorder("=")), dataset.shape or ())
                fields.append(_from_numpy(dataset[()]))
        return fields


def _numpy(path: Path) -> list[Tensor]:
    import numpy

    with _damage(path, None, "is damaged, cut short or no npz file"):
        archive = numpy.load(path, allow_pickle=False)
        if not isinstance(archive, numpy.lib.npyio.NpzFile):
            raise SlideError(path, None, "holds a single array; give an npz file with features and coords")
    with archive:
        fields = []
        _check_names(path, archive.files)
        for name in FIELDS:
            with _damage(path, name, "cannot be read"):
                array = archive[name]
            _check_kind(path, name, str(array.dtype.newbyteorder("=")), array.shape)
            fields.append(_from_numpy(array))
        return fields


def _torch(path: Path) -> list[Tensor]:
    try:
        with path.open("rb") as file:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except OSError as error:
        raise SlideError(path, None, f"cannot be read ({error.strerror or error})") from None
    except Exception:
        # torch's own message is left out, for it recommends to switch the protection off.
        raise SlideError(
            path,
            None,
            "is damaged, cut short, no file of torch.save, or holds objects other than tensors and plain containers, "
            "which could run code and were not restored",
        ) from None
    if not isinstance(content, dict):
        raise SlideError(path, "features", f"is missing in the file; it is a {type(content).__name__}, not a dict")
    _check_names(path, [name for name in content if isinstance(name, str)])
    fields: list[Tensor] = []
    for name in FIELDS:
        value = content[name]
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            raise SlideError(path, name, f"is a {type(value).__name__}, not a dense tensor")
        _check_kind(path, name, str(value.dtype).removeprefix("torch."), value.shape)
        fields.append(value.detach())
    return fields


def _from_numpy(array: Any) -> Tensor:
    """A tensor of its own, in the byte order of this machine."""
    import numpy

    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    # torch has few operations for wide unsigned integers.
    wide = native.astype(numpy.int64) if native.dtype.kind in "iu" else native
    return torch.from_numpy(numpy.ascontiguousarray(wide))
