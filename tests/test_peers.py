"""The diffusers backend: the weights are ours, the loop is its pipeline's, and its absence is a reason."""

from __future__ import annotations

import builtins
import importlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ldmperf.model import FAMILY, UNet, load_unet
from ldmperf.profiling import Case, profile
from ldmperf.profiling.measure.error import relative_rms
from ldmperf.profiling.measure.outcomes import Unsupported
from ldmperf.profiling.measure.timing import RepetitionRule
from ldmperf.profiling.peer import SCHEDULER_CONFIG, diffusers_unet
from ldmperf.profiling.trajectory.ours import OurBackend
from ldmperf.profiling.trajectory.theirs import (
    CompileMode,
    DiffusersBackend,
    compiled,
    fuse_projections,
    side_by_side,
)
from ldmperf.profiling.trajectory.unet_problem import UNetProblem, added_conditions
from ldmperf.samplers import DIFFUSERS_CLASSES, SAMPLERS, NoiseSchedule, make_plan

pytestmark = pytest.mark.usefixtures("_one_thread")


def problem(checkpoint: Path, **changes: Any) -> UNetProblem:
    case = Case(**({"unet": str(checkpoint), "steps": 3, "latent_height": 16, "latent_width": 16} | changes))
    plan = make_plan(case.sampler, NoiseSchedule.from_diffusers(SCHEDULER_CONFIG), case.steps)
    return UNetProblem(case, load_unet(checkpoint, backend="torch"), plan, SCHEDULER_CONFIG)


def test_every_sampler_has_its_diffusers_class() -> None:
    diffusers = pytest.importorskip("diffusers")
    assert set(DIFFUSERS_CLASSES) == set(SAMPLERS)
    for name in DIFFUSERS_CLASSES.values():
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
    inputs = given.check_inputs()
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


def test_sdxl_networks_agree_and_see_what_is_added(tiny_sdxl: Path) -> None:
    given = problem(tiny_sdxl, batch=2)
    inputs = given.check_inputs()
    # As StableDiffusionXLPipeline makes them: original size, crop and target size, in pixels.
    assert inputs.added["time_ids"].tolist() == [[128.0, 128.0, 0.0, 0.0, 128.0, 128.0]] * 4
    ours, theirs = OurBackend("torch").build(given), DiffusersBackend().build(given)
    assert relative_rms(ours(inputs), theirs(inputs)) < 1e-5
    assert relative_rms(OurBackend("torch", is_hoisted=False).build(given)(inputs), theirs(inputs)) < 1e-5
    for name, value in inputs.added.items():
        other = replace(inputs, added={**inputs.added, name: value + 1.0})
        assert relative_rms(ours(other), ours(inputs)) > 1e-4
        assert relative_rms(ours(other), theirs(other)) < 1e-5


@pytest.mark.parametrize(("added_dim", "expected"), [(2816, (1280, 6)), (2560, (1280, 5)), (80, (32, 6))])
def test_what_is_added_has_the_widths_of_the_release(added_dim: int, expected: tuple[int, int]) -> None:
    config = replace(FAMILY["39M"], added_dim=added_dim, added_time_dim=256 if added_dim > 80 else 8)
    added = added_conditions(Case(unet="39M", batch=2), config, torch.Generator())
    assert (added["text_embeds"].shape[1], added["time_ids"].shape[1]) == expected
    assert all(value.shape[0] == 4 for value in added.values())


def test_a_network_whose_added_embedding_is_no_release_has_no_time() -> None:
    config = replace(FAMILY["39M"], added_dim=48, added_time_dim=8)
    with pytest.raises(Unsupported, match="too narrow"):
        added_conditions(Case(unet="39M"), config, torch.Generator())


def test_injected_noise_is_the_schedulers_and_its_own_is_put_back(tiny_checkpoint: Path) -> None:
    given = problem(tiny_checkpoint, sampler="ddpm", guidance_scale=1.0)
    trajectory = DiffusersBackend().build(given)
    inputs = given.check_inputs()
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


