"""What records say of a claim under one set of conditions, and of the claim under all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from ..figures.derived import Row
from ..figures.phrases import phrases_of
from ..measure.conditions import is_busy, is_unsteady, marks
from ..measure.environment import Environment
from ..measure.intervals import FEWEST, Interval
from ..terminal.layout import Grid
from ..terminal.visible import counted
from .catalogue import Claim

Finding = Literal["holds", "does not hold", "undecided", "not measured"]
FINDINGS: tuple[Finding, ...] = get_args(Finding)
# A verdict on so few sizes of eleven says so: a curve over the family needs more.
FEW_SIZES = 3
_BUSY = "measured on a busy machine"


@dataclass(frozen=True)
class Judged:
    """The number that decided: a claim holds where `interval` lies at or below the limit (`above`: above it)."""

    name: str
    interval: Interval
    limit: float
    above: bool = False

    @property
    def finding(self) -> Finding:
        """Undecided where the limit lies inside the interval."""
        low, high = self.interval.low, self.interval.high
        if self.above:
            return "holds" if low > self.limit else "does not hold" if high <= self.limit else "undecided"
        return "holds" if high <= self.limit else "does not hold" if low > self.limit else "undecided"

    @property
    def distance(self) -> float:
        """How far the value lies from the limit, relative to it, or from zero in widths of the interval: what is
        told first."""
        unit = abs(self.limit) or self.interval.high - self.interval.low
        return abs(self.interval.value - self.limit) / unit if unit else 0.0


@dataclass(frozen=True)
class Verdict:
    """What records say of a claim under one set of conditions.

    sentence     why, in one sentence without the conditions; of "not measured" it begins with what is needed
    conditions   name and phrase of all that the times behind it share
    figures      what it stands on, or what timing can say of a claim that it cannot judge; null without times
    sizes        how many networks it was judged on
    samples      of the time with the least, or of the quality with the least images; null without either
    judged       the number that decided, where one did
    """

    claim: Claim
    finding: Finding
    sentence: str
    conditions: Mapping[str, str] = field(default_factory=dict)
    figures: Grid | None = None
    sizes: int = 0
    samples: int | None = None
    judged: Judged | None = None

    @property
    def is_of_quality(self) -> bool:
        """Whether the quality of a closed world is behind it, and not times alone."""
        return "world" in self.conditions


@dataclass(frozen=True)
class ClaimVerdicts:
    """A claim and its verdicts: one for each set of conditions with figures, or one that says what is needed."""

    claim: Claim
    verdicts: tuple[Verdict, ...]

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The different findings, in a fixed order."""
        found = {verdict.finding for verdict in self.verdicts}
        return tuple(finding for finding in FINDINGS if finding in found)

    @property
    def is_judged(self) -> bool:
        """Whether a time decided it under some conditions, or left it undecided."""
        return self.findings != ("not measured",)

    @property
    def has_figures(self) -> bool:
        return any(verdict.figures is not None for verdict in self.verdicts)

    @property
    def common(self) -> dict[str, str]:
        """The conditions that all its verdicts share."""
        first, *others = self.verdicts
        return {
            name: phrase
            for name, phrase in first.conditions.items()
            if all(other.conditions.get(name) == phrase for other in others)
        }


@dataclass(frozen=True)
class Evidence:
    """What a verdict stands on: rows with times, the figures, the networks by name.

    place: the rows whose shared conditions are told; all of them unless given.
    """

    claim: Claim
    rows: Sequence[Row]
    environments: Sequence[Environment]
    figures: Grid
    sizes: Sequence[str]
    place: Sequence[Row] = ()

    def decided(self, judged: Judged | None, sentence: str, samples: int | None = None) -> Verdict:
        """The verdict of a number, null where times of zero allow none; the sentence says what is few.

        samples: of the time with the least, unless told.
        """
        if judged is None:
            return self._verdict("not measured", "needs times that are not zero")
        count = least_samples(self.rows) if samples is None else samples
        finding, confidence = judged.finding, judged.interval.confidence
        if count < FEWEST:
            finding = "undecided"
            decide = "decides" if count == 1 else "decide"
            sentence += f"; {counted(count, 'sample')} of a time {decide} nothing, {FEWEST} do"
        elif confidence < 0.95:
            sentence += f"; with {counted(count, 'sample')} of a time the interval has {confidence:.0%} confidence"
        if len(self.sizes) <= FEW_SIZES:
            sentence += f"; judged on {counted(len(self.sizes), 'size')} only ({', '.join(self.sizes)})"
        return self._verdict(finding, sentence, judged)

    def undecidable(self, sentence: str) -> Verdict:
        """What timing says of a claim about quality, which it cannot judge."""
        return self._verdict("not measured", f"needs {self.claim.needs}; timing says: {sentence}")

    def unmeasured(self, needs: str) -> Verdict:
        """What is there, and what a verdict needs besides."""
        return self._verdict("not measured", f"needs {needs}")

    def _verdict(self, finding: Finding, sentence: str, judged: Judged | None = None) -> Verdict:
        sentence += "".join(f"; {doubt}" for doubt in doubts(self.rows))
        return Verdict(
            self.claim,
            finding,
            sentence,
            shared_conditions(self.place or self.rows, self.environments),
            self.figures,
            len(self.sizes),
            least_samples(self.rows),
            judged,
        )


def doubts(rows: Iterable[Row]) -> list[str]:
    """What is against the times of these rows; nothing where all is well."""
    records = [row.record for row in rows if row.record.wall_ms is not None]

    def of(bad: int, one: str, several: str) -> str:
        if len(records) == 1:
            return f"its time {one}"
        return f"{bad} of its {len(records)} times {one if bad == 1 else several}"

    unsteady = sum(is_unsteady(record.wall_ms) for record in records)
    busy = sum(is_busy(record) for record in records)
    flagged = marks(*records)
    return [
        *([f"some of its times are not those of a free GPU ({flagged})"] if flagged else []),
        *([of(unsteady, "is unsteady", "are unsteady")] if unsteady else []),
        *([of(busy, f"was {_BUSY}", f"were {_BUSY}")] if busy else []),
    ]


def least_samples(rows: Iterable[Row]) -> int:
    """The samples of the time with the fewest."""
    return min((row.record.wall_ms.n for row in rows if row.record.wall_ms is not None), default=0)


def shared_conditions(rows: Sequence[Row], environments: Sequence[Environment]) -> dict[str, str]:
    """Name and phrase of the conditions that all rows share, the network and the backend among them."""
    said = [{"size": row.name, "backend": row.case.backend, **phrases_of(row, environments)} for row in rows]
    return {
        name: phrase
        for name, phrase in said[0].items()
        if phrase and all(other.get(name) == phrase for other in said[1:])
    }


def interval_text(interval: Interval, form: str = "{:.3g}") -> str:
    """ "1.51 to 1.63"."""
    return f"{form.format(interval.low)} to {form.format(interval.high)}"
