"""The command `encode-slide`: every format to the golden numbers, resuming, damaged files, and wrong input."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import matplotlib.image
import numpy as np
import pytest
import torch
from click.testing import Result
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from dilated_attention_pytorch import LongNetViT, encoding
from dilated_attention_pytorch.cli import app

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "gigapath_slide_encoder.safetensors")
STATE = {name.removeprefix("state/"): value for name, value in GOLDEN.items() if name.startswith("state/")}
FEATURES, COORDS = GOLDEN["x"][0], GOLDEN["coords"][0]
GRID = ("--slide-ngrids", "48", "--max-wsi-size", "16384")
TILES = 60


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "slide_encoder.pth"
    torch.save({"model": STATE}, path)
    return path


def encode(*arguments: str | Path, grid: tuple[str, ...] = GRID) -> Result:
    return CliRunner().invoke(app, ["encode-slide", *map(str, arguments), *grid, "--device", "cpu"])


def save(path: Path, fields: dict[str, Any]) -> Path:
    """Write fields, tensors or arrays, in the format that the name asks for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".pt":
        torch.save(fields, path)
        return path
    arrays = {name: np.asarray(value) for name, value in fields.items()}
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        with h5py.File(path, "w") as file:
            for name, array in arrays.items():
                file[name] = array
    return path


def small(tiles: int = TILES, **changes: Any) -> dict[str, Any]:
    fields = {"features": FEATURES[:tiles], "coords": COORDS[:tiles], **changes}
    return {name: value for name, value in fields.items() if value is not None}


def summary(output: Path) -> dict[str, Any]:
    return json.loads((output / "summary.json").read_text())


@pytest.mark.parametrize("suffix", [".h5", ".hdf5", ".pt", ".npz"])
def test_every_format_gives_the_golden_numbers(suffix: str, weights: Path, tmp_path: Path):
    path, output = save(tmp_path / f"slide{suffix}", small(len(FEATURES))), tmp_path / "out"
    result = encode(path, "--weights", weights, "--output", output)
    assert result.exit_code == 0, result.output
    found = load_file(output / "slide.safetensors")
    assert found.keys() == {"class_token", "pooled", "layers"}
    expected = torch.cat([GOLDEN[f"layer{i}"] for i in range(3)])
    for got, right in ((found["layers"], expected), (found["pooled"], GOLDEN["pooled"][0])):
        assert got.shape == right.shape
        assert float((got - right).abs().max() / right.abs().max()) <= 1e-5
    report = summary(output)
    assert report["complete"] is True
    assert [slide["tiles"] for slide in report["encoded"]] == [len(FEATURES)]
    assert report["settings"]["segment_lengths"] == [1024, 1448, 2048, 2896, 4096]
    assert report["notes"] == []  # 1,500 rows are more than 1,448, which is a multiple of its rate


def test_results_are_those_of_the_model(weights: Path, tmp_path: Path):
    model = LongNetViT.from_gigapath(STATE, slide_ngrids=48, max_wsi_size=16384)
    x, coords = FEATURES[None, :TILES], COORDS[None, :TILES]
    for pooled in (False, True):
        model.global_pool = pooled
        output = tmp_path / f"out{pooled}"
        extra = ["--global-pool"] if pooled else []
        result = encode(save(tmp_path / "s.npz", small()), "--weights", weights, "--output", output, *extra)
        assert result.exit_code == 0, result.output
        found = load_file(output / "s.safetensors")
        with torch.no_grad():
            alone, every = model(x, coords)[0][0], torch.cat(model(x, coords, all_layer_embed=True))
        torch.testing.assert_close(found["pooled" if pooled else "class_token"], alone, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(found["layers"], every, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 0.03), ("float16", 0.005)])
def test_half_precision_is_close(dtype: str, bound: float, weights: Path, tmp_path: Path):
    path = save(tmp_path / "slide.pt", small())
    arguments = (path, "--weights", weights, "--dtype")
    assert encode(*arguments, "float32", "--output", tmp_path / "full").exit_code == 0
    assert encode(*arguments, dtype, "--output", tmp_path / "half").exit_code == 0
    half = load_file(tmp_path / "half" / "slide.safetensors")
    for name, right in load_file(tmp_path / "full" / "slide.safetensors").items():
        assert half[name].dtype == torch.float32
        assert not torch.equal(half[name], right)
        assert float((half[name] - right).norm() / right.norm()) <= bound


