"""`sampler_update` against plain float64 loops, over registers, batches, shapes, strides, dtypes and guidance."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldmperf.kernels import KernelUnsupported, philox_normal, sampler_update, sampler_update_ref
from ldmperf.kernels.philox import STEP_NOISE


def plain_update(registers, model_output, table, k, weight, noise):
    """The definition, one coefficient at a time, in float64."""
    registers, output = registers.double(), model_output.double()
    if weight is not None:
        uncond, cond = output[: registers.shape[1]], output[registers.shape[1] :]
        output = uncond + weight * (cond - uncond)
    inputs = [*registers, output, torch.zeros_like(output) if noise is None else noise.double()]
    new = torch.zeros_like(registers)
    for row, column in itertools.product(range(registers.shape[0]), range(len(inputs))):
        new[row] += float(table[k, row, column]) * inputs[column]
    return new


def awkward(tensor, layout):
    """The same values under other strides; the storage around them is NaN."""
    if layout == "sliced":
        wide = torch.full(
            (tensor.shape[0], 2 * tensor.shape[1] + 1, *tensor.shape[2:]), torch.nan, dtype=tensor.dtype
        )
        view = wide[:, 1::2]
    elif layout == "channels_last" and tensor.dim() == 4:
        view = torch.empty_like(tensor, memory_format=torch.channels_last)
    elif layout == "transposed":
        view = torch.full(
            (*tensor.shape[:-2], tensor.shape[-1], tensor.shape[-2] + 1), torch.nan, dtype=tensor.dtype
        )
        view = view[..., 1:].transpose(-1, -2)
    else:
        view = torch.empty_like(tensor)
    return view.copy_(tensor)


LAYOUTS = ("contiguous", "sliced", "channels_last", "transposed")
OUTPUT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@given(
    r=st.integers(1, 6),
    batch=st.integers(1, 3),
    image=st.sampled_from([(1, 1, 1), (4, 8, 8), (3, 7, 9), (5, 6)]),
    steps=st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    output_dtype=st.sampled_from(OUTPUT_DTYPES),
    input_dtype=st.sampled_from(OUTPUT_DTYPES),
    output_layout=st.sampled_from(LAYOUTS),
    input_layout=st.sampled_from(LAYOUTS),
    guided=st.booleans(),
    channels_last_registers=st.booleans(),
    noise_source=st.sampled_from(["none", "given", "seeds"]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=150, deadline=None)
def test_against_plain_loops(
    r, batch, image, steps, dtype, output_dtype, input_dtype, output_layout, input_layout, guided,
    channels_last_registers, noise_source, seed,
):  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    k = seed % steps
    copies = 2 if guided else 1
    registers = random(r, batch, *image).to(dtype)
    if channels_last_registers:
        registers = registers.movedim(2, -1).contiguous().movedim(-1, 2)
    before = registers.clone()
    output = awkward(random(copies * batch, *image).to(output_dtype), output_layout)
    table = random(steps, r, r + 2).to(dtype)
    weights = random(steps).to(dtype) * 5
    input_scale = random(steps).to(dtype)
    model_input = awkward(torch.full((copies * batch, *image), torch.nan, dtype=input_dtype), input_layout)
    seeds = torch.arange(batch) + seed
    noise = {
        "none": None,
        "given": random(batch, *image).to(dtype),
        "seeds": philox_normal(seeds, image, k, STEP_NOISE),
    }[noise_source]

    sampler_update(
        registers,
        output,
        table,
        torch.tensor([k]),
        guidance_scale=weights if guided else None,
        seeds=seeds if noise_source == "seeds" else None,
        noise=noise if noise_source == "given" else None,
        model_input=model_input,
        input_scale=input_scale,
        backend="torch",
    )

    expected = plain_update(before, output, table, k, float(weights[k]) if guided else None, noise)
    tolerance = 2e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(registers.double(), expected, rtol=tolerance, atol=tolerance)
    scaled = (input_scale[k] * registers[0]).to(input_dtype)
    assert torch.equal(model_input, torch.cat([scaled] * copies))


def small_call(**changes):
    arguments = {
        "registers": torch.zeros(2, 3, 4, 5, 5),
        "model_output": torch.ones(3, 4, 5, 5),
        "table": torch.ones(6, 2, 4),
        "step": torch.tensor([1]),
        **changes,
    }
    sampler_update(**arguments, backend="torch")


def test_given_noise_replaces_generated_noise():
    results = []
    for noise in (None, torch.full((3, 4, 5, 5), 2.0)):
        registers = torch.zeros(2, 3, 4, 5, 5)
        small_call(registers=registers, seeds=torch.arange(3), noise=noise)
        results.append(registers)
    assert torch.equal(results[1], torch.full_like(results[1], 3.0))
    assert not torch.equal(results[0], results[1])


def test_model_input_may_be_a_channel_slice():
    """A super-resolution network reads its condition from the other channels of the same buffer."""
    wide = torch.full((6, 9, 5, 5), 7.0, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    small_call(
        model_output=torch.ones(6, 4, 5, 5),
        guidance_scale=torch.ones(6),
        model_input=wide[:, 2:6],
        input_scale=torch.full((6,), 3.0),
    )
    assert (wide[:, 2:6] == 3.0).all()
    assert (wide[:, :2] == 7.0).all()
    assert (wide[:, 6:] == 7.0).all()


def test_nan_and_infinity_propagate():
    registers = torch.zeros(2, 3, 4, 5, 5)
    output = torch.ones(3, 4, 5, 5)
    output[0, 0, 0, 0], output[1, 0, 0, 0] = torch.nan, torch.inf
    small_call(registers=registers, model_output=output)
    assert registers[:, 0, 0, 0, 0].isnan().all()
    assert registers[:, 1, 0, 0, 0].isinf().all()
    assert registers[:, 2].isfinite().all()


def test_empty_batch():
    small_call(registers=torch.zeros(2, 0, 4, 5, 5), model_output=torch.ones(0, 4, 5, 5), seeds=torch.arange(0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"registers": torch.zeros(2, 3, 4, 5, 5).half()}, "registers must be float32 or float64"),
        ({"registers": torch.zeros(2)}, "registers must be float32 or float64"),
        ({"model_output": torch.ones(6, 4, 5, 5)}, "model_output must be a float dtype"),
        ({"model_output": torch.ones(3, 4, 5, 5, dtype=torch.int32)}, "model_output must be a float dtype"),
        ({"guidance_scale": torch.ones(6)}, "model_output must be a float dtype"),
        ({"table": torch.ones(6, 2, 3)}, "table must be"),
        ({"table": torch.ones(6, 2, 4).double()}, "table must be torch.float32"),
        ({"table": torch.ones(2, 4)}, "table must be"),
        ({"step": torch.tensor(1)}, "step must be"),
        ({"step": torch.tensor([1], dtype=torch.int32)}, "step must be torch.int64"),
        ({"seeds": torch.arange(2)}, "seeds must be"),
        ({"noise": torch.ones(3, 4, 5, 6)}, "noise must be"),
        ({"model_input": torch.ones(3, 4, 5, 5)}, "together"),
        ({"input_scale": torch.ones(6)}, "together"),
        ({"model_input": torch.ones(6, 4, 5, 5), "input_scale": torch.ones(6)}, "model_input must be"),
        ({"model_input": torch.ones(3, 4, 5, 5), "input_scale": torch.ones(5)}, "input_scale must be"),
        ({"model_output": torch.ones(6, 4, 5, 5), "guidance_scale": torch.ones(5)}, "guidance_scale must be"),
        ({"model_output": torch.ones(3, 4, 5, 5, device="meta")}, "model_output must be"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        small_call(**changes)
    assert "\n" not in str(error.value)


def test_the_triton_backend_says_why_it_cannot():
    with pytest.raises(KernelUnsupported, match="sampler_update") as error:
        sampler_update(
            torch.zeros(1, 1, 4), torch.zeros(1, 4), torch.ones(1, 1, 3), torch.tensor([0]), backend="triton"
        )
    assert error.value.reasons


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend"):
        sampler_update(
            torch.zeros(1, 1, 4), torch.zeros(1, 4), torch.ones(1, 1, 3), torch.tensor([0]), backend="cuda"
        )


def test_auto_equals_the_reference():
    registers = [torch.randn(2, 1, 4, 3, 3, generator=torch.Generator().manual_seed(0)) for _ in range(2)]
    arguments = (torch.ones(1, 4, 3, 3), torch.full((1, 2, 4), 0.5), torch.tensor([0]))
    sampler_update(registers[0], *arguments, seeds=torch.tensor([4]))
    sampler_update_ref(registers[1], *arguments, seeds=torch.tensor([4]))
    assert torch.equal(*registers)
