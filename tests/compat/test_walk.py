"""The whole table, each old module in a fork of one process that has imported torch and the package alone."""

from __future__ import annotations

import json
import subprocess
import sys

WALK = """
import json, os, sys, warnings
import torch

torch.set_num_threads(1)
PACKAGE = "dilated_attention_pytorch"

def check(module, names):
    import importlib
    path = f"{PACKAGE}.{module}" if module else PACKAGE
    problems = []
    for name in names:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scope = {"__name__": "somebody"}
            try:
                exec(f"from {path} import {name}", scope)
                exec(f"from {path} import {name} as again", scope)
            except BaseException as error:
                problems.append(f"{path}.{name}: {type(error).__name__}: {error}")
                continue
        ours = [str(w.message) for w in caught if issubclass(w.category, DeprecationWarning)]
        if len(ours) != 1 or not ours[0].startswith(f"{path}.{name} is deprecated: use "):
            problems.append(f"{path}.{name}: {len(ours)} warnings {ours[:1]}")
        if any(w.filename != "<string>" for w in caught):
            problems.append(f"{path}.{name}: the warning points at {caught[0].filename}")
        if scope[name] is not scope["again"]:
            problems.append(f"{path}.{name}: two objects")
    if module:
        found = importlib.import_module(path)
        problems += [f"{path} is no attribute"] if module.split(".")[0] not in vars(sys.modules[PACKAGE]) else []
    package = sys.modules[PACKAGE]
    x = torch.ones(1, 4, 1, 8)
    if package.dilated_attention(x, x, x, (4,), (1,)).sum() != x.sum():
        problems.append(f"after {path}: dilated_attention is {package.dilated_attention!r}")
    return problems

work = json.loads(sys.stdin.read())
import dilated_attention_pytorch
import dilated_attention_pytorch.compat.table

dilated_attention_pytorch.compat.table.load()
for part in ("attention", "caches", "factories", "models", "multihead", "pools", "records", "refused", "sparse"):
    __import__(f"dilated_attention_pytorch.compat.{part}")  # read once for all forks; no old name is made yet
problems = []
for module, names in work:
    read, write = os.pipe()
    if os.fork() == 0:
        try:
            found = check(module, names)
        except BaseException as error:
            found = [f"{module}: {type(error).__name__}: {error}"]
        os.write(write, json.dumps(found).encode()[:60000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        problems += json.loads(pipe.read() or '["a fork died"]')
    os.wait()
print(json.dumps(problems))
"""


def test_every_old_path_and_name_imports_and_warns_once():
    from dilated_attention_pytorch.compat.table import load

    by_module: dict[str, list[str]] = {}
    for module, name in load().by_path:
        by_module.setdefault(module, []).append(name)
    assert len(by_module) > 150
    assert sum(map(len, by_module.values())) > 1000
    done = subprocess.run(
        [sys.executable, "-c", WALK],
        input=json.dumps(sorted(by_module.items())),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


def test_files_that_the_analysis_of_the_old_package_named_are_there():
    from dilated_attention_pytorch.compat.table import load

    ring = "ring_attention_bucketed ring_attention_lse ring_attention_lse_optimized ring_attention_utils "
    ring += "ring_dilated_attention_fixed ring_dilated_attention_refactored ring_dilated_attention_production "
    ring += "ring_dilated_attention_true ring_dilated_attention_v3 ring_distributed_dilated_attention "
    ring += "ring_dilated_attention_hybrid ring_dilated_attention_hybrid_hilbert ring_dilated_attention_hilbert_v2 "
    ring += "ring_dilated_attention_triton_kernel ring_dilated_attention_simple_triton "
    ring += "block_sparse_ring_distributed_dilated_attention"
    kernels = "hilbert_attention_final hilbert_dilated_attention hilbert_dilated_attention_triton "
    kernels += "hilbert_dilated_attention_triton_fixed hilbert_dilated_attention_triton_v2 "
    kernels += "hilbert_dilated_attention_triton_v3"
    pools = "memory_pool enhanced_memory_pool bucketed_memory_pool fragment_aware_pool numa_aware_pool"
    expected = {*ring.split(), *(f"kernels.{k}" for k in kernels.split()), *(f"core.{p}" for p in pools.split())}
    assert expected <= load().modules
