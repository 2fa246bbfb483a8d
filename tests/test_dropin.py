"""accelerate() on diffusers UNets and VAEs of every kind: the same results, the very objects back, all listed."""

from __future__ import annotations

import copy
import sys
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models import attention, attention_processor, resnet
from diffusers.models.transformers import transformer_2d
from dropin_checks import SAME, floats, objects, our_calls, output, relative_rms, same_tensors, tensors
from dropin_models import (
    DUAL_CROSS_ATTENTION,
    RARE_UNETS,
    UNETS,
    VAES,
    make,
    make_unet,
    model_inputs,
    unet_configs,
)
from hypothesis import HealthCheck, given, settings
from torch import nn

from ldmperf.model.dropin import KernelAttnProcessor, accelerate

pytestmark = pytest.mark.usefixtures("_one_thread")
quick = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
KINDS = (*UNETS, *RARE_UNETS, *VAES)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("kind", KINDS)
def test_before_during_and_after(kind, dtype):
    model = make(kind, dtype)
    inputs = model_inputs(model)
    before, state, things = output(model, inputs), tensors(model), objects(model)
    with accelerate(model, backend="torch") as report:
        assert report.replaced
        assert same_tensors(model, state)
        assert relative_rms(output(model, inputs), before) < SAME[dtype]
        assert [id(p) for p in model.parameters()] == [things[name] for name in parameter_names(model)]
        assert our_calls(model, inputs)
    assert objects(model) == things
    assert same_tensors(model, state)
    assert not our_calls(model, inputs)
    assert torch.equal(output(model, inputs), before)


def parameter_names(model: Any) -> list[str]:
    names = (name.rpartition(".") for name, _ in model.named_parameters())
    return [f"{path}:{name}" for path, _, name in names]


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_no_worse_than_diffusers(kind):
    model = make(kind, torch.bfloat16)
    inputs = model_inputs(model)
    exact_model = nn.Module.to(copy.deepcopy(model), torch.float32)
    exact = output(exact_model, floats(inputs, torch.float32))
    own = relative_rms(output(model, inputs), exact)
    with accelerate(model, backend="torch"):
        error = relative_rms(output(model, inputs), exact)
    assert error <= 1.25 * own


@settings(quick, max_examples=40)
@given(unet_configs())
def test_any_configuration(config):
    model = make_unet(config, torch.float64)
    inputs = model_inputs(model, size=4)
    before, things = output(model, inputs), objects(model)
    report = accelerate(model, backend="torch")
    check_report(report, model)
    assert relative_rms(output(model, inputs), before) < 1e-11
    report.undo()
    assert objects(model) == things
    assert torch.equal(output(model, inputs), before)


ATTENTIONS = (attention_processor.AttnProcessor2_0, KernelAttnProcessor)


def replaceable(path: str, module: nn.Module, parent: nn.Module | None) -> str | None:
    """What of a module accelerate() should take over, read from diffusers alone; None for what it should leave."""
    kind = type(module)
    kind = kind.__mro__[1] if kind.__module__.startswith("ldmperf") else kind
    if kind is attention_processor.Attention and isinstance(module.processor, ATTENTIONS):
        return "attention"
    if kind is resnet.ResnetBlock2D and isinstance(module.nonlinearity, nn.SiLU):
        return "norms"
    if kind is attention.BasicTransformerBlock and module.norm_type == "layer_norm":
        return "norms"
    if kind is nn.GroupNorm and path.endswith("conv_norm_out") and isinstance(parent.conv_act, nn.SiLU):
        return "norms"
    if kind is nn.GroupNorm and isinstance(parent, transformer_2d.Transformer2DModel):
        return "norms"
    if kind.__name__ == "GEGLU":
        return "geglu"
    return None


def check_report(report: Any, model: Any) -> None:
    """Each entry against a walk of our own; norms, attention and gates are listed, or part of what is."""
    modules = dict(model.named_modules())
    parents = {path: modules.get(path.rpartition(".")[0]) for path in modules}
    expected = {path: replaceable(path, module, parents[path]) for path, module in modules.items()}
    expected = {path: what for path, what in expected.items() if what}
    replaced = {entry.path: entry.what for entry in report.replaced}
    assert replaced == expected
    left = {entry.path: entry.reason for entry in report.left}
    assert all(path in modules and reason for path, reason in left.items())
    assert not set(left) & set(replaced)
    listed = {*left, *replaced}
    for path, module in modules.items():
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm, attention_processor.Attention, attention.FeedForward)):
            parts = path.split(".")
            around = {".".join(parts[:count]) for count in range(1, len(parts) + 1)}
            below = any(other.startswith(path + ".") for other in listed)
            assert around & listed or below, path


@pytest.mark.parametrize("kind", KINDS)
def test_report_is_complete(kind):
    model = make(kind)
    with accelerate(model, backend="torch") as report:
        check_report(report, model)
        assert len(str(report).splitlines()) < 40
    assert report.replaced == ()


def test_dual_cross_attention():
    """diffusers can build it and not run it."""
    model = make_unet(DUAL_CROSS_ATTENTION)
    things = objects(model)
    with accelerate(model, backend="torch") as report:
        check_report(report, model)
    assert objects(model) == things


@pytest.mark.parametrize(
    ("options", "operators"),
    [
        ({"norms": False, "geglu": False}, {"attention"}),
        ({"attention": False, "geglu": False}, {"group_norm_silu", "residual_add", "layer_norm"}),
        ({"attention": False, "norms": False}, {"linear"}),
    ],
)
def test_parts(options, operators):
    model = make("sd15")
    inputs = model_inputs(model)
    before = output(model, inputs)
    with accelerate(model, backend="torch", **options) as report:
        assert set(our_calls(model, inputs)) == operators
        assert relative_rms(output(model, inputs), before) < SAME[torch.float32]
        off = {name for name, wanted in options.items() if not wanted}
        assert not off & {entry.what for entry in report.replaced}


def test_never_a_global_patch():
    namespaces = [
        vars(owner)
        for owner in (
            attention_processor.Attention,
            attention_processor.AttnProcessor2_0,
            attention.BasicTransformerBlock,
            resnet.ResnetBlock2D,
            transformer_2d.Transformer2DModel,
            diffusers.UNet2DConditionModel,
            diffusers.AutoencoderKL,
            nn.Module,
            nn.GroupNorm,
            nn.LayerNorm,
            nn.functional,
            torch,
            *(module for name, module in sorted(sys.modules.items()) if name.startswith("diffusers.models")),
        )
    ]
    model, other = make("sd15"), make("sd15")
    inputs = model_inputs(model)
    before, things = output(other, inputs), objects(other)
    seen = [dict(namespace) for namespace in namespaces]
    with accelerate(model, backend="torch"):
        output(model, inputs)
        assert all(dict(now) == then for now, then in zip(namespaces, seen, strict=True))
        assert objects(other) == things
        assert not our_calls(other, inputs)
        assert torch.equal(output(other, inputs), before)
        assert torch.equal(output(make("sd15"), inputs), before)
