"""What `ldmperf compile --for NAME` stands for: launches of whole runs, of single calls, of a tuner's choices.

Runs are not listed but run: our backends sample on "meta" tensors, which have shapes, strides and the places of
slices, and every call of an operator is planned.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ldmperf.kernels import OPERATORS, Launch, linear_separate
from ldmperf.model import FAMILY, UNet, UNetConfig
from ldmperf.samplers import GraphedSampler, NoiseSchedule, make_plan, sample

from ..kernel_bench.selection import (
    BATCHES,
    SIZES,
    VAE,
    Job,
    first_of_each_key,
    head_dim_jobs,
    jobs,
    steps_in_order,
)
from ..machines import MACHINES, Machine
from ..options import CaseError, DType, whole_number
from ..peer import SCHEDULER_CONFIG
from ..step.call import OperatorCall
from ..step.calls import Calls, family_calls, vae_calls
from ..trajectory.backend import Inputs, Problem
from ..trajectory.case import Case
from ..trajectory.network import IN_CHANNELS, family_config
from ..trajectory.ours import GraphBackend, OurBackend
from ..trajectory.presets import PRESETS
from ..trajectory.rungs import default_backends
from .precompile import Part, Work, plan

Planned = Iterator[tuple[Launch, bool]]
NAMES = ("smoke", "ladder", "family", "kernels", "tests", "tune:OPERATOR[+...][:SIZE[+...][:BATCH[+...]]]")
# A run's launches are the same at every step, but that noise and a slice of the steps' numbers come and go.
_FEW_STEPS = 3
# Of attention in the GPU check (bench/gpu_check.py).
CHECKED_HEAD_DIMS = (40, 64, 80, 128, 160, 384, 8)


def work_for(names: Iterable[str], machine: Machine | str, *, processes: int | None = None) -> Work:
    """The launches of the named work: smoke, ladder, family, kernels, tests, tune:OPERATOR[:SIZE[:BATCH]].

    Raises CaseError for a name that is none.
    """
    chosen = [part for name in names for part in parts_of(name)]
    return plan(chosen, MACHINES[machine] if isinstance(machine, str) else machine, processes=processes)


def parts_of(name: str) -> list[Part]:
    """The parts of the named work, each to be planned by a process. Raises CaseError for a name that is none."""
    kind, *rest = name.split(":")
    if kind == "tune" and 1 <= len(rest) <= 3:
        return tuning_parts(*rest)
    if rest or kind not in _SETS:
        raise CaseError(f"--for: there is no work {name!r}; choose from {', '.join(NAMES)}")
    return _SETS[kind]()


def _smoke() -> list[Part]:
    """Every operator at the calls of the smallest size and of Stable Diffusion's, and a trajectory of each."""
    sizes = ("39M", "866M")
    cases = (
        Case(unet=size, steps=_FEW_STEPS, dtype="bfloat16", device="cuda", backend=backend)
        for size in sizes
        for backend in _ours()
    )
    calls = [partial(_calls_of_cases, partial(family_calls, size, 2, "bfloat16")) for size in sizes]
    # tests/gpu/test_0_smoke.py
    tested = [
        part
        for size in sizes
        for part in (
            partial(_tested_forward, size, "bfloat16", 2, 64),
            partial(_tested_sampling, FAMILY[size], "dpmpp_2m", 1, 64, 77),
        )
    ]
    return [*calls, *run_parts(cases), *tested]


def _ladder() -> list[Part]:
    """The preset `ladder`, and two of its sizes in float16 too."""
    sweeps = PRESETS["ladder"].sweeps
    in_half = (replace(sweep, unets=("866M", "39M"), dtypes=("float16",)) for sweep in sweeps)
    return run_parts(case for sweep in (*sweeps, *in_half) for case in sweep.cases())


def _family() -> list[Part]:
    """The preset `family`."""
    return run_parts(case for sweep in PRESETS["family"].sweeps for case in sweep.cases())


