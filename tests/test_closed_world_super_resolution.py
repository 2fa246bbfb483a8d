"""Super-resolution: what a network sees, where its weights come from, and its cells."""

import dataclasses
import hashlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from closed_world import cells, study
from closed_world.captions import embedded, none_embedded
from closed_world.data import Source
from closed_world.family import SCHEDULE, WORLDS
from closed_world.latents import autoencoder
from closed_world.networks import COMMITTED, forward_gflop, load_network, network_folder, save_network
from closed_world.sampling import Prompts, plan_of, real_samples, sampled
from closed_world.scenes import Scenes
from closed_world.super_resolution import (
    IN_CHANNELS,
    FineTune,
    TrainingSuperResolution,
    conditions,
    doubled,
    half_side,
    recipe_of,
    super_folder,
    widened,
)
from closed_world.tasks import JudgeReal, stages
from closed_world.training import Recipe, Training, drawn_network, trained
from closed_world_tasks import cut_off_after
from diffusers import DDIMScheduler, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st

from ldmperf.model import UNet
from ldmperf.samplers import initial_noise

WORLD = WORLDS[8]
SHORT = Recipe(steps=20, batch=16, learning_rate=2e-3, warmup=5, untold=0.0)


def tiny(channels=4, seed=0):
    torch.manual_seed(seed)
    return UNet(WORLD.config(8, channels), backend="torch").eval()


def training(recipe=SHORT, *, network=None, before=0, seed=0):
    network = network or drawn_network(WORLD.config(8, IN_CHANNELS), seed)
    return TrainingSuperResolution(WORLD, network, seed, recipe, before=before)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
