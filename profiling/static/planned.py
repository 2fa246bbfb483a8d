"""The launches of one denoising step of a family size that differ in the code they are compiled to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ldmperf.kernels import OPERATORS, Chip, Launch

from ..machines import SM_90, Machine
from ..options import DType
from ..step.call import OperatorCall
from ..step.calls import family_calls
from .compile import Specialization, specialization_of

# The other operators' configurations are those of 132 multiprocessors on every architecture.
_OF_ARCH = ("attention", "linear", "conv3x3", "transformer_front", "transformer_tail")


def planned(operator: str, arguments: Mapping[str, Any], machine: Machine, config: Any = None) -> list[Launch]:
    """The launches of a call as they are planned for a chip that need not be there."""
    made = OPERATORS[operator]
    chip = chip_of(machine) if operator in _OF_ARCH else None
    launches: list[Launch] = made.plan(made.bind(**arguments), config=config, chip=chip)[1]
    return launches


def chip_of(machine: Machine) -> Chip:
    """What kernels know of the machine: its chip."""
    return Chip(machine.chip, machine.multiprocessors, machine.arch)


def family_launches(
    size: str, batch: int, dtype: DType, operator: str | None = None, machine: Machine = SM_90
) -> dict[Specialization, Launch]:
    """Those of a step of `size`, `batch` images in the model; of one operator or of all."""
    calls = family_calls(size, batch, dtype)
    return distinct_launches((call for call in calls if operator in (None, call.operator)), machine)


def distinct_launches(calls: Iterable[OperatorCall], machine: Machine = SM_90) -> dict[Specialization, Launch]:
    """The launches of calls, one of each specialization."""
    launches: dict[Specialization, Launch] = {}
    for call in calls:
        for launch in planned(call.operator, call.arguments("meta"), machine):
            launches.setdefault(specialization_of(launch, machine), launch)
    return launches
