"""Floors of cases: the roofline of their step at the ceilings of their device."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

from ..measure.ceiling_cache import CeilingSource
from ..measure.ceilings import Ceilings
from ..measure.outcomes import Unsupported, failure
from ..options import DType
from ..step.roofline import Roof, StepPart, least_ms, sums_of
from .backend import Problem
from .record_parts import Floor


def measured_roof(ceilings: Ceilings, dtype: DType) -> Roof:
    """The ceilings that bound a step in that dtype. Raises `Unsupported` with the reason where one is missing."""
    moved, flop, exponentials = ceilings.bytes.per_s, ceilings.flop_per_s(dtype), ceilings.exponentials.per_s
    if moved is None or flop is None or exponentials is None:
        raise Unsupported(f"no ceiling of {ceilings.missing(dtype)}")
    return Roof(moved, flop, exponentials)


def floor_of(parts: Sequence[StepPart], ceilings: Ceilings, dtype: DType) -> Floor:
    """The floor of a step. Raises `Unsupported` where a ceiling is missing."""
    roof = measured_roof(ceilings, dtype)
    least = ceilings.least_flop_per_s(dtype)
    assert least is not None
    sums = sums_of(parts, roof)
    return Floor(
        step_ms=sums.floor_ms,
        least_step_ms=least_ms(parts, least),
        nbytes=sums.nbytes,
        flops=sums.flops,
        exponentials=sums.exponentials,
        bytes_per_s=roof.bytes_per_s,
        flop_per_s=roof.flop_per_s,
        exponentials_per_s=roof.exponentials_per_s,
        least_flop_per_s=least,
    )


class Floors:
    """Floors at the ceilings that a source tells; none without a source.

    What cannot be counted, or has no ceiling, has no floor and a warning: a floor never ends a measurement.
    """

    def __init__(self, ceilings: CeilingSource | None = None) -> None:
        self._ceilings = ceilings

    def prepare(self, device: str) -> None:
        """Has the device's ceilings measured now, if they are to be: before a network takes its memory."""
        if self._ceilings is not None:
            self._ceilings.of(device)

    def of(self, problem: Problem) -> Floor | None:
        """The floor of a step of the problem."""
        return None if self._ceilings is None else self._floor(problem, self._ceilings.of)

    def anew(self, problem: Problem) -> Floor | None:
        """The floor at ceilings that are measured once more, the best of both: never above the one before.

        Ceilings measured on a busy machine are too low, and their floors too high. So this comes before a time is
        called impossible.
        """
        return None if self._ceilings is None else self._floor(problem, self._ceilings.anew)

    def _floor(self, problem: Problem, ceilings_of: Callable[[str], Ceilings]) -> Floor | None:
        case = problem.case
        try:
            return floor_of(problem.step_parts(), ceilings_of(case.device), case.dtype)
        except Exception as error:
            reason = failure(error)[1]
            warnings.warn(f"{case.label} in {case.dtype} on {case.device}: no floor ({reason})", stacklevel=3)
            return None