def test_places_are_doubled_as_torchs_nearest(count, height, width, seed):
    low = torch.randn(count, 4, height, width, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(doubled(low), F.interpolate(low, scale_factor=2, mode="nearest"))


@pytest.mark.parametrize("world", WORLDS.values())
def test_a_condition_is_the_scene_in_half_its_side(world):
    """In integers by hand; and near the mean of the scene's own latents, which no other scene's is."""
    side, count = world.side // 2, 200
    low = Source(world, 7, half_side(world)).read(0, count)
    one = autoencoder(world.side)
    images, factors = Scenes(7, side).images(0, count)
    patches = F.unfold(torch.from_numpy(images).double(), 4, stride=4).numpy().round().astype(np.int64)
    sums = np.einsum("ck,nkp->ncp", one.components, patches - one.mean[:, None])
    expected = (sums / (1024 * one.deviations[:, None])).astype(np.float32)
    assert np.array_equal(low.latents.flatten(2).numpy(), expected)
    assert torch.equal(low.factors, torch.from_numpy(factors))
    pooled = F.avg_pool2d(Source(world, 7).read(0, count).latents, 2)
    assert low.latents.shape == pooled.shape == (count, 4, side // 4, side // 4)

    def alike(first, second):
        return np.corrcoef(first.flatten().numpy(), second.flatten().numpy())[0, 1]

    assert alike(low.latents, pooled) > 0.8
    assert alike(low.latents, pooled.roll(1, 0)) < 0.4


def test_conditions_have_the_bits_that_they_have_on_every_machine():
    found = {latent: Source(world, 1, half_side(world)).read(0, 64).latents for latent, world in WORLDS.items()}
    digests = {
        latent: hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16] for latent, values in found.items()
    }
    assert digests == DIGESTS


def test_conditions_are_those_of_the_prompts():
    found = conditions(WORLD, "test", 9)
    assert found.shape == (9, 4, 8, 8)
    scenes, seed = real_samples(WORLD, "test", 9), 55
    assert torch.equal(scenes.factors, Prompts.of("test", 9).factors)
    assert torch.equal(found, doubled(Source(WORLD, seed, 16).read(0, 9).latents))
    assert not torch.equal(found, conditions(WORLD, "held-out", 9))


def test_a_widened_network_does_what_it_did_whatever_the_new_channels_hold():
    """In float64; until the new weights are other than zero."""
    network = tiny().double()
    wide = widened(network, WORLD, 8)
    x, other = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    context = embedded(Prompts.of("test", 3).factors).double()
    with torch.no_grad():
        expected = network(x, 500.0, context)
        found = wide(torch.cat([x, other], 1), 500.0, context)
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
        assert not torch.allclose(wide(torch.cat([other, x], 1), 500.0, context), expected, atol=1e-3)
        wide.conv_in.weight[:, 4:] = 0.1
        assert not torch.allclose(wide(torch.cat([x, other], 1), 500.0, context), expected, atol=1e-3)
    assert wide.config == WORLD.config(8, IN_CHANNELS)
    assert network.conv_in.weight.shape[1] == 4


def test_a_network_sees_noised_latents_then_its_condition():
    """Of the same scenes, noise and timesteps as text-to-image has at that step."""
    plain, super_ = Training(WORLD, tiny(), 3, SHORT, before=5), training(before=5, seed=3)
    seen = {}
    for name, one in (("plain", plain), ("sr", super_)):
        one.network.forward = lambda *given, name=name: seen.setdefault(name, given)[0][:, :4]
        one._loss(2)
    (x, t, context), (wide, other_t, other_context) = seen["plain"], seen["sr"]
    assert torch.equal(wide[:, :4], x)
    assert torch.equal(t, other_t)
    assert torch.equal(context, other_context)
    # Step 2 after 5 is the seventh batch of the seed's scenes.
    low = Source(WORLD, 1003, 16).read(6 * SHORT.batch, SHORT.batch)
    assert torch.equal(wide[:, 4:], doubled(low.latents))
    assert torch.equal(context, embedded(low.factors))


@pytest.mark.parametrize("pretrained", [True, False])
def test_every_caption_is_told(pretrained):
    recipe = dataclasses.replace(recipe_of(100, pretrained), batch=64)
    one = training(recipe)
    seen = []
    one.network.forward = lambda x, t, context: seen.append(context) or x[:, :4]
    one._loss(1)
    assert not (seen[0] == none_embedded(64)).all(-1).all(-1).any()
    assert recipe.steps == 100
    assert recipe.rate(100) < recipe.rate(50) > recipe.rate(1)


def test_twenty_steps_lower_the_loss_and_use_the_condition():
    one = training(network=widened(tiny(), WORLD, 8))
    found = [one.step() for _ in range(20)]
    assert sum(found[-4:]) < 0.95 * sum(found[:4])
    assert one.averaged_network().conv_in.weight[:, 4:].abs().max() > 1e-3


@pytest.mark.parametrize("pretrained", [True, False])
def test_a_training_that_was_cut_off_goes_on_to_the_same_bits(tmp_path, pretrained):
    def of():
        network = widened(tiny(), WORLD, 8) if pretrained else None
        return training(dataclasses.replace(SHORT, steps=4), network=network, before=3)

    whole = trained(of(), tmp_path / "whole.pt")

    with pytest.raises(KeyboardInterrupt):
        trained(cut_off_after(3, of()), tmp_path / "cut.pt", every=2)
    again = trained(of(), tmp_path / "cut.pt", every=2)
    for name, value in whole.averaged.items():
        assert torch.equal(value, again.averaged[name])


def test_sampling_is_diffusers_network_and_ddim_with_the_condition_concatenated(tmp_path):
    network = tiny(IN_CHANNELS)
    save_network(network, tmp_path / "w8-sr")
    theirs = UNet2DConditionModel.from_pretrained(tmp_path / "w8-sr", torch_dtype=torch.float32).eval()
    prompts, beside = Prompts.of("test", 3), conditions(WORLD, "test", 3)
    ours = load_network(tmp_path / "w8-sr")
    found = sampled([ours] * 4, WORLD, plan_of("ddim", 4), prompts, 1.0, batch=2, beside=beside)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(4)
    x = initial_noise(prompts.seeds, (4, 8, 8))
    with torch.no_grad():
        for t in scheduler.timesteps:
            v = theirs(torch.cat([x, beside], 1), t, embedded(prompts.factors)).sample
            x = scheduler.step(v, t, x).prev_sample
    torch.testing.assert_close(found, x, rtol=1e-3, atol=1e-3)
    assert SCHEDULE.prediction_type == "v_prediction"


def test_a_guided_pair_sees_the_condition_twice():
    """With guidance 2 of networks that answer the condition: what no guidance gives."""
    network = tiny(IN_CHANNELS)
    network.denoise = lambda x, conditions, index: x[:, 4:]
    prompts, beside = Prompts.of("test", 3), conditions(WORLD, "test", 3)
    plain, pair = (
        sampled([network], WORLD, plan_of("ddim", 1), prompts, rate, batch=2, beside=beside) for rate in (1.0, 2.0)
    )
    torch.testing.assert_close(plain, pair)


def of(folder):
    return study.Study(
        folder,
        folder / "given",
        "a" * 32,
        # Its batch is none of super-resolution's.
        recipe=Recipe(steps=10, batch=16),
        fine_tuned=(1, 2),
        seeds=(0,),
        samples=60,
        held_out=40,
    )


def test_networks_are_trained_and_judged_once(tmp_path, monkeypatch):
    one = of(tmp_path)
    save_network(tiny(), network_folder(one.weights, 8, 0))
    one.judge.write_bytes((COMMITTED / "judge.safetensors").read_bytes())
    tasks = [FineTune(8, 0, 2, True, (1, 2)), FineTune(8, 0, 2, False, (2,))]
    for task in tasks:
        told = []
        task.run(dataclasses.replace(one, tell=told.append))
        assert told == sorted(told)
        assert told[-1] == pytest.approx(1.0)
        # Two steps of training, then cells.
        assert len(told) == 2 + 2 * len(task.sampled)
    records = list(study.kept(one).values())
    cells_of = [("held-out", 1, 40), ("held-out", 2, 40), ("test", 1, 60), ("test", 2, 60)]
    found = [(r.case.kind, (r.case.split, r.case.steps, r.case.samples)) for r in records]
    assert found == [("diffusion", cell) for cell in cells_of] + [("scratch", cell) for cell in cells_of[1::2]]
    forward = forward_gflop(WORLD.config(8, 8), 8)
    earlier = {"diffusion": 3 * 10 * 16 * forward_gflop(WORLD.config(8), 8), "scratch": 0}
    for record in records:
        case = record.case
        assert (case.task, case.network, case.sampler) == ("sr", "w8-sr", "ddim")
        assert (case.training_steps, case.guided) == (2, False)
        assert record.tuned == (case.split == "test")
        assert record.takes == ((case.network, case.steps),)
        assert record.gflop_per_image == pytest.approx(case.steps * forward)
        assert record.training_gflop == pytest.approx(earlier[case.kind] + 3 * 2 * 32 * forward)
    folders = [super_folder(one, 8, 0, 2, pretrained) for pretrained in (True, False)]
    assert folders[0] != folders[1]
    for folder in folders:
        assert folder.name == "w8-sr"
        assert load_network(folder).config.in_channels == 8
        assert folder.is_relative_to(one.folder / "weights")
    monkeypatch.setattr("closed_world.super_resolution.trained", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(study, "sampled", lambda *_, **__: pytest.fail("sampled again"))
    for task in tasks:
        task.run(one)


def test_only_the_pretrained_network_starts_from_text_to_image(tmp_path, monkeypatch):
    one, started = of(tmp_path), []
    save_network(tiny(), network_folder(one.weights, 8, 0))

    def first(training, keep, tell):
        started.append({name: value.clone() for name, value in training.network.state_dict().items()})
        return training

    monkeypatch.setattr("closed_world.super_resolution.trained", first)
    for pretrained in (True, False):
        FineTune(8, 0, 2, pretrained, (1,))._trained(one)
    pretrained, scratch = started
    for name, value in load_network(network_folder(one.weights, 8, 0)).state_dict().items():
        if name == "conv_in.weight":
            assert torch.equal(pretrained[name][:, :4], value)
            assert not pretrained[name][:, 4:].any()
        else:
            assert torch.equal(pretrained[name], value), name
    assert scratch["conv_in.weight"][:, 4:].abs().min() > 0
    assert not torch.equal(scratch["conv_out.weight"], pretrained["conv_out.weight"])


def test_the_stage_covers_both_weights_of_every_width_over_time_and_steps_after_the_longest():
    one = dataclasses.replace(of(COMMITTED), fine_tuned=(100, 300, 1000), seeds=(0, 1))
    real, *tasks = stages(one, ("ddim",))["super-resolution"]
    assert real == JudgeReal("sr")
    keys = [task.case(one, number, "test").key for task in tasks for number in task.sampled]
    assert len(keys) == len(set(keys)) == 2 * 5 * (len(cells.SUPER_RESOLVED) + 5)
    assert {(task.width, task.seed, task.steps, task.pretrained) for task in tasks} == {
        (width, seed, steps, pretrained)
        for width in WORLD.widths
        for seed in (0, 1)
        for steps in (100, 300, 1000)
        for pretrained in (True, False)
    }
    assert all(set(cells.SUPER_RESOLVED_BRIEFLY) <= set(task.sampled) for task in tasks)
    assert all(task.cost > 0 for task in tasks)


DIGESTS = {8: "50ef5f9c3105b210", 16: "c7ff019535434432"}