DTYPES = {
    "float16 features": {"features": FEATURES[:TILES].half()},
    "float64 features": {"features": FEATURES[:TILES].double()},
    "big-endian features": {"features": FEATURES[:TILES].numpy().astype(">f4")},
    "int64 coords": {"coords": COORDS[:TILES].long()},
    "uint32 coords": {"coords": COORDS[:TILES].numpy().astype(np.uint32)},
    "float64 coords": {"coords": COORDS[:TILES].double()},
}


def has_dtype(suffix: str, name: str) -> bool:
    """Whether such a file can hold it: tensors are neither big-endian nor, here, uint32."""
    return suffix != ".pt" or all(isinstance(value, torch.Tensor) for value in DTYPES[name].values())


@pytest.mark.parametrize(
    ("suffix", "name"),
    [(suffix, name) for suffix in (".h5", ".pt", ".npz") for name in DTYPES if has_dtype(suffix, name)],
)
def test_dtypes_that_files_have(suffix: str, name: str, tmp_path: Path):
    changes: dict[str, Any] = DTYPES[name]
    slide = encoding.read_slide(save(tmp_path / f"slide{suffix}", small(**changes)))
    assert slide.features.dtype == torch.float32
    torch.testing.assert_close(slide.features, FEATURES[:TILES], atol=2e-3, rtol=1e-3)
    assert torch.equal(slide.coords.double(), COORDS[:TILES].double())


def test_a_folder_is_resumed(weights: Path, tmp_path: Path):
    folder, output = tmp_path / "features", tmp_path / "out"
    for name in ("a.h5", "b.pt", "deeper/a.npz", ".hidden/c.pt"):
        save(folder / name, small())
    (folder / "notes.txt").write_text("no slide")
    arguments = (folder, "--weights", weights, "--output", output)
    assert encode(*arguments).exit_code == 0
    files = {path.relative_to(output).as_posix(): path for path in output.rglob("*.safetensors")}
    assert files.keys() == {"a.safetensors", "b.safetensors", "deeper/a.safetensors"}
    assert len(summary(output)["encoded"]) == 3
    before = {name: path.stat().st_mtime_ns for name, path in files.items()}

    def encoded() -> set[str]:
        result = encode(*arguments)
        assert result.exit_code == 0, result.output
        report = summary(output)
        assert len(report["encoded"]) + len(report["skipped"]) == 3
        return {slide["slide"] for slide in report["encoded"]}

    assert encoded() == set()
    assert before == {name: path.stat().st_mtime_ns for name, path in files.items()}
    cut = files["a.safetensors"].read_bytes()
    files["a.safetensors"].write_bytes(cut[:-4])
    files["b.safetensors"].unlink()
    assert encoded() == {"a", "b"}
    assert files["a.safetensors"].read_bytes() == cut
    save(folder / "deeper" / "a.npz", small(40))  # another slide under the name
    assert encoded() == {"deeper/a"}
    assert encode(*arguments, "--overwrite").exit_code == 0
    assert len(summary(output)["encoded"]) == 3
    assert not [path for path in output.rglob("*") if path.name.endswith(".tmp")]


def test_results_of_other_settings_are_not_taken_for_these(weights: Path, tmp_path: Path):
    path, output = save(tmp_path / "slide.npz", small()), tmp_path / "out"
    arguments = (path, "--weights", weights, "--output", output)
    assert encode(*arguments).exit_code == 0
    for extra, fragment in (
        (("--global-pool",), "global_pool False, now it is True"),
        (("--dtype", "bfloat16"), "dtype float32, now it is bfloat16"),
        (("--rates", "1,2,4,8,8"), "dilation_rates [1, 2, 4, 8, 16], now it is"),
    ):
        result = encode(*arguments, *extra)
        assert result.exit_code == 2
        assert f"slide.safetensors' was made with {fragment}" in " ".join(result.stderr.split())
    other = tmp_path / "other.safetensors"
    save_file({**STATE, "cls_token": STATE["cls_token"] + 1}, other)
    result = encode(path, "--weights", other, "--output", output)
    assert result.exit_code == 2
    assert "was made with weights" in result.stderr
    assert encode(path, "--weights", other, "--output", output, "--overwrite").exit_code == 0
    save_file({"x": torch.zeros(1)}, output / "slide.safetensors")
    result = encode(*arguments)
    assert result.exit_code == 2
    assert "holds no embeddings of this command" in result.stderr


