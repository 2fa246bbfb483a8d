"""The ComfyUI node's kernels, where they serve: in the interpreter, where "auto" takes them as on a GPU."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

NODE = Path(__file__).parents[2] / "examples" / "comfyui" / "__init__.py"
spec = importlib.util.spec_from_file_location("comfyui_node", NODE, submodule_search_locations=[str(NODE.parent)])
sys.modules["comfyui_node"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["comfyui_node"])
serving, fused = (sys.modules[f"comfyui_node.{name}"] for name in ("serving", "fused_modules"))
attention_override = sys.modules["comfyui_node.attention_override"].attention_override


def theirs(*_, **__):
    """ComfyUI's attention."""
    return "theirs"


@pytest.mark.parametrize("skip_reshape", [False, True])
def test_attention_is_the_kernels_where_it_was_measured_to_win(skip_reshape, monkeypatch):
    q, k, v = torch.randn(3, 1, 2, 5, 8).unbind()
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    if not skip_reshape:
        q, k, v = (tensor.transpose(1, 2).flatten(2) for tensor in (q, k, v))
    arguments = {"skip_reshape": skip_reshape, "skip_output_reshape": True}
    monkeypatch.setattr(serving, "_found", {})
    assert attention_override("auto")(theirs, q, k, v, 2, **arguments) == "theirs"
    out = attention_override("triton")(theirs, q, k, v, 2, **arguments)
    assert (out - exact).norm() / exact.norm() < 1e-6
    ran = []
    monkeypatch.setattr(serving, "_found", {})
    monkeypatch.setattr(serving, "_measured", lambda device: {key(call) for call in ran})
    operator = serving.kernels.OPERATORS["attention"]
    key = operator.tuning_key
    shape = [tensor.transpose(1, 2) if skip_reshape else tensor.unflatten(-1, (2, 8)) for tensor in (q, k, v)]
    ran.append(operator.bind(*shape))
    assert torch.equal(attention_override("auto")(theirs, q, k, v, 2, **arguments), out)


class GEGLU(nn.Module):
    """It says that it is ComfyUI's."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 24)

    def forward(self, x):
        raise AssertionError("left to ComfyUI")


GEGLU.__module__ = GEGLU.forward.__module__ = fused.ATTENTION


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_norms_and_gates_are_the_kernels(backend, monkeypatch):
    pair = nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 4, 1)).requires_grad_(False)
    pair[0].weight.copy_(torch.randn(8))
    x = torch.randn(2, 8, 3, 3)
    exact = pair.double()(x.double())
    pair.float()
    ran = []

    def counted(operator, call, backend, run=serving.run):
        ran.append(operator)
        return run(operator, call, backend)

    monkeypatch.setattr(fused, "run", counted)
    gate = GEGLU().requires_grad_(False)
    tokens = torch.randn(2, 3, 8)
    value, of_gate = gate.proj(tokens).double().chunk(2, dim=-1)
    gated = value * F.gelu(of_gate)
    model = nn.ModuleList([pair, gate])
    fused.inject(model, True, True, backend)
    out = pair(x)
    assert (out - exact).norm() / exact.norm() < 1e-6
    out = gate(tokens)
    assert (out - gated).norm() / gated.norm() < 1e-6
    assert ran == ["group_norm_silu", "geglu"]


def test_dtypes_and_widths_that_the_kernels_do_not_take_are_left():
    assert attention_override("triton")(theirs, *torch.randn(3, 1, 4, 6).double().unbind(), 2) == "theirs"
    assert attention_override("triton")(theirs, *torch.randn(3, 1, 4, 6).unbind(), 2) == "theirs"
