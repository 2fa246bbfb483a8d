"""The node of examples/comfyui, in a stand-in of ComfyUI; again in a real one by tests/test_comfyui_engine.py."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import json
import logging
import os
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

HERE = Path(__file__).parent
NODE = HERE.parent / "examples" / "comfyui"
KEY = "optimized_attention_override"


def load(name, path):
    """A module of this file; a package if it is an __init__.py, as ComfyUI loads a folder of custom_nodes."""
    folder = [str(path.parent)] if path.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=folder)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


load("comfy_layers", HERE / "comfy_layers.py")
contract = load("comfy_contract", HERE / "comfy_contract.py")
package = load("ldmperf_comfyui_node", NODE / "__init__.py")
serving = sys.modules["ldmperf_comfyui_node.serving"]
fused = sys.modules["ldmperf_comfyui_node.fused_modules"]
REAL = os.environ.get("LDMPERF_COMFYUI")


@pytest.fixture(scope="module")
def host():
    if REAL:
        yield contract.real(REAL)
        return
    host, modules = contract.stand_in()
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    yield host
    for name, module in before.items():
        sys.modules.pop(name) if module is None else sys.modules.update({name: module})


@pytest.fixture
def calls(monkeypatch):
    """The operators that ran, by name, in their order."""
    ran = []

    def counted(operator, call, backend, run=serving.run):
        ran.append(operator)
        return run(operator, call, backend)

    for module in ("attention_override", "fused_modules"):
        monkeypatch.setattr(sys.modules[f"ldmperf_comfyui_node.{module}"], "run", counted)
    return ran


@pytest.fixture
def log(monkeypatch, caplog):
    """What is logged; a reason that an earlier test met is new again."""
    monkeypatch.setattr(serving, "_logged", set())
    caplog.set_level(logging.INFO, "ldmperf_comfyui_node")
    return caplog


def node(patcher, backend="torch", **switches):
    (clone,) = package.NODE_CLASS_MAPPINGS["LdmperfKernels"]().apply(patcher, backend=backend, **switches)
    return clone


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 8, 8, generator=generator).to(dtype)
    return x, torch.randn(2, 5, contract.CONTEXT, generator=generator).to(dtype)


def predict(host, patcher, offload=False, dtype=torch.float32, **options):
    host.manager.load(patcher, offload=offload)
    out = contract.call(patcher, *inputs(dtype), **options)
    host.manager.unload()
    return out


def counts(model):
    """(attentions, norms with their SiLU, gates) that a call of the UNet meets."""
    modules = list(model.modules())
    names = [type(module).__name__ for module in modules]
    pairs = sum(type(module) is nn.Sequential and isinstance(module[0], nn.GroupNorm) for module in modules)
    return sum(name.endswith("CrossAttention") for name in names), pairs, names.count("GEGLU")


def close(a, b, tolerance=2e-5):
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    assert ((a - b).double().norm() / b.double().norm()).item() < tolerance


def snapshot(model):
    """Classes, attributes of the instances, and the bytes of the state dict, by name."""
    classes = {name: (type(module), frozenset(vars(module))) for name, module in model.named_modules()}
    state = model.state_dict(keep_vars=True)
    return classes, {name: (id(weight), weight.clone()) for name, weight in state.items()}


def same(a, b):
    assert a[0] == b[0]
    assert list(a[1]) == list(b[1])
    for name, (identity, weight) in a[1].items():
        assert identity == b[1][name][0]
        assert torch.equal(weight, b[1][name][1])


# What ComfyUI reads of a node.


def test_the_mappings_and_widgets_are_what_comfyui_reads():
    assert package.NODE_CLASS_MAPPINGS.keys() == package.NODE_DISPLAY_NAME_MAPPINGS.keys()
    (cls,) = package.NODE_CLASS_MAPPINGS.values()
    widgets = cls.INPUT_TYPES()["required"]
    parameters = inspect.signature(getattr(cls, cls.FUNCTION)).parameters
    assert list(parameters) == ["self", *widgets]
    assert cls.RETURN_TYPES == ("MODEL",)
    assert widgets["model"] == ("MODEL",)
    for name, parameter in list(parameters.items())[2:]:
        assert widgets[name][1]["default"] == parameter.default


def test_the_registrys_file_tells_the_version_of_the_kernels_and_brings_no_torch():
    """A torch that a node's installer puts over ComfyUI's own may have no CUDA."""
    document = tomllib.loads((NODE / "pyproject.toml").read_text())
    assert document["project"]["version"] == serving.kernels.__version__
    assert document["project"].get("dependencies", []) == []


# The original and the clone.


def test_a_clone_runs_on_the_operators_and_the_original_is_bit_equal_to_before(host, calls):
    original = host.patcher()
    before = predict(host, original)
    state = snapshot(original.model)
    clone = node(original)
    assert KEY not in original.model_options["transformer_options"]
    assert original.injections == {}
    assert clone.model is original.model
    during = predict(host, clone)
    attentions, pairs, gates = counts(original.model)
    assert min(attentions, pairs, gates) > 0
    assert [calls.count(name) for name in ("attention", "group_norm_silu", "geglu")] == [attentions, pairs, gates]
    close(during, before)
    assert not torch.equal(during, before)
    calls.clear()
    assert torch.equal(predict(host, original), before)
    assert calls == []
    same(snapshot(original.model), state)


def test_the_original_is_loaded_in_place_of_its_clone_and_back(host, calls):
    """No unloading in between: what ComfyUI does when a workflow samples from both."""
    original = host.patcher()
    clone = node(original)
    results = []
    for patcher in (original, clone, original, clone):
        host.manager.load(patcher)
        calls.clear()
        results.append(contract.call(patcher, *inputs()))
        assert bool(calls) == (patcher is clone)
    host.manager.unload()
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])
    close(results[1], results[0])


def test_a_clone_that_was_made_of_a_loaded_clone_and_dropped_leaves_right_results(host):
    original = host.patcher()
    before = predict(host, original)
    clone = node(original)
    host.manager.load(clone)
    del_me = clone.clone()
    del del_me
    close(contract.call(clone, *inputs()), before)
    again = clone.clone()
    host.manager.load(again)
    close(contract.call(again, *inputs()), before)
    host.manager.load(original)
    assert torch.equal(contract.call(original, *inputs()), before)
    host.manager.unload()


@pytest.mark.parametrize("only", ["attention", "norms", "geglu"])
def test_each_switch_is_its_own(host, calls, only):
    original = host.patcher()
    operator = {"norms": "group_norm_silu"}.get(only, only)
    clone = node(original, **{name: name == only for name in ("attention", "norms", "geglu")})
    predict(host, clone)
    assert set(calls) == {operator}


def test_all_switches_off_is_the_original(host, calls):
    original = host.patcher()
    before = predict(host, original)
    clone = node(node(original), attention=False, norms=False, geglu=False)
    assert torch.equal(predict(host, clone), before)
    assert calls == []


def test_auto_leaves_everything_to_comfyui_on_a_cpu_and_says_why_once(host, calls, log):
    original = host.patcher()
    before = predict(host, original)
    clone = node(original, backend="auto")
    assert torch.equal(predict(host, clone), before)
    assert torch.equal(predict(host, clone), before)
    assert calls == []
    left = [record.message for record in log.records if "left to ComfyUI" in record.message]
    assert sorted(message.split(" is left")[0] for message in left) == [
        f"ldmperf: {what}" for what in ("GEGLU", "GroupNorm + SiLU", "attention")
    ]
    assert all("need a GPU" in message for message in left)


def test_a_model_without_anything_known_is_said_to_be_one(host, log):
    patcher = host.patcher()
    patcher.model.diffusion_model = nn.Linear(2, 2)
    node(patcher)
    said = [record.message for record in log.records if record.levelname == "WARNING"]
    assert any("no GroupNorm + SiLU" in message for message in said)
    assert any("no GEGLU" in message for message in said)


def test_what_was_found_is_told_also_while_a_clone_is_loaded(host, log):
    """ComfyUI runs a node again when a widget changes, with the earlier clone still loaded."""
    original = host.patcher()
    host.manager.load(node(original))
    first = [record.message for record in log.records if " of " in record.message]
    log.clear()
    again = node(original, backend="auto")
    assert [record.message for record in log.records if " of " in record.message] == first
    assert len(first) == 2
    assert not [record for record in log.records if record.levelname == "WARNING"]
    host.manager.load(again)
    host.manager.unload()


def test_an_injection_replaces_one_that_was_not_taken_back(host):
    """A clone that was dropped while it was loaded, as ComfyUI's garbage collection may leave it."""
    model = host.patcher().model
    state = snapshot(model)
    fused.inject(model, True, True, "torch")
    fused.inject(model, False, True, "auto")
    backends = [vars(module)["ldmperf_backend"] for module in model.modules() if "ldmperf_backend" in vars(module)]
    assert backends == ["auto"] * counts(model)[2]
    fused.eject(model)
    same(snapshot(model), state)


