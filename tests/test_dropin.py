"""accelerate() on diffusers UNets and VAEs of every kind: the same results, the very objects back, all listed."""

from __future__ import annotations

import copy
import sys
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models import activations, attention, attention_processor, resnet
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

from ldmperf.model.dropin import accelerate

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


def kind_of(module: nn.Module, parent: nn.Module | None, name: str) -> str | None:
    """What accelerate() should take a module over as, by diffusers' classes; None for what it should leave."""
    host = next(kind for kind in type(module).__mro__ if not kind.__module__.startswith("ldmperf"))
    if host is attention_processor.Attention:
        is_plain = type(module.processor) is attention_processor.AttnProcessor2_0
        return "attention" if is_plain and module.added_kv_proj_dim is None else None
    if host is resnet.ResnetBlock2D:
        return "resnet"
    if host is attention.BasicTransformerBlock:
        return "transformer block"
    if host is activations.GEGLU:
        return "geglu"
    if name in ("conv_norm_out", "conv_act"):
        return "norm" if name == "conv_norm_out" or isinstance(module, nn.SiLU) else None
    is_norm = host is nn.GroupNorm and isinstance(parent, transformer_2d.Transformer2DModel)
    return "norm" if is_norm else None


def check_report(report: Any, model: Any) -> None:
    """Each entry against a walk of our own; each module that computes is listed, or part of what is replaced."""
    modules = dict(model.named_modules())
    expected: dict[str, str] = {}
    for path, module in modules.items():
        around, _, name = path.rpartition(".")
        if kind := kind_of(module, modules.get(around), name):
            expected[path] = kind
    assert {entry.path: entry.kind for entry in report.replaced} == expected
    left = {entry.path: entry.reason for entry in report.left}
    assert not set(left) & set(expected)
    assert len(left) == len(report.left)
    assert all(left.values())
    assert all(
        entry.class_name == type(modules[entry.path]).__name__ for entry in (*report.left, *report.replaced)
    )
    for path, module in modules.items():
        if list(module.children()) or isinstance(module, (nn.Dropout, nn.Identity, nn.ModuleList)):
            continue
        around = path.rpartition(".")[0]
        # Norms and activations of a block, the linear layer of a gate.
        assert path in left or path in expected or around in expected, path


@pytest.mark.parametrize("kind", KINDS)
def test_report_is_complete(kind):
    model = make(kind)
    with accelerate(model, backend="torch") as report:
        check_report(report, model)
        assert len(str(report).splitlines()) < 40
    assert report.replaced == ()


@pytest.mark.parametrize(
    ("kind", "class_name", "reason"),
    [
        ("added_kv", "Attention", "it adds keys and values of its own"),
        ("mish", "Mish", "called as it is: torch's Mish, not SiLU"),
        ("sd15", "Conv2d", "torch's convolution"),
        ("sd15", "Linear", "torch's matmul"),
    ],
)
def test_reasons(kind, class_name, reason):
    model = make(kind)
    with accelerate(model, backend="torch") as report:
        reasons = [entry.reason for entry in report.left if entry.class_name == class_name]
    assert reason in reasons
    assert class_name != "Attention" or set(reasons) == {reason}


def test_dual_cross_attention():
    """diffusers can build it and not run it."""
    model = make_unet(DUAL_CROSS_ATTENTION)
    things = objects(model)
    with accelerate(model, backend="torch") as report:
        check_report(report, model)
    assert objects(model) == things


@pytest.mark.parametrize(
    ("options", "operators", "kinds"),
    [
        ({"norms": False, "geglu": False}, {"attention"}, {"attention"}),
        (
            {"attention": False, "geglu": False},
            {"group_norm_silu", "residual_add", "layer_norm", "add_layer_norm"},
            {"resnet", "transformer block", "norm"},
        ),
        ({"attention": False, "norms": False}, {"linear"}, {"geglu"}),
    ],
)
def test_parts(options, operators, kinds):
    model = make("sd15")
    inputs = model_inputs(model)
    before = output(model, inputs)
    with accelerate(model, backend="torch", **options) as report:
        assert set(our_calls(model, inputs)) == operators
        assert relative_rms(output(model, inputs), before) < SAME[torch.float32]
        assert {entry.kind for entry in report.replaced} == kinds
        assert {f"{name}=False" for name in options} <= {entry.reason for entry in report.left}


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
