"""kernels/ elsewhere: copied into other packages, under names of all kinds, and loaded again, in one process."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
NAMES = ("fast_kernels", "my-kernels", "my_kernels", "2kernels", "vendored.v2", "Kerne ls", "aten", "noyau_é")

CODE = """
import importlib, sys
import torch
import ldmperf.kernels as ours

qkv = torch.randn(2, 9, 3, 4, 8).unbind(2)
image, vector = torch.randn(2, 8, 4, 4), torch.randn(8)

def results(kernels):
    x = image.clone().requires_grad_()
    y = kernels.group_norm_silu(x, 4, vector, vector, backend="torch")
    y.sum().backward()
    rows = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    return [
        kernels.attention(*qkv, backend="torch"), y, x.grad,
        kernels.layer_norm(rows, vector, vector, residual=rows, backend="torch")[1],
        kernels.linear(rows, rows[:4], backend="torch"), kernels.geglu(rows, backend="torch"),
        kernels.residual_add(image, image, vector, backend="torch"),
    ]

expected = results(ours)

def check(kernels):
    assert all(map(torch.equal, results(kernels), expected)), kernels

for name in NAMES:
    before = importlib.import_module(name)
    check(before)
    assert "ldmperf" not in before.attention.__module__
    for module in [module for module in sys.modules if module == name or module.startswith(name + ".")]:
        del sys.modules[module]
    again = importlib.import_module(name)
    assert again is not before
    check(again)
    check(before)

former = ours.attention
for _ in range(2):
    for module in sorted(module for module in sys.modules if module.startswith("ldmperf.kernels.")):
        importlib.reload(sys.modules[module])
        check(ours)
    check(importlib.reload(ours))
assert torch.equal(former(*qkv, backend="torch"), expected[0])
compiled = torch.compile(lambda x: ours.geglu(x, backend="torch"), fullgraph=True, backend="aot_eager")
assert torch.equal(compiled(image), ours.geglu(image, backend="torch"))
print("all equal")
"""


# In a repository that has torch and triton, and neither ldmperf nor diffusers.
ALONE = """
import copy, importlib, pickle, sys
sys.modules |= dict.fromkeys(("ldmperf", "diffusers"))
import torch
from torch import nn
import models.vendor.kernels as first
import models.fused as second

torch.manual_seed(0)
torchs = nn.GroupNorm(4, 8).requires_grad_(False)
torchs.weight.normal_(), torchs.bias.normal_()
image, tokens = torch.randn(2, 8, 5, 3), torch.randn(2, 9, 8)
expected = nn.functional.silu(torchs(image))

def made(kernels):
    layers = importlib.import_module(kernels.__name__ + ".layers")

    class Host(nn.GroupNorm):
        forward, ldmperf_backend = layers.GroupNorm.forward, "torch"

    hosted = Host(4, 8)
    hosted.load_state_dict(torchs.state_dict())
    torch.testing.assert_close(hosted(image), torchs(image))
    norm = kernels.GroupNormSiLU(4, 8, backend="torch")
    norm.load_state_dict(torchs.state_dict())
    torch.manual_seed(1)
    options = {"heads": 2, "dim_head": 4, "backend": "torch"}
    return [norm, kernels.Attention(8, **options), kernels.GEGLU(8, 6, backend="torch")]

def results(modules):
    norm, *others = modules
    return [norm(image), *(module(tokens) for module in others)]

def check(modules, kernels):
    for module in modules:
        assert type(module).__module__ == kernels.__name__ + ".modules"
    out = results(modules)
    torch.testing.assert_close(out[0], expected)
    assert all(map(torch.equal, out, of_first))
    sum(y.sum() for y in out).backward()

kept = made(first)
of_first = results(kept)
for kernels in (first, second):
    modules = made(kernels)
    check(modules, kernels)
    check(copy.deepcopy(modules), kernels)
    check(pickle.loads(pickle.dumps(modules)), kernels)
    for module in ("group_norm", "attention", "linear", "layers", "modules"):
        importlib.reload(sys.modules[f"{kernels.__name__}.{module}"])
    importlib.reload(kernels)
    assert type(modules[0]) is not kernels.GroupNormSiLU
    check(modules, kernels)
    check(made(kernels), kernels)
assert first.OPERATORS.keys() == second.OPERATORS.keys()
assert not {"safetensors", "numpy.testing"} & sys.modules.keys()
print("all equal")
"""


def copied(target: Path) -> None:
    shutil.copytree(ROOT / "kernels", target, ignore=shutil.ignore_patterns("__pycache__"))


def run(code: str, folder: Path) -> None:
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert (result.stdout, result.stderr) == ("all equal\n", "")


def test_reloaded_modules_and_copies_of_any_name_work_beside_each_other(tmp_path: Path) -> None:
    for name in NAMES:
        copied(tmp_path / name.replace(".", "/"))
    run(f"NAMES = {NAMES!r}\n{CODE}", tmp_path)


def test_modules_of_two_copies_in_a_repository_without_ldmperf_and_diffusers(tmp_path: Path) -> None:
    copied(tmp_path / "models" / "vendor" / "kernels")
    copied(tmp_path / "models" / "fused")
    run(ALONE, tmp_path)
