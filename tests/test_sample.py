"""`sample` and `initial_noise`: what the loop promises about dtypes, guidance, noise, callbacks and failures."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ldmperf.kernels import KernelUnsupported
from ldmperf.samplers import SAMPLERS, NoiseSchedule, initial_noise, make_plan, sample

SCHEDULE = NoiseSchedule.from_diffusers(
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
)
SHAPE = (4, 6, 7)
NOISE = initial_noise([3, 4], SHAPE)


def network(x, step):
    return 0.9 * torch.tanh(x + 1e-3 * step.timestep)


def by_hand(plan, noise, network, step_noise=None, weight=None):
    """The definition of a plan, in float64: registers <- U [registers, output, noise]."""
    registers = [noise.double() * plan.init_noise_sigma]
    registers += [torch.zeros_like(registers[0]) for _ in range(plan.num_registers - 1)]
    for step in plan.steps:
        x = step.c_in * registers[0]
        output = network(x if weight is None else torch.cat([x, x]), step).double()
        if weight is not None:
            uncond, cond = output.chunk(2)
            output = uncond + weight[step.index] * (cond - uncond)
        z = torch.zeros_like(x) if step_noise is None else step_noise(step.index).double()
        columns = [*registers, output, z]
        registers = [sum(float(u) * column for u, column in zip(row, columns, strict=True)) for row in step.U]
    return registers[0]


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_runs_the_plan_in_the_noise_dtype(name, dtype):
    plan = make_plan(name, SCHEDULE, 6)
    noise = NOISE.to(dtype)
    kept = noise.clone()
    injected = torch.randn(20, *noise.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = sample(network, plan, noise, step_noise=lambda k: injected[k])
    expected = by_hand(plan, NOISE, network, lambda k: injected[k])
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=3e-5 if dtype == torch.float32 else 1e-12)
    assert torch.equal(noise, kept)
    assert result.data_ptr() != noise.data_ptr()


@pytest.mark.parametrize("output_dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_state_stays_in_float32_whatever_denoise_computes_in(output_dtype):
    plan = make_plan("dpmpp_2m", SCHEDULE, 8)
    seen = []

    def denoise(x, step):
        seen.append(x.dtype)
        return network(x, step).to(output_dtype)

    result = sample(denoise, plan, NOISE)
    assert result.dtype == torch.float32
    assert set(seen) == {torch.float32}
    rounded = lambda x, step: network(x.float(), step).to(output_dtype)  # noqa: E731
    torch.testing.assert_close(result.double(), by_hand(plan, NOISE, rounded), rtol=0, atol=2e-2)


@pytest.mark.parametrize("shape", [(2, 5), (2, 3, 5), (2, 4, 6, 7), (1, 2, 3, 4, 5)])
def test_any_shape(shape):
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plan = make_plan("unipc", SCHEDULE, 7)
    torch.testing.assert_close(sample(network, plan, noise), by_hand(plan, noise, network), rtol=0, atol=1e-12)


def test_the_result_keeps_the_memory_format_of_the_noise():
    plan = make_plan("ddim", SCHEDULE, 3)
    channels_last = NOISE.to(memory_format=torch.channels_last)
    result = sample(network, plan, channels_last)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert sample(network, plan, NOISE).is_contiguous()
    assert torch.equal(result, sample(network, plan, NOISE))


def test_the_model_input_is_one_channels_last_buffer():
    addresses = set()

    def denoise(x, step):
        assert x.is_contiguous(memory_format=torch.channels_last)
        addresses.add(x.data_ptr())
        return network(x, step)

    sample(denoise, make_plan("euler", SCHEDULE, 5), NOISE, guidance_scale=2.0)
    assert len(addresses) == 1


def two_halves(x, step):
    """Another network for the second half of the batch."""
    half = x.shape[0] // 2
    return torch.cat([network(x[:half], step), torch.sin(x[half:]) + 0.2])


@pytest.mark.filterwarnings("ignore:guidance_scale=0")
@pytest.mark.parametrize("name", ["ddim", "heun", "unipc"])
def test_guidance(name):
    plan = make_plan(name, SCHEDULE, 6)
    noise = NOISE.double()
    count = len(plan.steps)
    per_step = [1.0 + 0.5 * k for k in range(count)]
    for scale, weight in ((7.5, [7.5] * count), (0.0, [0.0] * count), (3, [3.0] * count), (per_step, per_step)):
        result = sample(two_halves, plan, noise, guidance_scale=scale)
        torch.testing.assert_close(result, by_hand(plan, noise, two_halves, weight=weight), rtol=2e-12, atol=1e-11)


@pytest.mark.parametrize("scale", [1.0, 1, [1.0] * 4])
def test_no_guidance_means_no_second_half(scale):
    batches = []

    def denoise(x, step):
        batches.append(x.shape[0])
        return network(x, step)

    sample(denoise, make_plan("ddim", SCHEDULE, 4), NOISE, guidance_scale=scale)
    assert batches == [2] * 4


def test_denoise_sees_the_steps_in_order():
    plan = make_plan("heun", SCHEDULE, 4)
    steps = []
    sample(lambda x, step: steps.append(step) or network(x, step), plan, NOISE)
    assert tuple(steps) == plan.steps
    assert all(isinstance(step.timestep, float) for step in steps)


def test_seeds_make_the_noise_of_a_stochastic_plan():
    plan = make_plan("ddpm", SCHEDULE, 5)
    both = sample(network, plan, NOISE, seeds=[3, 4])
    assert torch.equal(both, sample(network, plan, NOISE, seeds=torch.tensor([3, 4])))
    assert torch.equal(both[1:], sample(network, plan, NOISE[1:], seeds=[4]))
    assert torch.equal(both.flip(0), sample(network, plan, NOISE.flip(0), seeds=[4, 3]))
    assert not torch.equal(both, sample(network, plan, NOISE, seeds=[3, 5]))
    assert torch.equal(
        sample(network, plan, NOISE, seeds=[-1, 4]), sample(network, plan, NOISE, seeds=[2**64 - 1, 4])
    )


def test_every_step_has_its_own_noise_unlike_the_initial_noise():
    """With a network of zeros, DDIM with eta 1 is a known sum of the noises."""
    plan = make_plan("ddim", SCHEDULE, 3, eta=1.0)
    seen = []
    zeros = lambda x, step: torch.zeros_like(x)  # noqa: E731
    sample(zeros, plan, torch.zeros(1, 4, 32, 32), seeds=[9], callback=lambda step, x: seen.append(x))
    before = torch.zeros(1, 4, 32, 32)
    noises = [initial_noise([9], (4, 32, 32)).flatten()]
    for step, x in zip(plan.steps[:-1], seen, strict=False):
        noises.append(((x - step.U[0, 0] * before) / step.U[0, -1]).float().flatten())
        before = x
    correlations = torch.corrcoef(torch.stack(noises)) - torch.eye(len(noises))
    assert correlations.abs().max() < 5 / 4096**0.5
    assert all(abs(float(noise.std()) - 1) < 0.06 for noise in noises)


def test_step_noise_is_asked_for_the_steps_that_add_noise():
    plan = make_plan("lcm", SCHEDULE, 4)
    asked = []
    sample(network, plan, NOISE, step_noise=lambda k: asked.append(k) or torch.zeros_like(NOISE))
    assert asked == [0, 1, 2]


def test_callback_gets_a_copy_after_every_step():
    plan = make_plan("dpmpp_2s", SCHEDULE, 5)
    calls = []

    def callback(step, x):
        calls.append((step.index, x.clone()))
        x.fill_(torch.nan)

    result = sample(network, plan, NOISE, callback=callback)
    assert [index for index, _ in calls] == list(range(5))
    assert torch.equal(calls[-1][1], result)
    assert torch.equal(result, sample(network, plan, NOISE))


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("where", ["denoise", "callback"])
def test_an_interrupted_run_leaves_nothing_broken(failure, where):
    plan = make_plan("unipc", SCHEDULE, 6)
    noise = NOISE.clone()
    expected = sample(network, plan, noise)

    def interrupt(step):
        if step.index == 3:
            raise failure

    def denoise(x, step):
        if where == "denoise":
            interrupt(step)
        return network(x, step)

    callback = (lambda step, x: interrupt(step)) if where == "callback" else None
    with pytest.raises(failure):
        sample(denoise, plan, noise, callback=callback)
    assert torch.equal(noise, NOISE)
    assert torch.is_grad_enabled()
    assert torch.equal(sample(network, plan, noise), expected)


def test_no_graph_is_kept():
    weight = torch.ones((), requires_grad=True)
    result = sample(lambda x, step: weight * network(x, step), make_plan("ddim", SCHEDULE, 3), NOISE)
    assert not result.requires_grad


def test_a_network_that_returns_its_input():
    """Its output shares memory with the buffer that the update writes."""
    plan = make_plan("ddim", SCHEDULE, 4)
    result = sample(lambda x, step: x, plan, NOISE.double(), guidance_scale=3.0)
    torch.testing.assert_close(result, by_hand(plan, NOISE, lambda x, step: x), rtol=0, atol=1e-12)


class NoHostReads(TorchDispatchMode):
    """Fails on the operators that make the host wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["ddim", "ddpm", "unipc"])
