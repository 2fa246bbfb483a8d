"""The launches of one denoising step of a family size that differ in the code they are compiled to."""

from __future__ import annotations

from collections.abc import Iterable

from ldmperf.kernels import OPERATORS, Launch

from ..cases import DType
from ..kernel_case import KernelCase
from ..kernel_cases import family_kernel_cases
from .compile import Specialization, specialization_of
from .machines import MACHINES


def family_launches(
    size: str, batch: int, dtype: DType, operator: str | None = None
) -> dict[Specialization, Launch]:
    """Those of a step of `size`, `batch` images in the model; of one operator or of all."""
    cases = family_kernel_cases(size, batch, dtype)
    return distinct_launches(case for case in cases if operator in (None, case.operator))


def distinct_launches(cases: Iterable[KernelCase]) -> dict[Specialization, Launch]:
    """The launches of calls, one of each specialization on sm_90."""
    launches: dict[Specialization, Launch] = {}
    for case in cases:
        for launch in OPERATORS[case.operator].plan(**case.arguments("meta"))[1]:
            launches.setdefault(specialization_of(launch, MACHINES["sm_90"]), launch)
    return launches
