"""The layers of the hub's repository, put into networks by `kernelize`: results and gradients as without them."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")

from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from hub_check import public_layers
from hub_kernels import PAGE, REPO_ID, repository, write

import kernels
from kernels import LocalLayerRepository, Mode

CLASSES = {cls.__name__: cls for cls in (nn.GroupNorm, nn.LayerNorm, GEGLU, ResnetBlock2D, BasicTransformerBlock)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("hub") / "hub-kernels"
    write(repository(), target)
    return target


@pytest.fixture(scope="module")
def kernel(folder: Path) -> Any:
    return kernels.get_local_kernel(folder)


class Network(nn.Module):
    """One module of each class that the layers replace; images [2, 8, 5, 4] -> tokens [2, 20, 12]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, 8)
        self.resnet = ResnetBlock2D(in_channels=8, out_channels=16, temb_channels=6, groups=4)
        self.block = BasicTransformerBlock(16, 2, 8, cross_attention_dim=10)
        self.gate = GEGLU(16, 12)
        self.last = nn.LayerNorm(12)

    def forward(self, image: Tensor, temb: Tensor, context: Tensor) -> Tensor:
        tokens = self.resnet(self.norm(image), temb).flatten(2).transpose(1, 2)
        return self.last(self.gate(self.block(tokens, encoder_hidden_states=context)))


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    network = Network().double()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.5)
    return network


@pytest.fixture(scope="module")
def inputs() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, 8, 5, 4), (2, 6), (2, 7, 10))
    return tuple(torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in shapes)


@pytest.fixture
def extensible() -> Iterator[None]:
    """torch's and diffusers' classes as `kernelize` finds them; nothing else of this process sees it."""
    for name, cls in CLASSES.items():
        kernels.replace_kernel_forward_from_hub(cls, name, condition=lambda module, cls=cls: type(module) is cls)
    yield
    for cls in CLASSES.values():
        del cls.kernel_layer_name, cls.kernel_condition


def replaced(network: nn.Module, kernel: Any) -> set[str]:
    """The classes of which every module runs the forward of the kernel's layer of that name."""
    layers = public_layers(kernel)
    found = {True: set[str](), False: set[str]()}
    for module in network.modules():
        name = type(module).__name__
        forward = getattr(module.__dict__.get("forward"), "__func__", None)
        found[name in layers and forward is layers[name].forward].add(name)
    return found[True] - found[False]


@pytest.mark.usefixtures("extensible")
@pytest.mark.parametrize("mode", [Mode.INFERENCE, Mode.TRAINING, Mode.TRAINING | Mode.TORCH_COMPILE])
def test_kernelize_keeps_results_and_gradients(
    mode: Mode, folder: Path, kernel: Any, network: Network, inputs: tuple[Tensor, ...]
) -> None:
    mapping = {name: {"cpu": {mode: LocalLayerRepository(folder, layer_name=name)}} for name in CLASSES}
    with kernels.use_kernel_mapping(mapping, inherit_mapping=False):
        model = kernels.kernelize(copy.deepcopy(network), mode=mode, device="cpu", use_fallback=False)
    assert replaced(model, kernel) == CLASSES.keys() == public_layers(kernel).keys()
    run: Callable[..., Tensor] = model
    if Mode.TORCH_COMPILE in mode:
        run = torch.compile(model, fullgraph=True, backend="aot_eager")
    plain = copy.deepcopy(network)
    expected, result = plain(*inputs), run(*inputs)
    torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-11)
    if Mode.TRAINING in mode:
        for output in (result, expected):
            output.square().sum().backward()
        for (name, ours), (_, theirs) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
            assert ours.grad is not None, name
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """`kernelize` believes that the model is on a GPU, and chooses the layers of the device "cuda"."""
    gpu = kernels.Device(type="cuda")
    monkeypatch.setattr(sys.modules["kernels.layer.kernelize"], "_find_device", lambda model: gpu)
    monkeypatch.setattr(sys.modules["kernels.layer.repos"], "_find_capability", lambda: 90)


@pytest.mark.usefixtures("extensible", "pretended_gpu")
def test_the_example_of_the_page_runs(
    folder: Path, kernel: Any, network: Network, inputs: tuple[Tensor, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    scope = {"unet": copy.deepcopy(network)}
    exec(example.replace("/path/to/build/hub-kernels", str(folder)), scope)
    assert replaced(scope["unet"], kernel) == CLASSES.keys()
    assert scope["ops"] is kernel
    # The norms of a residual block are one call with their SiLU, though `kernelize` took them over too.
    activations = []

    def spied(*arguments: Any, activation: str | None = "silu", **options: Any) -> Tensor:
        activations.append(activation)
        return kernel.group_norm_silu(*arguments, activation=activation, **options)

    monkeypatch.setattr(kernel.layers, "group_norm_silu", spied)
    scope["unet"](*inputs)
    assert activations == [None, "silu", "silu"]


@pytest.mark.usefixtures("extensible", "pretended_gpu")
def test_the_examples_of_the_card_run(
    folder: Path, kernel: Any, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers, functions = re.findall(r"```python\n(.*?)```", (folder / "CARD.md").read_text(), re.DOTALL)
    monkeypatch.setenv("LOCAL_KERNELS", f"{REPO_ID}={folder}")
    scope: dict[str, Any] = {"pipeline": SimpleNamespace(unet=copy.deepcopy(network))}
    # A LayerRepository asks the hub which revision a version is.
    exec(layers.replace("version=0", 'revision="v0"'), scope)
    assert replaced(scope["unet"], kernel) == {"ResnetBlock2D", "BasicTransformerBlock", "GEGLU"}
    assert {frozenset(devices) for devices in scope["mapping"].values()} == {frozenset({"cuda", "rocm"})}
    exec(functions.replace('"cuda"', '"cpu"'), scope)
    assert scope["y"].shape == (2, 320, 64, 64)
