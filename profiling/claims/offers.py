"""What a trajectory costs at a step count, as far as records tell.

A measured step count costs its measured median. Another one costs what the least-squares line through the measured
medians says, and is marked:

    interpolated   between measured counts, by a line through two, or through more with R2 of at least 0.99
    extrapolated   outside of them, by a line through three or more with R2 of at least 0.99
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from ..figures.derived import Row
from ..figures.lines import Line, fit_line
from ..measure.conditions import marks
from ..measure.intervals import Interval, median_interval
from ..paper import paper_sizes
from ..trajectory.case import Case
from ..trajectory.records import Record

Basis = Literal["measured", "interpolated", "extrapolated"]
Per = Literal["image", "batch"]
LEAST_R2 = 0.99
MOST_STEPS = 1000
# Why a course does not tell of every step count, the least of the limits first.
LIMITS = (
    "measured at two step counts: the line is not carried on beyond them",
    f"the times are no rising line over steps (R² below {LEAST_R2:g}): measured counts only",
    "measured at one step count: nothing is told of others",
)
# Of the paper's FID: the steps, and all conditions of a case.
PAPER_STEPS = 50
_PAPER_CONDITIONS = {
    "steps": PAPER_STEPS,
    "task": "t2i",
    "sampler": "ddim",
    "guidance_scale": 7.5,
    "latent_height": 64,
    "latent_width": 64,
    "context_tokens": 77,
}


@dataclass(frozen=True)
class Budget:
    """What an image, or a whole batch, may cost: wall time in milliseconds, and energy in joules where limited."""

    wall_ms: float
    joules: float | None = None
    per: Per = "image"

    def units(self, case: Case) -> int:
        """How many of what the budget is for a trajectory makes."""
        return case.batch if self.per == "image" else 1


@dataclass(frozen=True)
class Offer:
    """A trajectory at a step count, and what it costs per image or per batch, as the budget counts.

    ms      the median of the wall time and its interval
    joules  null where the energy was not measured
    basis   how the two are known
    fid     the paper's; null where it has none of this network, sampler and step count
    flags   what makes the times behind it not those of a free GPU
    """

    name: str
    case: Case
    ms: Interval
    joules: float | None
    basis: Basis
    fid: float | None
    flags: str = ""

    def fits(self, budget: Budget) -> bool:
        """Whether median and joules are within the budget; an unknown energy is within none."""
        within = budget.joules is None or (self.joules is not None and self.joules <= budget.joules)
        return within and self.ms.value <= budget.wall_ms

    def interval_fits(self, budget: Budget) -> bool:
        """Whether the time's whole interval is within the budget too."""
        return self.fits(budget) and self.ms.high <= budget.wall_ms


@dataclass(frozen=True)
class Course:
    """A cost over step counts: `measured` at some, and the line through these where they lie on one."""

    measured: dict[int, float]
    line: Line | None

    @classmethod
    def of(cls, measured: dict[int, float]) -> Course:
        """The line is null where it does not rise, or R2 is below LEAST_R2."""
        line = fit_line(measured.items(), relative=True)
        is_straight = line is not None and line.slope > 0 and (line.r2 is None or line.r2 >= LEAST_R2)
        return cls(measured, line if is_straight and min(measured.values()) > 0 else None)

    @property
    def known(self) -> range:
        """The step counts that the line tells of: two points tell nothing of those outside of them."""
        if self.line is None:
            return range(0)
        counts = range(min(self.measured), max(self.measured))
        return counts if self.line.r2 is None else range(1, MOST_STEPS + 1)

    @property
    def limit(self) -> str | None:
        """What keeps the line from telling of every step count."""
        if len(self.measured) < 2:
            return LIMITS[2]
        if self.line is None:
            return LIMITS[1]
        return LIMITS[0] if self.line.r2 is None else None

    def has_inside(self, steps: int) -> bool:
        """Whether the step count lies between measured ones."""
        return min(self.measured) < steps < max(self.measured)

    def at(self, steps: int) -> float | None:
        """The cost; null where it is not known."""
        if steps in self.measured or self.line is None or steps not in self.known:
            return self.measured.get(steps)
        value = self.line.at(steps)
        # A line with a negative fixed part is below zero at few steps.
        return value if value > 0 else None

    def most(self, limit: float, below: int) -> int:
        """The most steps, fewer than `below`, that the line puts within a limit; 0 without any."""
        counts = range(self.known.start, min(self.known.stop, below))
        within = 0 if self.line is None else bisect_right(counts, limit, key=self.line.at)
        return counts[within - 1] if within else 0


