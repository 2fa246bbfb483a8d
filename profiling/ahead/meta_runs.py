"""The launches of runs, of single calls and of a tuner's choices, planned on "meta" tensors.

Runs are not listed but run: our backends sample on "meta" tensors, which have shapes, strides and the places of
slices, and every call of an operator is planned.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ldmperf.kernels import OPERATORS, Launch
from ldmperf.model import AUTO, FAMILY, RELEASED, Choices, UNet, UNetConfig
from ldmperf.samplers import NoiseSchedule, make_plan

from ..kernel_bench.selection import Job, first_of_each_key
from ..measure.outcomes import Unsupported
from ..peer import SCHEDULER_CONFIG, diffusers_unet
from ..step.call import OperatorCall
from ..step.recording import RecordedCall, calls_of_ours
from ..trajectory.backend import Inputs
from ..trajectory.case import Case
from ..trajectory.network import IN_CHANNELS, family_config
from ..trajectory.ours import GraphBackend, OurBackend
from ..trajectory.rungs import all_backends
from ..trajectory.theirs import accelerated
from ..trajectory.unet_problem import UNetProblem, added_conditions
from .work import Part

# diffusers' backends that launch kernels of ours, the same ones.
ACCELERATED = ("diffusers-accelerated", "diffusers-accelerated-compile")
Planned = Iterator[tuple[Launch, bool]]
SCHEDULE = NoiseSchedule.from_diffusers(SCHEDULER_CONFIG)
# A run's launches are the same at every step, but that noise and a slice of the steps' numbers come and go.
FEW_STEPS = 3


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

    def capture(
        self, work: Callable[[], None], device: torch.device, *, shares: bool = True
    ) -> Callable[[], None]:
        work()
        return lambda: None

    def memory(self, device: torch.device) -> int:
        return 0

    def timed(self, work: Callable[[], None], device: torch.device) -> Callable[[], float | None]:
        work()
        return lambda: None


def our_backends() -> dict[str, OurBackend | GraphBackend]:
    """Our backends that launch kernels of ours, by name; what they would capture, they run."""
    ours: dict[str, OurBackend | GraphBackend] = {}
    for name, backend in all_backends().items():
        if isinstance(backend, GraphBackend):
            ours[name] = replace(backend, graphs=NoGraphs())
        elif isinstance(backend, OurBackend) and backend.operators == "triton":
            ours[name] = backend
    return ours


def run_parts(cases: Iterable[Case]) -> list[Part]:
    """One part for each case of our backends with launches of its own; checkpoints are left out.

    Where diffusers is installed, also one for each of its networks with our kernels.
    """
    ours = our_backends()
    named = [case for case in cases if case.unet in FAMILY or case.unet in RELEASED]
    distinct = {
        case.model_copy(update={"steps": _steps(case.sampler, case.steps), "seed": 0}): None
        for case in named
        if case.backend in ours
    }
    parts: list[Part] = [partial(_trajectory, case) for case in distinct]
    if importlib.util.find_spec("diffusers") is None:
        return parts
    # The sampler is diffusers', and launches nothing of ours.
    networks = {
        case.model_copy(update={"sampler": "ddim", "steps": 1, "seed": 0, "backend": ACCELERATED[0]}): None
        for case in named
        if case.backend in ACCELERATED
    }
    return [*parts, *(partial(_accelerated, case) for case in networks)]


def _steps(sampler: str, steps: int) -> int:
    """As few steps as show what a plan of so many launches."""
    few = min(steps, FEW_STEPS)
    plans = [make_plan(sampler, SCHEDULE, count) for count in (few, steps)]
    return few if len({(plan.num_registers, plan.stochastic) for plan in plans}) == 1 else steps


def _trajectory(case: Case) -> Planned:
    """A trajectory of `ldmperf profile`; of a stochastic sampler also that of its check, whose noise is given."""
    dtype: torch.dtype = getattr(torch, case.dtype)
    unet = meta_unet(family_config(case), dtype, "torch")
    plan = make_plan(case.sampler, SCHEDULE, case.steps)
    try:
        run = our_backends()[case.backend].build(UNetProblem(case, unet, plan, SCHEDULER_CONFIG))
    except Unsupported:
        # Of a chip without dependent launches, or without float8: on it nothing is launched either.
        return
    noise = torch.empty(case.batch, 4, case.latent_height, case.latent_width, device="meta")
    inputs = Inputs(
        noise=noise,
        context=_context(case, unet.config),
        low_resolution=torch.empty_like(noise) if unet.config.in_channels == IN_CHANNELS["sr"] else None,
        seeds=tuple(range(case.batch)),
        added=_added(case, unet.config),
    )
    yield from launches_of_run(lambda: run(inputs))
    if plan.stochastic:
        given = replace(inputs, step_noise=lambda index: torch.empty_like(noise))
        yield from launches_of_run(lambda: run(given))


@torch.no_grad()
def _accelerated(case: Case) -> Planned:
    """An evaluation of diffusers' network with our kernels in it."""
    config, dtype = family_config(case), getattr(torch, case.dtype)
    unet = diffusers_unet(meta_unet(config, dtype, "torch"))
    accelerated(unet)
    size = (case.model_batch, config.in_channels, case.latent_height, case.latent_width)
    x, timestep = torch.empty(size, dtype=dtype, device="meta"), torch.empty((), device="meta")
    given = {"encoder_hidden_states": _context(case, config), "added_cond_kwargs": _added(case, config) or None}
    yield from launches_of_run(lambda: unet(x, timestep, **given))


