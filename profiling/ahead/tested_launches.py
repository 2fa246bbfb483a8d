"""What tests/gpu launches, but for single calls of odd shapes, which compile where they are made.

tests/test_precompile.py holds the values here against the tests' own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ldmperf.kernels import OPERATORS, dependent_launches
from ldmperf.model import AUTO, FAMILY, Choices, UNetConfig
from ldmperf.samplers import GraphedSampler, Step, make_plan, sample

from ..options import DType
from ..step.call import GUIDANCE_SCALE
from ..step.calls import FAMILY_HEAD_DIMS, family_calls, vae_calls
from .meta_runs import FEW_STEPS, SCHEDULE, NoGraphs, Planned, launches_of_calls, launches_of_run, meta_unet
from .work import Part

# The queries of attention, and the tokens that they attend to where those are others.
TESTED_TOKENS: tuple[tuple[int, int | None], ...] = ((1024, None), (250, None), (250, 77), (64, 64))
TESTED_IDEAS = ("convolutions", "tails", "statistics")
TESTED_SAMPLERS = ("ddim", "ddpm", "dpmpp_2m", "dpmpp_2s", "unipc", "euler", "euler_a", "heun", "lcm")
TESTED_TINY = UNetConfig(
    (32, 64, 64), (4, 8, 8), (True, True, False), layers_per_block=1, context_dim=24, norm_groups=8
)
# What evaluations are captured for: (batch, latents).
TESTED_GRAPHS = ((4, 128), (3, 128), (2, 128), (1, 32))
_HALF: tuple[DType, ...] = ("bfloat16", "float16")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SMOKE_SIZES = ("39M", "866M")


def smoke_parts() -> list[Part]:
    """What tests/gpu/test_0_smoke.py launches beside single calls."""
    parts: list[Part] = [partial(_forward, FAMILY[size], "bfloat16", 2, 64) for size in SMOKE_SIZES]
    return parts + [partial(_sampling, FAMILY[size], "dpmpp_2m", 1, 64, 77) for size in SMOKE_SIZES]


def tested_parts() -> list[Part]:
    """What the other files launch."""
    parts: list[Part] = [partial(_attention, *pair) for pair in itertools.product(FAMILY_HEAD_DIMS, _DTYPES)]
    steps: list[tuple[str, int, DType]] = [(size, 2, "bfloat16") for size in FAMILY]
    steps += [("866M", 2, "float16"), ("866M", 2, "float32"), ("39M", 16, "bfloat16")]
    parts += [partial(launches_of_calls, partial(family_calls, *step)) for step in steps]
    parts.append(partial(launches_of_calls, partial(vae_calls, "bfloat16")))
    # tests/test_gpu_timing.py
    parts.append(partial(launches_of_calls, partial(family_calls, "39M", 2, "bfloat16", latent=(16, 16))))
    parts += [partial(_configurations, operator) for operator in OPERATORS if operator != "sampler_update"]
    forwards: list[tuple[str, DType, int, int]] = [(size, dtype, 2, 64) for size in FAMILY for dtype in _HALF]
    forwards += [("39M", "float32", 2, 64), ("39M", "float16", 2, 32)]
    # A sample alone, and in a batch.
    forwards += [(size, "bfloat16", batch, 64) for size in SMOKE_SIZES for batch in (1, 4)]
    parts += [partial(_forward, FAMILY[size], dtype, *shape) for size, dtype, *shape in forwards]
    parts += [partial(_forward, TESTED_TINY, "bfloat16", *shape, tokens=7) for shape in TESTED_GRAPHS]
    merged = [
        AUTO._replace(**{name: "triton" if name in on else "torch" for name in TESTED_IDEAS})
        for on in _combinations(TESTED_IDEAS)
    ]
    both: tuple[DType, ...] = ("bfloat16", "float32")
    parts += [
        partial(_forward, FAMILY["39M"], dtype, 2, 64, choices=choices) for dtype in both for choices in merged
    ]
    everything = Choices(*["triton"] * len(AUTO))
    parts.append(partial(_sampling, FAMILY["39M"], "ddim", 1, 64, 77, everything))
    parts.append(partial(_sampling, TESTED_TINY, "dpmpp_2m", 2, 64, 7))
    parts += [partial(_sampling, TESTED_TINY, sampler, 2, 16, 7) for sampler in TESTED_SAMPLERS]
    parts += [partial(_dependent, TESTED_TINY, 16, 7), partial(_dependent, FAMILY["39M"], 64, 77)]
    return [*parts, _samplers_alone]


def _attention(dim: int, dtype: torch.dtype) -> Planned:
    def packed(tokens: int, count: int) -> tuple[Tensor, ...]:
        return torch.empty(3, tokens, count, 8, dim, device="meta", dtype=dtype).unbind(2)

    operator = OPERATORS["attention"]
    for tokens, context in TESTED_TOKENS:
        q, k, v = packed(tokens, 3)
        if context is not None:
            k, v = packed(context, 2)
        lengths = torch.empty(3, dtype=torch.int64, device="meta")
        mask = torch.empty(3, k.shape[1], dtype=torch.bool, device="meta")
        for options in ({}, {"key_lengths": lengths}, {"key_mask": mask}):
            yield from ((launch, False) for launch in operator.plan(operator.bind(q, k, v, **options))[1])


def _configurations(operator: str) -> Planned:
    """Every tenth of a tuner's choices."""
    calls = [call.bound("meta") for call in family_calls("866M", 2, "bfloat16") if call.operator == operator]
    for call in (*calls[:1], *calls[-1:]):
        for config in OPERATORS[operator].candidates(call)[::10]:
            yield from ((launch, True) for launch in OPERATORS[operator].plan(call, config=config)[1])