def spoiled(values: torch.Tensor, index: Any, value: float) -> torch.Tensor:
    values = values[:TILES].clone()
    values[index] = value
    return values


DAMAGED = {
    "no features": ({"features": None}, "features", "is missing in the file; it has coords"),
    "no coords": ({"coords": None}, "coords", "is missing in the file; it has features"),
    "fewer coords": ({"coords": COORDS[: TILES - 1]}, "coords", "has 59 tiles and features has 60"),
    "NaN": ({"features": spoiled(FEATURES, (7, 2), torch.nan)}, "features", "1 of 60 tiles have NaN or infinite"),
    "infinite": ({"features": spoiled(FEATURES, (7, 2), torch.inf)}, "features", "the first is tile 7"),
    "channels": ({"features": FEATURES[:TILES, :23]}, "features", "has 23 channels; these weights take 24"),
    "a batch": ({"features": FEATURES[None, :TILES]}, "features", "has shape (1, 60, 24); give (tiles, channels)"),
    "no tiles": ({"features": FEATURES[:0], "coords": COORDS[:0]}, "features", "has shape (0, 24)"),
    "3-D coords": ({"coords": torch.zeros(TILES, 3)}, "coords", "has shape (60, 3); give (tiles, 2)"),
    "integers": ({"features": torch.ones(TILES, 24, dtype=torch.int64)}, "features", "has dtype int64"),
    "rounded coords": ({"coords": COORDS[:TILES].half()}, "coords", "has dtype float16"),
    "negative": ({"coords": spoiled(COORDS, (3, 1), -1)}, "coords", "outside the grid of 48 x 48 tiles of 256"),
    "too far": ({"coords": spoiled(COORDS, 5, 48 * 256)}, "coords", "tile 5, at [12288.0, 12288.0]"),
    "NaN coords": ({"coords": spoiled(COORDS, (9, 0), torch.nan)}, "coords", "tile 9"),
}


