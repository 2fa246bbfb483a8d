"""`rebuild`: what is replaced and what is left, in which words, and everything as before at its end."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from ldmperf.model import load_autoencoder, load_unet
from ldmperf.model.dropin import PipelineAutoencoder, PipelineUNet, PlanScheduler, accelerate, rebuild, undo

from .dropin_checks import objects
from .dropin_models import make_pipeline, make_unet, make_vae, pipeline_inputs
from .tapes import Tapes

pytestmark = pytest.mark.usefixtures("_one_thread")
SAME = 2e-5


@pytest.fixture
def pipe() -> Any:
    return make_pipeline("text")


def image(pipe: Any, kind: str = "text") -> np.ndarray:
    images: np.ndarray = pipe(**pipeline_inputs(kind)).images
    return images


def things(pipe: Any) -> dict[str, Any]:
    found = {name: objects(part) for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return found | {f"{name}=": id(part) for name, part in pipe.components.items()} | {"config": dict(pipe.config)}


def test_before_during_and_after(pipe: Any) -> None:
    before, were = image(pipe), things(pipe)
    with rebuild(pipe, backend="torch") as rebuilt:
        assert {one.path: (one.class_name, one.kind) for one in rebuilt.replaced} == {
            "unet": ("UNet2DConditionModel", "PipelineUNet"),
            "vae": ("AutoencoderKL", "PipelineAutoencoder"),
            "scheduler": ("DDIMScheduler", "PlanScheduler"),
        }
        assert [one.path for one in rebuilt.left] == ["text_encoder"]
        assert dict(pipe.config) == were["config"]
        assert 0 < float(np.abs(image(pipe) - before).max()) < SAME
    assert things(pipe) == were
    assert np.array_equal(image(pipe), before)
    assert [one.path for one in rebuilt.replaced] == []
    assert "undone, or put in since: call rebuild again" in str(rebuilt)


def test_options_choose_components(pipe: Any) -> None:
    rebuilt = rebuild(pipe, vae=False, scheduler=False)
    assert [one.path for one in rebuilt.replaced] == ["unet"]
    assert {one.path: one.reason for one in rebuilt.left}["vae"] == "vae=False"
    later = rebuild(pipe, unet=False)
    assert {one.path for one in later.replaced} == {"unet", "vae", "scheduler"}
    later.undo()
    assert [one.path for one in rebuilt.replaced] == ["unet"]
    later.undo()
    undo(pipe)
    assert isinstance(pipe.unet, diffusers.UNet2DConditionModel)
    with pytest.raises(ValueError, match="vae must be True or False"):
        rebuild(pipe, vae="yes")  # type: ignore[arg-type]


def test_a_component_set_since_stays(pipe: Any) -> None:
    rebuilt = rebuild(pipe)
    mine = pipe.vae = make_vae("vae")
    rebuilt.undo()
    assert pipe.vae is mine
    assert isinstance(pipe.unet, diffusers.UNet2DConditionModel)


def test_undo_by_the_pipeline_also_undoes_accelerate(pipe: Any) -> None:
    were = things(pipe)
    accelerate(pipe, backend="torch")
    before = image(pipe)
    rebuild(pipe, backend="torch")
    assert float(np.abs(image(pipe) - before).max()) < SAME
    undo(pipe)
    assert things(pipe) == were


def test_an_undo_that_is_refused_changes_nothing(pipe: Any) -> None:
    rebuild(pipe)
    pipe.unet = PipelineUNet(pipe.unet.unet)
    were = dict(pipe.components)
    with pytest.raises(ValueError, match="not made from diffusers' UNet2DConditionModel"):
        undo(pipe)
    assert pipe.components == were


def test_a_scheduler_set_since_is_taken_by_another_rebuild(pipe: Any) -> None:
    rebuilt = rebuild(pipe)
    mine = pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    assert {one.path: one.reason for one in rebuilt.left}["scheduler"].endswith("call rebuild again for ours")
    rebuild(pipe)
    assert isinstance(pipe.scheduler, PlanScheduler)
    undo(pipe)
    assert pipe.scheduler is mine


def test_accelerate_after_rebuild_says_to_undo(pipe: Any) -> None:
    rebuild(pipe, vae=False)
    left = {one.path: one.reason for one in accelerate(pipe).left}
    assert left["unet"].startswith("ours already")
    rebuild(pipe)
    with pytest.raises(ValueError, match=r"ours already: undo\(pipe\) first"):
        accelerate(pipe)
    undo(pipe)
    accelerate(pipe)


def test_moved_and_cast_parts_come_back_as_ours_were(pipe: Any) -> None:
    rebuild(pipe)
    pipe.unet.to(torch.bfloat16)
    undo(pipe)
    assert pipe.unet.dtype == torch.bfloat16
    assert pipe.vae.dtype == torch.float32


def test_dtype_device_and_mode_are_kept(pipe: Any) -> None:
    pipe.unet.to(torch.float64).train()
    pipe.vae.enable_tiling()
    rebuild(pipe)
    assert (pipe.unet.dtype, pipe.unet.training, pipe.vae.training) == (torch.float64, True, False)
    assert pipe.vae.use_tiling


def test_saved_and_loaded_by_diffusers(pipe: Any, tmp_path: Any) -> None:
    expected = image(pipe)
    rebuild(pipe, backend="torch")
    pipe.save_pretrained(tmp_path)
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.unet) is diffusers.UNet2DConditionModel
    assert type(loaded.scheduler) is DDIMScheduler
    assert np.array_equal(image(loaded), expected)


def test_our_components_in_a_pipeline_from_a_folder(pipe: Any, tmp_path: Any) -> None:
    expected = image(pipe)
    pipe.save_pretrained(tmp_path)
    ours = {
        "unet": PipelineUNet(load_unet(tmp_path / "unet")),
        "vae": PipelineAutoencoder(load_autoencoder(tmp_path / "vae")),
        "scheduler": PlanScheduler.from_pretrained(tmp_path, subfolder="scheduler"),
    }
    loaded = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, **ours, safety_checker=None)
    loaded.set_progress_bar_config(disable=True)
    assert float(np.abs(image(loaded) - expected).max()) < SAME
    with pytest.raises(ValueError, match=r"not made from diffusers' (UNet2DConditionModel|AutoencoderKL): set"):
        undo(loaded)
    rebuild(loaded).undo()
    assert {name: loaded.components[name] for name in ours} == ours
    with pytest.raises(AttributeError, match=r"'enable_freeu'.*load that and set pipe\.unet$"):
        loaded.enable_freeu(0.9, 0.2, 1.2, 1.4)
    loaded.save_pretrained(tmp_path / "again")
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "again", safety_checker=None)
    again.set_progress_bar_config(disable=True)
    assert type(again.unet) is diffusers.UNet2DConditionModel
    assert type(again.vae) is diffusers.AutoencoderKL
    assert type(again.scheduler) is DDIMScheduler
    assert np.array_equal(image(again), expected)


def test_pipelines_that_share_components(pipe: Any) -> None:
    other = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    expected, texts = image(other, "img2img"), image(pipe)
    rebuild(pipe, backend="torch")
    assert np.array_equal(image(other, "img2img"), expected)
    sharing = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    # from_pipe of a pipeline's class hands over models of the very class alone; AutoPipeline's all.
    own = {"unet": pipe.unet, "vae": pipe.vae}
    assert diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe, **own).components == sharing.components
    painting = diffusers.AutoPipelineForInpainting.from_pipe(pipe)
    sharing.set_progress_bar_config(disable=True)
    painting.set_progress_bar_config(disable=True)
    assert sharing.unet is painting.unet is pipe.unet
    for _ in range(2):
        assert float(np.abs(image(sharing, "img2img") - expected).max()) < SAME
        assert float(np.abs(image(pipe) - texts).max()) < SAME
    assert image(painting, "inpaint").shape == expected.shape
    undo(sharing)
    assert sharing.unet is other.unet
    assert (sharing.config["unet"], sharing.config["vae"]) == (other.config["unet"], other.config["vae"])


def test_the_table_tells_captures_and_reasons(pipe: Any) -> None:
    rebuilt = rebuild(pipe, backend="torch", graphs=Tapes())
    image(pipe)
    assert [capture.uses for capture in rebuilt.captures] == [2]
    table = str(rebuilt)
    assert "PipelineUNet: cpu, float32, the references in torch" in table
    assert "DDIMScheduler's steps, each one call of sampler_update's reference in torch" in table
    assert "the network for [2, 4, 8, 8] float32: 2 replays" in table
    assert "each shape where it pays; the last 4 are kept" in table
    assert "text_encoder" in table
    assert "3 components replaced" in repr(rebuilt)
    with rebuild(make_pipeline("text")) as eager:
        assert "none: cpu captures none" in str(eager)


def _without(pipe: Any, part: str) -> str:
    rebuilt = rebuild(pipe)
    assert part not in {one.path for one in rebuilt.replaced}
    return {one.path: one.reason for one in rebuilt.left}[part]


def test_what_ours_does_not_compute_is_left_with_the_reason() -> None:
    pipe = make_pipeline("text")
    pipe.unet.enable_freeu(0.9, 0.2, 1.2, 1.4)
    assert "FreeU" in _without(pipe, "unet")
    pipe.unet = make_unet("scale_shift")
    assert "resnet_time_scale_shift" in _without(pipe, "unet")
    pipe.unet = make_unet("sd15")
    pipe.unet.conv_in.weight.data = pipe.unet.conv_in.weight.data.half()
    assert "float16 on cpu, float32 on cpu" in _without(pipe, "unet")
    pipe.unet = type("Mine", (diffusers.UNet2DConditionModel,), {})(**pipe.unet.config)
    assert "a Mine, not UNet2DConditionModel" in _without(pipe, "unet")
    pipe.vae = make_vae("vae_mish")
    assert "act_fn" in _without(pipe, "vae")


def test_a_controlnet_pipeline_keeps_its_unet() -> None:
    pipe = make_pipeline("text")
    controlnet = diffusers.ControlNetModel.from_unet(pipe.unet)
    guided = diffusers.StableDiffusionControlNetPipeline(
        **pipe.components, controlnet=controlnet, requires_safety_checker=False
    )
    rebuilt = rebuild(guided)
    assert {one.path for one in rebuilt.replaced} == {"vae", "scheduler"}
    assert "controlnet adds residuals" in {one.path: one.reason for one in rebuilt.left}["unet"]


@pytest.mark.parametrize("what", [None, torch.nn.Linear(2, 2), diffusers.StableDiffusionPipeline])
def test_it_takes_pipelines(what: Any) -> None:
    with pytest.raises(ValueError, match="pipe must be a loaded pipeline of diffusers") as error:
        rebuild(what)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["PAG", "SAG"])
def test_a_pipeline_that_changes_attention_keeps_its_unet(pipe: Any, name: str) -> None:
    kind = getattr(diffusers, f"StableDiffusion{name}Pipeline")
    options = {"pag_applied_layers": "down_blocks.0"} if name == "PAG" else {}
    other = kind(**pipe.components, requires_safety_checker=False, **options)
    other.set_progress_bar_config(disable=True)
    expected = image(other)
    rebuilt = rebuild(other, backend="torch")
    assert [one.path for one in rebuilt.replaced] == ["vae", "scheduler"]
    assert "changes the UNet's attention" in str(rebuilt)
    assert float(np.abs(image(other) - expected).max()) < SAME


def test_slicing_tiling_and_the_encoder_of_the_autoencoder() -> None:
    theirs = make_vae("vae", torch.float64)
    ours = PipelineAutoencoder.of(theirs, backend="torch")
    x = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for change in ("disable_tiling", "enable_slicing", "enable_tiling", "disable_slicing"):
        for vae in (ours, theirs):
            getattr(vae, change)()
        with torch.no_grad():
            samples = [
                vae.encode(x).latent_dist.sample(torch.Generator().manual_seed(1)) for vae in (ours, theirs)
            ]
            torch.testing.assert_close(*samples, rtol=0, atol=1e-9)
            torch.testing.assert_close(ours.decode(samples[1]).sample, theirs.decode(samples[1]).sample)
            torch.testing.assert_close(ours(x).sample, theirs(x).sample)
    assert issubclass(PlanScheduler, diffusers.SchedulerMixin)
