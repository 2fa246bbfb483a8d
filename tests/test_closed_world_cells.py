"""Sampling, tuning and keeping of cells."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from closed_world import cells, stitching, study, tasks
from closed_world.family import SCHEDULE, WORLDS
from closed_world.networks import COMMITTED, forward_gflop, network_folder, save_network
from closed_world.sampling import Prompts, plan_of, real_samples, sampled
from closed_world.scenes import Scenes
from closed_world.tasks import stages
from closed_world.training import Recipe
from hypothesis import given
from hypothesis import strategies as st

from ldmperf.model import UNet
from ldmperf.samplers import initial_noise, sample

WORLD = WORLDS[8]


@given(st.integers(0, len(cells.RATES) - 1), st.sampled_from(cells.RATES), st.floats(0.1, 10))
def test_the_climb_finds_the_bottom_of_a_valley_from_everywhere(bottom, start, slope):
    asked = []

    def score(rate):
        asked.append(rate)
        return slope * abs(cells.RATES.index(rate) - bottom)

    assert cells.climbed(score, start) == cells.RATES[bottom]
    assert len(asked) == len(set(asked))


def test_the_climb_leaves_scores_that_are_not_finite():
    assert cells.climbed(lambda rate: math.inf if rate > 2 else 1 / rate, 2.0) == 2.0


def tiny(seed=0):
    torch.manual_seed(seed)
    return UNet(WORLD.config(8), backend="torch").eval()


def test_an_image_does_not_depend_on_those_beside_it():
    network, plan, prompts = tiny(), plan_of("ddpm", 3), Prompts.of("test", 5)
    whole = sampled([network] * 3, WORLD, plan, prompts, 2.0, batch=5)
    parts = sampled([network] * 3, WORLD, plan, prompts, 2.0, batch=2)
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-4)


def test_the_network_of_each_step_takes_it():
    """Two networks in turn, by hand: DDIM (Song et al.) with a v prediction (Salimans and Ho)."""
    first, second = tiny(0), tiny(1)
    prompts = Prompts.of("test", 2)
    plan = plan_of("ddim", 2)
    found = sampled([first, second], WORLD, plan, prompts, 1.0)
    other = sampled([second, first], WORLD, plan, prompts, 1.0)
    assert not torch.allclose(found, other, atol=1e-3)
    from closed_world.captions import embedded

    x = initial_noise(prompts.seeds, (4, 8, 8))
    alphas = torch.tensor(SCHEDULE.alphas_cumprod)
    # Trailing: 1000 and 500 as counted from 1; before the first timestep diffusers' DDIM has alpha 1.
    for network, t, before in ((first, 999, 499), (second, 499, None)):
        alpha, sigma = alphas[t].sqrt(), (1 - alphas[t]).sqrt()
        with torch.no_grad():
            v = network(x, float(t), embedded(prompts.factors))
        sample, noise = alpha * x - sigma * v, alpha * v + sigma * x
        next_alpha = torch.tensor(1.0).double() if before is None else alphas[before]
        x = (next_alpha.sqrt() * sample + (1 - next_alpha).sqrt() * noise).float()
    torch.testing.assert_close(found, x, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("steps", cells.STEPS["ddim"])
def test_six_steps_of_ddim_alone_leave_noise_as_in_diffusers(steps):
    """Of samples that are all noise, which a perfect network sees: x_0 = 0, so v = alpha eps."""
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
    )
    theirs.set_timesteps(steps)
    alphas = torch.tensor(SCHEDULE.alphas_cumprod)

    def v(x, timestep):
        alpha, sigma = alphas[int(timestep)].sqrt(), (1 - alphas[int(timestep)]).sqrt()
        return alpha * x / sigma

    noise = initial_noise(range(4), (4, 8, 8)).double()
    expected = noise * (1 - alphas[int(theirs.timesteps[0])]).sqrt()
    for timestep in theirs.timesteps:
        expected = theirs.step(v(expected, timestep), timestep, expected).prev_sample
    start = noise * (1 - alphas[int(theirs.timesteps[0])]).sqrt()
    found = sample(lambda x, step: v(x, step.timestep), plan_of("ddim", steps), start, backend="torch")
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    left = (found.std() / noise.std()).item()
    assert left == pytest.approx(0.029 if steps == 6 else 0.0, abs=0.0005)


def test_splits_share_no_prompt_order_and_no_noise():
    held, test = Prompts.of("held-out", 50), Prompts.of("test", 50)
    assert not torch.equal(held.factors, test.factors)
    assert not set(held.seeds) & set(test.seeds)
    assert torch.equal(Prompts.of("test", 7).factors, test.factors[:7])


def test_real_samples_are_the_scenes_of_the_prompts():
    assert torch.equal(real_samples(WORLD, "test", 9).factors, Prompts.of("test", 9).factors)


def of(folder):
    return study.Study(
        folder, folder / "weights", "a" * 32, recipe=Recipe(steps=10), seeds=(0,), samples=60, held_out=40
    )


def test_a_judged_cell_is_on_disk_and_is_not_sampled_again(tmp_path, monkeypatch):
    one = of(tmp_path)
    save_network(tiny(), network_folder(one.weights, 8, 0))
    one.judge.write_bytes((COMMITTED / "judge.safetensors").read_bytes())
    case = one.case([8, 8], 0, "ddim", 1.5, "test")
    record = study.judged_cell(one, case, [8, 8], tuned=True)
    assert record.case.samples == 60
    assert record.takes == (("w8", 2),)
    assert len(record.frechet.replicates) == 200
    assert record.frechet.value > 5
    assert 0.1 < record.alignment.value < 0.4
    # Two steps of a guided pair; ten training steps of 32 images, whose backward takes twice the forward.
    forward = forward_gflop(WORLD.config(8), 8)
    assert record.gflop_per_image == pytest.approx(2 * 2 * forward)
    assert record.training_gflop == pytest.approx(10 * 32 * 3 * forward)
    assert record.parameters == sum(p.numel() for p in tiny().parameters())
    monkeypatch.setattr(study, "sampled", lambda *_: pytest.fail("sampled again"))
    assert study.judged_cell(one, case, [8, 8]) == record
    assert study.kept(one) == {case.key: record}


def valley(asked, bottoms):
    """In place of `judged_cell`: the Frechet distance is least at the rate of each number of steps."""

    def judged(_, case, widths, *, tuned=False):
        asked.append((case, tuple(widths), tuned))
        value = 1 + abs(math.log(case.guidance_scale / bottoms[case.steps]))
        return SimpleNamespace(frechet=None if case.guidance_scale > 6 else SimpleNamespace(value=value))

    return judged


def test_guidance_is_tuned_on_held_out_prompts_by_the_networks_of_one_seed(monkeypatch, tmp_path):
    asked, bottoms = [], {4: 1.0, 8: 6.0, 16: 2.0, 50: 3.0}
    monkeypatch.setattr(study, "judged_cell", valley(asked, bottoms))
    told = []
    found = study.tuned_rates(dataclasses.replace(of(tmp_path), seeds=(1, 2)), 12, "ddpm", told.append)
    assert found == bottoms
    assert len(told) == len(asked)
    assert told == sorted(told)
    assert 50 / 78 < told[-1] < 1
    assert {(case.split, case.training_seed, case.samples) for case, _, _ in asked} == {("held-out", 0, 40)}
    assert all(widths == (12,) * case.steps and not tuned for case, widths, tuned in asked)


def test_cells_are_judged_at_the_rate_that_was_tuned(monkeypatch, tmp_path):
    """Where all rates are judged one of them is the tuned one."""
    asked = []
    monkeypatch.setattr(tasks, "judged_cell", valley(asked, dict.fromkeys(range(99), 2.0)))
    monkeypatch.setattr(tasks, "tuned_rates", lambda _, width, sampler: {4: 1.5})
    one = of(tmp_path)
    tasks.JudgeCell(8, 2, "ddpm", 4).run(one)
    ((judged, _, tuned),) = asked
    assert (judged.guidance_scale, judged.training_seed, judged.sampler, judged.split) == (1.5, 2, "ddpm", "test")
    assert tuned
    asked.clear()
    told = []
    tasks.JudgeRates(8, 0, "ddim", 4).run(dataclasses.replace(one, tell=told.append))
    assert told == [done / 9 for done in range(1, 10)]
    assert [(case.guidance_scale, tuned) for case, _, tuned in asked] == [(r, r == 1.5) for r in cells.RATES]


def test_a_plan_is_scored_on_held_out_prompts_and_judged_with_every_seed_if_none_beats_it(monkeypatch, tmp_path):
    """At the guidance of the wider network; scored with the networks that guidance is chosen by."""
    asked = []

    def judged(study_, case, widths, *, tuned=False):
        asked.append((case, widths, tuned))
        return SimpleNamespace(frechet=SimpleNamespace(value=1.0 + abs(widths.count(32) - 2) / len(widths)))

    monkeypatch.setattr(stitching, "judged_cell", judged)
    rates = {8: {4: 2.5, 8: 2.5, 16: 2.5}, 12: {4: 1.5, 8: 1.5, 16: 1.5}, 32: {4: 3.0, 8: 4.0, 16: 5.0}}
    monkeypatch.setattr(stitching, "tuned_rates", lambda _, width, sampler: rates[width])
    one = dataclasses.replace(of(tmp_path), seeds=(1, 2))
    stitching.ScorePlan((12, 12, 32, 32)).run(one)
    ((case, widths, tuned),) = asked
    assert (case.split, case.training_seed, case.samples) == ("held-out", 0, 40)
    assert (case.guidance_scale, tuned) == (3.0, False)
    assert (case.network, case.sampler, widths) == ("w12x2+w32x2", "ddim", (12, 12, 32, 32))
    # As good as any; and worse than that one with as many steps, for fewer FLOPs.
    for plan, name in (((8, 8, 32, 32), "w8x2+w32x2"), ((8, 8, 8, 32), "w8x3+w32x1")):
        asked.clear()
        stitching.JudgePlan(plan, 2).run(one)
        judged_ = [of for of in asked if of[0].split == "test"]
        assert [(case.network, case.training_seed, case.samples, tuned) for case, _, tuned in judged_] == [
            (name, 2, 60, True)
        ]
        assert {(case.steps, case.guidance_scale) for case, _, _ in asked} == {(4, 3.0), (8, 4.0), (16, 5.0)}
    # One that costs more and is worse is not judged.
    asked.clear()
    stitching.JudgePlan((8, 32, 32, 32), 2).run(one)
    assert {case.split for case, _, _ in asked} == {"held-out"}
    assert {case.training_seed for case, _, _ in asked} == {0}


def test_plans_are_every_pair_number_of_steps_and_share():
    found = stitching.plans(WORLD)
    assert len(found) == len(set(found)) == 5 * 3 * 3
    assert [plan for plan in found if len(plan) == 4 and plan[0] == 32] == [
        (32, 8, 8, 8),
        (32, 32, 8, 8),
        (32, 32, 32, 8),
    ]
    assert {sum(width != 32 for width in plan) / 16 for plan in found if len(plan) == 16 and plan[0] == 24} == {
        *(0.25, 0.5, 0.75)
    }


@given(
    st.dictionaries(
        st.lists(st.sampled_from(WORLD.widths), min_size=1, max_size=4).map(tuple),
        st.integers(1, 9).map(float),
        min_size=1,
        max_size=12,
    ),
    st.floats(0, 3),
    st.floats(0, 3),
    st.floats(0, 20),
)
def test_the_best_plan_under_any_budget_is_among_the_unbeaten(scores, of_a_step, of_flops, budget):
    """Whatever a step and a FLOP cost."""
    flops = dict(zip(WORLD.widths, (0.07, 0.15, 0.26, 0.57, 1.0), strict=True))
    left = stitching.unbeaten(scores, flops)
    of_plan = {plan: sum(flops[width] for width in plan) for plan in scores}

    def within(plans):
        costs = {plan: of_a_step * len(plan) + of_flops * of_plan[plan] for plan in plans}
        return min((scores[plan] for plan in plans if costs[plan] <= budget * (1 + 1e-9)), default=None)

    assert within(scores) == within(left)
    # Nothing is left that another one beats: each is the best of what costs as much at most.
    for plan in left:
        cheaper = [of for of in scores if len(of) <= len(plan) and of_plan[of] <= of_plan[plan]]
        assert scores[plan] == min(scores[of] for of in cheaper)


def test_a_plan_is_beaten_with_as_few_steps_and_as_few_flops_alone():
    """(32, 32) has fewer steps than what is better, (8, 8) fewer FLOPs; equals do not beat each other."""
    left = {(32, 32): 3.0, (8,) * 12: 2.0, (8, 8): 4.0, (8, 32): 3.5, (32, 8): 3.5}
    assert stitching.unbeaten(left | {(8, 8, 8): 4.5}, {8: 0.1, 32: 1.0}) == list(left)


@pytest.mark.parametrize(
    ("value", "told"), [(math.nan, "NaN"), (math.inf, "NaN or infinity"), (3e38, "NaN or infinity")]
)
def test_samples_that_explode_are_an_error_record(tmp_path, value, told):
    one = of(tmp_path)
    one.judge.parent.mkdir()
    one.judge.write_bytes((COMMITTED / "judge.safetensors").read_bytes())
    real = real_samples(WORLD, "test", 20)
    latents = real.latents.clone()
    latents[3] = value
    case = one.case([8], 0, "ddim", 1.0, "test")
    record = study.judging(one).record(case, latents, real.factors, takes=(("w8", 1),))
    assert (record.status, record.frechet) == ("error", None)
    assert told in record.message


def test_a_stitched_cell_tells_who_takes_which_steps():
    one = of(COMMITTED)
    widths = (8, 8, 8, 32)
    case = one.case(widths, 0, "ddim", 2.0, "test")
    assert study.takes_of(widths) == (("w8", 3), ("w32", 1))
    assert (case.kind, case.network, case.steps) == ("stitched", "w8x3+w32x1", 4)
    assert one.case([8] * 4, 0, "ddim", 2.0, "test").network == "w8"


def test_stages_cover_the_grid_once():
    one = dataclasses.replace(of(COMMITTED), seeds=(0, 1, 2))
    parts = stages(one, tuple(cells.STEPS))
    assert len(parts["train"]) == 15
    assert len(parts["sample"]) == len(set(parts["sample"])) == 15 * sum(map(len, cells.STEPS.values()))
    assert len(parts["shares"]) == len(set(parts["shares"])) == 45
    assert len(parts["stitch"]) == len(set(parts["stitch"])) == 3 * 45
    assert all(task.cost > 0 for tasks in parts.values() for task in tasks)


def test_prompts_are_the_worlds_own():
    assert torch.equal(Prompts.of("test", 3).factors, torch.from_numpy(Scenes(55).factors(0, 3)))
