"""The finder: cheap, behind every real module, and quiet about names that never were."""

from __future__ import annotations

import importlib
import inspect
import pickle
import statistics
import subprocess
import sys
import warnings

import pytest
import torch

import dilated_attention_pytorch as package
from dilated_attention_pytorch import dilated_attention as function
from dilated_attention_pytorch.compat import KEPT, OldNameFinder, install


def fresh(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_loads_nothing_of_the_table_and_costs_under_5_ms():
    loaded, tomllib, *times = fresh(
        """
import sys, time
import dilated_attention_pytorch as package
print(*sorted(name for name in sys.modules if name.startswith("dilated_attention_pytorch.compat")))
print("tomllib" in sys.modules)
for _ in range(10):
    sys.modules.pop("dilated_attention_pytorch.compat")
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != "OldNameFinder"]
    start = time.perf_counter()
    import dilated_attention_pytorch.compat
    sys.modules["dilated_attention_pytorch.compat"].install()
    print(time.perf_counter() - start)
"""
    ).splitlines()
    assert (loaded, tomllib) == ("dilated_attention_pytorch.compat", "False")
    assert statistics.median(map(float, times)) < 5e-3


def test_installing_twice_adds_one_finder_at_the_end():
    install()
    install()
    finders = [finder for finder in sys.meta_path if isinstance(finder, OldNameFinder)]
    assert len(finders) == 1


def test_real_modules_win():
    assert "compat" not in repr(importlib.import_module("dilated_attention_pytorch.models").__spec__)
    assert package.DilatedAttention.__module__ == "dilated_attention_pytorch.modules"
    from dilated_attention_pytorch.models import LongNet

    assert LongNet.__module__ == "dilated_attention_pytorch.models.longnet"


@pytest.mark.parametrize("name", ["no_such_module", "ring.no_such_module", "core.memory_pool.inside", "models.nothing"])
def test_modules_that_never_were_are_not_found(name: str):
    with pytest.raises(ModuleNotFoundError, match=name.rpartition(".")[2]):
        importlib.import_module(f"dilated_attention_pytorch.{name}")


def test_names_that_never_were_are_not_there():
    with pytest.raises(ImportError, match="NoSuchClass"):
        from dilated_attention_pytorch.core import NoSuchClass
    with pytest.raises(ImportError, match="NoSuchClass"):
        from dilated_attention_pytorch import NoSuchClass  # noqa: F401
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = package.nothing
    assert not hasattr(package, "__wrapped__")


def test_the_old_module_of_the_functions_name_is_the_function_too():
    old_module = importlib.import_module("dilated_attention_pytorch.dilated_attention")
    try:
        assert package.dilated_attention is old_module
        x = torch.randn(1, 8, 2, 4)
        out = package.dilated_attention(x, x, x, (8,), (1,), is_causal=True)
        assert torch.equal(out, function(x, x, x, (8,), (1,), is_causal=True))
        assert inspect.signature(package.dilated_attention) == inspect.signature(function)
        assert pickle.loads(pickle.dumps(function)) is function
        with pytest.warns(DeprecationWarning, match="DilatedAttention is deprecated: use DilatedAttention"):
            assert old_module.__class__.__getattr__(old_module, "DilatedAttention") is not package.DilatedAttention
    finally:
        package.dilated_attention = function
        sys.modules.pop("dilated_attention_pytorch.dilated_attention")


def test_kept_paths_do_not_warn_and_give_the_same_objects():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = importlib.import_module(f"{KEPT}.ring.factory")
        from dilated_attention_pytorch.compat.old import ImprovedDilatedAttention
        from dilated_attention_pytorch.compat.old.improved_dilated_attention import ImprovedDilatedAttention as same
    assert ImprovedDilatedAttention is same
    assert callable(kept.create_ring_attention)
    assert "create_ring_attention" in dir(kept)


def test_star_imports_bring_every_old_name():
    scope: dict = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec("from dilated_attention_pytorch.kernels.hilbert_attention_final import *", scope)
    assert {"HilbertDilatedAttention", "create_hilbert_mapping"} <= scope.keys()
    assert len(caught) == sum(not name.startswith("__") for name in scope)
