"""`PipelineUNet` called as diffusers' pipelines call their UNet, beside diffusers' own with the same weights."""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import ModelMixin, UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ldmperf.model import UNet, UNetConfig
from ldmperf.model.dropin import PipelineUNet
from ldmperf.samplers import CaptureError

from .dropin_checks import relative_rms
from .dropin_models import UNETS, make_unet, model_inputs
from .tapes import Tapes

pytestmark = pytest.mark.usefixtures("_one_thread")
CLOSE = 1e-9


@torch.no_grad()
def both(ours: Any, theirs: Any, inputs: dict[str, Any]) -> float:
    """The relative error of ours."""
    return relative_rms(ours(**inputs, return_dict=False)[0], theirs(**inputs, return_dict=False)[0])


@pytest.mark.parametrize(
    ("kind", "graphs"), [*((kind, False) for kind in sorted(UNETS)), ("bk_sdm_small", True), ("upscale", True)]
)
def test_outputs_are_those_of_diffusers(kind: str, graphs: bool) -> None:
    theirs = make_unet(kind, torch.float64)
    ours = PipelineUNet.of(theirs, backend="torch", graphs=Tapes() if graphs else False)
    timesteps = torch.tensor([981, 501, 21])
    for batch in (2, 1):
        inputs = model_inputs(theirs, batch=batch)
        for t in (timesteps[1], *timesteps, 501, 7.5, torch.tensor([3]), inputs["timestep"]):
            assert both(ours, theirs, inputs | {"timestep": t}) < CLOSE


def test_types_and_configuration() -> None:
    theirs = make_unet("sdxl")
    inputs = model_inputs(theirs)
    for ours in (PipelineUNet.of(theirs), PipelineUNet(PipelineUNet.of(theirs).unet)):
        assert isinstance(ours(**inputs), UNet2DConditionOutput)
        assert isinstance(ours(**inputs, return_dict=False), tuple)
        assert isinstance(ours, ModelMixin)
        assert UNetConfig.from_diffusers(_public(ours.config)) == ours.unet.config
        assert (ours.config.sample_size, ours.config.time_cond_proj_dim) == (8, None)
        assert ours.add_embedding.linear_1.in_features == theirs.add_embedding.linear_1.in_features
        assert (ours.dtype, ours.device) == (torch.float32, torch.device("cpu"))
    ours = ours.to(torch.bfloat16)
    assert (ours.dtype, theirs.dtype) == (torch.bfloat16, torch.float32)


def _public(config: Any) -> dict[str, Any]:
    return {name: value for name, value in config.items() if not name.startswith("_")}


class Case:
    """Ours and diffusers', the arguments of both, and changes of these as pipelines and callbacks make them."""

    def __init__(self, graphs: Tapes | bool = False) -> None:
        self.theirs = make_unet("sdxl", torch.float64)
        self.ours: Any = PipelineUNet.of(self.theirs, backend="torch", graphs=graphs)
        self.inputs = model_inputs(self.theirs)
        self.timesteps = torch.tensor([981, 741, 501, 261, 21])
        self.step = 0

    def evaluate(self) -> float:
        timestep = self.timesteps[self.step]
        self.step = (self.step + 1) % len(self.timesteps)
        return both(self.ours, self.theirs, self.inputs | {"timestep": timestep})

    @property
    def text(self) -> Tensor:
        return self.inputs["encoder_hidden_states"]

    @property
    def added(self) -> dict[str, Tensor]:
        return self.inputs["added_cond_kwargs"]


def _write_text(case: Case) -> None:
    case.text[0, 1] += 1


def _write_text_through_a_view(case: Case) -> None:
    case.text.view(-1)[3:5].mul_(-2)


def _another_text_at_the_same_address(case: Case) -> None:
    shape = case.text.shape
    case.inputs["encoder_hidden_states"] = torch.zeros(0)
    gc.collect()
    case.inputs["encoder_hidden_states"] = torch.randn(shape, dtype=torch.float64)


def _guide_no_more(case: Case) -> None:
    """As callbacks do in mid-run: the conditional half alone."""
    case.inputs["encoder_hidden_states"] = case.text.chunk(2)[-1]
    case.inputs["sample"] = case.inputs["sample"].chunk(2)[-1]
    case.inputs["added_cond_kwargs"] = {name: value.chunk(2)[-1] for name, value in case.added.items()}