def test_damaged_files_are_named_and_the_others_encoded(weights: Path, tmp_path: Path):
    folder, output = tmp_path / "features", tmp_path / "out"
    expected: dict[str, tuple[str | None, str]] = {}
    for suffix in (".h5", ".pt", ".npz"):
        kind = suffix[1:]
        for what, (changes, field, reason) in DAMAGED.items():
            name = f"{kind} {what}"
            save(folder / f"{name}{suffix}", small(**changes))
            expected[name] = field, reason
        content = save(folder / f"{kind} good{suffix}", small()).read_bytes()
        for name, part in ((f"{kind} cut", content[: len(content) // 2]), (f"{kind} text", b"no slide"), (kind, b"")):
            (folder / f"{name}{suffix}").write_bytes(part)
            expected[name] = None, {"h5": "no HDF5 file", "pt": "no file of torch.save", "npz": "no npz file"}[kind]
    np.savez(folder / "pickle.npz", features=np.array([{}], dtype=object), coords=np.asarray(COORDS))
    expected["pickle"] = "features", "cannot be read (Object arrays cannot be loaded"
    torch.save({"features": np.zeros((2, 24)), "coords": COORDS}, folder / "array.pt")
    expected["array"] = None, "could run code"
    torch.save(FEATURES, folder / "tensor.pt")
    expected["tensor"] = "features", "it is a Tensor, not a dict"
    torch.save({"features": [1.0], "coords": COORDS}, folder / "list.pt")
    expected["list"] = "features", "is a list, not a dense tensor"
    (folder / "moved.pt").symlink_to(folder / "no such file.pt")
    expected["moved"] = None, "cannot be read (No such file or directory)"
    with h5py.File(folder / "group.h5", "w") as file:
        file.create_group("features")
        file["coords"] = np.asarray(COORDS)
    expected["group"] = "features", "is a Group, not a dataset"

    result = encode(folder, "--weights", weights, "--output", output)
    assert result.exit_code == 1, result.output
    report = summary(output)
    assert report["complete"] is False
    assert {slide["slide"] for slide in report["encoded"]} == {"h5 good", "pt good", "npz good"}
    assert {path.stem for path in output.glob("*.safetensors")} == {"h5 good", "pt good", "npz good"}
    found = {slide["slide"]: slide for slide in report["failed"]}
    assert found.keys() == expected.keys()
    for name, (field, reason) in expected.items():
        assert found[name]["field"] == field, name
        assert reason in found[name]["reason"], (name, found[name]["reason"])
        line = next(line for line in result.stderr.splitlines() if f"{Path(found[name]['file']).name}'" in line)
        assert line.startswith(f"error: '{found[name]['file']}': {field + ': ' if field else ''}")
    assert f"{len(expected)} of {len(expected) + 3} slides were not encoded" in result.stderr
    assert "Traceback" not in result.output


def test_a_slide_that_is_too_large_is_reported_and_the_others_encoded(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, tiles in (("large.npz", 50), ("small.npz", 30)):
        save(tmp_path / "in" / name, small(tiles))
    real = encoding.embed_slide

    def limited(model: Any, slide: Any, **options: Any) -> Any:
        if len(slide.coords) > 40:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(model, slide, **options)

    monkeypatch.setattr(encoding, "embed_slide", limited)
    result = encode(tmp_path / "in", "--weights", weights, "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert "large.npz': is too large: out of memory" in result.stderr
    assert [slide["slide"] for slide in summary(tmp_path / "out")["encoded"]] == ["small"]


def test_interrupted_it_keeps_what_is_done(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("a.npz", "b.npz"):
        save(tmp_path / "in" / name, small())
    real = encoding.read_slide

    def interrupted(path: Path) -> Any:
        if path.name == "b.npz":
            raise KeyboardInterrupt
        return real(path)

    monkeypatch.setattr(encoding, "read_slide", interrupted)
    arguments = (tmp_path / "in", "--weights", weights, "--output", tmp_path / "out")
    result = encode(*arguments)
    assert result.exit_code == 130
    assert "the same command continues" in result.stdout
    assert summary(tmp_path / "out")["complete"] is False
    monkeypatch.undo()
    assert encode(*arguments).exit_code == 0
    report = summary(tmp_path / "out")
    assert (report["skipped"], report["complete"]) == (["a"], True)


def test_a_heat_map_shows_what_tiles_receive(weights: Path, tmp_path: Path):
    path, output = save(tmp_path / "a $slide$.pt", small(300)), tmp_path / "out"
    arguments = (path, "--weights", weights, "--output", output)
    assert encode(*arguments).exit_code == 0
    assert encode(*arguments, "--heat-map").exit_code == 0
    assert len(summary(output)["encoded"]) == 1  # again, for what was not asked for before
    assert encode(*arguments, "--heat-map").exit_code == 0
    assert summary(output)["skipped"] == ["a $slide$"]
    received = load_file(output / "a $slide$.safetensors")["received_attention"]
    assert received.shape == (2, 300)
    # One segment holds the slide: all rows' attention goes to tiles, the class token, and keys of zeros.
    assert 0.5 * 301 < float(received[0].sum()) < 301
    picture = matplotlib.image.imread(output / "a $slide$.png")
    assert min(picture.shape[:2]) > 300
    assert len(np.unique((picture[..., :3].reshape(-1, 3) * 255).round().astype(int), axis=0)) > 50


def test_heat_map_places_tiles(tmp_path: Path):
    from dilated_attention_pytorch.encoding.picture import rasterise

    values = torch.arange(1.0, 5.0)
    coords = torch.tensor([[2560, 512], [3000, 512], [2600, 700], [3100, 1300]])
    assert rasterise(values, coords, 256).nan_to_num(-1).tolist() == [
        [2.0, 2.0, -1.0], [-1.0, -1.0, -1.0], [-1.0, -1.0, -1.0], [-1.0, -1.0, 4.0]
    ]  # fmt: skip
    one = encoding.heat_map(torch.ones(2, 1), torch.tensor([[0, 0]]), tile_size=256, title="one")
    assert one.startswith(b"\x89PNG")


def test_rows_that_the_original_misplaces_are_noted_once(weights: Path, tmp_path: Path):
    for name in ("a.pt", "b.pt"):
        save(tmp_path / "in" / name, small())
    arguments = (tmp_path / "in", "--weights", weights, "--output", tmp_path / "out")
    result = encode(*arguments, "--segments", "25,64", "--rates", "2,4")
    assert result.exit_code == 0, result.output
    assert result.stderr.count("is longer than segments of 25 (rate 2)") == 1
    assert len(summary(tmp_path / "out")["notes"]) == 1


def test_what_a_result_says_about_itself(weights: Path, tmp_path: Path):
    path, output = save(tmp_path / "slide.pt", small()), tmp_path / "out"
    assert encode(path, "--weights", weights, "--output", output).exit_code == 0
    with safe_open(output / "slide.safetensors", framework="pt") as file:
        about = json.loads(file.metadata()["dilated-attention slide 1"])
    assert about["source"]["name"] == "slide.pt"
    assert about["settings"]["num_heads"] == 16


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (("nothing.h5",), "there is no"),
        (("empty",), "there are no slides in"),
        (("notes.txt",), "is no file of features"),
        (("slide.pt", "twin/slide.npz"), "would both be written to slide.safetensors"),
        (("slide.pt", "--weights", "none.pth"), "cannot read"),
        (("slide.pt", "--weights", "notes.txt"), "no readable file of weights"),
        (("slide.pt", "--weights", "slide.pt"), "is no slide encoder of GigaPath"),
        (("slide.pt", "--device", "abacus"), "device 'abacus' cannot be used"),
        (("slide.pt", "--dtype", "int8"), "'int8'"),
        (("slide.pt", "--num-heads", "7"), "num_heads is 7"),
        (("slide.pt", "--rates", "1,x"), "--rates is '1,x'"),
        (("slide.pt", "--segments", "64"), "segment"),
        (("slide.pt", "--tile-size", "0"), "tile_size is 0"),
        (("slide.pt", "--backend", "nobody"), "nobody"),
        (("slide.pt", "--output", "notes.txt"), "cannot write into the folder"),
        ((), "features"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    arguments: tuple[str, ...], fragment: str, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "slide.pt", small(4))
    save(tmp_path / "twin" / "slide.npz", small(4))
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("nothing of use here")
    given = ["encode-slide", "--weights", str(weights), *arguments]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 2, result.output
    assert fragment in " ".join(result.stderr.split())
    assert len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.rglob("*.safetensors"))


def test_weights_are_asked_for(tmp_path: Path):
    result = CliRunner().invoke(app, ["encode-slide", str(save(tmp_path / "slide.pt", small(4)))])
    assert result.exit_code == 2
    assert "--weights" in result.stderr


@pytest.mark.parametrize(("module", "arguments"), [("h5py", ("slide.h5",)), ("matplotlib", ("s.pt", "--heat-map"))])
def test_what_is_not_installed_is_named(
    module: str, arguments: tuple[str, ...], weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / arguments[0], small(4))
    real = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == module else real(name, *rest))
    result = encode(*arguments, "--weights", weights)
    assert result.exit_code == 2
    assert f"{module} is not installed" in result.stderr
    assert f"run: pip install {module}" in result.stderr


def test_help_and_other_formats_load_no_optional_package(tmp_path: Path):
    path = save(tmp_path / "slide.pt", small(4))
    code = """
import sys
from pathlib import Path
from dilated_attention_pytorch.cli import app
try:
    app(["encode-slide", "--help"])
except SystemExit as end:
    assert end.code == 0
from dilated_attention_pytorch.encoding import read_slide
read_slide(Path(sys.argv[1]))
print([name for name in ("h5py", "matplotlib") if name in sys.modules])
"""
    command = [sys.executable, "-c", code, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