def _context(case: Case, config: UNetConfig) -> Tensor:
    size = (case.model_batch, case.context_tokens, config.context_dim)
    return torch.empty(size, dtype=getattr(torch, case.dtype), device="meta")


def _added(case: Case, config: UNetConfig) -> dict[str, Tensor]:
    dtype: torch.dtype = getattr(torch, case.dtype)
    given = added_conditions(case, config, torch.Generator())
    return {name: torch.empty_like(value, dtype=dtype, device="meta") for name, value in given.items()}


def meta_unet(config: UNetConfig, dtype: torch.dtype, backend: str, choices: Choices = AUTO) -> UNet:
    with torch.device("meta"):
        unet = UNet(config, **choices._replace(backend=backend)._asdict()).to(dtype)
    return unet.eval().requires_grad_(False)


def launches_of_run(run: Callable[[], Any]) -> Planned:
    """The launches of the calls that `run` makes on "meta" tensors."""
    distinct = {_layout(call): call for call in calls_of_ours(run)}
    for call in distinct.values():
        yield from ((launch, False) for launch in call.launches)


def _layout(call: RecordedCall) -> object:
    """Equal for calls that launch the same: a layer's weights differ from another's, their shapes often do not."""
    return (
        call.operator,
        call.dependent,
        tuple(
            (name, value.dtype, value.shape, value.stride(), value.data_ptr() % 16)
            if isinstance(value, Tensor)
            else (name, str(value))
            for name, value in call.given.items()
        ),
    )


def launches_of_call(call: OperatorCall) -> Planned:
    """The launches of a call as the benches make it; of one that merges also those of its parts."""
    yield from ((launch, False) for launch in call.launches)
    separate = OPERATORS[call.operator].torchs_own
    # Torch's own attention has none of ours beside it.
    if separate is not None and call.operator != "attention":
        yield from launches_of_run(partial(separate, **call.arguments("meta"), backend="triton"))


def launches_of_calls(calls: Callable[[], Iterable[OperatorCall]]) -> Planned:
    """The same of several, which are found only then."""
    return itertools.chain.from_iterable(map(launches_of_call, calls()))


def candidates(given: Callable[[], Iterable[Job]]) -> Planned:
    """The launches that a tuner tries for these jobs, in its order of keys."""
    for _, job in first_of_each_key(given()):
        operator, call = OPERATORS[job.call.operator], job.call.bound("meta")
        yield from launches_of_call(job.call)
        for config in operator.candidates(call):
            yield from ((launch, True) for launch in operator.plan(call, config=config)[1])