def _back_to_two(case: Case) -> None:
    case.inputs = model_inputs(case.theirs, seed=7)


def _write_sizes(case: Case) -> None:
    case.added["time_ids"].add_(3)


def _another_pooled_text(case: Case) -> None:
    case.inputs["added_cond_kwargs"] = case.added | {"text_embeds": torch.randn_like(case.added["text_embeds"])}


def _rewrite_timesteps(case: Case) -> None:
    case.timesteps.sub_(1)


def _other_timesteps(case: Case) -> None:
    case.timesteps = torch.linspace(999.5, 0.25, 5)


def _strided_timesteps(case: Case) -> None:
    case.timesteps = torch.from_numpy(np.arange(20, 1000)[::200])


def _write_source(case: Case) -> None:
    case.theirs.conv_in.bias.data[0] += 0
    with torch.no_grad():
        case.theirs.conv_out.weight.mul_(1.5)
        case.theirs.time_embedding.linear_1.bias.add_(0.1)


def _load(case: Case) -> None:
    state = {name: value + 0.01 for name, value in case.theirs.state_dict().items()}
    case.ours.load_state_dict(state)


def _replace_a_weight_of_the_source(case: Case) -> None:
    case.theirs.conv_in.weight = torch.nn.Parameter(case.theirs.conv_in.weight.detach() * 0.9, False)


def _slice_attention(case: Case) -> None:
    case.theirs.set_attention_slice("max")