# LoRA, casts and offloading.


def lora(model, strength=1.0):
    """A patch of a projection, a convolution, a gate, and of a norm's own weight and bias."""
    generator = torch.Generator().manual_seed(2)
    ends = ("to_q.weight", "in_layers.2.weight", "proj.weight", "out_layers.0.weight", "in_layers.0.bias")
    keys = [key for key in model.state_dict() if key.endswith(ends)]
    assert {key.split(".", 1)[1].rsplit(".", 2)[-2] for key in keys} >= {"to_q", "2", "proj", "0"}
    shapes = model.state_dict()
    return {key: ("diff", (strength * 0.3 * torch.randn(shapes[key].shape, generator=generator),)) for key in keys}


@pytest.mark.parametrize("offload", [False, True], ids=["loaded", "offloaded"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_lora_before_and_after_the_node(host, calls, order, offload):
    original = host.patcher()
    plain = original.clone()
    plain.add_patches(lora(original.model))
    expected = predict(host, plain)
    assert not torch.equal(expected, predict(host, original))
    if order == "before":
        clone = node(plain)
    else:
        clone = node(original).clone()
        clone.add_patches(lora(original.model))
    close(predict(host, clone, offload=offload), expected)
    assert calls.count("group_norm_silu") == counts(original.model)[1]
    # The weights that the patches changed are there for the clone without the node, and gone for the original.
    host.manager.load(clone)
    host.manager.load(plain)
    assert torch.equal(contract.call(plain, *inputs()), expected)
    host.manager.unload()
    assert not torch.equal(predict(host, original), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_whose_weights_are_cast_at_every_call(host, calls, dtype):
    original = host.patcher(cast=True, dtype=dtype)
    before = predict(host, original)
    assert before.dtype == torch.float32
    close(predict(host, node(original)), before)
    assert calls.count("group_norm_silu") == counts(original.model)[1]


def test_weights_that_were_asked_of_comfyui_are_given_back(host, monkeypatch):
    from comfy import ops

    held = []

    def ask(layer, *arguments, ask=ops.cast_bias_weight, **named):
        held.append(layer)
        return ask(layer, *arguments, **named)

    def give_back(layer, *arguments, give_back=ops.uncast_bias_weight):
        held.remove(layer)
        return give_back(layer, *arguments)

    clone = node(host.patcher(cast=True))
    monkeypatch.setattr(ops, "cast_bias_weight", ask)
    monkeypatch.setattr(ops, "uncast_bias_weight", give_back)
    monkeypatch.setattr(serving, "_found", {})
    predict(host, clone)
    assert held == []

    def fails(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(fused, "run", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        predict(host, clone)
    host.manager.unload()
    assert held == []


# What is not plain is called.


def test_a_forward_that_someone_put_into_torchs_group_norm_is_called(host, calls, monkeypatch, log):
    """As AnimateDiff does while it samples."""
    original = host.patcher()
    clone = node(original, attention=False, geglu=False)
    monkeypatch.setattr(
        nn.GroupNorm, "forward", lambda self, x: F.group_norm(x, self.num_groups, self.weight, self.bias, 1.0)
    )
    expected = predict(host, original)
    assert torch.equal(predict(host, clone), expected)
    assert calls == []
    monkeypatch.undo()
    assert not torch.equal(predict(host, original), expected)


@pytest.mark.parametrize("how", ["hook", "forward", "class", "activation"])
def test_a_norm_that_someone_changed_is_called(host, calls, how):
    original = host.patcher()
    block = original.model.diffusion_model.out
    if how == "hook":
        block[0].register_forward_hook(lambda module, arguments, out: out + 1)
    elif how == "forward":
        block[0].forward = lambda x: F.group_norm(x, block[0].num_groups) + 1
    elif how == "class":
        block[0].__class__ = type("GroupNorm", (nn.GroupNorm,), {"forward": lambda self, x: x})
    else:
        block[1] = type("SiLU", (nn.SiLU,), {"forward": lambda self, x: x})()
    before = predict(host, original)
    clone = node(original, attention=False, geglu=False)
    close(predict(host, clone), before)
    assert calls.count("group_norm_silu") == counts(original.model)[1] - 1


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("path", ["diffusion_model.out", "diffusion_model.out.0", "diffusion_model.out.forward"])
def test_what_another_node_puts_in_the_same_place_stands(host, path, order):
    original = host.patcher()
    before, state = predict(host, original), snapshot(original.model)
    block = original.model.diffusion_model.out
    theirs = nn.Sequential(nn.GroupNorm(8, block[0].num_channels), nn.SiLU(), block[2])
    patched = original.clone()
    patched.add_object_patch(
        path, {"out": theirs, "0": theirs[0], "forward": lambda x: theirs(x)}[path.rsplit(".", 1)[1]]
    )
    expected = predict(host, patched)
    assert not torch.equal(expected, before)
    if order == "before":
        clone = node(patched)
    else:
        clone = node(original).clone()
        clone.add_object_patch(path, patched.object_patches[path])
    close(predict(host, clone), expected)
    assert torch.equal(predict(host, patched), expected)
    assert torch.equal(predict(host, original), before)
    if not path.endswith("forward"):
        # ComfyUI itself leaves a bound method behind where a node patched one.
        same(snapshot(original.model), state)


def test_hooks_of_the_modules_that_are_taken_over_run(host):
    original = host.patcher()
    seen = []
    for module in original.model.modules():
        if type(module).__name__ == "GEGLU" or module is original.model.diffusion_model.out:
            module.register_forward_hook(lambda module, arguments, out: seen.append(type(module).__name__))
    predict(host, original)
    expected = len(seen)
    predict(host, node(original))
    assert expected > 1
    assert len(seen) == 2 * expected


def test_a_forward_that_someone_put_into_the_gate_is_called(host, calls, monkeypatch):
    original = host.patcher()
    clone = node(original, attention=False, norms=False)
    monkeypatch.setattr(host.attention.GEGLU, "forward", lambda self, x: self.proj(x).chunk(2, dim=-1)[0])
    assert torch.equal(predict(host, clone), predict(host, original))
    assert calls == []


def test_video_norms_of_five_dimensions_are_left(host, calls):
    pair = nn.Sequential(nn.GroupNorm(2, 4, eps=0.5), nn.SiLU())
    x = torch.randn(1, 4, 3, 2, 2)
    expected = pair(x)
    fused.inject(pair, True, True, "torch")
    assert torch.equal(pair(x), expected)
    assert torch.equal(pair[:1](x), pair[0](x))
    image = torch.randn(1, 4, 2, 2)
    close(pair[-2:](image), pair(image), 1e-6)
    assert calls == ["group_norm_silu"]
    fused.eject(pair)
    assert type(pair) is nn.Sequential


def test_a_copy_of_a_loaded_model_has_weights_of_its_own(host, calls):
    clone = node(host.patcher())
    host.manager.load(clone)
    theirs = copy.deepcopy(clone.model)
    expected = contract.call(clone, *inputs())
    host.manager.unload()
    for weight in clone.model.parameters():
        weight.data.zero_()
    patcher = host.patcher_class(theirs, torch.device("cpu"), torch.device("cpu"))
    patcher.model_options = clone.model_options
    assert torch.equal(contract.call(patcher, *inputs()), expected)


def test_a_compiled_block_notices_the_node_and_its_removal(host, calls):
    torch._dynamo.reset()
    original = host.patcher()
    clone = node(original)
    block = original.model.diffusion_model.out
    compiled = torch.compile(block, backend="eager")
    x = torch.randn(2, block[0].num_channels, 4, 4)

    def run(patcher):
        host.manager.load(patcher)
        with torch.inference_mode():
            out = compiled(x)
            assert torch.equal(out, block(x))
        host.manager.unload()
        return out

    expected, accelerated = run(original), run(clone)
    close(accelerated, expected)
    assert not torch.equal(accelerated, expected)
    assert torch.equal(run(original), expected)


# The attention's contract.


def oracle(q, k, v, heads, mask=None, skip_reshape=False, skip_output_reshape=False, scale=None):
    """The contract in float64, by the formula."""
    if not skip_reshape:
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    q, k, v = q.double(), k.double(), v.double()
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        mask = mask.unsqueeze(1) if mask.ndim == 3 else mask
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    out = torch.softmax(scores, dim=-1) @ v
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


def qkv(batch, queries, keys, heads, dim, skip_reshape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (heads, dim) if skip_reshape else (heads * dim,)
    tensors = []
    for tokens in (queries, keys, keys):
        size = (batch, heads, tokens, dim) if skip_reshape else (batch, tokens, *shape)
        tensors.append(torch.randn(size, generator=generator).to(dtype))
    return tensors


def never(*arguments, **named):
    raise AssertionError("left to ComfyUI")


override = sys.modules["ldmperf_comfyui_node.attention_override"].attention_override


@pytest.mark.filterwarnings("ignore:attention. q, k and v have fewer tokens than heads")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 3),
    queries=st.integers(1, 9),
    keys=st.integers(1, 9),
    heads=st.integers(1, 4),
    dim=st.sampled_from([1, 4, 8, 12]),
    skip_reshape=st.booleans(),
    skip_output_reshape=st.booleans(),
    mask_shape=st.sampled_from([None, "1k", "b1k", "11k", "b11k", "111k", "bqk expanded", "bhqk expanded"]),
    scale=st.sampled_from([None, 0.5, 2.0]),
    by_keyword=st.booleans(),
)
def test_the_override_follows_the_contract(
    batch, queries, keys, heads, dim, skip_reshape, skip_output_reshape, mask_shape, scale, by_keyword
):
    q, k, v = qkv(batch, queries, keys, heads, dim, skip_reshape)
    mask = None
    if mask_shape:
        sizes = {"b": batch, "h": heads, "q": queries, "k": keys, "1": 1}
        letters = mask_shape.split(" ")[0]
        masks = torch.rand(batch, keys, generator=torch.Generator().manual_seed(3)) < 0.7
        masks[:, 0] = True
        masks = masks if letters[0] == "b" else masks[:1]
        mask = masks.view(masks.shape[0], *[1] * (len(letters) - 2), keys)
        mask = mask.expand([sizes[letter] for letter in letters])
    expected = oracle(q, k, v, heads, mask, skip_reshape, skip_output_reshape, scale)
    extra = {} if scale is None else {"scale": scale}
    given_mask = {"mask": mask} if by_keyword else {}
    positional = () if by_keyword else (mask,)
    out = override("torch")(
        *(never, q, k, v, heads, *positional),
        **given_mask,
        skip_reshape=skip_reshape,
        skip_output_reshape=skip_output_reshape,
        transformer_options={},
        low_precision_attention=False,
        _inside_attn_wrapper=True,
        **extra,
    )
    close(out, expected.float(), 1e-5)


LEFT = {
    "float mask": {"mask": torch.zeros(2, 5, 7)},
    "mask by query": {"mask": torch.ones(2, 5, 7, dtype=torch.bool).tril()},
    "mask by head": {"mask": torch.ones(2, 3, 1, 7, dtype=torch.bool)},
    "mask of another batch": {"mask": torch.ones(3, 1, 7, dtype=torch.bool)},
    "unknown argument": {"window": 3},
    "attn_precision float64": {"attn_precision": torch.float64},
    "scale that is none of the kernel's": {"scale": 1e9, "backend": "triton"},
}


@pytest.mark.parametrize("case", LEFT)
def test_what_the_kernel_cannot_do_goes_to_comfyui_with_the_same_arguments(case, calls, log):
    named = dict(LEFT[case])
    backend = named.pop("backend", "torch")
    got = {}

    def func(q, k, v, heads, **others):
        got.update(others, q=q, k=k, v=v, heads=heads)
        return "theirs"

    q, k, v = qkv(2, 5, 7, 3, 4, False)
    options = {"block": 1}
    for _ in range(2):
        result = override(backend)(
            *(func, q, k, v, 3), transformer_options=options, _inside_attn_wrapper=True, **named
        )
        assert result == "theirs"
    assert calls == []
    for name, value in dict(named, q=q, k=k, v=v, heads=3, transformer_options=options).items():
        assert got[name] is value
    assert got["skip_reshape"] is got["skip_output_reshape"] is False
    assert got["_inside_attn_wrapper"] is True
    assert len([record for record in log.records if "attention is left" in record.message]) == 1


def test_grouped_queries_go_to_comfyui_and_equal_heads_do_not(calls):
    q, k, v = qkv(1, 5, 5, 4, 8, True)
    out = override("torch")(never, q, k, v, 4, skip_reshape=True, enable_gqa=True)
    close(out, oracle(q, k, v, 4, skip_reshape=True).float(), 1e-5)

    def theirs(*_, **__):
        return "theirs"

    few = [q, k[:, :2], v[:, :2]]
    assert override("torch")(theirs, *few, 4, skip_reshape=True, enable_gqa=True) == "theirs"
    flat = [tensor.transpose(1, 2).flatten(2) for tensor in few]
    assert override("torch")(theirs, *flat, 4, enable_gqa=True) == "theirs"
    assert calls == ["attention"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_past_float16_do_not_overflow_where_float32_is_asked_for(dtype):
    q, k, v = qkv(1, 6, 6, 2, 8, False, dtype)
    q, k = q * 300, k * 300
    out = override("torch")(never, q, k, v, 2, attn_precision=torch.float32)
    assert out.dtype == dtype
    close(out.double(), oracle(q, k, v, 2), 1e-2)


def test_slices_of_a_packed_projection_are_read_in_place(calls):
    packed = torch.randn(2, 6, 3, 24)
    q, k, v = packed.unbind(2)
    close(override("torch")(never, q, k, v, 3), oracle(q, k, v, 3).float(), 1e-5)


def test_an_override_that_was_set_before_is_asked_first_and_gets_the_kernel(host, calls, log):
    original = host.patcher()
    asked = []

    def theirs(func, q, k, v, heads, **named):
        asked.append(func.__name__)
        return 2 * func(q, k, v, heads, **named)

    upstream = original.clone()
    upstream.model_options["transformer_options"][KEY] = theirs
    expected = predict(host, upstream)
    attentions = counts(original.model)[0]
    assert len(asked) == attentions
    clone = node(node(upstream), norms=False, geglu=False)
    close(predict(host, clone), expected)
    assert len(asked) == 2 * attentions
    # Once, however often the node stands in the chain.
    assert calls == ["attention"] * attentions
    assert any("asked first" in record.message for record in log.records)
    assert upstream.model_options["transformer_options"][KEY] is theirs
    off = node(clone, attention=False, norms=False, geglu=False)
    assert off.model_options["transformer_options"][KEY] is theirs
    assert torch.equal(predict(host, off), expected)


def test_an_override_that_is_set_later_stands(host, calls):
    clone = node(host.patcher(), norms=False, geglu=False).clone()
    clone.model_options["transformer_options"][KEY] = lambda func, *args, **named: func(*args, **named)
    predict(host, clone)
    assert calls == []


def test_what_was_measured_is_read_from_the_table_of_the_gpu(tmp_path, monkeypatch):
    properties = SimpleNamespace(name="GPU", multi_processor_count=7, major=9, minor=0)
    table = tmp_path / "gpu.json"
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(serving.kernels, "tuned_table", lambda chip: asked.append(chip) or table)
    measured = serving._measured.__wrapped__
    assert measured(torch.device("cuda", 0)) == frozenset()
    assert asked == [serving.kernels.Chip("GPU", 7, "sm_90")]
    document = {
        "kernels": {"attention": {"a": None, "b": {}}, "geglu": {"c": {}}},
        "torch": {"attention": ["b", "d"]},
    }
    table.write_text(json.dumps(document))
    assert measured(torch.device("cuda", 0)) == {"a"}
    assert measured(torch.device("cpu")) == frozenset()


def test_reasons_are_asked_once_a_layout_and_few_are_kept(monkeypatch):
    asked = []
    monkeypatch.setattr(serving, "_refusals", lambda operator, call, backend: asked.append(call.x) or ())
    monkeypatch.setattr(serving, "_found", {})
    monkeypatch.setattr(serving, "MOST", 3)
    square = torch.randn(4, 4)
    layouts = [square, square.t(), square.half(), square[:2], square[:, :2]]
    for x in layouts:
        for _ in range(2):
            assert serving.refusals("geglu", serving.bind("geglu", x), "auto") == ()
        assert len(serving._found) <= serving.MOST
    assert len(asked) == len(layouts)
