"""accelerate() beside what wraps a forward: hooks of offloading and casting, torch.compile, checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import accelerate as hf_accelerate
import pytest
import torch
from accelerate.hooks import remove_hook_from_module
from diffusers.hooks import HookRegistry
from dropin_checks import SAME, our_calls, output, relative_rms
from dropin_models import UNETS, make, make_unet, model_inputs
from torch import nn
from torch._dynamo.backends.registry import lookup_backend
from torch.utils.checkpoint import checkpoint

from ldmperf.model.dropin import accelerate

pytestmark = pytest.mark.usefixtures("_one_thread")
SMALL = UNETS["bk_sdm_small"]


def sequential(unet: Any) -> Callable[[], None]:
    """diffusers' enable_sequential_cpu_offload: a hook on every module with parameters, which rest elsewhere."""
    hf_accelerate.cpu_offload(unet, execution_device="cpu")
    return partial(remove_hook_from_module, unet, recurse=True)


def whole(unet: Any) -> Callable[[], None]:
    """diffusers' enable_model_cpu_offload."""
    hf_accelerate.cpu_offload_with_hook(unet, execution_device="cpu")
    return partial(remove_hook_from_module, unet, recurse=True)


def groups(unet: Any, kind: str) -> Callable[[], None]:
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    unet.enable_group_offload(onload_device=torch.device("cpu"), offload_type=kind, **blocks)
    return partial(remove_diffusers_hooks, unet)


def casting(unet: Any) -> None:
    """diffusers has no way back from it."""
    unet.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)


def remove_diffusers_hooks(unet: Any) -> None:
    for module in unet.modules():
        registry = getattr(module, "_diffusers_hook", None)
        if isinstance(registry, HookRegistry):
            for name in list(registry.hooks):
                registry.remove_hook(name, recurse=False)


HOOKS = {
    "sequential": sequential,
    "whole": whole,
    "groups of leaves": partial(groups, kind="leaf_level"),
    "groups of blocks": partial(groups, kind="block_level"),
    "casting": casting,
}
# a: accelerate, u: undo, h: hooks on, r: hooks off.
ORDERS = ("ahur", "ahru", "haur", "haru", "hrau", "auhr")
CASES = [(hooks, order) for hooks in HOOKS for order in (ORDERS if hooks != "casting" else ("ahu", "hau"))]


@pytest.mark.parametrize(("hooks", "order"), CASES)
def test_hooks_in_every_order(hooks, order):
    unet, plain = make_unet(SMALL), make_unet(SMALL)
    if hooks == "casting":
        # Values that float16 has.
        for model in (unet, plain):
            nn.Module.to(nn.Module.to(model, torch.float16), torch.float32)
    inputs = model_inputs(plain)
    expected = output(plain, inputs)
    modules = dict(unet.named_modules())
    report = remove = None
    for step in order:
        if step == "a":
            report = accelerate(unet, backend="torch")
            assert report.replaced
        elif step == "u":
            report.undo()
        elif step == "h":
            remove = HOOKS[hooks](unet)
        else:
            remove()
        result = output(unet, inputs)
        assert relative_rms(result, expected) < SAME[torch.float32], step
        so_far = order[: order.index(step) + 1]
        accelerated = "a" in so_far and "u" not in so_far
        assert bool(our_calls(unet, inputs)) == accelerated, step
    assert torch.equal(output(unet, inputs), expected)
    assert all(module is modules[path] for path, module in unet.named_modules())
    classes = [type(module) for module in plain.modules()]
    assert [type(module) for module in unet.modules()] == classes


def test_hooks_of_a_user_are_called():
    unet = make_unet(SMALL)
    inputs = model_inputs(unet)
    called: list[str] = []
    paths = [path for path, module in unet.named_modules() if path and not list(module.children())]

    def note(module: nn.Module, args: Any, result: Any, path: str) -> None:
        called.append(path)

    handles = [unet.get_submodule(path).register_forward_hook(partial(note, path=path)) for path in paths]
    expected = output(unet, inputs)
    own, called[:] = sorted(called), []
    with accelerate(unet, backend="torch"):
        result = output(unet, inputs)
    assert relative_rms(result, expected) < SAME[torch.float32]
    assert sorted(called) == own
    for handle in handles:
        handle.remove()


