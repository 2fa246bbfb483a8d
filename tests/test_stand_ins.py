"""ldmperf.model.dropin: what setting the classes of a model's modules keeps, and how it is told and undone."""

import copy
import gc
import importlib
import io
import pickle
import runpy
import sys
import types
import weakref

import accelerate as hf_accelerate
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
)
from diffusers.models.resnet import ResnetBlock2D
from dropin_checks import Computed
from torch import nn

from ldmperf.kernels import KernelUnsupported
from ldmperf.model import dropin
from ldmperf.model.dropin import Report, accelerate, processed, undo
from ldmperf.model.dropin.stand_ins import StandIn


def unet(**options):
    torch.manual_seed(0)
    defaults = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 12,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**defaults | options).eval()


def vae():
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    ).eval()


# The package has a function of this name.
attention_module = importlib.import_module("ldmperf.kernels.attention")
X, CONTEXT = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12)


def run(model, **options):
    with torch.no_grad():
        if isinstance(model, AutoencoderKL):
            return model.decode(X).sample
        return model(X, 10, CONTEXT, **options).sample


def classes(model):
    return [type(module) for module in model.modules()]


def ours(model):
    return [module for module in model.modules() if isinstance(module, StandIn)]


@pytest.fixture(params=[unet, vae])
def model(request):
    return request.param()


