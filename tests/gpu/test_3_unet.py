"""The UNet on the kernels and its captured steps: parity, extremes, bits, and memory that runs out."""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ldmperf.kernels import OPERATORS
from ldmperf.model import FAMILY, UNetConfig
from ldmperf.samplers import CaptureError, GraphedSampler, initial_noise, make_plan

pytestmark = pytest.mark.gpu

TINY = UNetConfig((32, 64, 64), (4, 8, 8), (True, True, False), layers_per_block=1, context_dim=24, norm_groups=8)
# UNet's choices beside the products.
IDEAS = ("convolutions", "tails", "statistics")
SAMPLERS = ("ddim", "ddpm", "dpmpp_2m", "dpmpp_2s", "unipc", "euler", "euler_a", "heun", "lcm")


# Beside other tests a network's weights in two dtypes fit up to here.
ALONE = ("558M", "704M", "866M", "2B", "5B")
# Those that the smoke tests leave.
FORWARDS = [
    pytest.param(size, dtype, id=f"{size}-{dtype}", marks=[pytest.mark.alone] if size in ALONE else [])
    for size in FAMILY
    for dtype in ("float16", "bfloat16")
    if (size, dtype) not in (("39M", "bfloat16"), ("866M", "bfloat16"))
]


@pytest.mark.parametrize(("size", "dtype"), FORWARDS)
def test_a_forward_errs_no_more_than_on_torchs_operators(size: str, dtype: str, kit: SimpleNamespace) -> None:
    kit.check_a_forward(size, getattr(torch, dtype))


@torch.no_grad()
def test_the_float32_network_is_that_of_torchs_operators(kit: SimpleNamespace) -> None:
    ours = kit.network(FAMILY["39M"], torch.float32)
    x, context = kit.given(FAMILY["39M"], 2, 64)
    assert kit.relative_rms(ours(x, 981.0, context), ours.with_backend("torch")(x, 981.0, context)) < 1e-4


COMBINATIONS = [
    pytest.param({name: "triton" if name in on else "torch" for name in IDEAS}, id="+".join(on) or "none")
    for count in range(len(IDEAS) + 1)
    for on in itertools.combinations(IDEAS, count)
]


@pytest.mark.parametrize("choices", COMBINATIONS)
@torch.no_grad()
def test_with_every_combination_of_what_can_be_merged(choices: dict[str, str], kit: SimpleNamespace) -> None:
    """Half precision at 39M, and float32, in which fewer kernels serve."""
    x, context = kit.given(FAMILY["39M"], 2, 64)
    reference = kit.network(FAMILY["39M"], torch.bfloat16).with_backend("torch")
    exact = reference.float()(x, 500.0, context)
    for dtype, least in ((torch.bfloat16, 0.0), (torch.float32, 1e-5)):
        ours = kit.network(FAMILY["39M"], torch.bfloat16).to(dtype)
        merged = ours.with_backend(kit.operators, "auto", **choices)
        own = kit.relative_rms(ours.with_backend("torch")(x.to(dtype), 500.0, context), exact)
        assert kit.relative_rms(merged(x.to(dtype), 500.0, context), exact) <= max(1.2 * own, least)


@torch.no_grad()
def test_a_captured_step_with_all_merged_has_the_bits_of_the_eager_one(kit: SimpleNamespace) -> None:
    ours = kit.network(FAMILY["39M"], torch.bfloat16)
    unet = ours.with_backend(kit.operators, "triton", **dict.fromkeys(IDEAS, "triton"))
    plan, noise = make_plan("ddim", kit.schedule, 3), initial_noise([1], (4, 64, 64), device=kit.device)
    _, context = kit.given(FAMILY["39M"], 2, 64)
    conditioning = unet.condition([step.timestep for step in plan.steps], context)
    found = kit.graphed(unet)(conditioning, plan, noise, guidance_scale=3.0)
    assert torch.equal(found, kit.eager(unet, conditioning, plan, noise, guidance_scale=3.0))