def _kernels() -> list[Part]:
    """`ldmperf kernels`, and attention by head dimension as the GPU check has it."""
    parts: list[Part] = []
    for size, batch in steps_in_order(SIZES, BATCHES):
        cases = partial(vae_calls, "bfloat16") if size == VAE else None
        parts.append(partial(_calls_of_cases, cases or partial(family_calls, size, batch, "bfloat16")))
    parts.append(
        partial(
            _calls_of_cases,
            lambda: (job.case for job in head_dim_jobs(CHECKED_HEAD_DIMS, (4096,), BATCHES, "bfloat16")),
        )
    )
    return parts


def tuning_parts(operators: str, sizes: str = "", batches: str = "") -> list[Part]:
    """What bench/tune.py tries: every candidate at each tuning key, what is used now and torch's own operator."""
    chosen = _known("operator", operators, tuple(OPERATORS))
    of_sizes = _known("size", sizes, SIZES) if sizes else SIZES
    of_batches = tuple(whole_number("for tune", text, 1024) for text in batches.split("+")) if batches else BATCHES
    return [
        partial(candidates, partial(jobs, (operator,), (size,), (batch,), "bfloat16"))
        for operator in chosen
        for size, batch in steps_in_order(of_sizes, of_batches)
    ]


def _known(what: str, text: str, known: Sequence[str]) -> tuple[str, ...]:
    chosen = tuple(text.split("+"))
    for name in chosen:
        if name not in known:
            raise CaseError(f"--for tune: there is no {what} {name!r}; choose from {', '.join(known)}")
    return chosen


def candidates(given: Callable[[], Iterable[Job]]) -> Planned:
    """The launches that a tuner tries for these jobs, in its order of keys."""
    for _, job in first_of_each_key(given()):
        operator, call = OPERATORS[job.case.operator], job.case.bound("meta")
        yield from now_launches(job.case)
        for config in operator.candidates(call):
            yield from ((launch, True) for launch in operator.plan(call, config=config)[1])


def now_launches(case: OperatorCall) -> Planned:
    """The launches of a call as it is now, and of what it is timed beside."""
    return _calls_of_cases(lambda: [case])


def _calls_of_cases(cases: Callable[[], Iterable[OperatorCall]]) -> Planned:
    """The launches of calls as the benches make them; of a linear layer also those beside torch's product."""
    for case in cases():
        arguments = case.arguments("meta")
        yield from _launches(case.operator, arguments)
        if case.operator == "linear":
            yield from _recorded(partial(linear_separate, **arguments, backend="triton"))


def _launches(operator: str, arguments: Mapping[str, Any], config: Any = None) -> Planned:
    made = OPERATORS[operator]
    yield from ((launch, False) for launch in made.plan(made.bind(**arguments), config=config)[1])


def _recorded(run: Callable[[], Any]) -> Planned:
    """The launches of the calls that `run` makes on "meta" tensors."""
    with Calls() as noted:
        run()
    distinct = {_call_key(operator, arguments): (operator, arguments) for operator, arguments, _ in noted.calls}
    for operator, arguments in distinct.values():
        yield from _launches(operator, arguments)


def _call_key(operator: str, arguments: Mapping[str, Any]) -> object:
    """Equal for calls that launch the same: a layer's weights differ from another's, their shapes often do not."""
    return operator, tuple(
        (name, value.dtype, value.shape, value.stride(), value.data_ptr() % 16)
        if isinstance(value, Tensor)
        else (name, str(value))
        for name, value in arguments.items()
    )


class NoGraphs:
    """`Graphs` that run a step where it would be captured, and never again."""

    def check(self, device: torch.device) -> None:
        pass

    def turn(self, device: torch.device) -> AbstractContextManager[None]:
        return nullcontext()

    def settle(self) -> None:
        pass

    def warm_up(self, work: Callable[[], None], device: torch.device) -> None:
        pass

    def capture(self, work: Callable[[], None], device: torch.device) -> Callable[[], None]:
        work()
        return lambda: None


def _ours() -> dict[str, OurBackend | GraphBackend]:
    """Our backends that launch kernels of ours, by name."""
    ours: dict[str, OurBackend | GraphBackend] = {}
    for name, backend in default_backends().items():
        if isinstance(backend, GraphBackend):
            ours[name] = replace(backend, graphs=NoGraphs())
        elif isinstance(backend, OurBackend) and backend.operators == "triton":
            ours[name] = backend
    return ours