def _combinations(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Every set of them."""
    for count in range(len(names) + 1):
        yield from itertools.combinations(names, count)


@torch.no_grad()
def _forward(
    config: UNetConfig, dtype: DType, batch: int, latents: int, tokens: int = 77, *, choices: Choices = AUTO
) -> Planned:
    torch_dtype = getattr(torch, dtype)
    unet = meta_unet(config, torch_dtype, "triton", choices)
    x = torch.empty(batch, config.in_channels, latents, latents, device="meta", dtype=torch_dtype)
    context = torch.empty(batch, tokens, config.context_dim, device="meta", dtype=torch_dtype)
    yield from launches_of_run(lambda: unet(x, 500.0, context))


@torch.no_grad()
def _sampling(
    config: UNetConfig, sampler: str, images: int, latents: int, tokens: int, choices: Choices = AUTO
) -> Planned:
    """Guided, by the eager loop and by a captured step."""
    unet = meta_unet(config, torch.bfloat16, "triton", choices)
    plan = make_plan(sampler, SCHEDULE, FEW_STEPS)
    noise = torch.empty(images, 4, latents, latents, device="meta")
    context = torch.empty(2 * images, tokens, config.context_dim, device="meta")
    conditioning = unet.condition([step.timestep for step in plan.steps], context)
    given: dict[str, Any] = {"guidance_scale": GUIDANCE_SCALE, "seeds": list(range(images))}
    options: dict[str, Any] = {"input_dtype": unet.dtype, "backend": "triton"}

    def denoise(x: Tensor, step: Step) -> Tensor:
        return unet.denoise(x, conditioning, step.index)

    yield from launches_of_run(partial(sample, denoise, plan, noise, **given, **options))
    graphed = GraphedSampler(unet.denoise, graphs=NoGraphs(), **options)
    yield from launches_of_run(partial(graphed, conditioning, plan, noise, **given))


def _dependent(config: UNetConfig, latents: int, tokens: int) -> Planned:
    """The same with dependent launches."""
    with dependent_launches():
        found = list(_sampling(config, "dpmpp_2m", 1, latents, tokens))
    yield from found


@torch.no_grad()
def _samplers_alone() -> Planned:
    noise = torch.empty(2, 4, 16, 16, device="meta")
    for sampler in ("ddim", "ddpm", "dpmpp_2m", "unipc", "euler_a"):
        plan = make_plan(sampler, SCHEDULE, 6)
        run = partial(sample, lambda x, step: torch.tanh(x), plan, noise, backend="triton")
        yield from launches_of_run(partial(run, guidance_scale=GUIDANCE_SCALE, seeds=[3, 4]))
