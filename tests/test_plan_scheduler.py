"""`PlanScheduler` against diffusers' own schedulers, step by step, in the loops of pipelines."""

import copy
import inspect
import json
import pickle

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldmperf.model.dropin import PlanScheduler
from ldmperf.model.dropin import plan_run as plan_run_module
from ldmperf.samplers import DIFFUSERS_CLASSES

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SHAPE = (2, 4, 5, 6)
# Heun's second slope divides by sigma_min what a step of the length of sigma_max has rounded.
TOLERANCE = {"heun": 3e-5}


def scheduler_of(name, **config):
    if name in ("ddim", "ddpm"):
        config.setdefault("clip_sample", False)
    if name == "pndm":
        config.setdefault("skip_prk_steps", True)
    if name == "dpmpp_2s":
        config.setdefault("lower_order_final", True)
    return getattr(diffusers, DIFFUSERS_CLASSES[name])(**{**SD, **config})


def pair(name, **config):
    return scheduler_of(name, **config), PlanScheduler.from_scheduler(
        scheduler_of(name, **config), backend="torch"
    )


def network(x, timestep):
    return (0.8 * torch.tanh(x.double()) + 0.2 * torch.sin(x.double() + 0.003 * float(timestep))).to(x.dtype)


def run(
    scheduler, num_steps, *, begin=0, dtype=torch.float32, shape=SHAPE, eta=None, callback=None, **set_options
):
    """Every step's output, in a pipeline's loop: scaled input, guidance, step, callback."""
    generator = torch.Generator().manual_seed(3)
    scheduler.set_timesteps(num_steps, "cpu", **set_options)
    timesteps = scheduler.timesteps[begin:]
    x = torch.randn(shape, generator=generator).to(dtype)
    if begin:
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
        x = scheduler.add_noise(torch.tanh(x), x, timesteps[:1].repeat(shape[0]))
    else:
        x = (x * scheduler.init_noise_sigma).to(dtype)
    known = inspect.signature(scheduler.step).parameters
    extra = {"generator": generator} if "generator" in known else {}
    extra |= {"eta": eta} if eta is not None else {}
    outputs = []
    for index, timestep in enumerate(timesteps):
        model_input = scheduler.scale_model_input(torch.cat([x, x]), timestep)
        uncond, cond = network(model_input, timestep).chunk(2)
        output = scheduler.step(uncond + 3.0 * (0.9 * cond - uncond), timestep, x, **extra)
        x = output.prev_sample
        if callback is not None:
            x = callback(index, x)
        outputs.append(output)
    return outputs


def relative_error(value, expected):
    return float((value.double() - expected.double()).norm() / expected.double().norm())


def compare(theirs, ours, tolerance=1e-5):
    assert len(theirs) == len(ours)
    for expected, got in zip(theirs, ours, strict=True):
        assert type(got) is type(expected)
        for (key, value), (name, tensor) in zip(expected.items(), got.items(), strict=True):
            assert (name, tensor.dtype, tensor.shape) == (key, value.dtype, value.shape)
            assert tensor.is_contiguous()
            assert relative_error(tensor, value) <= tolerance, (name, relative_error(tensor, value))


