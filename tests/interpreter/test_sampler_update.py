"""sampler_update's kernel and its noise against float64 and the torch reference, in the interpreter."""

import random

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from ldmperf.kernels import OPERATORS, KernelUnsupported, philox_normal, sampler_update
from ldmperf.kernels._launch import run
from ldmperf.kernels.philox import STEP_NOISE, philox4x32, philox_normal_lanes
from ldmperf.samplers import SAMPLERS, NoiseSchedule, initial_noise, make_plan, sample

SCHEDULE = NoiseSchedule.from_diffusers(
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
)
OPTIONS = {
    "ddim": [{}, {"eta": 1.0}],
    "dpmpp_2m": [{}, {"solver_order": 3, "use_karras_sigmas": True}, {"algorithm_type": "sde-dpmsolver++"}],
    "unipc": [{}, {"solver_order": 3}],
    "lcm": [{}],
}


def exact_update(registers, output, table, k, weight, noise):
    registers, output = registers.double(), output.double()
    if weight is not None:
        uncond, cond = output.chunk(2)
        output = uncond + weight * (cond - uncond)
    inputs = torch.stack([*registers, output, torch.zeros_like(output) if noise is None else noise.double()])
    return torch.einsum("ij,j...->i...", table[k].double(), inputs)


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 5),
    batch=st.integers(1, 3),
    image=st.sampled_from([(4, 8, 8), (3, 7, 9), (5, 6), (11,), (16, 4, 4), (1, 1, 1)]),
    channels_last=st.booleans(),
    output_dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    input_dtype=st.sampled_from([torch.float32, torch.float16]),
    guided=st.booleans(),
    sliced_input=st.booleans(),
    noise_source=st.sampled_from(["none", "given", "seeds"]),
    seed=st.integers(0, 2**31),
)
def test_against_float64(
    count, batch, image, channels_last, output_dtype, input_dtype, guided, sliced_input, noise_source, seed
):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    steps, copies = 4, 2 if guided else 1
    k = seed % steps

    def laid_out(tensor):
        spread = channels_last and tensor.dim() >= len(image) + 1 and len(image) == 3
        return tensor.movedim(-3, -1).contiguous().movedim(-1, -3) if spread else tensor

    registers = laid_out(draw(count, batch, *image))
    output = laid_out(draw(copies * batch, *image).to(output_dtype))
    table, weights, scales = draw(steps, count, count + 2), 5 * draw(steps), draw(steps)
    around = torch.full((copies * batch, 2 * image[0] + 1, *image[1:]), 7.0, dtype=input_dtype)
    model_input = around[:, 1::2] if sliced_input else laid_out(torch.full((copies * batch, *image), torch.nan))
    model_input = model_input.to(input_dtype) if not sliced_input else model_input
    seeds = torch.arange(batch) - 2 + seed
    noise = {"none": None, "given": draw(batch, *image), "seeds": philox_normal(seeds, image, k, STEP_NOISE)}
    before = registers.clone()
    arguments = (registers, output, table, torch.tensor([k]))
    options = {
        "guidance_scale": weights if guided else None,
        "seeds": seeds if noise_source == "seeds" else None,
        "noise": noise["given"] if noise_source == "given" else None,
        "model_input": model_input,
        "input_scale": scales,
    }
    operator = OPERATORS["sampler_update"]
    call = operator.bind(*arguments, **options)
    found = operator.candidates(call)
    config = random.Random(seed).choice([None, *found])
    _, launches = operator.plan(call, config=config)
    run(launches, torch.device("cpu"))

    exact = exact_update(before, output, table, k, weights[k].double() if guided else None, noise[noise_source])
    torch.testing.assert_close(registers.double(), exact, rtol=2e-5, atol=3e-5)
    torch.testing.assert_close(
        model_input, torch.cat([(scales[k] * registers[0]).to(input_dtype)] * copies), rtol=1e-3, atol=1e-6
    )
    if sliced_input:
        assert (around[:, ::2] == 7.0).all()


@pytest.mark.parametrize("seed", [0, -5, 2**40 + 3, 2**63 - 1])
@pytest.mark.parametrize("step", [0, 7, 999])
def test_noise_is_that_of_the_reference(seed, step):
    registers = torch.zeros(1, 1, 4, 33, 31)
    table = torch.zeros(1000, 1, 3)
    table[:, 0, 2] = 1.0
    sampler_update(
        registers,
        torch.zeros(1, 4, 33, 31),
        table,
        torch.tensor([step]),
        seeds=torch.tensor([seed]),
        backend="triton",
    )
    expected = philox_normal(torch.tensor([seed]), (4, 33, 31), step, STEP_NOISE)
    assert (registers[0] - expected).abs().max() < 4e-6
    assert abs(float(registers.std()) - 1) < 0.05


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
@pytest.mark.parametrize(
    ("name", "options"), [(name, options) for name in SAMPLERS for options in OPTIONS.get(name, [{}])]
)
def test_every_plan_equals_the_reference(name, options, guidance_scale):
    plan = make_plan(name, SCHEDULE, 5, **options)

    def denoise(model_input, step):
        return torch.tanh(model_input * 0.7 + 0.1 * (step.timestep / 1000)) + 0.1 * model_input.flip(0)

    results = [
        sample(
            denoise,
            plan,
            initial_noise([3, 4], (4, 6, 5)),
            guidance_scale=guidance_scale,
            seeds=[3, 4],
            backend=backend,
        )
        for backend in ("torch", "triton")
    ]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_empty_batch_and_reasons():
    nothing = torch.zeros(2, 0, 4, 5, 5)
    sampler_update(nothing, nothing[0], torch.ones(1, 2, 4), torch.tensor([0]), backend="triton")
    for registers, reason in (
        (torch.zeros(1, 1, 2, 2, 2, 2), "4 dimensions"),
        (torch.zeros(1, 1, 4, 2, 2, dtype=torch.float64), "float64"),
        (torch.zeros(1, 1, 5000, 1, 1), "5000 channels"),
    ):
        table = torch.zeros(1, 1, 3, dtype=registers.dtype)
        with pytest.raises(KernelUnsupported, match=reason):
            sampler_update(registers, registers[0].float(), table, torch.tensor([0]), backend="triton")


@triton.jit
def _noise_of(out_ptr, seed_ptr, first, COUNT: tl.constexpr):
    lanes = tl.arange(0, COUNT)
    noise = philox_normal_lanes(tl.load(seed_ptr), first + lanes.to(tl.int64), tl.full([], 5, tl.int64), STREAM=1)
    tl.store(out_ptr + lanes, noise)


@pytest.mark.parametrize("first", [0, 2**31 - 8, 2**35, 2**45 + 4])
def test_noise_counts_elements_in_64_bits(first):
    out, seed = torch.empty(64), torch.tensor([2**33 + 9])
    _noise_of[(1,)](out, seed, first, 64)
    group = first // 4 + torch.arange(16)
    counter = (group & 0xFFFFFFFF, group >> 32, torch.full_like(group, 5), torch.ones_like(group))
    key = (seed & 0xFFFFFFFF, seed >> 32)
    words = [word.double() for word in philox4x32(counter, key)]
    expected = []
    for radius_word, angle_word in (words[:2], words[2:]):
        radius = (-2 * ((radius_word + 0.5) / 2**32).log()).sqrt()
        angle = angle_word * (2 * torch.pi / 2**32)
        expected += [radius * angle.cos(), radius * angle.sin()]
    assert (out - torch.stack(expected, dim=1).flatten()).abs().max() < 5e-6
