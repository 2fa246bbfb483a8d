"""Numbers of numpy and torch where a sampler takes a number; copies and pickles; refusals that say what to do."""

import copy
import dataclasses
import math
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldmperf.kernels import philox_normal, seed_tensor
from ldmperf.samplers import SAMPLERS, GraphedSampler, NoiseSchedule, Step, initial_noise, make_plan, sample

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
SCHEDULE = NoiseSchedule.from_diffusers(SD)
SHAPE = (2, 3, 5)
NOISE = initial_noise([3, 4], SHAPE)


def network(x, step):
    return torch.tanh(x * torch.linspace(0.8, 1.2, x.shape[0])[:, None, None, None])


def as_numpy_scalar(value):
    kinds = {bool: np.bool_, int: np.int64, float: np.float64, str: np.str_}
    return kinds[type(value)](value)


def as_tensor(value):
    return value if isinstance(value, str) else torch.tensor(value, dtype={float: torch.float64}.get(type(value)))


# How a caller may hold a number that is `value`, exactly.
INTEGERS = [
    np.int64, np.int16, np.uint8, np.array, torch.tensor, lambda value: torch.tensor(value, dtype=torch.int32)
]  # fmt: skip
FLOATS = [
    np.float64, np.float32, np.float16, np.longdouble, np.array, torch.tensor,
    lambda value: torch.tensor(value, dtype=torch.bfloat16), lambda value: torch.tensor(value, requires_grad=True),
    lambda value: torch.tensor(value, dtype=torch.float64),
]  # fmt: skip
SEQUENCES = [tuple, list, np.array, torch.tensor, lambda values: [torch.tensor(v) for v in values],
             lambda values: tuple(np.float32(v) for v in values)]  # fmt: skip

# Numbers that bfloat16 holds too.
EXACT = st.integers(4, 80).map(lambda n: n / 4)