def test_the_host_never_reads_a_tensor(name):
    plan = make_plan(name, SCHEDULE, 4)
    with NoHostReads():
        sample(network, plan, NOISE, seeds=[1, 2], guidance_scale=2.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"noise": NOISE.half()}, "noise must be float32 or float64"),
        ({"noise": NOISE.to(torch.bfloat16)}, "noise must be float32 or float64"),
        ({"noise": torch.zeros(3)}, "noise must be float32 or float64"),
        ({"plan": make_plan("ddpm", SCHEDULE, 3)}, "give seeds"),
        ({"plan": make_plan("ddpm", SCHEDULE, 3), "seeds": [1]}, "2 images, 1 seeds"),
        ({"plan": make_plan("ddpm", SCHEDULE, 3), "seeds": [1.5, 2]}, "seeds must be"),
        ({"plan": make_plan("ddpm", SCHEDULE, 3), "step_noise": lambda k: NOISE[:1]}, "step_noise"),
        ({"guidance_scale": [2.0, 3.0]}, "3 numbers"),
        ({"denoise": lambda x, step: x[:1]}, "denoise's output at step 0"),
        ({"denoise": lambda x, step: x[..., :2]}, "denoise's output at step 0"),
        ({"denoise": lambda x, step: x.int()}, "denoise's output at step 0"),
        ({"denoise": lambda x, step: (x,)}, "not tuple"),
        ({"denoise": lambda x, step: x.chunk(2)[0], "guidance_scale": 2.0}, "denoise's output at step 0"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(arguments, message):
    call = {"denoise": network, "plan": make_plan("ddim", SCHEDULE, 3), "noise": NOISE, **arguments}
    with pytest.raises(ValueError, match=message) as error:
        sample(**call)
    assert "\n" not in str(error.value)


def test_initial_noise():
    noise = initial_noise([5, -5, 2**63 + 1], SHAPE)
    assert noise.shape == (3, *SHAPE)
    assert noise.dtype == torch.float32
    assert torch.equal(noise[1:2], initial_noise([-5], SHAPE))
    assert torch.equal(initial_noise([5], SHAPE, dtype=torch.float64)[0], noise[0].double())
    assert torch.equal(initial_noise([5], SHAPE, dtype=torch.bfloat16)[0], noise[0].bfloat16())
    assert initial_noise([], SHAPE).shape == (0, *SHAPE)
    assert abs(float(initial_noise(range(8), (4, 64, 64)).std()) - 1) < 0.01


def test_sample_starts_from_the_scaled_noise():
    first = []

    class Stop(Exception):
        pass

    def denoise(x, step):
        first.append(x.clone())
        raise Stop

    plan = make_plan("euler", SCHEDULE, 5)
    with contextlib.suppress(Stop):
        sample(denoise, plan, NOISE.double())
    expected = NOISE.double() * plan.init_noise_sigma * plan.steps[0].c_in
    torch.testing.assert_close(first[0], expected, rtol=1e-14, atol=0)


def test_the_backend_is_named_to_the_operator():
    plan = make_plan("ddim", NoiseSchedule.from_diffusers({}), 2)
    noise = initial_noise([1], (4, 3, 3))
    assert torch.equal(
        sample(lambda x, step: x, plan, noise, backend="torch"), sample(lambda x, step: x, plan, noise)
    )
    with pytest.raises(KernelUnsupported, match="sampler_update"):
        sample(lambda x, step: x, plan, noise, backend="triton")
