"""The roofline of a step: what its launches compute and move by class of operator, and the least time of that.

A launch takes at least the longest of its bytes, its FLOPs and its exponentials, each at the device's ceiling; a
step takes the sum, as no launch overlaps another. Counts are those of our step, recorded without memory, with
all merged that is measured or predicted to gain by it.

That sum is no law. A cache may hold the bytes, exponentials may be polynomials, and Winograd's algorithm needs a
quarter of the multiplications of a 3x3 convolution (F(4x4, 3x3); Lavin and Gray, arXiv 1509.09308). `least_ms` is
what is left: all FLOPs, those of 3x3 convolutions at a quarter, and nothing else.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ldmperf.model import AUTO, Choices, UNetConfig

from ..machines import BYTES_PER_S, EXPONENTIALS_PER_S, FLOP_PER_S, SM_90, Machine
from ..options import DType
from .classes import ATTENTION, CLASSES, OperatorClass, class_of, operator_name
from .launches import GpuLaunch
from .recorded_steps import our_step
from .recording import RecordedCall
from .rules import launches_of

Resource = Literal["bytes", "FLOP", "exponentials"]
# The share of a 3x3 convolution's multiplications that Winograd's algorithm needs.
WINOGRAD = 0.25


@dataclass(frozen=True)
class Roof:
    """The rates that bound a launch, a second; `flop_per_s` is of one dtype."""

    bytes_per_s: float
    flop_per_s: float
    exponentials_per_s: float

    def seconds(self, launch: GpuLaunch) -> dict[Resource, float]:
        """What each resource takes for the launch."""
        return {
            "bytes": launch.nbytes / self.bytes_per_s,
            "FLOP": launch.flops / self.flop_per_s,
            "exponentials": launch.exponentials / self.exponentials_per_s,
        }


@dataclass(frozen=True)
class StepShape:
    """What a step's work depends on beside the network: `batch` images of `height` x `width` latent pixels."""

    batch: int = 1
    is_guided: bool = True
    dtype: DType = "bfloat16"
    height: int = 64
    width: int = 64
    tokens: int = 77


@dataclass(frozen=True)
class StepPart:
    """A launch of a step. `least_flops`: with Winograd's algorithm where it is a 3x3 convolution."""

    of: OperatorClass
    launch: GpuLaunch
    least_flops: float


@dataclass(frozen=True)
class WorkSums:
    """Sums over launches, their floor, and the resource that bounds most of it; None where that is no time."""

    launches: int
    nbytes: int
    flops: int
    exponentials: int
    floor_ms: float
    bound: Resource | None


@functools.lru_cache(maxsize=64)
def step_parts(config: UNetConfig, shape: StepShape, choices: Choices = AUTO) -> tuple[StepPart, ...]:
    """The launches of our step in order, with what is merged by `choices`.

    Raises `UnknownOperator`, and what the network raises for sizes that it does not serve.
    """
    calls = our_step(
        config,
        getattr(torch, shape.dtype),
        (shape.height, shape.width),
        shape.tokens,
        batch=shape.batch,
        is_guided=shape.is_guided,
        choices=choices,
    )
    return tuple(part for call in calls for part in _parts(call))


def _parts(call: RecordedCall) -> Iterable[StepPart]:
    share = WINOGRAD if _is_3x3(call) else 1.0
    return [StepPart(class_of_call(call), launch, share * launch.flops) for launch in launches_of([call])]


def class_of_call(call: RecordedCall) -> OperatorClass:
    """The class of a call of our step, whose self-attention reads queries and keys from one packed tensor."""
    name = call.operator or operator_name(call.name)
    if name == ATTENTION and call.in_network:
        query, key = (call.arguments[name].untyped_storage()._cdata for name in ("q", "k"))
        name = "self-attention" if query == key else "cross-attention"
    return class_of(name, in_network=call.in_network)


def _is_3x3(call: RecordedCall) -> bool:
    if call.operator == "conv3x3":
        return True
    return operator_name(call.name) == "convolution" and tuple(call.arguments["weight"].shape[2:]) == (3, 3)


def by_class(parts: Sequence[StepPart], roof: Roof) -> dict[OperatorClass, WorkSums]:
    """The sums of each class that has a launch, in the order of CLASSES."""
    found = {name: [part for part in parts if part.of == name] for name in CLASSES}
    return {name: sums_of(of_class, roof) for name, of_class in found.items() if of_class}


def sums_of(parts: Sequence[StepPart], roof: Roof) -> WorkSums:
    """The sums. The floor has every launch at its longest resource."""
    launches = [part.launch for part in parts]
    bounded: dict[Resource, float] = {}
    for launch in launches:
        seconds = roof.seconds(launch)
        longest = max(seconds, key=lambda resource: seconds[resource])
        bounded[longest] = bounded.get(longest, 0.0) + seconds[longest]
    most = max(bounded, key=lambda resource: bounded[resource], default=None)
    return WorkSums(
        launches=len(launches),
        nbytes=sum(launch.nbytes for launch in launches),
        flops=sum(launch.flops for launch in launches),
        exponentials=sum(launch.exponentials for launch in launches),
        floor_ms=1e3 * sum(bounded.values()),
        bound=most if most is not None and bounded[most] > 0 else None,
    )


def least_ms(parts: Iterable[StepPart], flop_per_s: float) -> float:
    """Milliseconds that no implementation undercuts at that rate: all FLOPs, 3x3 convolutions at a quarter."""
    return 1e3 * sum(part.least_flops for part in parts) / flop_per_s


def published_roof(machine: Machine, dtype: DType) -> Roof:
    """The rates of a chip that need not be here, for a prediction.

    An H200's are those that it reaches in practice (machines.py), but for float32 (no TF32): there the FMA units'
    of its sheet count. Those of others are the sheet's. Raises ValueError for a chip whose units are not modelled.
    """
    if not machine.lanes:
        raise ValueError(f"no units of {machine.arch} are modelled, so it has no roofline")
    cycles_per_s = machine.multiprocessors * machine.clock_ghz * 1e9
    sheet = Roof(
        bytes_per_s=machine.memory_tb_per_s * 1e12,
        flop_per_s=2 * cycles_per_s * machine.lanes["FMA" if dtype == "float32" else "matrix"],
        exponentials_per_s=cycles_per_s * machine.lanes["exponential"],
    )
    if machine is not SM_90:
        return sheet
    flop_per_s = sheet.flop_per_s if dtype == "float32" else FLOP_PER_S
    return Roof(BYTES_PER_S, flop_per_s, EXPONENTIALS_PER_S)


def published_source(machine: Machine, dtype: DType) -> str:
    """Whose the rates of `published_roof` are, in words."""
    if machine is not SM_90:
        return f"{machine.chip}, its data sheet"
    flops = ", FLOPs by its data sheet" if dtype == "float32" else ""
    return f"{machine.chip}, what it reaches in practice{flops}"