CHANGES = (
    _write_text,
    _write_text_through_a_view,
    _another_text_at_the_same_address,
    _guide_no_more,
    _back_to_two,
    _write_sizes,
    _another_pooled_text,
    _rewrite_timesteps,
    _other_timesteps,
    _strided_timesteps,
    _write_source,
    _load,
    _replace_a_weight_of_the_source,
    _slice_attention,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_nothing_kept_is_stale(change: Callable[[Case], None]) -> None:
    case = Case()
    assert max(case.evaluate() for _ in range(2)) < CLOSE
    change(case)
    assert max(case.evaluate() for _ in range(4)) < CLOSE


@settings(max_examples=4, deadline=None)
@given(st.lists(st.sampled_from((None, *CHANGES)), min_size=4, max_size=10))
def test_nothing_kept_is_stale_after_any_changes(changes: list[Callable[[Case], None] | None]) -> None:
    case = Case(Tapes())
    for change in changes:
        if change is not None and not (change is _guide_no_more and len(case.text) == 1):
            change(case)
        assert case.evaluate() < CLOSE


def test_a_run_is_conditioned_once() -> None:
    case = Case()
    made, condition = [], case.ours.unet.condition
    case.ours.unet.condition = lambda *args, **kwargs: made.append(1) or condition(*args, **kwargs)
    for _ in range(10):
        case.evaluate()
    assert len(made) == 1
    _write_text(case)
    case.evaluate()
    case.evaluate()
    assert len(made) == 2


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_in_inference_mode_nothing_is_kept() -> None:
    with torch.inference_mode():
        case = Case()
        case.inputs = model_inputs(case.theirs)
        assert case.evaluate() < CLOSE
        case.text.add_(1)
        assert case.evaluate() < CLOSE


def test_with_weights_of_inference_mode_nothing_is_kept() -> None:
    """Such weights have no counter that would tell of a write."""
    theirs = make_unet("bk_sdm_small", torch.float64)
    same = PipelineUNet.of(theirs, backend="torch").unet
    with torch.inference_mode():
        network = UNet(same.config, backend="torch").to(torch.float64).eval()
        network.load_state_dict(same.state_dict())
    assert all(map(Tensor.is_inference, network.parameters()))
    ours = PipelineUNet(network)
    inputs = model_inputs(theirs) | {"timestep": torch.tensor([501, 7])[0]}
    assert both(ours, theirs, inputs) < CLOSE
    with torch.inference_mode():
        for parameter in network.parameters():
            parameter.mul_(1.1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(1.1)
    assert both(ours, theirs, inputs) < CLOSE


def test_what_is_not_given_any_more_is_not_kept() -> None:
    config = UNETS["bk_sdm_small"] | {"time_cond_proj_dim": 6}
    theirs = UNet2DConditionModel(**config).to(torch.float64).eval().requires_grad_(False)
    ours = PipelineUNet.of(theirs, backend="torch")
    inputs = model_inputs(theirs) | {"timestep": torch.tensor([501, 7])[0]}
    guided = {"timestep_cond": torch.randn(2, 6, dtype=torch.float64)}
    for beside in (guided, {}, guided):
        assert both(ours, theirs, inputs | beside) < CLOSE


def test_a_conditioning_of_autocast_is_not_one_without() -> None:
    theirs = make_unet("bk_sdm_small")
    ours = PipelineUNet.of(theirs, backend="torch")
    inputs = model_inputs(theirs) | {"timestep": torch.tensor([501, 7])[0]}
    with torch.autocast("cpu", torch.bfloat16):
        assert 1e-4 < both(ours, theirs, inputs) < 0.05
    assert both(ours, theirs, inputs) < 1e-5


def test_a_saved_network_has_the_sources_weights_as_they_are(tmp_path: Path) -> None:
    case = Case()
    _write_source(case)
    case.ours.save_pretrained(tmp_path)
    saved = UNet2DConditionModel.from_pretrained(tmp_path, torch_dtype=torch.float64).state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in case.theirs.state_dict().items())


def test_one_text_in_two_networks_with_other_sizes() -> None:
    case, other = Case(), Case()
    other.inputs["encoder_hidden_states"] = case.text
    _write_sizes(other)
    assert max(case.evaluate(), other.evaluate(), case.evaluate(), other.evaluate()) < CLOSE
    other.ours = case.ours
    assert max(case.evaluate(), other.evaluate(), case.evaluate(), other.evaluate()) < CLOSE


def test_weights_of_a_network_without_a_source() -> None:
    theirs = make_unet("bk_sdm_small", torch.float64)
    ours = PipelineUNet(PipelineUNet.of(theirs, backend="torch").unet)
    inputs = model_inputs(theirs) | {"timestep": torch.tensor([501, 7])[0]}
    assert both(ours, theirs, inputs) < CLOSE
    theirs.load_state_dict({name: value * 1.1 for name, value in theirs.state_dict().items()})
    assert both(ours, theirs, inputs) > 1e-3
    ours.load_state_dict(theirs.state_dict())
    assert both(ours, theirs, inputs) < CLOSE
    with torch.no_grad():
        for ours_too in ours.parameters():
            ours_too.mul_(0.9)
        for theirs_too in theirs.parameters():
            theirs_too.mul_(0.9)
    assert both(ours, theirs, inputs) < CLOSE
    with pytest.raises(RuntimeError, match="1 missing"):
        ours.load_state_dict(dict(list(theirs.state_dict().items())[1:]))


def test_gradients_are_those_of_diffusers() -> None:
    theirs = make_unet("bk_sdm_small", torch.float64)
    ours = PipelineUNet.of(theirs, backend="torch", graphs=Tapes())
    inputs = model_inputs(theirs)
    text = inputs["encoder_hidden_states"].requires_grad_()
    expected = torch.autograd.grad(theirs(**inputs).sample.square().sum(), text)[0]
    for _ in range(2):
        torch.testing.assert_close(torch.autograd.grad(ours(**inputs).sample.square().sum(), text)[0], expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda ours: _pickled(ours)], ids=["deepcopy", "pickle"])
def test_copies_stand_alone(copied: Callable[[Any], Any]) -> None:
    theirs = make_unet("bk_sdm_small", torch.float64)
    ours = PipelineUNet.of(theirs, backend="torch")
    inputs = model_inputs(theirs)
    ours(**inputs)
    other = copied(ours)
    with torch.no_grad():
        theirs.conv_in.weight.mul_(2)
        other.source.conv_in.weight.mul_(3)
    assert both(ours, theirs, inputs) < CLOSE
    assert both(other, other.source, inputs) < CLOSE


