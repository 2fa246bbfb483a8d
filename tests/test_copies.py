"""kernels/ loaded again: a module or the package reloaded, and copies under names of all kinds, in one process."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
NAMES = ("fast_kernels", "my-kernels", "my_kernels", "2kernels", "kernels.v2", "Kerne ls", "aten", "noyau_é")

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


def test_reloaded_modules_and_copies_of_any_name_work_beside_each_other(tmp_path: Path) -> None:
    for name in NAMES:
        target = tmp_path / name.replace(".", "/")
        shutil.copytree(ROOT / "kernels", target, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-c", f"NAMES = {NAMES!r}\n{CODE}"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert (result.stdout, result.stderr) == ("all equal\n", "")
