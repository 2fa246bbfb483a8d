"""The verdict on each case and metric of two sets of records, and the cases that only one of them has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..figures.text import joined
from ..measure.conditions import marks
from ..measure.timing import quantile
from ..terminal.visible import counted
from .contrast import Contrast, NoContrast, contrast, holm
from .metrics import Metric
from .sets import RecordSet, in_turn, measured, names_of

SAME, AMBIGUOUS = "SAME", "AMBIGUOUS"


@dataclass(frozen=True)
class VerdictRule:
    """When two sides differ.

    FASTER, SLOWER    the difference is significant (adjusted p at most `alpha`, the interval without 1) and at
                      least `min_effect`; LESS, MORE of what is no time
    SAME              the whole interval lies within `min_effect` of 1
    AMBIGUOUS         neither: noise is larger than the difference, or there are too few samples or runs (fewer
                      than three pairs, or four runs in all: two may agree by chance)

    min_effect and assumed_noise (of two runs of one commit, used for one run each) are shares: 0.02 is 2 %.
    """

    min_effect: float = 0.02
    assumed_noise: float = 0.05
    alpha: float = 0.05

    def verdict(self, metric: Metric, found: Contrast, p: float) -> str:
        """By the contrast and its p-value adjusted for all that are judged with it."""
        least, most = 1 / (1 + self.min_effect), 1 + self.min_effect
        ratio = found.ratio
        if self.is_enough(found) and least <= ratio.low and ratio.high <= most:
            return SAME
        if self.is_significant(found, p) and not least < ratio.value < most:
            return metric.less if ratio.value < 1 else metric.more
        return AMBIGUOUS

    def is_significant(self, found: Contrast, p: float) -> bool:
        """Whether the sides differ, by the adjusted p and the interval both."""
        return self.is_enough(found) and p <= self.alpha and not found.ratio.low <= 1 <= found.ratio.high

    def is_enough(self, found: Contrast) -> bool:
        """Whether there are runs enough for any verdict."""
        return found.freedom is None or found.freedom > 1


@dataclass(frozen=True)
class Change:
    """A case in one metric. a, b: medians over the runs of their medians. p: adjusted (Holm); None for a counted
    metric. Without a contrast `why` says why there is none. marks: what flags the time."""

    key: str
    name: str
    metric: Metric
    a: float
    b: float
    runs: tuple[int, int]
    marks: str
    contrast: Contrast | None
    verdict: str = AMBIGUOUS
    p: float | None = None
    why: str = ""


@dataclass(frozen=True)
class Comparison:
    """Two sets side by side. The lists of cases are names, those of `broken` and `failing` with the reason.

    working    had a time in some run of A and in some run of B, by key
    broken     had a time in every run of A and failed in a run of B, or in some run of A and in none of B: a
               regression whatever the times
    repaired   failed in A, and has a time in every run of B
    failing    failed in both, and is not broken
    """

    a: RecordSet
    b: RecordSet
    in_turn: bool
    shared: tuple[str, ...]
    changes: tuple[Change, ...]
    working: Mapping[str, str]
    broken: tuple[str, ...]
    repaired: tuple[str, ...]
    failing: tuple[str, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]

    def without(self, metric: Metric) -> tuple[str, ...]:
        """The cases that work on both sides, of which one side has no value in that metric."""
        judged = {change.key for change in self.changes if change.metric == metric}
        return tuple(name for key, name in self.working.items() if key not in judged)


def compare_sets(a: RecordSet, b: RecordSet, metrics: Sequence[Metric], rule: VerdictRule) -> Comparison:
    """All cases of both sets in the metrics that they have. p-values are adjusted over the whole comparison."""
    everything = {record.case_key: record for record in (*b.all_records, *a.all_records)}
    shared, names = names_of(list(everything.values()))
    in_a, in_b = dict.fromkeys(a.keys), dict.fromkeys(b.keys)
    common = [key for key in in_a if key in in_b]
    turns = in_turn(a, b)
    changes = [
        change
        for key in common
        for metric in metrics
        if (change := _change(key, names[key], metric, a, b, turns, rule)) is not None
    ]
    failures = {key: (_failures(a, key), _failures(b, key)) for key in common}
    working_a, working_b = (
        {record.case_key for record in side.all_records if record.status == "ok"} for side in (a, b)
    )
    lost = working_a - working_b

    def listed(wanted: Callable[[str, str], bool]) -> tuple[str, ...]:
        return tuple(
            f"{names[key]}: {of_b}" if of_b else names[key]
            for key, (of_a, of_b) in failures.items()
            if wanted("" if key in lost else of_a, of_b)
        )

    return Comparison(
        a,
        b,
        turns,
        shared,
        judged_changes(changes, rule),
        {key: names[key] for key in common if key in working_a & working_b},
        broken=listed(lambda of_a, of_b: bool(of_b) and not of_a),
        repaired=listed(lambda of_a, of_b: bool(of_a) and not of_b),
        failing=listed(lambda of_a, of_b: bool(of_a) and bool(of_b)),
        only_a=tuple(names[key] for key in in_a if key not in in_b),
        only_b=tuple(names[key] for key in in_b if key not in in_a),
    )


def _failures(side: RecordSet, key: str) -> str:
    """How a case failed in the runs of a side ("2 oom of 6 runs: tried to ..."); empty where it did not."""
    records = side.of(key)
    failed = [record for record in records if record.status != "ok"]
    if not failed:
        return ""
    statuses = joined(f"{count} {name}" for name, count in Counter(record.status for record in failed).items())
    return f"{statuses} of {counted(len(records), 'run')}: {failed[0].message}"


def _change(
    key: str, name: str, metric: Metric, a: RecordSet, b: RecordSet, turns: bool, rule: VerdictRule
) -> Change | None:
    """None where a side has no value in that metric."""

    def values_of(side: RecordSet) -> dict[int, tuple[float, ...]]:
        records = {place: run.records[key] for place, run in enumerate(side.runs) if key in run.records}
        found = {place: metric.values(record) for place, record in records.items() if record.status == "ok"}
        return {place: values for place, values in found.items() if values}

    of_a, of_b = values_of(a), values_of(b)
    if not of_a or not of_b:
        return None
    # Pairs need both; with fewer than two pairs the runs are taken as they are.
    pairs = [place for place in of_a if place in of_b]
    if by_turns := turns and len(pairs) > 1:
        of_a, of_b = ({place: side[place] for place in pairs} for side in (of_a, of_b))
    runs_a, runs_b = list(of_a.values()), list(of_b.values())
    first, second = (quantile([quantile(run, 0.5) for run in runs], 0.5) for runs in (runs_a, runs_b))
    counts = len(runs_a), len(runs_b)
    flagged = marks(*measured([*a.of(key), *b.of(key)]))
    change = Change(key, name, metric, first, second, counts, flagged, None)
    try:
        found = contrast(
            runs_a, runs_b, in_turn=by_turns, assumed_noise=rule.assumed_noise, counted=metric.counted
        )
    except NoContrast as why:
        return replace(change, why=str(why))
    return replace(change, contrast=found)


def judged_changes(changes: Sequence[Change], rule: VerdictRule) -> tuple[Change, ...]:
    """With verdicts. What never varies takes no part in the adjustment: its differences are no chance."""
    by_chance = [c for c in changes if c.contrast is not None and c.contrast.basis != "exact"]
    adjusted = holm([c.contrast.p for c in by_chance if c.contrast is not None])
    p_of = {id(change): p for change, p in zip(by_chance, adjusted, strict=True)}
    judged = []
    for change in changes:
        if change.contrast is None:
            judged.append(change)
            continue
        p = p_of.get(id(change))
        verdict = rule.verdict(change.metric, change.contrast, change.contrast.p if p is None else p)
        why = "noise is larger than the difference" if rule.is_enough(change.contrast) else "too few runs"
        why = why if verdict == AMBIGUOUS else ""
        judged.append(replace(change, p=p, verdict=verdict, why=why))
    return tuple(judged)