@given(EXACT, st.sampled_from(FLOATS), st.data())
@settings(max_examples=25, deadline=None)
def test_guidance_is_any_number_and_any_sequence_of_them(run_again, scale, kind, data):
    plan = make_plan("ddpm", SCHEDULE, 3)
    sampler = GraphedSampler(lambda x, _, step: network(x, step), graphs=run_again)
    scales = data.draw(st.lists(EXACT, min_size=3, max_size=3))
    sequence = data.draw(st.sampled_from(SEQUENCES))
    for given_, plain in ((kind(scale), scale), (sequence(scales), scales)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            expected = sample(network, plan, NOISE, guidance_scale=plain, seeds=[1, 2])
            assert torch.equal(sample(network, plan, NOISE, guidance_scale=given_, seeds=[1, 2]), expected)
            assert torch.equal(sampler((), plan, NOISE, guidance_scale=given_, seeds=[1, 2]), expected)


def test_none_and_one_are_no_guidance_and_zero_is_the_unconditional_image(run_again):
    plan = make_plan("ddim", SCHEDULE, 3)
    batches = []

    def denoise(x, step):
        batches.append(len(x))
        return network(x, step)

    sampler = GraphedSampler(lambda x, _, step: denoise(x, step), graphs=run_again)
    unguided = sample(network, plan, NOISE)
    for off in (None, 1, 1.0, np.float32(1), torch.tensor(1.0), [1.0] * 3, np.ones(3)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(sample(denoise, plan, NOISE, guidance_scale=off), unguided)
            assert torch.equal(sampler((), plan, NOISE, guidance_scale=off), unguided)
    assert set(batches) == {2}
    # The first half of the model input is the unconditional one.
    halves = sample(network, plan, NOISE, guidance_scale=[0.0] * 3)
    unconditional = sample(
        lambda x, step: torch.tanh(x * torch.tensor([0.8, 14 / 15])[:, None, None, None]), plan, NOISE
    )
    torch.testing.assert_close(halves, unconditional)
    for below in (0.0, 0, np.float32(0), torch.tensor(0), 0.5, -1.0):
        for run in (sample, lambda _, *rest, **options: sampler((), *rest, **options)):
            with pytest.warns(
                UserWarning, match=r"0 gives the unconditional.*Give None for no guidance"
            ) as caught:
                result = run(denoise, plan, NOISE, guidance_scale=below)
            assert caught[0].filename == __file__
            assert torch.equal(result, halves) == (float(below) == 0.0)


@given(st.lists(st.integers(0, 255), min_size=2, max_size=2), st.data())
@settings(max_examples=25, deadline=None)
def test_seeds_are_any_integers(run_again, seeds, data):
    kinds = [*INTEGERS, np.uint64]
    forms = [
        np.array(seeds), np.array(seeds, dtype=np.uint64),
        torch.tensor(seeds), torch.tensor(seeds, dtype=torch.uint8),
        [data.draw(st.sampled_from(kinds))(seed) for seed in seeds], tuple(map(np.int64, seeds)),
    ]  # fmt: skip
    plan = make_plan("ddpm", SCHEDULE, 2)
    expected = sample(network, plan, NOISE, seeds=seeds)
    sampler = GraphedSampler(lambda x, _, step: network(x, step), graphs=run_again)
    for form in forms:
        assert torch.equal(seed_tensor(form, "cpu"), torch.tensor(seeds))
        assert torch.equal(initial_noise(form, SHAPE), initial_noise(seeds, SHAPE))
        assert torch.equal(sample(network, plan, NOISE, seeds=form), expected)
        assert torch.equal(sampler((), plan, NOISE, seeds=form), expected)


def test_large_integers_of_numpy_and_torch_are_seeds_modulo_2_to_the_64():
    largest = 2**64 - 1
    for form in (
        [largest],
        np.array([largest], np.uint64),
        torch.tensor([largest], dtype=torch.uint64),
        [np.int64(-1)],
    ):
        assert seed_tensor(form, "cpu").tolist() == [-1]


def test_a_shape_may_be_an_array_and_the_step_of_the_noise_numpy_s():
    expected = initial_noise([7], SHAPE)
    for shape in (
        list(SHAPE),
        torch.Size(SHAPE),
        np.array(SHAPE),
        torch.tensor(SHAPE),
        tuple(map(np.int32, SHAPE)),
    ):
        assert torch.equal(initial_noise([7], shape), expected)
    seeds = torch.tensor([7])
    assert torch.equal(philox_normal(seeds, SHAPE, np.int64(5)), philox_normal(seeds, SHAPE, 5))


OPTIONS = {
    "ddim": {"eta": 0.5, "set_alpha_to_one": False, "timestep_spacing": "trailing", "steps_offset": 2},
    "dpmpp_2m": {"solver_order": 3, "use_karras_sigmas": True, "sigma_max": 16.0, "lambda_min_clipped": -6.5},
    "unipc": {"disable_corrector": [0, 2], "solver_type": "bh1", "final_sigmas_type": "sigma_min"},
    "lcm": {"original_inference_steps": 40, "timestep_scaling": 8.0},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_configs_and_counts_may_be_numpy_s_and_torch_s(name):
    options = OPTIONS[name]
    expected = make_plan(name, SCHEDULE, 4, **options)
    noise = {"beta_start": np.float64(0.00085), "beta_end": torch.tensor(0.012, dtype=torch.float64),
             "num_train_timesteps": np.int64(1000), "rescale_betas_zero_snr": np.bool_(False),
             "beta_schedule": np.str_("scaled_linear"), "steps_offset": torch.tensor(1)}  # fmt: skip
    # No config has eta.
    by_hand = {key: value for key, value in options.items() if key == "eta"}
    for kind in (as_numpy_scalar, np.array, as_tensor):
        held = {k: np.array(v) if isinstance(v, list) else kind(v) for k, v in options.items()}
        of_config = NoiseSchedule.from_diffusers({**noise, **{k: v for k, v in held.items() if k not in by_hand}})
        for count in (4, np.int64(4), np.array(4), torch.tensor(4)):
            for plan in (make_plan(name, SCHEDULE, count, **held), make_plan(name, of_config, count, **by_hand)):
                np.testing.assert_array_equal(plan.table, expected.table)
                assert plan.options == expected.options
                kinds = {type(value) for value in (plan.num_steps, *plan.options.values())}
                assert kinds <= {bool, int, float, str, tuple, type(None)}


def test_levels_and_betas_may_be_lists_arrays_and_tensors():
    betas = np.linspace(1e-3, 1.5e-2, 50)
    expected = NoiseSchedule.from_diffusers({"trained_betas": betas.tolist()}).alphas_cumprod
    for held in (betas, torch.from_numpy(betas), [torch.tensor(b, dtype=torch.float64) for b in betas]):
        np.testing.assert_array_equal(
            NoiseSchedule.from_diffusers({"trained_betas": held}).alphas_cumprod, expected
        )
    for held in (expected.tolist(), torch.tensor(expected), torch.tensor(expected, requires_grad=True)):
        np.testing.assert_array_equal(NoiseSchedule(held).alphas_cumprod, expected)


def copies_of(value):
    return {
        "pickle": pickle.loads(pickle.dumps(value)),
        "copy": copy.copy(value),
        "deepcopy": copy.deepcopy(value),
        "replace": dataclasses.replace(value),
    }


def assert_the_same_and_frozen(ours, theirs):
    assert type(ours) is type(theirs)
    for field in dataclasses.fields(ours):
        value, other = getattr(ours, field.name), getattr(theirs, field.name)
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(value, other)
            assert value.dtype == other.dtype
            assert not other.flags.writeable
        elif dataclasses.is_dataclass(value):
            assert_the_same_and_frozen(value, other)
        elif field.name == "steps":
            assert len(value) == len(other)
            for step, other_step in zip(value, other, strict=True):
                assert_the_same_and_frozen(step, other_step)
        else:
            assert value == other
            if field.name == "options":
                with pytest.raises(TypeError):
                    other["eta"] = 1.0


@pytest.mark.parametrize("name", SAMPLERS)
def test_schedules_plans_and_steps_can_be_copied_and_pickled(name):
    schedule = NoiseSchedule.from_diffusers({**SD, "disable_corrector": [0, 1], "prediction_type": "v_prediction"})
    plan = make_plan(name, schedule, 5)
    assert plan.table is plan.table
    for value in (schedule, plan, plan.steps[1]):
        for made in copies_of(value).values():
            assert_the_same_and_frozen(value, made)
    for made in copies_of(plan).values():
        np.testing.assert_array_equal(made.table, plan.table)
        assert torch.equal(sample(network, made, NOISE, seeds=[1, 2]), sample(network, plan, NOISE, seeds=[1, 2]))
        np.testing.assert_array_equal(make_plan(name, made.schedule, 5).table, plan.table)
    assert dataclasses.replace(schedule, prediction_type="sample").prediction_type == "sample"


WORKER = """
import pickle, sys
schedule, plan, step = pickle.load(sys.stdin.buffer)
from ldmperf.samplers import make_plan
again = make_plan(plan.name, schedule, plan.num_steps)
sys.stdout.buffer.write(pickle.dumps((plan, again.table, float(step.timestep))))
"""


def test_a_process_takes_a_plan_and_gives_it_back():
    plan = make_plan("unipc", SCHEDULE, 4)
    sent = pickle.dumps((SCHEDULE, plan, plan.steps[0]))
    done = subprocess.run([sys.executable, "-c", WORKER], input=sent, capture_output=True, check=True)
    back, again, timestep = pickle.loads(done.stdout)
    assert_the_same_and_frozen(plan, back)
    np.testing.assert_array_equal(again, plan.table)
    assert timestep == plan.steps[0].timestep


PLAN = make_plan("ddim", SCHEDULE, 3)
STOCHASTIC = make_plan("ddpm", SCHEDULE, 3)
META = torch.tensor(7.5, device="meta")


def run_with(**options):
    return lambda: sample(**{"denoise": network, "plan": STOCHASTIC, "noise": NOISE, "seeds": [1, 2], **options})


def planned(name="ddim", schedule=SCHEDULE, num_steps=3, **options):
    return lambda: make_plan(name, schedule, num_steps, **options)


def read(**config):
    return lambda: NoiseSchedule.from_diffusers(config)


REFUSALS = [
    *((run_with(guidance_scale=scale), "a number or 3 numbers, one per step, or None") for scale in (
        "7.5", True, np.bool_(True), math.nan, math.inf, [1.0, 2.0], np.ones(1), torch.ones(3, 2), 1j, [None] * 3,
        {"w": 1}, object())),
    (run_with(guidance_scale=META), "make it on the CPU"),
    *((run_with(seeds=seeds), r"give \[seed\]") for seeds in (
        7, np.int64(7), "12", [True, False], [np.True_, np.True_], [torch.tensor(True)] * 2,
        [torch.tensor([1])] * 2, np.array([1.0, 2.0]), np.array([[1], [2]]), {1, 2}, iter([1, 2]),
        np.random.default_rng(0))),
    (run_with(seeds=torch.tensor(7)), "give a tensor of one element"),
    (run_with(seeds=torch.Generator()), r"\[generator.initial_seed\(\)\]"),
    (run_with(seeds=None), "give seeds"),
    (run_with(plan="ddim"), "make_plan makes one"),
    (run_with(noise=np.zeros((2, 3), np.float32)), "initial_noise makes one"),
    (run_with(input_dtype=torch.int64), "torch.bfloat16"),
    (run_with(input_dtype="bfloat16"), "torch.bfloat16"),
    (lambda: GraphedSampler(network, input_dtype=torch.int32), "torch.bfloat16"),
    (lambda: GraphedSampler(network, max_captures=1.5), "at least 1"),
    (lambda: initial_noise([1], 4), r"such as \(4, 64, 64\)"),
    (lambda: initial_noise([1], (4, 2.0)), r"such as \(4, 64, 64\)"),
    (lambda: initial_noise([1], (4, -2)), r"such as \(4, 64, 64\)"),
    (lambda: initial_noise([1], SHAPE, dtype=torch.int64), "torch.float32"),
    (lambda: philox_normal([1, 2], SHAPE), "seed_tensor makes one"),
    *((planned(num_steps=count), "from 1 to 1000") for count in (
        4.0, np.float64(4), True, np.bool_(True), torch.tensor([4]), "4", None, 10**400)),
    *((planned(name=name), "choose one of ddim") for name in (None, ["ddim"], "DDIM")),
    *((planned(schedule=schedule), "from_diffusers") for schedule in (None, dict(SD), "scheduler_config.json")),
    (planned(eta=None), "a number like its default"),
    (planned(eta=10**400), "a number like its default"),
    (planned(eta=math.nan), "a number like its default"),
    (planned(steps_offset=np.float64(1)), "an integer like its default"),
    (planned(steps_offset=10**400), "choose fewer steps"),
    (planned(set_alpha_to_one=np.int64(1)), "True or False like its default"),
    (planned("euler", use_karras_sigmas=True, sigma_max=math.nan), "a number or None like its default"),
    (planned("unipc", disable_corrector=np.array([0.5])), "a list of integers"),
    (planned("lcm", timestep_scaling=10**300), "choose fewer steps|leave the options out"),
    *((lambda config=config: NoiseSchedule.from_diffusers(config), "json.load") for config in (None, [], "x")),
    *((read(num_train_timesteps=count), "from 2 to 1000000") for count in (
        10**12, 1, 0, -1, 1000.0, True, "1000")),
    *((read(beta_schedule="scaled_linear", beta_start=beta), "beta_start must be a number from 0") for beta in (
        -1, math.nan, 10**400, "x", True)),
    (read(beta_start=0, beta_end=1), "check the betas"),
    *((read(trained_betas=betas), "must be a list of numbers") for betas in (
        ["a"], [[0.1]], "no", 3, [0.1, 10**400], [0.1, -0.1], [math.nan, 0.1])),
    (lambda: make_plan("unipc", NoiseSchedule.from_diffusers({"solver_type": {}}), 3), "a name like its default"),
    (read(trained_betas=[0.1] * 5, num_train_timesteps=6), "must be num_train_timesteps = 6 numbers"),
    (read(trained_betas=[0.1]), "check num_train_timesteps and the betas"),
    (read(rescale_betas_zero_snr=1), "true or false"),
    (read(shift=1.0), "use a variance-preserving schedule"),
    (read(_class_name="FlowMatchEulerDiscreteScheduler"), "take a model that was trained with betas"),
    (read(_class_name="EDMEulerScheduler", num_train_timesteps=1000), "take a model that was trained with betas"),
    *((lambda levels=levels: NoiseSchedule(levels), "one per training timestep") for levels in (
        None, "abc", [[1, 2], [3]], [0.9, None], [1j, 2], 3, {})),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(REFUSALS)))
def test_a_refusal_is_one_line_that_says_what_to_do(number):
    call, told = REFUSALS[number]
    with pytest.raises(ValueError, match=told) as error:
        call()
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_a_step_made_by_hand_is_frozen():
    matrix = np.eye(1, 3)
    step = Step(0, 5.0, 1.0, matrix, 0.8, 0.6)
    matrix[0, 0] = 9.0
    assert step.U[0, 0] == 1.0
    with pytest.raises(ValueError, match="read-only"):
        step.U[0, 0] = 9.0
