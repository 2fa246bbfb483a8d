"""Whole pipelines, rebuilt, beside diffusers' own: latents and images, every sampler, callbacks and guidance."""

from __future__ import annotations

from collections import Counter
from functools import partial, partialmethod
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForImage2Image
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from ldmperf.model.dropin import PipelineUNet, PlanScheduler, plan_run, rebuild

from .dropin_models import UNETS, make_pipeline, make_unet, pipeline_inputs
from .tapes import Tape, Tapes

pytestmark = [
    pytest.mark.usefixtures("_one_thread"),
    pytest.mark.filterwarnings("ignore:You have passed 2 text prompts:FutureWarning"),
]
# Of values 0 to 1, and of latents relative to the largest.
SAME = 1e-5
KINDS = ("text", "img2img", "inpaint", "upscale", "sdxl")
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpmpp_2s": ("DPMSolverSinglestepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
}


class Pair:
    """A pipeline and the same rebuilt, made once and used by many tests."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.theirs, self.ours = make_pipeline(kind), make_pipeline(kind)
        self.tapes = Tapes()
        self.rebuilt = rebuild(self.ours, backend="torch", graphs=self.tapes)

    def same(self, **changes: Any) -> np.ndarray:
        """The images of ours, which are diffusers'."""
        results = [self.call(pipe, **changes) for pipe in (self.ours, self.theirs)]
        largest = max(1.0, float(np.abs(results[1]).max()))
        assert float(np.abs(results[0] - results[1]).max()) < SAME * largest
        assert results[0].std() > 0.02
        return results[0]

    def call(self, pipe: Any, *, seeds: tuple[int, ...] = (), **changes: Any) -> np.ndarray:
        if seeds:
            changes["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
        images = pipe(**pipeline_inputs(self.kind) | changes).images
        return images.numpy() if isinstance(images, torch.Tensor) else images

    def schedule(self, name: str, **options: Any) -> None:
        kind, fixed = SCHEDULERS[name]
        for pipe in (self.ours, self.theirs):
            pipe.scheduler = getattr(diffusers, kind).from_config(dict(pipe.scheduler.config), **fixed, **options)
        rebuild(self.ours, backend="torch")
        # One that was refused is left as it is: the two would be the same.
        assert isinstance(self.ours.scheduler, PlanScheduler)
        assert isinstance(self.ours.scheduler, getattr(diffusers, kind))
        assert not isinstance(self.theirs.scheduler, PlanScheduler)


@pytest.fixture(scope="module")
def pairs() -> dict[str, Pair]:
    return {kind: Pair(kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_images_latents_and_batches(pairs: dict[str, Pair], kind: str) -> None:
    pair = pairs[kind]
    alone = pair.same()
    assert np.array_equal(alone, pair.same())
    pair.same(output_type="latent")
    pair.same(guidance_scale=1.0)
    pair.same(num_images_per_prompt=2)
    two = {"prompt": ["a b c", "d"], "negative_prompt": ["d", "e"]}
    image = pipeline_inputs(kind).get("image")
    if image is not None and kind != "inpaint":
        two["image"] = image.repeat(2, 1, 1, 1)
    pair.same(**two, seeds=(3, 4))


@pytest.mark.parametrize("sampler", sorted(SCHEDULERS))
@pytest.mark.parametrize("kind", ["text", "img2img"])
def test_every_sampler(pairs: dict[str, Pair], kind: str, sampler: str) -> None:
    pair = pairs[kind]
    pair.schedule(sampler)
    changes: dict[str, Any] = {"num_inference_steps": 4, "output_type": "latent"}
    if sampler == "ddim":
        changes["eta"] = 0.7
    pair.same(**changes)
    if kind == "img2img":
        pair.same(**changes | {"strength": 0.5})


@pytest.mark.parametrize("kind", ["inpaint", "sdxl", "upscale"])
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m_karras"])
def test_other_pipelines_with_some_samplers(pairs: dict[str, Pair], kind: str, sampler: str) -> None:
    pairs[kind].schedule(sampler)
    pairs[kind].same(num_inference_steps=3)


@pytest.mark.parametrize("strength", [0.3, 0.8])
def test_strength(pairs: dict[str, Pair], strength: float) -> None:
    for kind in ("img2img", "inpaint"):
        pairs[kind].schedule("ddim")
        pairs[kind].same(strength=strength, num_inference_steps=4)


def test_shapes_that_alternate(pairs: dict[str, Pair]) -> None:
    pair = pairs["text"]
    pair.schedule("ddim")
    sizes = [(16, 16), (24, 16), (16, 16), (24, 16), (16, 32)]
    pair.tapes.log.clear()
    for height, width in sizes:
        pair.same(height=height, width=width)
    assert pair.tapes.captured <= 3
    assert len(pair.rebuilt.captures) <= 4


def test_callbacks_change_the_run_and_interrupt_it(pairs: dict[str, Pair]) -> None:
    pair = pairs["text"]
    pair.schedule("ddim")

    def weaker(pipe: Any, step: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        # As diffusers' guide shows: guidance ends in mid-run.
        if step == 1:
            pipe._guidance_scale = 0.0
            kwargs["prompt_embeds"] = kwargs["prompt_embeds"].chunk(2)[-1]
        return kwargs

    def in_place(pipe: Any, step: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        kwargs["prompt_embeds"].mul_(0.9)
        return {"latents": kwargs["latents"] * 1.01}

    def stop(pipe: Any, step: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step >= 1
        return kwargs

    inputs = ["latents", "prompt_embeds"]
    plain = pair.same(num_inference_steps=4)
    for callback in (weaker, in_place, stop):
        changed = pair.same(
            num_inference_steps=4, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=inputs
        )
        assert not np.allclose(changed, plain)


def test_prompt_embeds_and_rescaled_guidance(pairs: dict[str, Pair]) -> None:
    pair = pairs["text"]
    pair.schedule("ddim")
    embeds = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(0))
    given = {"prompt": None, "negative_prompt": None, "guidance_rescale": 0.7, "num_inference_steps": 3}
    for guidance_scale in (1.0, 5.0):
        first = pair.same(
            **given, prompt_embeds=embeds, negative_prompt_embeds=-embeds, guidance_scale=guidance_scale
        )
        embeds.add_(0.5)
        second = pair.same(
            **given, prompt_embeds=embeds, negative_prompt_embeds=-embeds, guidance_scale=guidance_scale
        )
        assert not np.allclose(first, second)


def test_the_same_generator_gives_the_same_image(pairs: dict[str, Pair]) -> None:
    pair = pairs["text"]
    pair.schedule("euler_a")
    images = [pair.call(pair.ours, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert np.array_equal(images[0], images[1])
    assert not np.allclose(images[0], images[2])


def test_inpainting_with_four_channels() -> None:
    theirs = diffusers.StableDiffusionInpaintPipeline(
        **make_pipeline("text").components, requires_safety_checker=False
    )
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(**pipeline_inputs("inpaint")).images
    rebuild(theirs, backend="torch")
    assert float(np.abs(theirs(**pipeline_inputs("inpaint")).images - expected).max()) < SAME


def test_latent_consistency_with_an_embedded_guidance_scale() -> None:
    parts = make_pipeline("text").components
    parts["unet"] = make_unet(UNETS["sd15"] | {"time_cond_proj_dim": 8})
    parts["scheduler"] = diffusers.LCMScheduler.from_config(parts["scheduler"].config)
    pipe = diffusers.LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    inputs = pipeline_inputs("text") | {"num_inference_steps": 3}
    del inputs["negative_prompt"]
    for guidance_scale in (2.0, 8.0):
        expected = pipe(**inputs | {"guidance_scale": guidance_scale, "generator": _generator()}).images
        with rebuild(pipe, backend="torch", graphs=Tapes()):
            assert isinstance(pipe.unet, PipelineUNet)
            images = pipe(**inputs | {"guidance_scale": guidance_scale, "generator": _generator()}).images
        assert float(np.abs(images - expected).max()) < SAME


def test_instructions_for_an_image() -> None:
    parts = make_pipeline("text").components
    parts["unet"] = make_unet(UNETS["sd15"] | {"in_channels": 8})
    pipe = diffusers.StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    inputs = pipeline_inputs("img2img")
    del inputs["strength"]
    expected = pipe(**inputs | {"generator": _generator()}).images
    with rebuild(pipe, backend="torch"):
        images = pipe(**inputs | {"generator": _generator()}).images
    assert float(np.abs(images - expected).max()) < SAME


def test_an_image_pipeline_of_sdxl(pairs: dict[str, Pair]) -> None:
    pair = pairs["sdxl"]
    pair.schedule("ddim")
    inputs = pipeline_inputs("img2img") | {"strength": 0.6, "num_inference_steps": 4}
    images = []
    for pipe in (pair.ours, pair.theirs):
        other = AutoPipelineForImage2Image.from_pipe(pipe)
        other.set_progress_bar_config(disable=True)
        images.append(other(**inputs | {"generator": _generator()}).images)
    assert float(np.abs(images[0] - images[1]).max()) < SAME


def _refiner(base: Any) -> Any:
    """As Stable Diffusion XL's: the second text encoder alone, five numbers of sizes with an aesthetic score."""
    parts = {"projection_class_embeddings_input_dim": 16 + 5 * 8, "cross_attention_dim": 16}
    pipe = diffusers.StableDiffusionXLImg2ImgPipeline(
        **base.components | {"tokenizer": None, "text_encoder": None, "unet": make_unet(UNETS["sdxl"] | parts)},
        requires_aesthetics_score=True,
        add_watermarker=False,
    )
    pipe.scheduler = type(base.scheduler).from_config(base.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp_2m_karras"])
def test_a_refiner_takes_the_last_steps_over(sampler: str) -> None:
    """denoising_end of one, denoising_start of the other."""
    base = make_pipeline("sdxl")
    kind, fixed = SCHEDULERS[sampler]
    base.scheduler = getattr(diffusers, kind).from_config(dict(base.scheduler.config), **fixed)
    refiner = _refiner(base)
    expected = _refined(base, refiner)
    with rebuild(base, backend="torch", graphs=Tapes()), rebuild(refiner, backend="torch", graphs=Tapes()):
        for pipe in (base, refiner):
            assert isinstance(pipe.unet, PipelineUNet)
            assert isinstance(pipe.scheduler, PlanScheduler)
        found = _refined(base, refiner)
    for ours, theirs in zip(found, expected, strict=True):
        assert float(np.abs(ours - theirs).max()) < SAME * max(1.0, float(np.abs(theirs).max()))


def _refined(base: Any, refiner: Any) -> tuple[np.ndarray, np.ndarray]:
    """(the latents handed over, the image)."""
    inputs = pipeline_inputs("sdxl") | {"num_inference_steps": 5, "generator": _generator()}
    latents = base(**inputs | {"denoising_end": 0.6, "output_type": "latent"}).images
    assert base.scheduler.timesteps[-1] < 400
    del inputs["height"], inputs["width"]
    image = refiner(**inputs | {"image": latents, "denoising_start": 0.6}).images
    return latents.numpy(), image


def test_inpainting_with_sdxl(pairs: dict[str, Pair]) -> None:
    """With the four channels of the base, and with the nine of a network for inpainting."""
    inputs = pipeline_inputs("inpaint") | {"num_inference_steps": 4}
    nine = make_unet(UNETS["sdxl"] | {"cross_attention_dim": 32, "in_channels": 9})
    for unet in (pairs["sdxl"].theirs.unet, nine):
        pipe = diffusers.StableDiffusionXLInpaintPipeline(
            **make_pipeline("sdxl").components | {"unet": unet}, add_watermarker=False
        )
        pipe.set_progress_bar_config(disable=True)
        for strength in (1.0, 0.6):
            expected = pipe(**inputs | {"strength": strength, "generator": _generator()}).images
            with rebuild(pipe, backend="torch", graphs=Tapes()):
                assert isinstance(pipe.unet, PipelineUNet)
                assert isinstance(pipe.scheduler, PlanScheduler)
                images = pipe(**inputs | {"strength": strength, "generator": _generator()}).images
            assert float(np.abs(images - expected).max()) < SAME


@pytest.mark.parametrize("kind", ["text", "sdxl"])
def test_in_inference_mode(pairs: dict[str, Pair], kind: str) -> None:
    """Called inside it, outside it after that, and inside again."""
    pair = pairs[kind]
    for sampler in ("ddim", "dpmpp_2m"):
        pair.schedule(sampler)
        plain = pair.same(num_inference_steps=3)
        with torch.inference_mode():
            inside = pair.same(num_inference_steps=3)
            assert not np.allclose(pair.same(num_inference_steps=3, prompt="b"), inside)
        assert float(np.abs(inside - plain).max()) < SAME
        assert float(np.abs(pair.same(num_inference_steps=3) - plain).max()) < SAME
    pair.schedule("ddim")
    with torch.inference_mode():
        # Weights that count no writes.
        pipe = make_pipeline(kind)
        rebuild(pipe, backend="torch", graphs=Tapes())
        assert isinstance(pipe.unet, PipelineUNet)
        image = pair.call(pipe)
    assert float(np.abs(image - pair.call(pair.theirs)).max()) < SAME


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


# Views, memory without a launch, and a question about dtypes.
_NO_LAUNCH = {"empty_like", "split", "select", "promote_types"}


class Launched(TorchDispatchMode):
    """The operators that launch something, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    def as_one(self, name: str, call: Any, *args: Any, **kwargs: Any) -> Any:
        self.names[name] += 1
        with _disable_current_modes():
            return call(*args, **kwargs)


def test_what_a_step_still_launches_outside_of_its_capture(
    pairs: dict[str, Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table of docs/pipelines.md."""
    pair = pairs["text"]
    pair.schedule("ddim")
    replay, update = Tape.replay, plan_run.sampler_update
    counts = []
    for steps in (2, 3, 2, 3):
        with Launched() as launched:
            seen = partialmethod(lambda tape, as_one: as_one("replay", replay, tape), launched.as_one)
            monkeypatch.setattr(Tape, "replay", seen)
            monkeypatch.setattr(Tape, "overwrite", lambda tape: None)
            monkeypatch.setattr(plan_run, "sampler_update", partial(launched.as_one, "sampler_update", update))
            pair.call(pair.ours, num_inference_steps=steps, output_type="latent")
        counts.append(launched.names)
    step = {name: count for name, count in (counts[3] - counts[2]).items() if name not in _NO_LAUNCH}
    # copy_: the input, and the estimate of the clean sample; fill_: the step's number.
    one = ("add", "cat", "clone", "fill_", "mul", "replay", "sampler_update", "sub")
    assert step == dict.fromkeys(one, 1) | {"copy_": 2}