@torch.no_grad()
def test_in_float8_the_kernels_err_as_the_references_do_and_a_capture_has_the_bits_of_the_eager_loop(
    kit: SimpleNamespace,
) -> None:
    """By torch's scaled matmul on this GPU, whose float8 is that of the CPU's tests."""
    ours = kit.network(FAMILY["39M"], torch.bfloat16)
    try:
        quantized = [unet.with_float8(least_channels=64) for unet in (ours, ours.with_backend("torch"))]
    except ValueError as misfit:
        pytest.skip(str(misfit))
    x, context = kit.given(FAMILY["39M"], 2, 64)
    exact = ours.with_backend("torch").float()(x, 500.0, context)
    half = kit.relative_rms(ours(x.bfloat16(), 500.0, context), exact)
    error, own = (kit.relative_rms(unet(x.bfloat16(), 500.0, context), exact) for unet in quantized)
    assert half < own < 0.1
    assert error <= 1.2 * own
    plan, noise = make_plan("ddim", kit.schedule, 3), initial_noise([1], (4, 64, 64), device=kit.device)
    conditioning = quantized[0].condition([step.timestep for step in plan.steps], context)
    found = kit.graphed(quantized[0])(conditioning, plan, noise, guidance_scale=3.0)
    assert torch.equal(found, kit.eager(quantized[0], conditioning, plan, noise, guidance_scale=3.0))


@pytest.mark.parametrize("scale", [1e-4, 1e2, 1e3])
@torch.no_grad()
def test_fp16_extremes_give_no_nan_where_float32_gives_none(scale: float, kit: SimpleNamespace) -> None:
    ours = kit.network(FAMILY["39M"], torch.float16)
    x, context = kit.given(FAMILY["39M"], 2, 32)
    exact = ours.with_backend("torch").float()(x.half().float() * scale, 500.0, context.half().float())
    assert exact.isfinite().all()
    assert ours(x.half() * scale, 500.0, context.half()).isfinite().all()


@torch.no_grad()
def test_200_replays_with_changed_prompts_seeds_and_plans_have_the_bits_of_the_eager_loop(
    kit: SimpleNamespace,
) -> None:
    unet = kit.network(TINY, torch.bfloat16)
    sampler = kit.graphed(unet)
    generator = torch.Generator().manual_seed(2)
    replays = run = 0
    while replays < 200:
        plan = make_plan(SAMPLERS[run % len(SAMPLERS)], kit.schedule, 1 + 7 * run % 11)
        seeds = [1000 + run, 2000 + run]
        noise = initial_noise(seeds, (4, 16, 16), device=kit.device)
        context = torch.randn(4, 7, TINY.context_dim, generator=generator).to(kit.device)
        conditioning = unet.condition([step.timestep for step in plan.steps], context)
        options = {"guidance_scale": 1.5 + run, "seeds": seeds}
        result = sampler(conditioning, plan, noise, **options)
        assert torch.equal(result, kit.eager(unet, conditioning, plan, noise, **options)), (plan.name, run)
        replays, run = replays + len(plan.steps), run + 1
    assert len(sampler.captures) == 1


@pytest.mark.alone  # bounds the memory that this process may take
@torch.no_grad()
def test_a_capture_after_memory_ran_out_works(kit: SimpleNamespace) -> None:
    unet = kit.network(TINY, torch.bfloat16)
    sampler = kit.graphed(unet)
    plan = make_plan("ddim", kit.schedule, 2)

    def run(batch: int, latents: int) -> bool:
        noise = initial_noise(list(range(batch)), (4, latents, latents), device=kit.device)
        context = torch.zeros(batch, 7, TINY.context_dim, device=kit.device)
        conditioning = unet.condition([step.timestep for step in plan.steps], context)
        return torch.equal(sampler(conditioning, plan, noise), kit.eager(unet, conditioning, plan, noise))

    assert run(1, 16)
    # torch's own bound: what is over it fails as if the device were full.
    _, total = torch.cuda.mem_get_info()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 64 * 2**20) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            run(8, 256)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert run(2, 16)
    assert run(1, 16)