def test_a_hook_that_changes_the_result():
    unet = make_unet(SMALL)
    inputs = model_inputs(unet)
    for path in ("conv_norm_out", "down_blocks.0.resnets.0.norm1", "down_blocks.0.resnets.0.conv2", "conv_act"):
        handle = unet.get_submodule(path).register_forward_hook(lambda module, args, result: 1.3 * result)
        expected = output(unet, inputs)
        with accelerate(unet, backend="torch"):
            assert relative_rms(output(unet, inputs), expected) < SAME[torch.float32]
        handle.remove()


def test_a_forward_of_the_instances_own_is_left():
    unet = make_unet(SMALL)
    inputs = model_inputs(unet)
    path = "down_blocks.0.resnets.0"
    block = unet.get_submodule(path)
    own = block.forward
    block.forward = lambda *args, **kwargs: 2 * own(*args, **kwargs)
    expected = output(unet, inputs)
    with accelerate(unet, backend="torch") as report:
        assert path not in {entry.path for entry in report.replaced}
        assert path in {entry.path for entry in report.left}
        assert relative_rms(output(unet, inputs), expected) < SAME[torch.float32]


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["default", "not reentrant", "reentrant"])
def test_gradient_checkpointing(reentrant):
    unet, plain = make_unet(SMALL, torch.float64), make_unet(SMALL, torch.float64)
    inputs = model_inputs(plain)
    report = accelerate(unet, backend="torch")
    for model in (unet, plain):
        model.train()
        if reentrant is None:
            model.enable_gradient_checkpointing()
        else:
            function = partial(checkpoint, use_reentrant=reentrant)
            model.enable_gradient_checkpointing(function)
    ours, expected = gradients(unet, inputs), gradients(plain, inputs)
    assert our_gradients_are(ours, expected)
    for model in (unet, plain):
        model.disable_gradient_checkpointing()
    assert our_gradients_are(gradients(unet, inputs), expected)
    report.undo()
    again = gradients(unet, inputs)
    assert all(torch.equal(again[name], gradient) for name, gradient in gradients(plain, inputs).items())


@pytest.mark.parametrize("kind", ["sdxl", "scale_shift", "gligen", "vae"])
def test_gradients(kind):
    model, plain = make(kind, torch.float64).train(), make(kind, torch.float64).train()
    inputs = model_inputs(plain)
    with accelerate(model, backend="torch"):
        assert our_gradients_are(gradients(model, inputs), gradients(plain, inputs))


def gradients(model: Any, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    sample = inputs["sample"].clone().requires_grad_()
    loss = model(**inputs | {"sample": sample}).sample.square().mean()
    model.zero_grad()
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return found | {"sample": sample.grad}


def our_gradients_are(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    assert list(ours) == list(expected)
    largest = max(float(gradient.norm()) for gradient in expected.values())
    return all(
        float((ours[name] - gradient).norm()) < 1e-10 * (float(gradient.norm()) + 1e-3 * largest)
        for name, gradient in expected.items()
    )


ONE_LEVEL = SMALL | {
    "block_out_channels": (32,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("UpBlock2D",),
}


def test_compiled_without_a_break():
    """Accelerated after torch.compile; what dynamo compiled before serves neither then nor after the undo."""
    unet = make_unet(ONE_LEVEL)
    inputs = model_inputs(unet)
    expected = output(unet, inputs)
    are_ours: list[bool] = []

    def note(graph: torch.fx.GraphModule, example: Any) -> Any:
        are_ours.append("ldmperf" in graph.code)
        return lookup_backend("aot_eager")(graph, example)

    compiled = torch.compile(unet, backend=note, fullgraph=True)
    assert relative_rms(output(compiled, inputs), expected) < SAME[torch.float32]
    with accelerate(compiled, backend="torch") as report:
        assert report.replaced
        assert relative_rms(output(compiled, inputs), expected) < SAME[torch.float32]
    assert relative_rms(output(compiled, inputs), expected) < SAME[torch.float32]
    assert are_ours in ([False, True], [False, True, False])
    assert torch.equal(output(unet, inputs), expected)
    torch.compiler.reset()