def test_everything_but_the_classes_is_as_it_was(model):
    before, expected = classes(model), run(model)
    modules, names = list(model.modules()), [type(m).__name__ for m in model.modules()]
    parameters = [(name, id(p), p._version) for name, p in model.named_parameters()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    stored = io.BytesIO()
    torch.save(model.state_dict(), stored)
    with accelerate(model) as report:
        assert isinstance(report, Report)
        assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
        # By which diffusers and accelerate look blocks up; what follows a norm has a name of its own.
        changed = {type(m).__name__ for m, n in zip(modules, names, strict=True) if type(m).__name__ != n}
        assert changed == {"OutGroupNorm", "OutSiLU"}
        assert [(name, id(p), p._version) for name, p in model.named_parameters()] == parameters
        assert list(model.state_dict()) == list(state)
        again = io.BytesIO()
        torch.save(model.state_dict(), again)
        assert again.getvalue() == stored.getvalue()
        torch.testing.assert_close(run(model), expected)
    assert classes(model) == before
    assert torch.equal(run(model), expected)
    assert not any("ldmperf" in name for m in modules for name in vars(m))


def test_undo_in_every_way():
    model = unet()
    before = classes(model)
    report = accelerate(model)
    report.undo()
    report.undo()
    assert classes(model) == before
    accelerate(model)
    undo(model)
    assert classes(model) == before
    with pytest.raises(RuntimeError, match="out of it"), accelerate(model):
        raise RuntimeError("out of it")
    assert classes(model) == before
    # A cell of a notebook, run twice: the second report finds all, and takes nothing.
    first, second = accelerate(model), accelerate(model)
    assert second.replaced == first.replaced != ()
    second.undo()
    assert ours(model)
    undo(model)
    assert classes(model) == before


def test_an_inner_call_undoes_what_it_took():
    model = unet()
    with accelerate(model, attention=False, geglu=False) as outer:
        kinds = {r.kind for r in outer.replaced}
        with accelerate(model, norms=False, backend="torch") as inner:
            assert {r.kind for r in inner.replaced} == kinds | {"attention", "geglu"}
            assert {m.ldmperf_backend for m in ours(model)} == {"torch"}
        assert {m.ldmperf_backend for m in ours(model)} == {"auto"}
        assert {r.kind for r in outer.replaced} == kinds == {"resnet", "transformer block", "norm"}
    assert not ours(model)


def test_a_report_undoes_its_own_call_once():
    model = unet()
    first = accelerate(model)
    first.undo()
    second = accelerate(model)
    first.undo()
    assert second.replaced
    # Undone out of order: what a call after both has set is its own.
    third = accelerate(model, backend="torch")
    second.undo()
    fourth = accelerate(model, backend="triton")
    third.undo()
    assert {m.ldmperf_backend for m in ours(model)} == {"triton"}
    fourth.undo()
    assert not ours(model)


def test_a_component_under_two_names_is_undone():
    model = unet()

    class Twice(DiffusionPipeline):
        def __init__(self, unet, other):
            super().__init__()
            self.register_modules(unet=unet, other=other)

    with accelerate(Twice(model, model)) as report:
        assert {entry.path.split(".")[0] for entry in report.replaced} == {"unet", "other"}
    assert not ours(model)


def test_what_someone_changed_since_is_left():
    model = unet()
    report = accelerate(model)
    theirs = type("Theirs", (ResnetBlock2D,), {})
    model.mid_block.resnets[0].__class__ = theirs
    assert "mid_block.resnets.0" in {entry.path for entry in report.left}
    report.undo()
    assert type(model.mid_block.resnets[0]) is theirs
    assert not ours(model)


@pytest.mark.parametrize(("option", "kinds"), [("attention", {"attention"}), ("geglu", {"geglu"})])
def test_options(option, kinds):
    model = unet()
    everything = {r.kind for r in accelerate(model).replaced}
    undo(model)
    report = accelerate(model, **{option: False})
    assert {r.kind for r in report.replaced} == everything - kinds
    assert {entry.reason for entry in report.left} >= {f"{option}=False"}


def test_report_of_every_module_once():
    """Containers and dropout compute nothing; what a stand-in computes with its own is not listed for itself."""
    model = unet()
    report = accelerate(model)
    paths = [entry.path for entry in (*report.replaced, *report.left)]
    assert len(paths) == len(set(paths))
    leaves = {path for path, module in model.named_modules() if not list(module.children())}
    unlisted = {type(model.get_submodule(path)).__name__ for path in leaves - set(paths)}
    assert unlisted == {"GroupNorm", "LayerNorm", "SiLU", "Linear", "Dropout"}
    for name, where in (("GroupNorm", "resnets."), ("Linear", "ff.net.0.proj")):
        inside = [path for path in leaves - set(paths) if type(model.get_submodule(path)).__name__ == name]
        assert all(where in path for path in inside)
    reasons = {entry.class_name: entry.reason for entry in report.left}
    assert reasons["Conv2d"] == "torch's convolution"
    assert reasons["Linear"] == "torch's matmul"
    text = str(report)
    assert len(text.splitlines()) < 20
    assert "resnet" in text
    assert text.splitlines()[-1] == "cpu: the references in torch, as the kernels need a GPU"
    assert (
        repr(report)
        == f"<Report: {len(report.replaced)} modules replaced, {len(report.left)} left; print it for the table>"
    )


@pytest.mark.parametrize("target", [nn.Linear(2, 2), "unet", None, object()])
@pytest.mark.parametrize("call", [accelerate, undo])
def test_a_wrong_target_is_told_in_one_line(call, target):
    with pytest.raises(
        ValueError, match=f"^{call.__name__}: target must be a loaded UNet2DConditionModel"
    ) as error:
        call(target)
    assert "\n" not in str(error.value)


def test_a_wrong_backend_is_told_before_anything_changes():
    model = unet()
    with pytest.raises(ValueError, match="unknown backend 'fast'; choose one of auto, torch, triton"):
        accelerate(model, backend="fast")
    assert not ours(model)


def test_a_wrong_option_is_told_before_anything_changes():
    model = unet()
    with pytest.raises(ValueError, match=r"^accelerate: attention must be True or False; got 'no'$"):
        accelerate(model, attention="no")
    assert not ours(model)


def test_the_backend_reaches_every_operator():
    model = unet()
    with accelerate(model, backend="triton"), pytest.raises(KernelUnsupported, match="on cpu"):
        run(model)
    for option in ("attention", "geglu", "norms"):
        others = {name: name == option for name in ("attention", "geglu", "norms")}
        with accelerate(model, **others, backend="triton"), pytest.raises(KernelUnsupported):
            run(model)


def test_without_diffusers_the_import_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"needs diffusers: pip install diffusers"):
        runpy.run_path(dropin.__file__)


# What other code does to a model