@torch.no_grad()
def test_what_a_capture_forbids_is_told_and_the_next_capture_works(kit: SimpleNamespace) -> None:
    unet = kit.network(TINY, torch.bfloat16)
    waits = True

    def denoise(x: torch.Tensor, conditioning: Any, step: torch.Tensor) -> torch.Tensor:
        if waits:
            step.item()
        return unet.denoise(x, conditioning, step)

    sampler = GraphedSampler(denoise, input_dtype=unet.dtype, backend=kit.operators, graphs=kit.graphs)
    plan, noise = make_plan("ddim", kit.schedule, 2), initial_noise([1], (4, 16, 16), device=kit.device)
    context = torch.zeros(1, 7, TINY.context_dim, device=kit.device)
    conditioning = unet.condition([step.timestep for step in plan.steps], context)
    stream = torch.cuda.current_stream()
    with pytest.raises(CaptureError, match="could not be captured") as raised:
        sampler(conditioning, plan, noise)
    assert "\n" not in str(raised.value)
    # Work goes on where it was: a capture that fails to end must not leave its stream behind.
    assert torch.cuda.current_stream() == stream
    waits = False
    assert torch.equal(sampler(conditioning, plan, noise), kit.eager(unet, conditioning, plan, noise))


def launched(func: Any, args: Sequence[Any]) -> Any:
    """What a call of one of our operators launches, less tensors and sizes; None for others."""
    name = func._schema.name.partition("::")[2]
    operator = next((known for known in OPERATORS if name == known or name.endswith(f"_{known}")), None)
    if func.namespace != "ldmperf" or operator is None:
        return None
    taken = inspect.signature(OPERATORS[operator].call).parameters
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
    arguments = {key: value for key, value in given.items() if key in taken and key != "backend"}
    return [
        (launch.name, launch.num_warps, {k: v for k, v in launch.arguments.items() if k.isupper()})
        for launch in OPERATORS[operator].plan(OPERATORS[operator].bind(**arguments))[1]
    ]


class AloneOrInABatch(TorchDispatchMode):
    """Runs every operator on the first sample alone too, and notes those whose bits differ.

    `differing` are those whose launches are the same alone: libraries', as far as they tell, and ours. `chosen`
    are ours whose tile is another one for a batch, which may add in another order.
    Tensors made from the samples carry a mark: a weight's first dimension is no batch, whatever its length. What
    all samples share is expanded over the batch: its stride there is 0.
    """

    VIEWS = ("view", "expand", "split", "select", "slice", "as_strided", "permute", "unbind")

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch = batch
        self.differing: Counter[str] = Counter()
        self.chosen: Counter[str] = Counter()

    def mark(self, tensor: torch.Tensor) -> None:
        tensor._of_samples = True  # type: ignore[attr-defined]

    def first(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.shape[:1] == (self.batch,) and value.stride(0) == 0:
            return value[:1]
        if not getattr(value, "_of_samples", False):
            return value
        return value[: value.shape[0] // self.batch].clone(memory_format=torch.preserve_format)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        of_samples = any(getattr(value, "_of_samples", False) for value in (*args, *kwargs.values()))
        alone = None
        if of_samples and not func._schema.name.endswith(self.VIEWS):
            alone = func(*map(self.first, args), **{name: self.first(value) for name, value in kwargs.items()})
        out = func(*args, **kwargs)
        for result in out if isinstance(out, tuple | list) else (out,):
            if of_samples and isinstance(result, torch.Tensor):
                self.mark(result)
        if isinstance(alone, torch.Tensor) and not torch.equal(out[: alone.shape[0]], alone):
            is_same = launched(func, args) == launched(func, [self.first(value) for value in args])
            (self.differing if is_same else self.chosen)[func._schema.name] += 1
        return out


@pytest.mark.parametrize("size", ["39M", "866M"])
@torch.no_grad()
def test_the_bits_of_a_sample_alone_and_in_a_batch(size: str, kit: SimpleNamespace) -> None:
    """Ours have the same wherever they launch the same; which calls have not is told by a warning."""
    unet = kit.network(FAMILY[size], torch.bfloat16)
    x, context = (value.bfloat16() for value in kit.given(FAMILY[size], 4, 64))
    conditioning = unet.condition([500.0], context[:1].expand(4, -1, -1))
    x = x.contiguous(memory_format=torch.channels_last)
    seen = AloneOrInABatch(4)
    for value in (x, *conditioning.context):
        seen.mark(value)
    with seen:
        unet.denoise(x, conditioning, 0)
    if seen.differing or seen.chosen:
        calls = ", ".join(f"{name} ({count})" for name, count in (seen.differing + seen.chosen).items())
        warnings.warn(f"{size}: other bits in a batch of 4 than alone: {calls}", stacklevel=1)
    assert not [name for name in seen.differing if name.startswith("ldmperf")]
