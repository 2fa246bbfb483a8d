"""Progressive distillation: diffusers' DDIM, and teachers whose ideal student is known in closed form."""

import dataclasses
import itertools
import math

import pytest
import torch
from closed_world import cells, study
from closed_world.captions import embedded, none_embedded
from closed_world.distillation import (
    Distill,
    Distilling,
    Levels,
    distilling_gflop,
    guided,
    student_case,
    student_folder,
)
from closed_world.family import SCHEDULE, WORLDS
from closed_world.networks import COMMITTED, forward_gflop, load_network, network_folder, save_network
from closed_world.sampling import Prompts, plan_of
from closed_world.tasks import stages
from closed_world.training import Recipe, trained
from closed_world_tasks import cut_off_after
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from ldmperf.model import UNet
from ldmperf.samplers import initial_noise, sample

WORLD = WORLDS[8]
SHORT = Recipe(steps=6, batch=16, learning_rate=2e-3, warmup=2, untold=0.0)
ALPHAS = torch.tensor(SCHEDULE.alphas_cumprod, dtype=torch.float64)


def tiny(seed=0):
    torch.manual_seed(seed)
    return UNet(WORLD.config(8), backend="torch").eval()


def distilling(recipe=SHORT, *, teacher=None, steps=4, seed=0, before=0):
    return Distilling(
        WORLD,
        tiny(),
        seed,
        recipe,
        before=before,
        teacher=teacher or guided(tiny(), 3.0),
        steps=steps,
    )


def scheduler(steps):
    """diffusers' DDIM in float64, at trailing timesteps."""
    found = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        timestep_spacing="trailing",
    )
    found.alphas_cumprod = ALPHAS
    found.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    found.set_timesteps(steps)
    return found


class Gaussian:
    """Data N(mean, deviation^2) in each element, whose best v is linear in x: exact, in float64."""

    def __init__(self, mean, deviation):
        self.mean, self.variance = mean, deviation**2

    def __call__(self, x, timesteps, context):
        level = ALPHAS[timesteps.long()][:, None, None, None]
        alpha, sigma = level.sqrt(), (1 - level).sqrt()
        x = x.double()
        clean = self.mean + self.variance * alpha * (x - alpha * self.mean) / (alpha**2 * self.variance + sigma**2)
        return ((alpha * x - clean) / sigma).float()

    def transported(self, x, now, then):
        """What many DDIM steps go to: along the ODE, the place in deviations from the mean does not change."""

        def spread(level):
            return math.sqrt(level * self.variance + 1 - level)

        deviations = (x - math.sqrt(now) * self.mean) / spread(now)
        return math.sqrt(then) * self.mean + deviations * spread(then)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([2, 4, 5, 8, 10]), st.data())