def run_parts(cases: Iterable[Case]) -> list[Part]:
    """One part for each case of our backends whose launches may be others'; sizes of the family only."""
    ours = _ours()
    distinct = {
        case.model_copy(update={"steps": _steps(case.sampler, case.steps), "seed": 0}): None
        for case in cases
        if case.backend in ours and case.unet in FAMILY
    }
    return [partial(_trajectory, case) for case in distinct]


def _steps(sampler: str, steps: int) -> int:
    """As few steps as show what a plan of so many launches."""
    few = min(steps, _FEW_STEPS)
    plans = [make_plan(sampler, _schedule(), count) for count in (few, steps)]
    return few if len({(plan.num_registers, plan.stochastic) for plan in plans}) == 1 else steps


def _schedule() -> NoiseSchedule:
    return NoiseSchedule.from_diffusers(SCHEDULER_CONFIG)


def _trajectory(case: Case) -> Planned:
    """A trajectory of `ldmperf profile`; of a stochastic sampler also that of its check, whose noise is given."""
    dtype: torch.dtype = getattr(torch, case.dtype)
    unet = _meta_unet(family_config(case), dtype, "torch")
    plan = make_plan(case.sampler, _schedule(), case.steps)
    run = _ours()[case.backend].build(Problem(case, unet, plan, SCHEDULER_CONFIG))
    image = (4, case.latent_height, case.latent_width)
    noise = torch.empty(case.batch, *image, device="meta")
    inputs = Inputs(
        noise=noise,
        context=torch.empty(
            case.model_batch, case.context_tokens, unet.config.context_dim, dtype=dtype, device="meta"
        ),
        low_resolution=torch.empty_like(noise) if unet.config.in_channels == IN_CHANNELS["sr"] else None,
        seeds=tuple(range(case.batch)),
    )
    yield from _recorded(lambda: run(inputs))
    if plan.stochastic:
        given = replace(inputs, step_noise=lambda index: torch.empty_like(noise))
        yield from _recorded(lambda: run(given))


def _meta_unet(config: UNetConfig, dtype: torch.dtype, backend: str) -> UNet:
    with torch.device("meta"):
        unet = UNet(config, backend=backend).to(dtype)
    return unet.eval().requires_grad_(False)


# What tests/gpu launches; tests/test_precompile.py holds these values against the tests' own.
TESTED_HEAD_DIMS = (8, 12, 16, 20, 24, 28, 32, 36, 40, 48, 56, 64, 72, 80, 96, 112, 128, 144, 160, 192, 256, 384)
TESTED_TOKENS: tuple[tuple[int, int | None], ...] = ((1024, None), (250, None), (250, 77), (64, 64))
TESTED_SAMPLERS = ("ddim", "ddpm", "dpmpp_2m", "dpmpp_2s", "unipc", "euler", "euler_a", "heun", "lcm")
TESTED_TINY = UNetConfig(
    (32, 64, 64), (4, 8, 8), (True, True, False), layers_per_block=1, context_dim=24, norm_groups=8
)
_EVERY_CONFIGURATION = ("attention", "group_norm_silu", "layer_norm", "linear", "geglu", "residual_add")
_HALF: tuple[DType, ...] = ("bfloat16", "float16")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _tests() -> list[Part]:
    """What tests/gpu launches, but for single calls of odd shapes, which compile where they are made."""
    parts: list[Part] = [
        partial(_tested_attention, *pair) for pair in itertools.product(TESTED_HEAD_DIMS, _DTYPES)
    ]
    steps: list[tuple[str, int, DType]] = [(size, 2, "bfloat16") for size in FAMILY]
    steps += [("866M", 2, "float16"), ("866M", 2, "float32"), ("39M", 16, "bfloat16")]
    parts += [partial(_calls_of_cases, partial(family_calls, *step)) for step in steps]
    parts.append(partial(_calls_of_cases, partial(vae_calls, "bfloat16")))
    # tests/test_gpu_timing.py
    parts.append(partial(_calls_of_cases, partial(family_calls, "39M", 2, "bfloat16", latents=16)))
    parts += [partial(_tested_configurations, operator) for operator in _EVERY_CONFIGURATION]
    forwards: list[tuple[str, DType, int, int]] = [(size, dtype, 2, 64) for size in FAMILY for dtype in _HALF]
    forwards += [("39M", "float32", 2, 64), ("39M", "float16", 2, 32)]
    # A sample alone, and in a batch.
    forwards += [(size, "bfloat16", batch, 64) for size in ("39M", "866M") for batch in (1, 4)]
    parts += [partial(_tested_forward, *forward) for forward in forwards]
    parts += [partial(_tested_sampling, TESTED_TINY, sampler, 2, 16, 7) for sampler in TESTED_SAMPLERS]
    parts.append(_tested_samplers_alone)
    return [*_smoke(), *parts]


