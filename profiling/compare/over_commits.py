"""Each case on each commit that has it, judged against the commit before."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from ..figures.derived import Spread, network_names, step_ms
from ..figures.phrases import Conditions, phrases_of
from ..figures.text import first_of, joined
from ..measure.conditions import busy_notes, commit, flag_notes, marks
from ..measure.timing import quantile
from ..terminal.visible import counted
from ..trajectory.case import Case
from ..trajectory.records import Record
from .commits import commit_order, machine_names
from .comparison import Change, VerdictRule, judged_changes
from .contrast import NoContrast, contrast
from .history import METRIC, CaseHistory, History, HistoryPoint
from .sets import RecordSet, machine_kind, set_of

# A step of a case: what it took, and how that differs from the step before.
Step = tuple[HistoryPoint, Change | None]


@dataclass(frozen=True)
class _Placed:
    """A case for `Conditions`, with the index of its machine's kind."""

    case: Case
    environment: int


def history(records: Sequence[Record], rule: VerdictRule | None = None) -> History | None:
    """Every case with times on several commits of one kind of machine, each step judged against the one before.

    None where there is none. A run is one observation, as in a comparison of two sets; p-values are adjusted for
    all steps of the history.
    """
    rule = rule or VerdictRule()
    kinds: dict[object, list[Record]] = {}
    for record in records:
        kinds.setdefault(machine_kind(record.environment), []).append(record)
    environments = tuple(of_kind[0].environment for of_kind in kinds.values())
    # One order of commits for all kinds of machines.
    times = commit_order(records)
    found: list[tuple[_Placed, list[Step]]] = []
    for index, of_kind in enumerate(kinds.values()):
        sets = _by_commit(of_kind, times)
        cases = {record.case_key: record.case for record in of_kind} if len(sets) > 1 else {}
        for key, case in cases.items():
            steps = _steps(key, sets, times, rule)
            if len(steps) > 1:
                found.append((_Placed(case, index), steps))
    if not found:
        return None
    judged = iter(judged_changes([change for _, steps in found for _, change in steps if change], rule))
    conditions = Conditions.of(environments, [place for place, _ in found])
    names, machines = network_names(records), machine_names(environments)
    series = []
    for place, steps in found:
        case, heading = place.case, conditions.heading(place, "environment", "device")
        series.append(
            CaseHistory(
                joined((f"{names[case.network]} {case.backend}", heading)),
                case.case_id,
                machines[place.environment] if len(machines) > 1 else "",
                tuple(point if change is None else _told(point, next(judged)) for point, change in steps),
            )
        )
    shown, keys = {point.commit for one in series for point in one.points}, {place.case.key for place, _ in found}
    told = [record for record in records if commit(record.environment) in shown and record.case_key in keys]
    notes = _notes(told, rule)
    untimed = {record.case_key for record in records if record.case_key in keys and record.wall_ms is None}
    if untimed:
        notes.append(f"{counted(len(untimed), 'case')} without a time on some commit: no point is drawn there.")
    # An environment's letter would be another one than elsewhere in a report: here commits are of one.
    phrases = phrases_of(found[0][0], environments)
    apart = {*conditions.varying, "environment"}
    shared = joined(phrase for name, phrase in phrases.items() if name not in apart)
    return History(tuple(series), shared, tuple(notes))


def _by_commit(records: Iterable[Record], times: Mapping[str, datetime]) -> dict[str, RecordSet]:
    """The records of each commit, in the order of `times`."""
    of: dict[str, list[Record]] = {}
    for record in records:
        of.setdefault(commit(record.environment), []).append(record)
    return {name: set_of(of[name], Path(name)) for name in times if name in of}


def _steps(
    key: str, sets: Mapping[str, RecordSet], times: Mapping[str, datetime], rule: VerdictRule
) -> list[Step]:
    """A point for each commit with a time of the case, and its contrast with the one before."""
    steps: list[Step] = []
    before: list[Record] = []
    for name, of_commit in sets.items():
        timed = [r for r in of_commit.of(key) if isinstance(r, Record) and r.wall_ms is not None]
        if not timed:
            continue
        point = HistoryPoint(name, times[name], _spread(timed), len(timed), flags=marks(*timed))
        steps.append((point, _change(key, before, timed, rule) if before else None))
        before = timed
    return steps


def _spread(records: Sequence[Record]) -> Spread:
    """Medians over the runs."""
    spreads = [spread for record in records if (spread := step_ms(record)) is not None]
    p20, p50, p80 = (quantile([getattr(of, end) for of in spreads], 0.5) for end in ("p20", "p50", "p80"))
    return Spread(p20, p50, p80)


def _change(key: str, before: Sequence[Record], after: Sequence[Record], rule: VerdictRule) -> Change:
    runs_a, runs_b = ([METRIC.values(record) for record in side] for side in (before, after))
    a, b = (_spread(side).p50 for side in (before, after))
    change = Change(key, key, METRIC, a, b, (len(before), len(after)), "", None)
    try:
        return replace(change, contrast=contrast(runs_a, runs_b, in_turn=False, assumed_noise=rule.assumed_noise))
    except NoContrast as why:
        return replace(change, why=str(why))


def _told(point: HistoryPoint, change: Change) -> HistoryPoint:
    ratio = None if change.contrast is None else change.contrast.ratio
    return replace(point, verdict=change.verdict, ratio=ratio, why=change.why)


def _notes(records: Sequence[Record], rule: VerdictRule) -> list[str]:
    """What a reader has to know beside the points."""
    environments = {commit(record.environment): record.environment for record in records}
    notes = [
        "Each time is of a model evaluation, the median over the runs of a commit, and judged against the commit "
        f"before that has the case. FASTER, SLOWER where the adjusted p is at most {rule.alpha:g} and the ratio "
        f"is off 1 by at least {100 * rule.min_effect:g}%. One run each says nothing of the noise between runs: "
        f"{100 * rule.assumed_noise:g}% is assumed."
    ]
    untimed = [name for name, environment in environments.items() if environment.commit_time is None]
    if untimed:
        notes.append(f"No time of commit is recorded of {first_of(untimed)}; shown is when it was first measured.")
    dirty = [name for name, environment in environments.items() if environment.git_dirty]
    if dirty:
        notes.append(f"{first_of(dirty)}: the commit alone does not say what ran.")
    unknown = [name for name, environment in environments.items() if environment.git_commit is None]
    if unknown:
        notes.append("Records without a commit stand together, whatever code they are of.")
    machines = {record.environment.machine_id for record in records}
    if len(machines) > 1:
        notes.append(
            "The commits were not all measured on one machine: a step holds what tells the machines apart."
        )
    return [*notes, *flag_notes(records, "record"), *busy_notes(records, "record")]