@pytest.mark.parametrize("name", DIFFUSERS_CLASSES)
def test_every_step_from_noise_and_from_an_image(name):
    theirs, ours = pair(name)
    for num_steps in (1, 2, 3, 7, 20):
        for begin in sorted({0, (num_steps // 2) * theirs.order, (num_steps - 1) * theirs.order}):
            expected = run(theirs, num_steps, begin=begin)
            got = run(ours, num_steps, begin=begin)
            compare(expected, got, TOLERANCE.get(name, 1e-5))
            assert torch.equal(ours.timesteps, theirs.timesteps)
            assert ours.timesteps.dtype == theirs.timesteps.dtype
            assert getattr(ours, "step_index", 0) == getattr(theirs, "step_index", 0)
            assert getattr(ours, "begin_index", 0) == getattr(theirs, "begin_index", 0)


@pytest.mark.parametrize("name", DIFFUSERS_CLASSES)
def test_latents_that_a_callback_changes_are_read(name):
    """A new tensor, and the same tensor written to; what is handed back untouched is not read."""
    theirs, ours = pair(name)

    def blend(index, x):
        if index % 3 == 0:
            return 0.5 * x + 0.25
        return x.mul_(1.125) if index % 3 == 1 else x

    compare(run(theirs, 7, callback=blend), run(ours, 7, callback=blend), TOLERANCE.get(name, 1e-5))


def test_the_last_result_is_read_from_the_registers_alone(monkeypatch):
    _, ours = pair("dpmpp_2m")
    loads = []
    image = plan_run_module._image
    monkeypatch.setattr(plan_run_module, "_image", lambda tensor: loads.append(tensor) or image(tensor))
    run(ours, 5)
    # The network's output and the result at every step; the sample at the first.
    assert len(loads) == 2 * 5 + 1


@pytest.mark.parametrize("name", DIFFUSERS_CLASSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_dtype_and_rounds_less(name, dtype):
    """Against float32 runs of diffusers: no further away than diffusers' own run in half precision."""
    theirs, ours = pair(name)
    expected = run(theirs, 6)[-1].prev_sample
    own, got = run(theirs, 6, dtype=dtype), run(ours, 6, dtype=dtype)
    assert [{k: v.dtype for k, v in output.items()} for output in got] == [
        {k: v.dtype for k, v in output.items()} for output in own
    ]
    error = relative_error(got[-1].prev_sample, expected)
    assert error <= 1.5 * max(relative_error(own[-1].prev_sample, expected), torch.finfo(dtype).eps)


@pytest.mark.parametrize("shape", [(1, 4, 3, 5), (3, 7), (2, 4, 3, 2, 5), (5,), (2, 4, 0, 3)])
@pytest.mark.parametrize("name", ["dpmpp_2m", "euler_a"])
def test_latents_of_any_shape(name, shape):
    theirs, ours = pair(name)
    expected, got = run(theirs, 4, shape=shape)[-1].prev_sample, run(ours, 4, shape=shape)[-1].prev_sample
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_strided_latents_and_tuples():
    theirs, ours = pair("ddim")
    x = torch.randn(2, 5, 6, 4).permute(0, 3, 1, 2)
    results = []
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(4)
        output = torch.tanh(x).contiguous()
        results.append(scheduler.step(output, scheduler.timesteps[1], x, return_dict=False))
        assert results[-1][0].stride() == x.stride()
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_ddim_options_of_a_step():
    theirs, ours = pair("ddim")
    for eta in (0.3, 1.0, 0.0):
        compare(run(theirs, 6, eta=eta), run(ours, 6, eta=eta))
    noise = torch.randn(SHAPE)
    x, output = torch.randn(SHAPE), torch.randn(SHAPE)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(6)
        with pytest.raises(ValueError, match="generator"):
            scheduler.step(output, scheduler.timesteps[1], x, 0.5, False, torch.Generator(), noise)
    # Any order, any number of times, several samples in turn.
    for place in (4, 1, 1, 0, 5):
        for sample in (x, 2.0 * x):
            expected, got = (
                scheduler.step(output, int(scheduler.timesteps[place]), sample, eta=0.5, variance_noise=noise)
                for scheduler in (theirs, ours)
            )
            compare([expected], [got])


def test_a_list_of_generators_and_the_generator_s_state_after():
    for name in ("euler_a", "lcm", "ddpm"):
        states = []
        for scheduler in pair(name):
            generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
            scheduler.set_timesteps(3)
            x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
            for timestep in scheduler.timesteps:
                x = scheduler.step(network(x, timestep), timestep, x, generator=generators).prev_sample
            states.append((x, *(torch.randn(3, generator=generator) for generator in generators)))
        for expected, got in zip(*states, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_2s", "ddim"])
def test_noise_is_drawn_where_diffusers_draws_it_and_in_its_dtype(name):
    """Also at a last step that does not use it; the multistep SDE solver draws float32 for any latents."""
    states = []
    config = {} if name == "ddim" else {"algorithm_type": "sde-dpmsolver++"}
    for scheduler in pair(name, **config):
        generator = torch.Generator().manual_seed(5)
        scheduler.set_timesteps(3)
        x = torch.linspace(-1.0, 1.0, 240).view(SHAPE).half()
        for timestep in scheduler.timesteps:
            options = {"eta": 1.0} if name == "ddim" else {}
            x = scheduler.step(network(x, timestep), timestep, x, generator=generator, **options).prev_sample
        states.append((x, generator.get_state()))
    (expected, after), (got, ours_after) = states
    assert torch.equal(ours_after, after)
    assert relative_error(got, expected) <= 3e-3


def test_lcm_takes_strength_and_original_steps_as_its_class_does():
    theirs, ours = pair("lcm")
    for strength, original in ((0.5, None), (0.8, 30), (1.0, 25)):
        options = {"strength": strength, "original_inference_steps": original}
        compare(run(theirs, 4, **options), run(ours, 4, **options))
        compare(run(theirs, 4, begin=2, **options), run(ours, 4, begin=2, **options))


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_any_config(data):
    name = data.draw(st.sampled_from(sorted(DIFFUSERS_CLASSES)))
    predictions = ["epsilon", "v_prediction"] + (["sample"] if name not in ("pndm", "euler_a") else [])
    config = {"prediction_type": data.draw(st.sampled_from(predictions))}
    if name not in ("lcm", "dpmpp_2s"):
        config["timestep_spacing"] = data.draw(st.sampled_from(["leading", "linspace"]))
        config["steps_offset"] = data.draw(st.integers(0, 1))
    if name.startswith("dpmpp"):
        config["algorithm_type"] = data.draw(st.sampled_from(["dpmsolver++", "sde-dpmsolver++"]))
    if name in ("dpmpp_2m", "dpmpp_2s", "unipc"):
        config["solver_order"] = data.draw(st.integers(1, 2))
    if name in ("dpmpp_2m", "dpmpp_2s", "unipc", "euler", "heun"):
        config["use_karras_sigmas"] = data.draw(st.booleans())
    num_steps = data.draw(st.integers(1, 12))
    theirs, ours = pair(name, **config)
    # In one evaluation out of a few, diffusers' float32 coefficients differ in the last digits.
    last = [run(scheduler, num_steps)[-1].prev_sample for scheduler in (theirs, ours)]
    assert relative_error(last[1], last[0]) <= (1e-3 if name == "heun" else 5e-5), (name, config, num_steps)


@pytest.mark.parametrize("name", DIFFUSERS_CLASSES)
def test_it_is_its_class_to_pipelines_and_on_disk(name, tmp_path):
    theirs, ours = pair(name)
    host = type(theirs)
    assert isinstance(ours, host)
    assert isinstance(ours, PlanScheduler)
    assert (type(ours).__name__, type(ours).__module__) == (host.__name__, host.__module__)
    assert ours.config == theirs.config
    assert (ours.order, len(ours)) == (theirs.order, len(theirs))
    assert set(ours.compatibles) == set(theirs.compatibles)
    assert inspect.signature(ours.step) == inspect.signature(theirs.step)
    taken = set(inspect.signature(ours.set_timesteps).parameters)
    assert taken == set(inspect.signature(theirs.set_timesteps).parameters) - {"timesteps", "sigmas"}
    ours.set_timesteps(5)
    ours.save_pretrained(tmp_path / "ours" / "scheduler")
    theirs.save_pretrained(tmp_path / "theirs")
    saved = json.loads((tmp_path / "ours" / "scheduler" / "scheduler_config.json").read_text())
    assert saved == json.loads((tmp_path / "theirs" / "scheduler_config.json").read_text())
    expected = run(ours, 5)[-1].prev_sample
    loaded = PlanScheduler.from_pretrained(tmp_path / "ours", subfolder="scheduler")
    again = PlanScheduler.from_config(saved)
    for other in (loaded, again, type(ours).from_config(ours.config), copy.deepcopy(ours), copy.copy(ours),
                  pickle.loads(pickle.dumps(ours))):  # fmt: skip
        assert type(other) is type(ours)
        assert torch.equal(run(other, 5)[-1].prev_sample, expected)
    plain = host.from_config(ours.config)
    assert not isinstance(plain, PlanScheduler)
    other = diffusers.EulerDiscreteScheduler.from_config(ours.config)
    assert type(other) is diffusers.EulerDiscreteScheduler
    assert other.config == diffusers.EulerDiscreteScheduler.from_config(theirs.config).config
    assert type(PlanScheduler.from_config(saved, sampler="euler")).sampler == "euler"


def test_a_copy_in_the_middle_of_a_run_goes_on():
    _, ours = pair("unipc")
    expected = [output.prev_sample for output in run(ours, 6)]
    ours.set_timesteps(6)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    for index, timestep in enumerate(ours.timesteps):
        if index == 3:
            ours, x = copy.deepcopy((ours, x))
        uncond, cond = network(torch.cat([x, x]), timestep).chunk(2)
        x = ours.step(uncond + 3.0 * (0.9 * cond - uncond), ours.timesteps[index], x).prev_sample
        assert torch.equal(x, expected[index])


def test_a_config_that_a_pipeline_corrects_counts():
    theirs, ours = pair("pndm", steps_offset=0)
    for scheduler in (theirs, ours):
        run(scheduler, 4)
        scheduler._internal_dict = diffusers.configuration_utils.FrozenDict(
            {**scheduler.config, "steps_offset": 1}
        )
    compare(run(theirs, 4), run(ours, 4))


class Subclass(diffusers.DDIMScheduler):
    pass


def test_what_no_plan_covers_is_refused_in_one_line():
    cases = [
        (diffusers.DDIMScheduler(**SD), "clip_sample"),
        (diffusers.DDPMScheduler(**SD, clip_sample=False, thresholding=True), "thresholding"),
        (diffusers.DDPMScheduler(**SD, clip_sample=False, variance_type="learned_range"), "variance_type"),
        (diffusers.DEISMultistepScheduler(**SD), "_class_name 'DEISMultistepScheduler'"),
        (diffusers.FlowMatchEulerDiscreteScheduler(), "_class_name 'FlowMatchEuler"),
        (diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"), "flow"),
        (diffusers.PNDMScheduler(**SD, prediction_type="sample"), "prediction_type"),
        (Subclass(**SD, clip_sample=False), "_class_name 'Subclass'"),
        (torch.nn.Linear(1, 1), "_class_name 'Linear'"),
    ]
    for scheduler, key in cases:
        with pytest.raises(ValueError, match=key) as raised:
            PlanScheduler.from_scheduler(scheduler)
        assert "\n" not in str(raised.value)
    changed = scheduler_of("ddim")
    changed.alphas_cumprod = changed.alphas_cumprod * 0.9
    with pytest.raises(ValueError, match="alphas_cumprod"):
        PlanScheduler.from_scheduler(changed)
    with pytest.raises(TypeError, match="from_scheduler"):
        PlanScheduler()
    with pytest.raises(ValueError, match="unknown sampler"):
        PlanScheduler.from_config(SD, sampler="nothing")
    # Another class's option, which diffusers keeps in the config and does not read.
    hidden = diffusers.EulerDiscreteScheduler.from_config({**SD, "clip_sample": True, "thresholding": True})
    assert PlanScheduler.from_scheduler(hidden).config.clip_sample is True


def test_steps_that_cannot_be_taken_are_refused():
    _, ours = pair("dpmpp_2m")
    x = torch.randn(SHAPE)
    with pytest.raises(ValueError, match="set_timesteps"):
        ours.step(x, 5, x)
    ours.set_timesteps(3)
    first, second, third = ours.timesteps
    with pytest.raises(ValueError, match="model_output must be like sample"):
        ours.step(x[:, :2], first, x)
    with pytest.raises(ValueError, match="no gradient"):
        ours.step(x.clone().requires_grad_(), first, x)
    for timestep in (first, second):
        ours.step(x, timestep, x)
    with pytest.raises(ValueError, match="samples of the same shape"):
        ours.step(x[:1], third, x[:1])
    ours.step(x, third, x)
    with pytest.raises(ValueError, match="is over"):
        ours.step(x, third, x)
    _, ours = pair("euler")
    ours.set_timesteps(3)
    with pytest.raises(ValueError, match="s_churn"):
        ours.step(x, ours.timesteps[0], x, s_churn=1.0)
    _, ours = pair("pndm")
    ours.set_timesteps(4)
    with pytest.raises(ValueError, match="is not one of this run's"):
        ours.step(x, 3, x)
    # 500 stands twice; the numbers do not say which is meant.
    ours.step(x, int(ours.timesteps[2]), x)
    with pytest.raises(ValueError, match="in order"):
        ours.step(x, int(ours.timesteps[3]), x)


def test_lists_of_timesteps_are_refused_as_diffusers_refuses_them():
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps

    for name in DIFFUSERS_CLASSES:
        _, ours = pair(name)
        with pytest.raises(ValueError, match="does not support custom"):
            retrieve_timesteps(ours, timesteps=[900, 500, 100])
        with pytest.raises(ValueError, match="does not support custom"):
            retrieve_timesteps(ours, sigmas=[9.0, 5.0, 0.0])


def test_in_inference_mode_and_across_it():
    theirs, ours = pair("unipc")
    expected = [output.prev_sample for output in run(theirs, 5)]
    with torch.inference_mode():
        got = [output.prev_sample for output in run(ours, 5)]
    compare_all = [relative_error(a, b) for a, b in zip(got, expected, strict=True)]
    assert max(compare_all) <= 1e-5
    assert relative_error(run(ours, 5)[-1].prev_sample, expected[-1]) <= 1e-5


def test_a_place_is_found_without_reading_elements_of_the_timesteps():
    _, ours = pair("dpmpp_2m")
    ours.set_timesteps(6)

    class Unread(torch.Tensor):
        def item(self):
            raise AssertionError("read")

        __bool__ = __float__ = __int__ = item

    places = ours._places
    for index in range(6):
        element = ours.timesteps[2:][index - 2] if index >= 2 else ours.timesteps[index]
        assert places.place(element.as_subclass(Unread)) == index
        assert ours.index_for_timestep(element.as_subclass(Unread)) == index
    assert places.place(float(ours.timesteps[3])) == 3
    assert places.place(np.int64(ours.timesteps[4])) == 4
    with torch.inference_mode():
        assert places.offset(ours.timesteps[5]) == 5