def test_copies_and_pickles_are_accelerated_and_can_be_undone(model):
    expected = run(model)
    accelerate(model)
    fast = run(model)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stored, weights_only=False)):
        assert classes(other) == classes(model)
        assert torch.equal(run(other), fast)
        # A pair of the copy is the copy's own.
        assert not {id(m) for m in ours(other)} & {id(m) for m in ours(model)}
        pairs = [m.ldmperf_pair for m in ours(other) if "ldmperf_pair" in vars(m)]
        assert pairs
        assert all(pair.is_fused() for pair in pairs)
        assert {id(m) for pair in pairs for m in (pair.norm, pair.silu)} <= {id(m) for m in ours(other)}
        undo(other)
        assert torch.equal(run(other), expected)
    assert torch.equal(run(model), fast)


def test_an_accelerated_model_is_saved_as_it_would_be(model, tmp_path):
    model.save_pretrained(tmp_path / "plain")
    accelerate(model)
    model.save_pretrained(tmp_path / "fast")
    for path in (tmp_path / "plain").iterdir():
        assert (tmp_path / "fast" / path.name).read_bytes() == path.read_bytes()
    assert not ours(type(model).from_pretrained(tmp_path / "fast"))


def offloaded(model):
    """Sequential offload, as pipelines do it: each leaf loads its parameters when it is called."""
    hf_accelerate.cpu_offload(model, torch.device("cpu"))


