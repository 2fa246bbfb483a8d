"""Timed rounds, compared between the backends that ran in them: no check's inputs, no reference, no time.

The last sample of a backend has the check's inputs, which it has seen in its first call: there a remembered result
would pass. The inputs of a round are fresh and random, and the same for all its backends.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ..measure.error import relative_rms
from ..measure.outcomes import release_memory
from .backend import Backend, Problem
from .check import LARGEST_TOLERANCE, References, round_tolerance
from .lane import Lane

# No backend can foresee which of its rounds is compared with a reference.
_CHANCE = random.SystemRandom()


@dataclass
class _Kept:
    """A lane's latents of one of its rounds, each as likely, and of how many it was chosen."""

    number: int
    latents: Tensor
    rounds: int


@dataclass
class SharedRounds:
    """The rounds of a group. A lane that agreed with no other one is compared with a reference, once."""

    problem: Problem
    references: References
    backends: Mapping[str, Backend]
    # Of the round that goes on: who ran, with its latents.
    _number: int = -1
    _ran: list[tuple[Lane, Tensor]] = field(default_factory=list)
    _kept: dict[str, _Kept] = field(default_factory=dict)
    # By lane, the first round in which another one differed, and how.
    _doubts: dict[str, tuple[_Kept, str]] = field(default_factory=dict)

    def compare(self, lane: Lane, number: int) -> None:
        """Takes a lane's latents of a round, and compares them with those of the lanes before it."""
        latents = lane.round_latents
        assert latents is not None
        if number != self._number:
            self._number, self._ran = number, []
        count = self._kept[lane.name].rounds + 1 if lane.name in self._kept else 1
        if _CHANCE.randrange(count) == 0:
            self._kept[lane.name] = _Kept(number, latents, count)
        self._kept[lane.name].rounds = count
        for other, theirs in self._ran:
            if self.problem.is_stochastic and not self._draw_alike(lane, other):
                continue
            error, passes = relative_rms(latents, theirs), round_tolerance(lane.tolerance, other.tolerance)
            if error <= passes:
                lane.confirmed_by = lane.confirmed_by or other.name
                other.confirmed_by = other.confirmed_by or lane.name
                continue
            for one, its, beside in ((lane, latents, other), (other, theirs, lane)):
                told = f"{error:.3g} off those of {beside.name} (relative RMS); at most {passes:.3g} passes"
                self._doubts.setdefault(one.name, (_Kept(number, its, 1), told))
        self._ran.append((lane, latents))

    def _draw_alike(self, lane: Lane, other: Lane) -> bool:
        """Whether both draw the same noise, which is known, so that rounding changes nothing of it."""
        implementation = lane.backend.implementation
        alike = other.backend.implementation == implementation
        return alike and bool(self.problem.references(implementation, of_round=True))

    def confirm(self, lane: Lane) -> bool:
        """Fails a lane whose latents of a timed round were wrong; whether that gave memory back to the device.

        A reference says who of two that differ is wrong; where there can be none, both are. A lane alone is
        compared with one in a round of chance. A reference that fails there costs the lane nothing but a warning.
        """
        doubt, told = self._doubts.get(lane.name, (None, None))
        kept = doubt or self._kept.get(lane.name)
        if not lane.active or kept is None or (doubt is None and lane.confirmed_by is not None):
            return False
        where = f"in round {1 + kept.number}, on inputs that only that round had, the final latents were"
        reference = None
        lane.shared.entered(lane.case, "reference")
        try:
            inputs = lane.round_inputs(self.problem, kept.number)
            reference = self.references.of_round(self.problem, lane.backend.implementation, self.backends, inputs)
        except Exception as failure:
            warnings.warn(f"{lane.case.key}: no reference of a timed round ({failure})", stacklevel=2)
        finally:
            self.references.release()
            release_memory()
        if reference is None:
            if told is not None:
                lane.fail("incorrect", f"{where} {told}, and nothing says whose are right")
            return True
        error, passes = relative_rms(kept.latents, reference.latents), round_tolerance(lane.tolerance)
        # A NaN is not at most the tolerance.
        if error <= passes:
            lane.confirmed_by = reference.name
        else:
            # What is of other inputs is as far off as another prompt's; less is wrong in another way.
            is_other = error > LARGEST_TOLERANCE
            what = "a result of other inputs (remembered, or computed ahead)" if is_other else "a wrong result"
            lane.fail(
                "incorrect",
                f"{what}: {where} {error:.3g} off {reference.name} (relative RMS); at most {passes:.3g} passes",
            )
        return True