def _tested_attention(dim: int, dtype: torch.dtype) -> Planned:
    def packed(tokens: int, count: int) -> tuple[Tensor, ...]:
        return torch.empty(3, tokens, count, 8, dim, device="meta", dtype=dtype).unbind(2)

    for tokens, context in TESTED_TOKENS:
        q, k, v = packed(tokens, 3)
        if context is not None:
            k, v = packed(context, 2)
        lengths = torch.empty(3, dtype=torch.int64, device="meta")
        mask = torch.empty(3, k.shape[1], dtype=torch.bool, device="meta")
        for options in ({}, {"key_lengths": lengths}, {"key_mask": mask}):
            yield from _launches("attention", {"q": q, "k": k, "v": v, **options})


def _tested_configurations(operator: str) -> Planned:
    """Every tenth of a tuner's choices."""
    cases = [case for case in family_calls("866M", 2, "bfloat16") if case.operator == operator]
    for case in (cases[0], cases[-1]):
        arguments = case.arguments("meta")
        for config in OPERATORS[operator].candidates(case.bound("meta"))[::10]:
            yield from ((launch, True) for launch, _ in _launches(operator, arguments, config=config))


@torch.no_grad()
def _tested_forward(size: str, dtype: DType, batch: int, latents: int) -> Planned:
    config, torch_dtype = FAMILY[size], getattr(torch, dtype)
    unet = _meta_unet(config, torch_dtype, "triton")
    x = torch.empty(batch, config.in_channels, latents, latents, device="meta", dtype=torch_dtype)
    context = torch.empty(batch, 77, config.context_dim, device="meta", dtype=torch_dtype)
    yield from _recorded(lambda: unet(x, 500.0, context))


@torch.no_grad()
def _tested_sampling(config: UNetConfig, sampler: str, images: int, latents: int, tokens: int) -> Planned:
    """Guided, by the eager loop and by a captured step."""
    unet = _meta_unet(config, torch.bfloat16, "triton")
    plan = make_plan(sampler, _schedule(), _FEW_STEPS)
    noise = torch.empty(images, 4, latents, latents, device="meta")
    context = torch.empty(2 * images, tokens, config.context_dim, device="meta")
    conditioning = unet.condition([step.timestep for step in plan.steps], context)
    given: dict[str, Any] = {"guidance_scale": 7.5, "seeds": list(range(images))}
    yield from _recorded(
        lambda: sample(
            lambda x, step: unet.denoise(x, conditioning, step.index),
            plan,
            noise,
            input_dtype=unet.dtype,
            backend="triton",
            **given,
        )
    )
    graphed = GraphedSampler(unet.denoise, input_dtype=unet.dtype, backend="triton", graphs=NoGraphs())
    yield from _recorded(lambda: graphed(conditioning, plan, noise, **given))


@torch.no_grad()
def _tested_samplers_alone() -> Planned:
    noise = torch.empty(2, 4, 16, 16, device="meta")
    for sampler in ("ddim", "ddpm", "dpmpp_2m", "unipc", "euler_a"):
        plan = make_plan(sampler, _schedule(), 6)
        run = partial(sample, lambda x, step: torch.tanh(x), plan, noise, backend="triton")
        yield from _recorded(partial(run, guidance_scale=7.5, seeds=[3, 4]))


_SETS: Mapping[str, Callable[[], list[Part]]] = {
    "smoke": _smoke,
    "ladder": _ladder,
    "family": _family,
    "kernels": _kernels,
    "tests": _tests,
}
