"""Adapters of peft in a rebuilt pipeline: loaded, scaled, swapped, fused and removed, with one capture for all."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

from ldmperf.model.dropin import PipelineUNet, rebuild, undo
from ldmperf.model.dropin.merged_adapters import adapted_layers, write_weights
from ldmperf.model.weights import diffusers_state_dict

from .adapters import CONTEXT_DIM, ip_adapter, lora, tiny_unet
from .dropin_checks import relative_rms
from .dropin_models import make_pipeline, pipeline_inputs
from .tapes import Tapes

pytestmark = [
    pytest.mark.usefixtures("_one_thread"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
    pytest.mark.filterwarnings("ignore:Adapter . was active which is now deleted:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*already merged.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:All adapters are already merged.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:Already unmerged.*:UserWarning"),
]
CLOSE = 1e-9
WEIGHTS = {
    "a": {"seed": 1},
    "b": {"seed": 2, "rank": 3, "targets": ("to_q", "to_k", "to_out.0", "ff.net.2")},
    "c": {"seed": 3, "dora": True},
}


def _call(unet: Any, scale: float | None) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    x, text = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((2, 4, 8, 8), (2, 3, CONTEXT_DIM))
    )
    kwargs = None if scale is None else {"scale": scale}
    with torch.no_grad():
        result: Tensor = unet(x, torch.tensor(501), text, cross_attention_kwargs=kwargs, return_dict=False)[0]
    return result


def test_weights_of_disabled_adapters_leave_the_source_as_it_is() -> None:
    source = tiny_unet()
    plain = copy.deepcopy(source)
    source.load_lora_adapter(lora(source, **WEIGHTS["a"]), prefix=None, adapter_name="a")
    layers = adapted_layers(source).values()
    for layer in layers:
        layer.merge()
        # As peft leaves it where whoever disables does not unmerge.
        layer._disable_adapters = True
    ours = PipelineUNet.of(plain, backend="torch").unet
    write_weights(source, ours)
    assert all(layer.merged for layer in layers)
    state = plain.state_dict()
    assert all(relative_rms(value, state[name]) < CLOSE for name, value in diffusers_state_dict(ours).items())


class Adapters(RuleBasedStateMachine):
    """The same changes to ours, through the pipeline's component, and to diffusers' own."""

    def __init__(self) -> None:
        super().__init__()
        self.tapes = Tapes()
        self.theirs = tiny_unet()
        self.ours: Any = PipelineUNet.of(tiny_unet(), backend="torch", graphs=self.tapes)
        self.loaded: list[str] = []
        self.fused = False

    def both(self, change: Callable[[Any], Any]) -> None:
        for unet in (self.ours, self.theirs):
            change(unet)

    @precondition(lambda self: not self.fused)
    @rule(name=st.sampled_from("abc"))
    def load(self, name: str) -> None:
        if name in self.loaded:
            return
        plain = tiny_unet()
        self.both(
            lambda unet: unet.load_lora_adapter(lora(plain, **WEIGHTS[name]), prefix=None, adapter_name=name)
        )
        self.loaded.append(name)

    @precondition(lambda self: self.loaded and not self.fused)
    @rule(data=st.data(), weight=st.sampled_from([0.0, 0.5, -1.0, 1.3]))
    def activate(self, data: Any, weight: float) -> None:
        names = data.draw(st.lists(st.sampled_from(self.loaded), min_size=1, unique=True))
        self.both(lambda unet: unet.set_adapters(names, [weight, *[0.7] * (len(names) - 1)]))

    @precondition(lambda self: "a" in self.loaded and not self.fused)
    @rule(seed=st.integers(10, 12))
    def hotswap(self, seed: int) -> None:
        weights = lora(tiny_unet(), seed)
        self.both(lambda unet: unet.load_lora_adapter(dict(weights), prefix=None, adapter_name="a", hotswap=True))

    @precondition(lambda self: self.loaded and not self.fused)
    @rule()
    def disable(self) -> None:
        self.both(lambda unet: unet.disable_lora())

    @precondition(lambda self: self.loaded)
    @rule()
    def enable(self) -> None:
        self.both(lambda unet: unet.enable_lora())

    @precondition(lambda self: self.loaded and not self.fused)
    @rule(scale=st.sampled_from([1.0, 0.6]), all_active=st.booleans())
    def fuse(self, scale: float, all_active: bool) -> None:
        self.both(lambda unet: unet.enable_lora())
        self.both(lambda unet: unet.set_adapters(self.loaded))
        names = None if all_active else self.loaded[:1]
        self.both(lambda unet: unet.fuse_lora(scale, adapter_names=names))
        self.fused = True

    @precondition(lambda self: self.fused)
    @rule()
    def unfuse(self) -> None:
        self.both(lambda unet: unet.unfuse_lora())
        self.fused = False

    @precondition(lambda self: len(self.loaded) > 1 and not self.fused)
    @rule()
    def delete(self) -> None:
        name = self.loaded.pop(0)
        self.both(lambda unet: unet.delete_adapters(name))
        self.both(lambda unet: unet.set_adapters(self.loaded))

    @precondition(lambda self: self.loaded and not self.fused)
    @rule()
    def unload(self) -> None:
        self.both(lambda unet: unet.unload_lora())
        self.loaded = []

    @rule()
    def write_the_base(self) -> None:
        with torch.no_grad():
            for unet in (self.ours.source, self.theirs):
                unet.conv_in.weight.mul_(1.1)

    @rule(scale=st.sampled_from([0.5, 0.0, 2.0]))
    def at_another_scale(self, scale: float) -> None:
        # At zero diffusers sets the scales of single adapters anew afterwards.
        theirs = copy.deepcopy(self.theirs)
        assert relative_rms(_call(self.ours, scale), _call(theirs, scale)) < CLOSE

    @invariant()
    def equal_by_one_capture(self) -> None:
        assert relative_rms(_call(self.ours, None), _call(self.theirs, None)) < CLOSE
        assert self.tapes.captured == 1


TestAdapters = Adapters.TestCase
TestAdapters.settings = settings(max_examples=3, stateful_step_count=12, deadline=None)
TestAdapters.pytestmark = pytestmark


def test_low_precision_merges_are_rounded_once() -> None:
    weights = lora(tiny_unet(), 1)
    half = tiny_unet().to(torch.bfloat16)
    ours: Any = PipelineUNet.of(half, backend="torch")
    ours.load_lora_adapter(weights, prefix=None, adapter_name="a")
    ours(torch.zeros(1, 4, 8, 8).bfloat16(), 1, torch.zeros(1, 3, CONTEXT_DIM).bfloat16())
    key = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    layer = half.get_submodule(key)
    base, down, up = (one.weight.float() for one in (layer.get_base_layer(), layer.lora_A["a"], layer.lora_B["a"]))
    expected = (base + layer.scaling["a"] * up @ down).bfloat16()
    assert torch.equal(ours.state_dict()[f"{key}.weight"], expected)


def test_scales_in_tensors_that_hotswaps_write() -> None:
    """As `enable_lora_hotswap` prepares adapters: the values of tensors change, and nothing else."""
    pair: list[Any] = [PipelineUNet.of(tiny_unet(), backend="torch"), tiny_unet()]
    for unet in pair:
        unet.enable_lora_hotswap(target_rank=4)
        unet.load_lora_adapter(lora(tiny_unet(), 1), prefix=None, adapter_name="a")
    assert relative_rms(_call(pair[0], None), _call(pair[1], None)) < CLOSE
    for unet in pair:
        for layer in adapted_layers(getattr(unet, "source", unet)).values():
            layer.scaling["a"].mul_(0.5)
    assert relative_rms(_call(pair[0], None), _call(pair[1], None)) < CLOSE


def test_an_ip_adapter_is_refused() -> None:
    unet = tiny_unet()
    ours: Any = PipelineUNet.of(unet)
    with pytest.raises(AttributeError, match=r"_load_ip_adapter_weights.*undo\(pipe\)"):
        ours._load_ip_adapter_weights([ip_adapter(unet, 1)])
    unet._load_ip_adapter_weights([ip_adapter(unet, 1)])
    with pytest.raises(ValueError, match="IP-Adapter"):
        _call(ours, None)


def _lora_of_the_pipeline(pipe: Any, seed: int) -> dict[str, Tensor]:
    """For the UNet and the text encoder, as `load_lora_weights` takes it."""
    generator = torch.Generator().manual_seed(seed)
    weights = {f"unet.{name}": value.float() for name, value in lora(_source(pipe), seed).items()}
    for name, tensor in pipe.text_encoder.state_dict().items():
        name = name.removesuffix(".weight").removesuffix(".base_layer")
        if name.endswith(("q_proj", "v_proj")):
            weights[f"text_encoder.{name}.lora_A.weight"] = torch.randn(2, tensor.shape[1], generator=generator)
            weights[f"text_encoder.{name}.lora_B.weight"] = torch.randn(tensor.shape[0], 2, generator=generator)
    return weights


def _source(pipe: Any) -> Any:
    return pipe.unet.source if isinstance(pipe.unet, PipelineUNet) else pipe.unet


def test_through_the_pipeline(tmp_path: Any) -> None:
    """What users type, step by step: images equal those of the pipeline that was not rebuilt."""
    plain, pipe = make_pipeline("text"), make_pipeline("text")
    tapes = Tapes()
    rebuilt = rebuild(pipe, backend="torch", graphs=tapes)
    weights = [_lora_of_the_pipeline(plain, seed) for seed in (1, 2)]

    def load(pipe: Any, number: int) -> None:
        pipe.load_lora_weights(dict(weights[number]), adapter_name=f"n{number}")

    seen: list[np.ndarray] = []

    def check(**changes: Any) -> None:
        images = [one(**pipeline_inputs("text") | changes).images for one in (pipe, plain)]
        assert float(np.abs(images[0] - images[1]).max()) < 3e-5
        seen.append(images[0])

    steps: list[Callable[[Any], Any]] = [
        lambda one: None,
        lambda one: load(one, 0),
        lambda one: load(one, 1),
        lambda one: one.set_adapters(["n0", "n1"], [0.6, 0.3]),
        lambda one: one.disable_lora(),
        lambda one: one.enable_lora(),
        lambda one: one.set_adapters("n1"),
        lambda one: one.delete_adapters("n0"),
        lambda one: one.fuse_lora(lora_scale=0.5),
        lambda one: one.unfuse_lora(),
        lambda one: one.unload_lora_weights(),
    ]
    for step in steps:
        for one in (pipe, plain):
            step(one)
        check()
        assert pipe.get_active_adapters() == plain.get_active_adapters()
        assert pipe.get_list_adapters() == plain.get_list_adapters()
        assert pipe.fused_loras == plain.fused_loras
    assert np.abs(seen[3] - seen[4]).max() > 1e-3
    assert np.abs(seen[0] - seen[-1]).max() < 1e-6
    for one in (pipe, plain):
        load(one, 0)
    check(cross_attention_kwargs={"scale": 0.4})
    check()
    with pytest.raises(ValueError, match="adapters are loaded"):
        pipe.unet.save_pretrained(tmp_path)
    assert tapes.captured == 1
    assert len(rebuilt.captures) == 1
    undo(pipe)
    check()
