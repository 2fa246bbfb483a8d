"""Whole diffusers pipelines, from random tiny components, with an accelerated UNet and VAE."""

from __future__ import annotations

from typing import Any

import accelerate as hf_accelerate
import diffusers
import numpy as np
import pytest
import torch
from dropin_checks import objects
from dropin_models import make_pipeline, pipeline_inputs

from ldmperf.model.dropin import accelerate, undo

pytestmark = pytest.mark.usefixtures("_one_thread")
PIPELINES = ("text", "img2img", "inpaint", "upscale", "sdxl")
# Of values 0 to 1, after a few steps in float32 with guidance.
SAME = 2e-5


def image(pipeline: Any, kind: str, **changes: Any) -> np.ndarray:
    images: np.ndarray = pipeline(**pipeline_inputs(kind) | changes).images
    return images


def things(pipeline: Any) -> dict[str, Any]:
    found = {
        name: objects(part) for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)
    }
    return found | {f"{name}=": id(part) for name, part in pipeline.components.items()}


@pytest.mark.parametrize("kind", PIPELINES)
def test_images_before_during_and_after(kind):
    pipeline = make_pipeline(kind)
    before, were = image(pipeline, kind), things(pipeline)
    assert before.std() > 0.05
    with accelerate(pipeline, backend="torch") as report:
        during = image(pipeline, kind)
        replaced = {entry.path.split(".")[0] for entry in report.replaced}
        left = {entry.path.split(".")[0] for entry in report.left}
    assert replaced == {"unet", "vae"}
    assert {name for name in pipeline.components if name.startswith("text_encoder")} <= left
    assert float(np.abs(during - before).max()) < SAME
    assert things(pipeline) == were
    assert np.array_equal(image(pipeline, kind), before)


def test_undo_by_the_pipeline_or_by_its_parts():
    pipeline = make_pipeline("text")
    were = things(pipeline)
    accelerate(pipeline, backend="torch")
    undo(pipeline.unet)
    assert things(pipeline)["unet"] == were["unet"]
    assert things(pipeline)["vae"] != were["vae"]
    undo(pipeline)
    assert things(pipeline) == were


def test_parts_shared_by_two_pipelines():
    """Pipelines made from one another share their components: so does what is done to them."""
    pipeline = make_pipeline("text")
    other = diffusers.StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    expected = image(other, "img2img")
    were = things(other)
    with accelerate(pipeline, backend="torch"):
        assert float(np.abs(image(other, "img2img") - expected).max()) < SAME
        report = accelerate(other)
        assert report.replaced
    undo(other)
    assert things(other) == were
    assert np.array_equal(image(other, "img2img"), expected)


def test_saved_and_loaded(tmp_path):
    pipeline = make_pipeline("text")
    expected = image(pipeline, "text")
    with accelerate(pipeline, backend="torch"):
        during = image(pipeline, "text")
        pipeline.save_pretrained(tmp_path)
    loaded = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert np.array_equal(image(loaded, "text"), expected)
    with accelerate(loaded, backend="torch"):
        assert np.array_equal(image(loaded, "text"), during)


@pytest.mark.parametrize("offload_first", [True, False])
def test_sequential_offload(offload_first):
    """Weights rest on the meta device and come for each module's forward."""
    pipeline = make_pipeline("text")
    expected = image(pipeline, "text")

    def offload() -> None:
        # As enable_sequential_cpu_offload, which cannot offload a text encoder from a CPU to a CPU.
        for part in (pipeline.unet, pipeline.vae):
            hf_accelerate.cpu_offload(part, execution_device="cpu")

    if offload_first:
        offload()
    report = accelerate(pipeline, backend="torch")
    if not offload_first:
        offload()
    assert pipeline.unet.conv_in.weight.device.type == "meta"
    assert float(np.abs(image(pipeline, "text") - expected).max()) < SAME
    report.undo()
    assert np.array_equal(image(pipeline, "text"), expected)


def test_model_offload():
    pipeline = make_pipeline("text")
    expected = image(pipeline, "text")
    with accelerate(pipeline, backend="torch"):
        pipeline.enable_model_cpu_offload(device="cpu")
        for _ in range(2):
            assert float(np.abs(image(pipeline, "text") - expected).max()) < SAME
    assert np.array_equal(image(pipeline, "text"), expected)


def test_a_compiled_unet():
    pipeline = make_pipeline("text")
    expected = image(pipeline, "text")
    unet = pipeline.unet
    pipeline.unet = torch.compile(unet, backend="eager")
    were = objects(unet)
    with accelerate(pipeline, backend="torch") as report:
        assert "unet" in {entry.path.split(".")[0] for entry in report.replaced}
    assert objects(unet) == were
    pipeline.unet = unet
    assert np.array_equal(image(pipeline, "text"), expected)


def test_several_images_with_slices_and_tiles():
    pipeline = make_pipeline("text")
    pipeline.vae.enable_slicing()
    pipeline.vae.enable_tiling()
    more = {"num_images_per_prompt": 2, "height": 24, "width": 32}
    expected = image(pipeline, "text", **more)
    assert expected.shape == (2, 24, 32, 3)
    with accelerate(pipeline, backend="torch"):
        assert float(np.abs(image(pipeline, "text", **more) - expected).max()) < SAME


def test_a_pipeline_without_a_unet():
    pipeline = diffusers.DDPMPipeline(
        diffusers.UNet2DModel(
            sample_size=8,
            block_out_channels=(8,),
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            norm_num_groups=4,
        ),
        diffusers.DDPMScheduler(),
    )
    with pytest.raises(ValueError, match="UNet2DConditionModel") as caught:
        accelerate(pipeline)
    assert "\n" not in str(caught.value)
