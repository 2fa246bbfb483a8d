"""A GAN: its losses in closed form, what each network learns from, and its cells."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from closed_world import study
from closed_world.adversarial import (
    PENALTY,
    PENALTY_EVERY,
    WRONG,
    Adversarial,
    Discriminator,
    TrainGan,
    discriminator_gflop,
    discriminator_loss,
    gan_folder,
    gan_gflop,
    generated,
    gradient_penalty,
    spread,
)
from closed_world.captions import embedded, none_embedded
from closed_world.data import Source
from closed_world.family import WORLDS
from closed_world.networks import COMMITTED, forward_gflop, load_network, save_network
from closed_world.sampling import Prompts
from closed_world.tasks import stages
from closed_world.training import ADVERSARIAL, Recipe, drawn_network, trained
from closed_world_tasks import cut_off_after
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ldmperf.model import UNet
from ldmperf.samplers import initial_noise

WORLD = WORLDS[8]
SHORT = dataclasses.replace(ADVERSARIAL, steps=20, batch=16, warmup=5)
SCORES = st.lists(st.floats(-3, 3), min_size=1, max_size=9)


def begun(recipe=SHORT, seed=0):
    network = drawn_network(WORLD.config(8), seed)
    # Whatever others draw changes nothing.
    torch.seed()
    return Adversarial(WORLD, network, seed, recipe)


def latents(count, seed=0):
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=50, deadline=None)
@given(SCORES, SCORES, SCORES)
def test_the_discriminators_loss_is_the_hinge_score_by_score(real, made, wrong):
    """Real scores below 1 cost what they lack, others above -1 what they have too much."""
    expected = sum(max(0, 1 - score) for score in real) / len(real)
    expected += sum(max(0, 1 + score) for score in made) / len(made)
    expected += WRONG * sum(max(0, 1 + score) for score in wrong) / len(wrong)
    found = discriminator_loss(*(torch.tensor(one, dtype=torch.float64) for one in (real, made, wrong)))
    assert found.item() == pytest.approx(expected, abs=1e-12)


def test_the_penalty_of_a_quadratic_is_known_and_so_is_its_gradient():
    """Of scores a |x|^2 / 2 the gradient is a x: the penalty a^2 |x|^2 / 2, by a it changes by a |x|^2."""
    x = latents(5).double().requires_grad_()
    a = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    mean_square = x.detach().square().sum((1, 2, 3)).mean()
    found = gradient_penalty(a * x.square().sum((1, 2, 3)) / 2, x)
    torch.testing.assert_close(found, a.detach() ** 2 * mean_square / 2)
    found.backward()
    torch.testing.assert_close(a.grad, a.detach() * mean_square)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 99))
def test_a_spread_is_numpys_deviation_in_groups_of_neighbours(groups, width, seed):
    features = np.random.default_rng(seed).normal(size=(4 * groups, width))
    expected = [features[4 * i : 4 * i + 4].std(0).mean() for i in range(groups) for _ in range(4)]
    found = spread(torch.from_numpy(features))
    assert found.shape == (4 * groups, 1)
    np.testing.assert_allclose(found[:, 0].numpy(), expected, atol=1e-4)


def test_latents_that_are_all_alike_have_no_spread_and_finite_gradients():
    features = torch.ones(4, 7, requires_grad=True)
    found = spread(features)
    assert found.max() < 1e-3
    found.sum().backward()
    assert features.grad.isfinite().all()


@pytest.mark.parametrize("world", WORLDS.values())
def test_a_score_is_linear_in_the_caption_and_depends_on_both(world):
    """The projection: of contexts half way between two, a score is half way, too."""
    torch.manual_seed(1)
    judge = Discriminator(world).double()
    x = torch.randn(4, 4, world.latent, world.latent, dtype=torch.float64)
    one = embedded(Prompts.of("test", 4).factors).double()
    other = none_embedded(4).double()
    with torch.no_grad():
        first, second, between = (judge(x, context) for context in (one, other, (one + other) / 2))
        torch.testing.assert_close(between, (first + second) / 2)
        assert first.shape == (4,)
        assert (first - second).abs().min() > 1e-4
        assert (judge(x.roll(1, -1), one) - first).abs().min() > 1e-6


def test_the_discriminator_sees_its_scenes_their_captions_and_those_of_others(monkeypatch):
    """A step's scenes are the family's; fakes and real latents are of the same captions."""
    training, seen = begun(seed=3), []
    asked = {}
    training.network.forward = lambda *given: asked.setdefault("network", given)[0] * 2
    training.discriminator.forward = lambda *given: seen.append(given) or given[0].sum((1, 2, 3))
    loss = training._discriminator_loss(2)
    scenes = Source(WORLD, 1003).read(SHORT.batch, SHORT.batch)
    context = embedded(scenes.factors)
    noise, timestep, told = asked["network"]
    assert timestep == 999
    assert torch.equal(told, context)
    wrong = torch.cat([context[-1:], context[:-1]])
    for x, its in ((scenes.latents, context), (scenes.latents, wrong), (2 * noise, context)):
        assert sum(torch.equal(x, one) and torch.equal(its, other) for one, other in seen) == 1
    assert len(seen) == 3
    real, made = scenes.latents.sum((1, 2, 3)), 2 * noise.sum((1, 2, 3))
    expected = F.relu(1 - real).mean() + F.relu(1 + made).mean() + WRONG * F.relu(1 + real).mean()
    torch.testing.assert_close(loss, expected)


def test_the_generator_is_told_the_same_captions_and_has_noise_of_its_own():
    training, seen = begun(seed=3), []
    training.network.forward = lambda *given: seen.append(given) or given[0]
    training.discriminator.forward = lambda x, context: (x * context.mean()).sum((1, 2, 3))
    found = training._loss(2)
    training._discriminator_loss(2)
    (noise, timestep, context), (other, _, others_context) = seen
    assert timestep == 999
    assert torch.equal(context, others_context)
    torch.testing.assert_close(found, -(noise * context.mean()).sum((1, 2, 3)).mean())
    assert abs(torch.corrcoef(torch.stack([noise.flatten(), other.flatten()]))[0, 1]) < 0.1
    for one in (noise, other):
        assert abs(one.mean()) < 0.05
        assert abs(one.std() - 1) < 0.05


def test_the_penalty_is_taken_in_one_step_of_four_and_weighs_four_times_as_much():
    """A discriminator that is linear in its latents has the gradient of its weights everywhere."""
    training, rate = begun(), 0.01
    training.discriminator.forward = lambda x, context: rate * x.sum((1, 2, 3))
    plain = dict.fromkeys(range(1, 9), 0.0)
    for number in plain:
        batch = training._read(training._source, number)
        with torch.no_grad():
            made = training.network(training._noises(number)[0], 999.0, embedded(batch.factors))
        real, fake = (rate * x.sum((1, 2, 3)) for x in (batch.latents, made))
        hinges = F.relu(1 - real).mean() + F.relu(1 + fake).mean() + WRONG * F.relu(1 + real).mean()
        plain[number] = training._discriminator_loss(number).item() - hinges.item()
    squared = rate**2 * 4 * 8 * 8
    for number, found in plain.items():
        expected = PENALTY_EVERY * PENALTY * squared / 2 if number in (4, 8) else 0.0
        assert found == pytest.approx(expected, abs=1e-6), number


def test_each_network_steps_down_its_own_loss():
    """A step with a small rate lowers the discriminator's loss, and then the generator's against it."""
    recipe = dataclasses.replace(SHORT, learning_rate=1e-4, last_rate=1e-4, warmup=1)
    training = begun(recipe)
    with torch.no_grad():
        before = training._discriminator_loss(1).item()
    weights = {name: value.clone() for name, value in training.network.state_dict().items()}
    generators = training.step()
    with torch.no_grad():
        after = training._loss(1).item()
        changed = training.network.state_dict()
        assert after < generators
        # The discriminator stepped against the generator as it was.
        moved = {name: value.clone() for name, value in changed.items()}
        training.network.load_state_dict(weights)
        assert training._discriminator_loss(1).item() < before
    assert any(not torch.equal(moved[name], value) for name, value in weights.items())


def test_twenty_steps_bring_made_latents_nearer_to_real_ones_and_tell_the_two_apart():
    """Mean and deviation at each place, of averaged weights; and the discriminator's loss on scenes of step 1."""
    training = begun(dataclasses.replace(SHORT, learning_rate=5e-3, last_rate=5e-4))
    prompts, real = Prompts.of("held-out", 64), Source(WORLD, 1000).read(0, 64).latents

    def distance():
        made = generated(training.averaged_network(), WORLD, prompts)
        return sum((of(made) - of(real)).square().mean() for of in (lambda x: x.mean(0), lambda x: x.std(0)))

    def loss():
        with torch.no_grad():
            return training._discriminator_loss(1).item()

    distance_before, loss_before = distance(), loss()
    for _ in range(20):
        training.step()
    assert distance() < 0.7 * distance_before
    assert loss() < 0.7 * loss_before


