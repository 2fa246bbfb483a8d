"""The diffusers backend: the weights are ours, the loop is its pipeline's, and its absence is a reason."""

from __future__ import annotations

import builtins
import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ldmperf.model import FAMILY, UNet, load_unet
from ldmperf.profiling import Case, profile
from ldmperf.profiling.backends import OurBackend, Problem, Unsupported
from ldmperf.profiling.check import check_inputs, relative_rms
from ldmperf.profiling.group import SCHEDULER_CONFIG
from ldmperf.profiling.peers import SCHEDULERS, DiffusersBackend, diffusers_unet
from ldmperf.profiling.timing import RepetitionRule
from ldmperf.samplers import SAMPLERS, NoiseSchedule, make_plan

pytestmark = pytest.mark.usefixtures("_one_thread")


def problem(checkpoint: Path, **changes: Any) -> Problem:
    case = Case(**({"unet": str(checkpoint), "steps": 3, "latent_height": 16, "latent_width": 16} | changes))
    plan = make_plan(case.sampler, NoiseSchedule.from_diffusers(SCHEDULER_CONFIG), case.steps)
    return Problem(case, load_unet(checkpoint, backend="torch"), plan, SCHEDULER_CONFIG)


def test_every_sampler_has_its_diffusers_class() -> None:
    diffusers = pytest.importorskip("diffusers")
    assert set(SCHEDULERS) == set(SAMPLERS)
    for name in SCHEDULERS.values():
        assert hasattr(diffusers, name)


def test_the_weights_are_shared_not_copied(tiny_checkpoint: Path) -> None:
    ours = load_unet(tiny_checkpoint, backend="torch")
    theirs = diffusers_unet(ours)
    held = {p.untyped_storage().data_ptr() for p in ours.parameters()}
    assert all(p.untyped_storage().data_ptr() in held for p in theirs.parameters())
    assert not any(p.is_meta for p in theirs.parameters())
    # Channels-last, which is how diffusers recommends it to be run.
    assert theirs.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_it_is_what_diffusers_own_pipeline_does(tiny_checkpoint: Path) -> None:
    """Against StableDiffusionPipeline itself, given our latents and embeddings."""
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("transformers", reason="StableDiffusionPipeline needs transformers")
    given = problem(tiny_checkpoint)
    inputs = check_inputs(given)
    unet = diffusers.UNet2DConditionModel.from_pretrained(tiny_checkpoint)
    vae = diffusers.AutoencoderKL(block_out_channels=(32, 32, 32, 32), norm_num_groups=8)
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=diffusers.DDIMScheduler.from_config(dict(SCHEDULER_CONFIG)),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    unconditional, conditional = inputs.context.chunk(2)
    expected = pipeline(
        prompt_embeds=conditional,
        negative_prompt_embeds=unconditional,
        latents=inputs.noise,
        num_inference_steps=3,
        guidance_scale=7.5,
        height=16 * pipeline.vae_scale_factor,
        width=16 * pipeline.vae_scale_factor,
        output_type="latent",
    ).images
    assert relative_rms(DiffusersBackend().build(given)(inputs), expected) < 1e-5
    assert relative_rms(OurBackend("torch").build(given)(inputs), expected) < 1e-5


def test_injected_noise_is_the_schedulers_and_its_own_is_put_back(tiny_checkpoint: Path) -> None:
    given = problem(tiny_checkpoint, sampler="ddpm", guidance_scale=1.0)
    trajectory = DiffusersBackend().build(given)
    inputs = check_inputs(given)
    module = importlib.import_module("diffusers.schedulers.scheduling_ddpm")
    drawn = module.randn_tensor
    once = trajectory(inputs)
    assert module.randn_tensor is drawn
    assert torch.equal(once, trajectory(inputs))
    # Other noise at its steps, another image; its own noise goes by the seeds.
    other = replace(inputs, step_noise=lambda index: torch.full_like(inputs.noise, float(index)))
    assert relative_rms(trajectory(other), once) > 1e-3
    free = replace(inputs, step_noise=None)
    assert torch.equal(trajectory(free), trajectory(free))
    assert relative_rms(trajectory(replace(free, seeds=(99,))), trajectory(free)) > 1e-3


@pytest.fixture
def _no_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def refuse(name: str, *arguments: Any) -> Any:
        if name == "diffusers":
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(importlib, "import_module", refuse)


@pytest.mark.usefixtures("_no_diffusers")
def test_where_it_is_not_installed_the_reason_says_what_to_install(tiny_checkpoint: Path) -> None:
    with pytest.raises(Unsupported, match=r"pip install 'ldmperf\[peers\]'"):
        DiffusersBackend().build(problem(tiny_checkpoint))
    case = problem(tiny_checkpoint).case
    cases = [case, case.model_copy(update={"backend": "diffusers"})]
    ours, theirs = profile(cases, rule=RepetitionRule(1, 0.0))
    assert (theirs.status, theirs.message) == (
        "unsupported", "diffusers is not installed: pip install 'ldmperf[peers]'"
    )  # fmt: skip
    assert ours.status == "ok", ours.message
    assert ours.correctness is not None
    assert ours.correctness.reference == "torch float64"


def test_importing_the_peers_does_not_import_diffusers() -> None:
    imported = []
    real = builtins.__import__

    def listening(name: str, *arguments: Any, **keywords: Any) -> Any:
        imported.append(name)
        return real(name, *arguments, **keywords)

    builtins.__import__ = listening
    try:
        importlib.reload(importlib.import_module("ldmperf.profiling.peers"))
    finally:
        builtins.__import__ = real
    assert imported
    assert not [name for name in imported if name.startswith("diffusers")]


def test_the_peers_convolutions_are_channels_last_to_the_eye_of_torch():
    """By strides, as torch decides: 1x1 weights are both layouts, and a linear layer's view reads as NCHW."""
    unet = UNet(FAMILY["39M"], backend="torch")
    theirs = diffusers_unet(unet)
    weights = [module.weight for module in theirs.modules() if isinstance(module, torch.nn.Conv2d)]
    assert any(weight.shape[2:] == (1, 1) for weight in weights)
    for weight in weights:
        assert weight.stride(1) == 1
        assert weight.stride(3) == weight.shape[1]