@dataclass(frozen=True)
class Curve:
    """One network, sampler and backend over its step counts; `records` and `intervals` of the measured ones."""

    name: str
    case: Case
    records: Mapping[int, Record]
    intervals: Mapping[int, Interval]
    ms: Course
    joules: Course

    @classmethod
    def of(cls, rows: Sequence[Row], budget: Budget) -> Curve:
        """Of timed rows that differ in steps only; costs as the budget counts them."""
        first, intervals, joules = rows[0], {}, {}
        units = budget.units(first.case)
        for row in rows:
            assert row.record.wall_ms is not None
            samples = row.record.wall_ms.samples
            intervals[row.case.steps] = median_interval([sample / units for sample in samples])
            if row.record.joules_per_image is not None:
                joules[row.case.steps] = row.record.joules_per_image * row.case.batch / units
        records = {row.case.steps: row.record for row in rows}
        ms = Course.of({steps: interval.value for steps, interval in intervals.items()})
        return cls(first.name, first.case, records, intervals, ms, Course.of(joules))

    def offer(self, steps: int) -> Offer | None:
        """The trajectory at a step count; null where its time is not known."""
        value = self.ms.at(steps)
        if value is None:
            return None
        case = self.case.model_copy(update={"steps": steps})
        is_measured = steps in self.intervals
        ms = self.intervals[steps] if is_measured else self._interval_by_line(steps, value)
        joules = self.joules.measured.get(steps) if is_measured else self.joules.at(steps)
        inside = [course.has_inside(steps) for course in (self.ms, self.joules) if course.at(steps) is not None]
        basis: Basis = "measured" if is_measured else "interpolated" if all(inside) else "extrapolated"
        flags = marks(*([self.records[steps]] if is_measured else self.records.values()))
        return Offer(self.name, case, ms, joules, basis, paper_fid(case), flags)

    def most_steps(self, budget: Budget) -> int:
        """The most steps that the line puts within the budget, below all measured to exceed it; 0 without any."""
        measured = (self.offer(steps) for steps in self.intervals)
        below = min((o.case.steps for o in measured if o and not o.fits(budget)), default=MOST_STEPS + 1)
        most = self.ms.most(budget.wall_ms, below)
        if budget.joules is not None:
            most = min(most, self.joules.most(budget.joules, below))
        beyond = range(max(self.intervals) + 1, most + 1)
        sampler = self.case.sampler
        if not beyond or is_taken(sampler, most):
            return most
        # A sampler refuses all counts above one.
        return beyond.start - 1 + bisect_left(beyond, True, key=lambda steps: not is_taken(sampler, steps))

    def contradicts(self, offer: Offer, budget: Budget) -> bool:
        """Whether the line has it fit where fewer steps were measured to exceed, or exceed where more fit."""
        if offer.basis == "measured":
            return False
        fits = offer.fits(budget)
        measured = (found for steps in self.intervals if (found := self.offer(steps)))
        return any(m.fits(budget) != fits and (m.case.steps < offer.case.steps) == fits for m in measured)

    def _interval_by_line(self, steps: int, value: float) -> Interval:
        """Around the line's value: its ends where every measured median lies at the worse end of its interval.

        How far the farthest of them is from the line, relative to it, is added on both sides.
        """
        assert self.ms.line is not None
        low = high = value
        for count, interval in self.intervals.items():
            moved = [
                line.at(steps) - value
                for end in (interval.low, interval.high)
                if (line := fit_line((self.ms.measured | {count: end}).items(), relative=True)) is not None
            ]
            low, high = low + min(0.0, *moved), high + max(0.0, *moved)
        off = value * max(abs(1 - self.ms.line.at(count) / ms) for count, ms in self.ms.measured.items())
        confidence = min(interval.confidence for interval in self.intervals.values())
        return Interval(max(low - off, 0.0), value, high + off, confidence)


def paper_fid(case: Case) -> float | None:
    """The FID that the paper has for a trajectory: of its sizes, after 50 steps of DDIM; null for any other."""
    size = paper_sizes().get(case.network)
    has_conditions = all(getattr(case, name) == value for name, value in _PAPER_CONDITIONS.items())
    return size.fid if size is not None and has_conditions else None


@cache
def is_taken(sampler: str, steps: int) -> bool:
    """Whether the sampler can take so many steps; no for what is no sampler."""
    # Loads torch, which measured step counts do not need.
    from ldmperf.samplers import NoiseSchedule, make_plan

    from ..peer import SCHEDULER_CONFIG

    try:
        make_plan(sampler, NoiseSchedule.from_diffusers(SCHEDULER_CONFIG), steps)
    except ValueError:
        return False
    return True