def test_a_seed_gives_the_same_bits_and_another_seed_others():
    first, second, other = (begun(seed=seed) for seed in (3, 3, 4))
    found = [[one.step() for _ in range(4)] for one in (first, second, other)]
    assert found[0] == found[1] != found[2]
    for one, two in zip(first.discriminator.parameters(), second.discriminator.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_training_that_was_cut_off_goes_on_to_the_same_bits(tmp_path):
    """Over a step with a penalty, of both networks."""
    recipe = dataclasses.replace(SHORT, steps=6)
    whole = trained(begun(recipe), tmp_path / "whole.pt")
    with pytest.raises(KeyboardInterrupt):
        trained(cut_off_after(5, begun(recipe)), tmp_path / "cut.pt", every=2)
    again = trained(begun(recipe), tmp_path / "cut.pt", every=2)
    assert again.done == 6
    for name, value in whole.averaged.items():
        assert torch.equal(value, again.averaged[name])
    theirs = again.discriminator.state_dict()
    for name, value in whole.discriminator.state_dict().items():
        assert torch.equal(value, theirs[name])


def test_a_latent_is_diffusers_network_once_from_the_familys_noise(tmp_path):
    torch.manual_seed(0)
    network = UNet(WORLD.config(8), backend="torch").eval()
    save_network(network, tmp_path / "w8-gan")
    theirs = UNet2DConditionModel.from_pretrained(tmp_path / "w8-gan", torch_dtype=torch.float32).eval()
    prompts = Prompts.of("test", 5)
    found = generated(load_network(tmp_path / "w8-gan"), WORLD, prompts, batch=2)
    with torch.no_grad():
        expected = theirs(initial_noise(prompts.seeds, (4, 8, 8)), 999, embedded(prompts.factors)).sample
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert found.is_contiguous()


def of(folder):
    return study.Study(
        folder,
        folder / "given",
        "a" * 32,
        recipe=Recipe(steps=10),
        adversarial=dataclasses.replace(SHORT, steps=8),
        seeds=(0,),
        samples=60,
        held_out=40,
    )


def test_a_gan_is_trained_and_judged_once(tmp_path, monkeypatch):
    one = of(tmp_path)
    one.weights.mkdir()
    one.judge.write_bytes((COMMITTED / "judge.safetensors").read_bytes())
    TrainGan(8, 0).run(one)
    records = list(study.kept(one).values())
    assert [(r.case.split, r.case.samples, r.tuned) for r in records] == [
        ("held-out", 40, False),
        ("test", 60, True),
    ]
    for record in records:
        case = record.case
        assert (case.task, case.kind, case.network, case.sampler) == ("t2i", "gan", "w8-gan", "none")
        assert (case.steps, case.guided, case.training_seed, case.training_steps) == (1, False, 0, 8)
        assert record.takes == (("w8-gan", 1),)
        assert record.gflop_per_image == pytest.approx(forward_gflop(WORLD.config(8), 8))
        assert record.parameters == 53284
        assert bool(record.frechet.replicates) == (case.split == "test")
    folder = gan_folder(one, 8, 0)
    assert folder.name == "w8-gan"
    assert folder.is_relative_to(one.folder / "weights")
    assert list(one.weights.iterdir()) == [one.judge]
    monkeypatch.setattr("closed_world.adversarial.trained", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr("closed_world.adversarial.generated", lambda *_: pytest.fail("made again"))
    TrainGan(8, 0).run(one)


class Counted(TorchDispatchMode):
    """FLOPs by torch's formulas; its own counter of modules fails where a gradient is asked for."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if formula := flop_registry.get(func.overloadpacket):
            self.flops += formula(*args, **kwargs or {}, out_val=out)
        return out


@pytest.mark.parametrize("width", [8, 32])
def test_training_costs_what_torch_counts_in_its_steps(width, tmp_path):
    """Four steps, one of them with the penalty. Torch counts what a trajectory keeps too (embeddings, contexts),
    and no backward to an input that wants none. A forward more or less of either network is beyond the bounds."""
    recipe = dataclasses.replace(SHORT, steps=4)
    training = Adversarial(WORLD, drawn_network(WORLD.config(width), 0), 0, recipe)
    with Counted() as counted:
        for _ in range(4):
            training.step()
    found = gan_gflop(dataclasses.replace(of(tmp_path), adversarial=recipe), width)
    assert 1.0 < found / (counted.flops / 1e9) < 1.05


def test_a_score_costs_its_layers():
    """By hand: places, inputs and outputs of each convolution and linear layer, two operations each."""
    convolutions = [(64, 4, 32), (64, 32, 32), (64, 32, 32), (16, 32, 64), (16, 64, 64), (16, 64, 64)]
    counted = sum(2 * 9 * places * inputs * outputs for places, inputs, outputs in convolutions)
    counted += 2 * (1025 * 128 + 128 + 192 * 128)
    assert discriminator_gflop(WORLD) == pytest.approx(counted / 1e9)


def test_every_width_has_a_generator_for_each_seed():
    one = dataclasses.replace(of(COMMITTED), seeds=(0, 1, 2))
    tasks = stages(one, ("ddim",))["gan"]
    cases = [task.case(one, split) for task, split in itertools.product(tasks, ("test", "held-out"))]
    assert len({case.key for case in cases}) == 30
    assert {case.network for case in cases} == {"w8-gan", "w12-gan", "w16-gan", "w24-gan", "w32-gan"}
    assert all(task.cost > 0 for task in tasks)