def test_a_step_is_diffusers_and_v_is_found_back(steps, data):
    place = data.draw(st.integers(0, steps - 1))
    theirs, levels = scheduler(steps), Levels.of(steps)
    assert levels.timesteps.tolist() == theirs.timesteps.tolist()
    draws = torch.Generator().manual_seed(place)
    x, v = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64, generator=draws)
    now = torch.full((3,), place)
    found = levels.step(x, v, now, now + 1)
    expected = theirs.step(v, theirs.timesteps[place], x).prev_sample
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(levels.v_between(x, found, now, now + 1), v, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("steps", cells.STUDENT_STEPS)
def test_a_students_timesteps_are_every_second_of_its_teachers_and_those_of_its_plan(steps):
    timesteps = Levels.of(2 * steps).timesteps.tolist()
    assert timesteps[::2] == plan_of("ddim", steps).timesteps.tolist()
    # The plan's own steps down, as diffusers has them, end at the student's next timestep.
    assert all(now - then == 1000 // steps for now, then in itertools.pairwise(timesteps[::2]))


def test_steps_that_leave_their_own_timesteps_are_refused():
    with pytest.raises(ValueError, match="give a divisor of 1000"):
        distilling(steps=16)


def test_guidance_is_that_of_the_sampling_loop():
    network, rate = tiny(), 3.0
    prompts = Prompts.of("test", 3)
    x = initial_noise(prompts.seeds, (4, 8, 8))
    plan = plan_of("ddim", 1)
    told, untold = embedded(prompts.factors), none_embedded(3)

    def denoise(model_input, step):
        return network(model_input, float(step.timestep), torch.cat([untold, told]))

    with torch.no_grad():
        expected = sample(denoise, plan, x, guidance_scale=rate, backend="torch")
        v = guided(network, rate)(x, torch.full((3,), 999.0), told)
        alone = guided(network, 1.0)(x, torch.full((3,), 999.0), told)
        torch.testing.assert_close(alone, network(x, 999.0, told), rtol=1e-5, atol=1e-6)
    levels, first = Levels.of(1), torch.zeros(3, dtype=torch.long)
    torch.testing.assert_close(levels.step(x, v, first, first + 1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", cells.STUDENT_STEPS)
def test_a_student_that_reaches_where_diffusers_two_steps_end_has_no_loss(steps):
    """The teacher is the exact denoiser of a Gaussian, guided; the two steps are diffusers', image by image."""
    told, untold = Gaussian(0.7, 0.5), Gaussian(-0.2, 1.1)

    def teacher(x, timesteps, context):
        far = untold(x, timesteps, context)
        return far + 2.0 * (told(x, timesteps, context) - far)

    training = distilling(teacher=teacher, steps=steps)
    fine, seen = Levels.of(2 * steps).timesteps.tolist(), []

    def ideal(x, timesteps, context):
        # Of diffusers' DDIM only the formula: its own next timestep is another where 1000 / steps is no integer.
        answers = []
        for one, t in zip(x.double(), timesteps.tolist(), strict=True):
            reached, place = one, fine.index(t)
            ends = [*fine, None]
            for at in (place, place + 1):
                v = teacher(reached[None].float(), torch.tensor([fine[at]]), None)[0].double()
                reached = ddim(reached, v, ends[at], ends[at + 1])
            now, then = ALPHAS[int(t)], level(ends[place + 2])
            # A student's step is cos x - sin v, with the angle between the two noise levels.
            angle = torch.atan2((1 - now).sqrt(), now.sqrt()) - torch.atan2((1 - then).sqrt(), then.sqrt())
            answers.append((angle.cos() * one - reached) / angle.sin())
            seen.append(t)
        return torch.stack(answers).float()

    training.network.forward = ideal
    assert training._loss(1).item() < 1e-9
    assert set(seen) <= set(fine[::2])
    assert len(set(seen)) > 1


def level(timestep):
    return torch.tensor(1.0, dtype=torch.float64) if timestep is None else ALPHAS[int(timestep)]


def ddim(x, v, timestep, then):
    """Song et al., equation 12, of a v prediction, in float64."""
    now, after = level(timestep), level(then)
    clean, noise = now.sqrt() * x - (1 - now).sqrt() * v, now.sqrt() * v + (1 - now).sqrt() * x
    return after.sqrt() * clean + (1 - after).sqrt() * noise


def test_four_steps_of_the_ideal_student_are_eight_of_its_teacher():
    """And both come near the ODE's own end, which a student of four untaught steps misses by more."""
    teacher, fine = Gaussian(0.7, 0.5), Levels.of(8)

    def student(x, step):
        now = torch.full((len(x),), 2 * step.index)
        reached = x
        for place in (now, now + 1):
            reached = fine.step(reached, teacher(reached, fine.timesteps[place], None), place, place + 1)
        return fine.v_between(x, reached, now, now + 2)

    def untaught(x, step):
        return teacher(x, torch.full((len(x),), step.timestep), None)

    noise = initial_noise(range(4), (4, 8, 8))
    by_four, by_eight = plan_of("ddim", 4), plan_of("ddim", 8)
    found = sample(student, by_four, noise, backend="torch")
    torch.testing.assert_close(found, sample(untaught, by_eight, noise, backend="torch"), rtol=1e-4, atol=1e-4)
    end = teacher.transported(noise.double(), ALPHAS[999].item(), 1.0)
    taught, plain = (
        (made - end).abs().mean() for made in (found, sample(untaught, by_four, noise, backend="torch"))
    )
    assert taught < 0.7 * plain


def test_a_short_round_lowers_the_loss():
    """The same scenes each time: the loss differs much between timesteps."""
    training = distilling(dataclasses.replace(SHORT, steps=20))
    with torch.no_grad():
        before = training._loss(1).item()
    for _ in range(20):
        training.step()
    with torch.no_grad():
        assert training._loss(1).item() < 0.7 * before


def test_a_students_scenes_come_after_those_of_its_teachers_training():
    early, late = distilling(before=0), distilling(before=5)
    batch = late._read(late._source, 2)
    assert torch.equal(batch.latents, early._source.read(6 * SHORT.batch, SHORT.batch).latents)
    first, second = (torch.rand(3, generator=one._draws(number)) for one, number in ((early, 7), (late, 2)))
    assert torch.equal(first, second)


def test_a_round_that_was_cut_off_goes_on_to_the_same_bits(tmp_path):
    whole = trained(distilling(), tmp_path / "whole.pt")

    with pytest.raises(KeyboardInterrupt):
        trained(cut_off_after(5, distilling()), tmp_path / "cut.pt", every=2)
    again = trained(distilling(), tmp_path / "cut.pt", every=2)
    assert again.done == 6
    for name, value in whole.averaged.items():
        assert torch.equal(value, again.averaged[name])


def of(folder):
    return study.Study(
        folder,
        folder / "given",
        "a" * 32,
        recipe=Recipe(steps=10),
        distilling=dataclasses.replace(SHORT, steps=2),
        seeds=(0,),
        samples=60,
        held_out=40,
    )


def test_a_network_is_distilled_and_judged_once(tmp_path, monkeypatch):
    one = of(tmp_path)
    save_network(tiny(), network_folder(one.weights, 8, 0))
    one.judge.write_bytes((COMMITTED / "judge.safetensors").read_bytes())
    monkeypatch.setattr("closed_world.distillation.tuned_rates", lambda *_: {16: 2.0})
    told = []
    Distill(8, 0).run(dataclasses.replace(one, tell=told.append))
    # Two rounds of two steps.
    assert told == [0.25, 0.5, 0.75, 1.0]
    (record,) = study.kept(one).values()
    case = record.case
    assert (case.kind, case.network, case.sampler, case.steps) == ("distilled", "w8", "ddim", 4)
    assert (case.training_steps, case.guided, record.tuned) == (4, False, True)
    assert record.takes == (("w8", 4),)
    forward = forward_gflop(WORLD.config(8), 8)
    assert record.gflop_per_image == pytest.approx(4 * forward)
    # 10 steps of training, then 2 of a round with guidance and 2 of one without.
    forwards = 3 * 10 * 32 + (4 + 3) * 2 * 16 + (2 + 3) * 2 * 16
    assert record.training_gflop == pytest.approx(forwards * forward)
    folders = [student_folder(one, 8, 0, steps) for steps in (8, 4)]
    assert {folder.name for folder in folders} == {"w8"}
    assert all(folder.is_relative_to(one.folder / "weights") for folder in folders)
    assert {path.name for path in one.weights.iterdir()} == {"seed-0", "judge.safetensors"}
    teacher, *students = (
        load_network(folder).state_dict() for folder in (network_folder(one.weights, 8, 0), *folders)
    )
    name = "conv_out.weight"
    assert not torch.equal(teacher[name], students[0][name])
    assert not torch.equal(students[0][name], students[1][name])
    monkeypatch.setattr("closed_world.distillation.trained", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(study, "sampled", lambda *_, **__: pytest.fail("sampled again"))
    Distill(8, 0).run(one)
    # Students that came with the networks are taken.
    folders[1].parents[1].rename(one.weights / folders[1].parents[1].name)
    assert student_folder(one, 8, 0, 4).is_relative_to(one.weights)
    assert student_folder(one, 8, 1, 4).is_relative_to(one.folder / "weights")


def test_the_second_teacher_has_no_guidance_and_goes_on_after_the_first(tmp_path, monkeypatch):
    one, seen = of(tmp_path), []
    save_network(tiny(), network_folder(one.weights, 8, 0))

    class Watched(Distilling):
        def __init__(self, *given, **named):
            seen.append(named)
            super().__init__(*given, **named)

    rates = []
    monkeypatch.setattr("closed_world.distillation.Distilling", Watched)
    monkeypatch.setattr(
        "closed_world.distillation.guided", lambda network, rate: rates.append(rate) or guided(network, rate)
    )
    from closed_world.distillation import distilled

    distilled(one, 8, 0, 2.5)
    assert rates == [2.5, 1.0]
    assert [named["before"] for named in seen] == [10, 12]
    assert [named["steps"] for named in seen] == [8, 4]


def test_a_teacher_without_guidance_costs_less():
    one = of(COMMITTED)
    assert distilling_gflop(one, 8, 1.0) / distilling_gflop(one, 8, 2.0) == pytest.approx(10 / 12)


def test_every_network_is_distilled_once():
    one = dataclasses.replace(of(COMMITTED), seeds=(0, 1, 2))
    tasks = stages(one, ("ddim",))["distill"]
    keys = {student_case(one, task.width, task.seed).key for task in tasks}
    assert len(tasks) == len(keys) == 15