def leaf_offloaded(model):
    apply_group_offloading(model, torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")


def block_offloaded(model):
    apply_group_offloading(
        model, torch.device("cpu"), torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    )


def cast_by_layer(model):
    apply_layerwise_casting(model, storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


@pytest.mark.parametrize("first", ["hooks", "accelerate"])
@pytest.mark.parametrize("hook", [offloaded, leaf_offloaded, block_offloaded, cast_by_layer])
def test_offloading_and_casting_hooks_of_a_vae(hook, first):
    model = vae()
    plain = copy.deepcopy(model)
    hook(plain)
    expected = run(plain)
    if first == "hooks":
        hook(model)
    report = accelerate(model)
    if first == "accelerate":
        hook(model)
    torch.testing.assert_close(run(model), expected)
    assert {"resnet", "attention"} <= {r.kind for r in report.replaced}
    report.undo()
    assert torch.equal(run(model), expected)


ON_INSTANCE = "its forward is set on the instance, as offloading and caching hooks do"


def test_a_model_that_is_all_hooks_is_told(caplog):
    """As `device_map="balanced"` loads it: a hook on every module with parameters in it."""
    model = unet()
    hf_accelerate.hooks.attach_execution_device_hook(model, "cpu")
    expected = run(model)
    with accelerate(model) as report:
        assert report.replaced == ()
        assert {r.getMessage() for r in caplog.records if "accelerate" in r.getMessage()} == {
            "accelerate: nothing of this UNet2DConditionModel was taken over; the report says why"
        }
        assert torch.equal(run(model), expected)
    reasons = {entry.reason for entry in report.left if entry.class_name == "ResnetBlock2D"}
    assert reasons == {ON_INSTANCE}
    hf_accelerate.hooks.remove_hook_from_submodules(model)
    caplog.clear()
    with accelerate(model) as report:
        assert report.replaced
        assert not [r for r in caplog.records if "nothing" in r.getMessage()]


def test_hooks_that_were_removed_leave_plain_modules():
    model = unet()
    hf_accelerate.cpu_offload(model, torch.device("cpu"))
    hf_accelerate.hooks.remove_hook_from_submodules(model)
    assert any("forward" in vars(m) for m in model.modules())
    expected = run(model)
    report = accelerate(model)
    assert not any("forward" in vars(m) for m in ours(model))
    clean = unet()
    assert report.replaced == accelerate(clean).replaced
    torch.testing.assert_close(run(model), expected)
    report.undo()
    assert torch.equal(run(model), expected)


def test_a_forward_set_meanwhile_is_told_apart_from_a_hook():
    model = unet()
    report = accelerate(model)
    everything = report.replaced
    hf_accelerate.hooks.attach_execution_device_hook(model, "cpu")
    assert {r.path for r in everything} - {r.path for r in report.replaced} == {"conv_act"}
    attn = model.mid_block.attentions[0].transformer_blocks[0].attn1
    # As prompt-to-prompt does it.
    attn.forward = lambda hidden_states, *args, **kwargs: hidden_states
    assert {entry.path: entry.reason for entry in report.left if entry.class_name == "Attention"} == {
        "mid_block.attentions.0.transformer_blocks.0.attn1": ON_INSTANCE
    }


def test_a_hook_set_meanwhile_calls_the_host_after_the_undo():
    model = unet()
    expected = run(model)
    report = accelerate(model)
    for module in ours(model):
        # What hooks do: they keep the method that they found.
        module.forward = lambda *args, forward=module.forward, **kwargs: forward(*args, **kwargs)
    torch.testing.assert_close(run(model), expected)
    report.undo()
    assert not ours(model)
    assert torch.equal(run(model), expected)


@pytest.mark.parametrize("name", ["conv_norm_out", "conv_act"])
def test_a_hook_between_the_last_norm_and_its_activation_sees_what_it_saw(name):
    seen = []
    for fast in (False, True):
        model = unet()
        if fast:
            accelerate(model)
        handle = model.get_submodule(name).register_forward_hook(lambda _, given, out: seen.append((*given, out)))
        result = run(model)
        seen[-1] += (result,)
        handle.remove()
    torch.testing.assert_close(seen[1], seen[0])
    # Without the hook the norm does both.
    with accelerate(model):
        h = torch.randn(2, 8, 4, 4)
        both = nn.functional.silu(nn.GroupNorm.forward(model.conv_norm_out, h))
        torch.testing.assert_close(model.conv_norm_out(h), both)
        assert model.conv_act(h) is h


def test_a_last_activation_that_others_call_stays_itself():
    model = unet()
    model.time_embedding.act = model.conv_act
    expected, report = run(model), accelerate(model)
    assert type(model.conv_act) is nn.SiLU
    assert {r.path: r.what for r in report.replaced}["conv_norm_out"] == "group norm"
    torch.testing.assert_close(run(model), expected)


def own_forward(network, x, *args):
    """Uses the last norm without the last activation."""
    return network.conv_out(torch.tanh(network.conv_norm_out(network.conv_in(x))))


@pytest.mark.parametrize("where", ["instance", "before", "subclass"])
def test_a_network_with_a_forward_of_its_own(where):
    model = unet()
    report = accelerate(model) if where == "instance" else None
    if where == "subclass":
        model.__class__ = type("Own", (UNet2DConditionModel,), {"forward": own_forward})
    else:
        model.forward = types.MethodType(own_forward, model)
    report = report or accelerate(model)
    with torch.no_grad():
        result = model(X)
        what = {entry.path: entry.what for entry in report.replaced}
        assert what["conv_norm_out"] == "group norm"
        assert "conv_act" in {entry.path for entry in report.left} - what.keys()
        report.undo()
        torch.testing.assert_close(result, model(X))


def test_a_compiled_forward_of_a_network():
    torch._dynamo.reset()
    model = unet(
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type=None,
    )
    expected = run(model)
    accelerate(model)
    model.forward = torch.compile(model.forward, backend=Graphs(), fullgraph=True)
    torch.testing.assert_close(run(model), expected)
    undo(model)
    torch.testing.assert_close(run(model), expected)


@pytest.mark.parametrize("name", ["conv_norm_out", "conv_act"])
def test_a_last_norm_or_activation_replaced_since(name):
    expected, model = [], unet()
    for fast in (False, True):
        model = unet()
        report = accelerate(model) if fast else None
        setattr(model, name, nn.Identity())
        expected.append(run(model))
    torch.testing.assert_close(*expected)
    report.undo()
    assert torch.equal(run(model), expected[0])


def test_the_network_is_not_kept_alive():
    model = unet()
    norm, network = model.conv_norm_out, weakref.ref(model)
    accelerate(model)
    gc.collect()
    del model
    assert network() is None
    x = torch.randn(1, 8, 2, 2)
    for one in (norm, copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        torch.testing.assert_close(one(x), nn.GroupNorm.forward(norm, x))


def test_a_wrapper_of_someone_elses_is_listed_and_what_is_in_it_is_not():
    class Wrapper(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.base_layer = layer

        def forward(self, x):
            return 2 * self.base_layer(x)

    model = unet()
    block = model.mid_block.attentions[0].transformer_blocks[0]
    block.attn1.to_q, block.ff.net[0].proj = Wrapper(block.attn1.to_q), Wrapper(block.ff.net[0].proj)
    expected, report = run(model), accelerate(model)
    reasons = {entry.path: entry.reason for entry in report.left if entry.class_name == "Wrapper"}
    assert len(reasons) == 2
    assert all(reason.startswith("called as it is: ") for reason in reasons.values())
    assert not [entry for entry in report.left if "base_layer" in entry.path]
    torch.testing.assert_close(run(model), expected)


def test_another_last_activation_is_left():
    model = unet(act_fn="gelu")
    expected = run(model)
    report = accelerate(model)
    (norm,) = (r for r in report.replaced if r.path == "conv_norm_out")
    assert norm.what == "group norm"
    reasons = {entry.path: entry.reason for entry in report.left}
    assert reasons["mid_block.resnets.0.nonlinearity"] == "called as it is: torch's GELU, not SiLU"
    assert reasons["conv_act"] == "no kernel for this class"
    torch.testing.assert_close(run(model), expected)


# Processors


def attention_left(report):
    return {entry.path: entry.reason for entry in report.left if entry.class_name == "Attention"}


def test_processors_stay_the_very_objects_and_diffusers_finds_its_classes(model):
    before = model.attn_processors
    accelerate(model)
    assert model.attn_processors == before
    assert all(isinstance(p, AttnProcessor2_0) for p in model.attn_processors.values())
    model.set_default_attn_processor()
    assert {type(p) for p in model.attn_processors.values()} == {AttnProcessor}


def test_slicing_before_is_taken_when_it_ends():
    model = unet()
    expected = run(model)
    model.set_attention_slice("max")
    report = accelerate(model)
    assert set(attention_left(report).values()) == {"its processor is SlicedAttnProcessor"}
    model.set_attn_processor(AttnProcessor2_0())
    assert not attention_left(report)
    torch.testing.assert_close(run(model), expected)


def test_fused_projections_of_a_vae():
    model = vae()
    expected = run(model)
    report = accelerate(model)
    model.fuse_qkv_projections()
    assert {type(p) for p in model.attn_processors.values()} == {FusedAttnProcessor2_0}
    assert not attention_left(report)
    assert any(hasattr(m, "to_qkv") for m in model.modules())
    fused = [m.to_qkv for m in model.modules() if hasattr(m, "to_qkv")]
    calls = []
    for layer in fused:
        layer.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(run(model), expected)
    # The encoder does not run.
    assert len(calls) == 1
    model.unfuse_qkv_projections()
    torch.testing.assert_close(run(model), expected)
    report.undo()
    assert torch.equal(run(model), expected)


def test_a_processor_of_someone_elses_runs():
    class Negative(AttnProcessor2_0):
        def __call__(self, *args, **kwargs):
            return -super().__call__(*args, **kwargs)

    model = unet()
    name = next(iter(model.attn_processors))
    model.set_attn_processor(model.attn_processors | {name: Negative()})
    expected = run(model)
    report = accelerate(model)
    assert attention_left(report) == {name.removesuffix(".processor"): "its processor is Negative"}
    torch.testing.assert_close(run(model), expected)
    adapter = IPAdapterAttnProcessor2_0(hidden_size=8, cross_attention_dim=12)
    model.set_attn_processor(model.attn_processors | {name: adapter})
    assert set(attention_left(report).values()) == {"its processor is IPAdapterAttnProcessor2_0"}
    report.undo()
    assert model.attn_processors[name] is adapter


def test_attention_of_another_kind_is_left():
    model = unet()
    block = model.mid_block.attentions[0].transformer_blocks[0]
    for options in ({"kv_heads": 1}, {"context_pre_only": True, "pre_only": True}):
        block.attn1 = Attention(16, heads=2, dim_head=8, **options)
        with accelerate(model) as report:
            reasons = {"its keys or its result have other heads than its queries"}
            assert set(attention_left(report).values()) == reasons


def test_a_mask_is_served_by_torch_and_told_once(caplog):
    model = unet()
    mask = torch.tensor([[True] * 5, [True, True, False, True, False]])
    expected = run(model, encoder_attention_mask=mask)
    assert not torch.allclose(expected, run(model))
    processed._log_mask.cache_clear()
    with accelerate(model):
        for _ in range(2):
            torch.testing.assert_close(run(model, encoder_attention_mask=mask), expected)
    told = [r.getMessage() for r in caplog.records if "additive mask" in r.getMessage()]
    assert len(told) == 1
    assert told[0].startswith("attention: torch's scaled_dot_product_attention serves an additive mask")


def test_fewer_tokens_than_heads_are_no_mistake(recwarn):
    model = unet(attention_head_dim=8)
    attention_module._warn_of_layout.cache_clear()
    torch.manual_seed(1)
    x = torch.randn(1, 16, 1, 2)
    expected = model.mid_block.attentions[0](x, encoder_hidden_states=CONTEXT[:1]).sample
    with accelerate(model):
        found = model.mid_block.attentions[0](x, encoder_hidden_states=CONTEXT[:1]).sample
    torch.testing.assert_close(found, expected)
    assert not [w for w in recwarn if "fewer tokens than heads" in str(w.message)]


def test_arguments_that_no_processor_takes_are_told(caplog):
    model = unet()
    with accelerate(model), torch.no_grad():
        model(X, 10, CONTEXT, cross_attention_kwargs={"ip_adapter_masks": None, "strength": 2})
    told = {r.getMessage() for r in caplog.records if "cross_attention_kwargs" in r.getMessage()}
    assert told == {"attention: the cross_attention_kwargs ['strength'] are of no effect here"}


# torch.compile


class Graphs:
    """A backend for torch.compile that runs what it is given, and notes how many of our operators are in it."""

    def __init__(self):
        self.counts = []

    def __call__(self, graph, inputs):
        self.counts.append(sum("ldmperf" in str(node.target) for node in graph.graph.nodes))
        return graph.forward


ONE_TRANSFORMER = {
    "block_out_channels": (8,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
}


def test_compiled_blocks_take_the_other_path_after_accelerate_and_after_undo():
    torch._dynamo.reset()
    model, graphs = unet(**ONE_TRANSFORMER), Graphs()
    expected = run(model)
    # In place, as Module.compile does it.
    model.compile_repeated_blocks(backend=graphs, fullgraph=True)
    assert torch.equal(run(model), expected)
    assert set(graphs.counts) == {0}
    graphs.counts.clear()
    report = accelerate(model)
    torch.testing.assert_close(run(model), expected)
    assert graphs.counts
    assert min(graphs.counts) > 0
    report.undo()
    assert torch.equal(run(model), expected)


def test_accelerated_first_and_compiled_then():
    torch._dynamo.reset()
    model, graphs = unet(**ONE_TRANSFORMER), Graphs()
    expected = run(model)
    report = accelerate(model)
    # By the names of classes, which the stand-ins keep.
    model.compile_repeated_blocks(backend=graphs, fullgraph=True)
    torch.testing.assert_close(run(model), expected)
    assert graphs.counts
    assert min(graphs.counts) > 0
    report.undo()
    assert torch.equal(run(model), expected)


# What it saves


def computed(call, *args, **kwargs):
    with torch.no_grad(), Computed() as mode:
        call(*args, **kwargs)
    return mode.names


def test_the_attention_of_a_vae_norms_and_adds_in_one_pass_each():
    model = vae()
    attention = model.decoder.mid_block.attentions[0]
    x = torch.randn(2, 16, 4, 4).contiguous(memory_format=torch.channels_last)
    theirs = computed(attention, x)
    with accelerate(model):
        ours = computed(attention, x)
    assert [name for name in ours if name != "addmm"] == ["group_norm_silu", "attention", "residual_add"]
    assert len(theirs) > len(ours)


def test_a_model_makes_fewer_passes(model):
    call = model.decode if isinstance(model, AutoencoderKL) else lambda x: model(x, 10, CONTEXT)
    theirs = computed(call, X)
    with accelerate(model):
        ours = computed(call, X)
    # What is left is mostly the convolutions and matmuls themselves.
    assert len(ours) < 0.8 * len(theirs)
    assert not {"native_group_norm", "native_layer_norm", "gelu"} & set(ours)
