"""The launches of one denoising step of a family size that differ in the code they are compiled to."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from ldmperf.kernels import OPERATORS, Chip, Launch

from ..cases import DType
from ..kernel_case import KernelCase
from ..kernel_cases import family_kernel_cases
from .compile import Specialization, specialization_of
from .machines import MACHINES, Machine

SM_90 = MACHINES["sm_90"]


def planned(operator: str, arguments: Mapping[str, Any], machine: Machine) -> list[Launch]:
    """The launches of a call as they are planned for a chip that need not be there."""
    plan = OPERATORS[operator].plan
    chip = Chip(machine.chip, machine.multiprocessors, machine.arch)
    options = {"chip": chip} if "chip" in inspect.signature(plan).parameters else {}
    return plan(**arguments, **options)[1]


def family_launches(
    size: str, batch: int, dtype: DType, operator: str | None = None, machine: Machine = SM_90
) -> dict[Specialization, Launch]:
    """Those of a step of `size`, `batch` images in the model; of one operator or of all."""
    cases = family_kernel_cases(size, batch, dtype)
    return distinct_launches((case for case in cases if operator in (None, case.operator)), machine)


def distinct_launches(cases: Iterable[KernelCase], machine: Machine = SM_90) -> dict[Specialization, Launch]:
    """The launches of calls, one of each specialization."""
    launches: dict[Specialization, Launch] = {}
    for case in cases:
        for launch in planned(case.operator, case.arguments("meta"), machine):
            launches.setdefault(specialization_of(launch, machine), launch)
    return launches