def _pickled(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_compiled_it_runs_as_it_is() -> None:
    theirs = make_unet("bk_sdm_small", torch.float64)
    ours = PipelineUNet.of(theirs, backend="torch")
    compiled: Any = torch.compile(ours, backend="eager")
    inputs = model_inputs(theirs)
    assert both(compiled, theirs, inputs) < CLOSE
    inputs["encoder_hidden_states"].add_(1)
    assert both(compiled, theirs, inputs) < CLOSE


def test_a_shape_that_cannot_be_captured_runs_eagerly_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    theirs = make_unet("bk_sdm_small", torch.float64)
    tapes = Tapes()
    tapes.failures = [RuntimeError("no room for stream 7")]
    ours = PipelineUNet.of(theirs, backend="torch", graphs=tapes)
    inputs = model_inputs(theirs)
    assert both(ours, theirs, inputs) < CLOSE
    assert both(ours, theirs, inputs) < CLOSE
    assert (tapes.log.count("failure"), tapes.captured) == (1, 0)
    assert len([line for line in ours.decisions if "no room for stream 7" in line]) == 1
    assert len([line for line in caplog.messages if "no room for stream 7" in line]) == 1
    assert both(ours, theirs, model_inputs(theirs, batch=1)) < CLOSE
    assert tapes.captured == 1


def test_graphs_are_asked_for_where_there_are_none() -> None:
    ours = PipelineUNet.of(make_unet("bk_sdm_small"), graphs=True)
    with pytest.raises(CaptureError, match="CUDA"), torch.no_grad():
        ours(**model_inputs(ours))
    with pytest.raises(ValueError, match='graphs must be "auto"'):
        PipelineUNet(ours.unet, graphs="always")


REFUSED: dict[str, Any] = {
    "attention_mask": torch.ones(2, 64),
    "encoder_attention_mask": torch.ones(2, 5),
    "mid_block_additional_residual": torch.ones(2, 64, 4, 4),
    "down_block_additional_residuals": (torch.ones(1),),
    "down_intrablock_additional_residuals": [torch.ones(1)],
    "cross_attention_kwargs": {"gligen": {}},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_lacks_is_refused_in_one_line(name: str) -> None:
    ours = PipelineUNet.of(make_unet("bk_sdm_small"))
    with pytest.raises(ValueError, match=name) as error:
        ours(**model_inputs(ours), **{name: REFUSED[name]})
    assert "\n" not in str(error.value)


def test_what_the_source_has_become_is_refused() -> None:
    theirs = make_unet("sd15")
    ours: Any = PipelineUNet.of(theirs)
    inputs = model_inputs(theirs)
    ours.enable_freeu(0.9, 0.2, 1.2, 1.4)
    with pytest.raises(ValueError, match="FreeU"):
        ours(**inputs)
    ours.disable_freeu()
    ours(**inputs)
    hook = theirs.mid_block.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="forward hooks"):
        ours(**inputs)
    hook.remove()
    with torch.no_grad():
        ours.unet.conv_out.weight.mul_(2)
        theirs.conv_in.weight.mul_(2)
    with pytest.raises(ValueError, match="written since"):
        ours(**inputs)
    with pytest.raises(AttributeError, match="PipelineUNet has no 'nonsense'"):
        _ = ours.nonsense


def test_offloading() -> None:
    theirs = make_unet("bk_sdm_small")
    ours: Any = PipelineUNet.of(theirs, backend="torch")
    inputs = model_inputs(theirs)
    cpu_offload(ours, torch.device("cpu"))
    with pytest.raises(ValueError, match="enable_model_cpu_offload"):
        ours(**inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype: torch.dtype) -> None:
    exact = make_unet("sd15", torch.float64)
    ours = PipelineUNet.of(make_unet("sd15"), backend="torch").to(dtype)
    inputs = model_inputs(ours)
    wide = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    with torch.no_grad():
        out = ours(**inputs).sample
        assert out.dtype == dtype
        assert relative_rms(out, exact(**wide).sample) < 0.05


def test_it_takes_a_network_and_nothing_else() -> None:
    with pytest.raises(ValueError, match=r"must be a ldmperf\.model\.UNet, not UNet2DConditionModel"):
        PipelineUNet(make_unet("bk_sdm_small"))
    assert isinstance(PipelineUNet.of(make_unet("bk_sdm_small")).unet, UNet)