def test_fused_projections_give_the_same_on_the_same_memory(tiny_checkpoint: Path) -> None:
    ours = load_unet(tiny_checkpoint, backend="torch")
    plain, fused = diffusers_unet(ours), diffusers_unet(ours)
    fuse_projections(fused)
    processors = {type(processor).__name__ for processor in fused.attn_processors.values()}
    assert processors == {"FusedAttnProcessor2_0"}
    called: list[str] = []
    for name, module in fused.named_modules():
        if name.endswith(("to_q", "to_k", "to_v", "to_qkv", "to_kv")):
            module.register_forward_hook(lambda module, given, result, name=name: called.append(name))
    x, context = torch.randn(2, 4, 16, 16), torch.randn(2, 5, ours.config.context_dim)
    with torch.no_grad():
        found, expected = (
            unet(x, torch.tensor(981), encoder_hidden_states=context, return_dict=False)[0]
            for unet in (fused, plain)
        )
    assert relative_rms(found, expected) < 1e-6
    # Of a self-attention one product, of one to a text two.
    kinds = Counter(name.rsplit(".", 1)[1] for name in called)
    assert kinds["to_qkv"] == kinds["to_kv"] == kinds["to_q"] > 0
    assert not kinds["to_k"]
    assert not kinds["to_v"]
    held = {p.untyped_storage().data_ptr() for p in ours.parameters()}
    assert all(p.untyped_storage().data_ptr() in held for p in fused.parameters())


def test_weights_that_do_not_lie_side_by_side_are_left_to_diffusers_copy() -> None:
    packed = torch.randn(6, 4)
    for parts in (
        [packed[:2], packed[4:6]],
        [packed[2:4], packed[:2]],
        [packed[:2], torch.randn(2, 4)],
        [packed[:, :2], packed[:, 2:]],
    ):
        assert side_by_side(parts) is None
    joined = side_by_side([packed[1:3], packed[3:4], packed[4:6]])
    assert joined is not None
    assert torch.equal(joined, packed[1:6])
    assert joined.data_ptr() == packed[1].data_ptr()


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_the_settings_are_in_force_while_it_is_compiled(mode: CompileMode) -> None:
    """Read off inductor's own configuration in the middle of a compilation, which ends there."""
    config: Any = importlib.import_module("torch._inductor.config")
    seen: dict[str, Any] = {}

    class _SeenEnough(Exception):
        pass

    def look(graph: Any) -> None:
        seen.update(config.get_config_copy())
        raise _SeenEnough

    module = torch.nn.Conv2d(4, 4, 1).requires_grad_(False)
    try:
        with (
            config.patch(post_grad_custom_post_pass=look, fx_graph_cache=False),
            pytest.raises(Exception, match="_SeenEnough"),
            torch.no_grad(),
        ):
            compiled(module, mode)(torch.randn(1, 4, 8, 8))
    finally:
        torch.compiler.reset()
    assert seen["triton.cudagraphs"] is True
    for name, value in {
        "max_autotune": True,
        "conv_1x1_as_mm": True,
        "coordinate_descent_tuning": True,
        "coordinate_descent_check_all_directions": True,
        "epilogue_fusion": False,
    }.items():
        expected = value if mode == "max-autotune" else config.get_config_copy()[name]
        assert seen[name] == expected, name
    # And they are not left behind.
    assert config.epilogue_fusion is True
    assert config.conv_1x1_as_mm is False


def test_what_is_set_beside_the_defaults_is_told() -> None:
    assert DiffusersBackend().settings == ()
    told = DiffusersBackend("max-autotune").settings
    assert set(told) >= {"fuse_qkv_projections", "conv_1x1_as_mm=True", "epilogue_fusion=False"}
    assert "max_autotune=True" in told
    assert "epilogue_fusion=False" not in DiffusersBackend("reduce-overhead").settings


def test_a_records_settings_are_its_backends(tiny_checkpoint: Path) -> None:
    case = problem(tiny_checkpoint).case
    names = ("diffusers", "diffusers-compile")
    records = profile([case.model_copy(update={"backend": n}) for n in names], rule=RepetitionRule(1, 0.0))
    settings = {record.case.backend: record.settings for record in records}
    assert settings["diffusers"] == ()
    assert settings["diffusers-compile"] == DiffusersBackend("reduce-overhead").settings


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
    theirs, ours = profile(cases, rule=RepetitionRule(1, 0.0))
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
        importlib.reload(importlib.import_module("ldmperf.profiling.trajectory.theirs"))
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
