"""A comparison on the terminal: a row for each case and metric, then what is no row, then how to read it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console

from ..figures.derived import ratio as ratio_of
from ..figures.text import joined
from ..measure.conditions import busy_notes, flag_notes
from ..terminal.layout import MISSING, Grid, formatted, number, say_grid
from ..terminal.visible import counted, say, say_wrapped
from .comparison import AMBIGUOUS, SAME, Change, Comparison, VerdictRule
from .gate import Answer, Threshold
from .metrics import Metric
from .sets import measured

HEADINGS = ("case", "metric", "A", "B", "B/A", "95% interval", "p (Holm)", "A/A noise", "verdict", "why", "flags")
# Above so many rows counts that are SAME are left out.
_MOST_EQUAL = 50
WORDS = frozenset({"case", "metric", "verdict", "why", "flags"})


def print_comparison(
    found: Comparison,
    rule: VerdictRule,
    console: Console,
    commits: tuple[str, str] | None = None,
    unlike: Sequence[str] = (),
) -> None:
    """The comparison in lines.

    commits: the hashes of what was compared, where the records do not say it. unlike: reasons against comparing.
    """
    sides = (found.a, found.b)
    of = [f"commit {commit[:7]}" for commit in commits or ()] or [" and ".join(side.commits) for side in sides]
    for letter, commit, side in zip("AB", of, sides, strict=True):
        say(console, f"{letter}: {joined((commit, counted(len(side.runs), 'run'), str(side.path)))}")
    if found.shared:
        say_wrapped(console, f"all: {joined(found.shared)}", indent=4)
    if _is_one_commit(found, commits) and not unlike:
        say_wrapped(console, "A/A: both sides are one commit, so FASTER, SLOWER, LESS or MORE is a false alarm.")
    say(console)
    shown = found.changes
    if len(shown) > _MOST_EQUAL:
        shown = tuple(change for change in shown if not _is_equal(change))
    say_grid(console, comparison_grid(shown), leading=2)
    if left := len(found.changes) - len(shown):
        say(console, f"{counted(left, 'more row')}, of counts that are SAME, left out")
    say(console)
    _print_lists(found, console)
    for line in notes(found, rule, unlike):
        say_wrapped(console, line, indent=2)


def _is_equal(change: Change) -> bool:
    """Whether it is a count that no noise is in, and that does not differ."""
    return change.contrast is not None and change.contrast.basis == "exact" and change.verdict == SAME


def _is_one_commit(found: Comparison, commits: tuple[str, str] | None) -> bool:
    """Whether both sides are of one commit; no where that is not known."""
    if commits is not None:
        return commits[0] == commits[1]
    hashes = {record.environment.git_commit for side in (found.a, found.b) for record in side.all_records}
    return len(hashes) == 1 and None not in hashes


def print_answers(found: Comparison, given: Sequence[tuple[Threshold, Change, Answer]], console: Console) -> None:
    """What the gate says: each threshold in a line, with the cases that fail it and those that cannot be told."""
    for threshold in dict.fromkeys(threshold for threshold, _, _ in given):
        of = [(change, answer) for other, change, answer in given if other == threshold]
        label = f"--fail-over {threshold.metric.name}:{100 * threshold.worse:g}%"
        counts = {answer: sum(a == answer for _, a in of) for answer in ("fails", "passes", "undecided")}
        said = joined(f"{count} {answer}" for answer, count in counts.items() if count)
        say(console, f"{label}: {said} of {counted(len(of), 'case')}", "red" if counts["fails"] else "")
        for change, answer in of:
            if answer == "fails":
                say(console, f"  fails: {change.name}, {_ratio(change)}", "red")
            elif answer == "undecided":
                end = "" if change.contrast is None else f", up to {formatted(change.contrast.ratio.high, '.3f')}"
                say(console, f"  undecided: {change.name}{end}; give more runs (--rounds)")
        for name in found.without(threshold.metric):
            say(console, f"  not judged: {name} has no {threshold.metric.name} in both sets")


def notes(found: Comparison, rule: VerdictRule, unlike: Sequence[str] = ()) -> list[str]:
    """What a reader has to know beside the rows."""
    lines = [f"Not alike: {reason}" for reason in unlike]
    records = measured([*found.a.all_records, *found.b.all_records])
    machines = {record.environment.machine_id for record in records}
    if len(machines) > 1:
        lines.append("A and B were not all measured on one machine, though its kind is the same.")
    lines += [*flag_notes(records, "record"), *busy_notes(records, "record")]
    effect = f"{100 * rule.min_effect:g}%"
    by_chance = sum(change.p is not None for change in found.changes)
    adjusted = f", adjusted for {counted(by_chance, 'row')}," if by_chance else ""
    bases = {change.contrast.basis for change in found.changes if change.contrast is not None}
    if bases == {"exact"}:
        return [
            *lines,
            "Counts do not vary from run to run: any difference is one of what was compiled or measured.",
        ]
    lines.append(
        f"B/A is of the medians of runs, their geometric mean. FASTER, SLOWER: p{adjusted} is at most "
        f"{rule.alpha:g} and B/A is off 1 by at least {effect}. SAME: the interval lies within {effect}. "
        "AMBIGUOUS: neither. A/A noise: two runs of one commit differ by at most that, 95 times of 100."
    )
    if "assumed" in bases:
        lines.append(
            f"One run on each side tells nothing about noise between runs: {100 * rule.assumed_noise:g}% is "
            "assumed (--noise). Give folders of several runs, or compare commits with --commits."
        )
    if "in turn" in bases:
        lines.append(
            "The runs were made in turn: each round, one run of each side, is one observation, and A/A noise is "
            "that within a round."
        )
    return lines


def _ratio(change: Change) -> str:
    if change.contrast is None:
        return change.why
    ratio = change.contrast.ratio
    return f"{change.metric.name} {ratio.value:.3f} times A's ({ratio.low:.3f} to {ratio.high:.3f})"


def comparison_grid(changes: Sequence[Change]) -> Grid:
    """A row for each case and metric."""
    return Grid(HEADINGS, tuple(_cells(change) for change in changes), WORDS)


def _cells(change: Change) -> tuple[str, ...]:
    start = (change.name, change.metric.name, _figure(change.metric, change.a), _figure(change.metric, change.b))
    contrast = change.contrast
    if contrast is None:
        told = formatted(ratio_of(change.b, change.a), ".3f")
        return (*start, told, *(MISSING,) * 3, change.verdict, change.why, change.marks or MISSING)
    ratio = contrast.ratio
    noise = f"{100 * contrast.noise:.2g}%" if contrast.noise < 1 else "over 100%"
    noise += " assumed" if contrast.basis == "assumed" else ""
    return (
        *start,
        f"{ratio.value:.3f}" if math.isfinite(ratio.value) else MISSING,
        MISSING if contrast.basis == "exact" else f"{ratio.low:.3f} to {ratio.high:.3f}",
        formatted(change.p, ".2g"),
        MISSING if contrast.basis == "exact" else noise,
        change.verdict,
        change.why or MISSING,
        change.marks or MISSING,
    )


def _figure(metric: Metric, value: float | None) -> str:
    """A count is whole."""
    return f"{value:.0f}" if value is not None and metric.counted and value.is_integer() else number(value)


def case_lists(found: Comparison) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Heading and names of the cases that failed, or are in one of the sets only; none that is empty."""
    lists = (
        ("failed in B, had a time in A (a regression)", found.broken),
        ("failed in A, has a time in B", found.repaired),
        ("failed in both", found.failing),
        ("in A only", found.only_a),
        ("in B only", found.only_b),
    )
    return tuple((heading, names) for heading, names in lists if names)


def verdict_counts(changes: Sequence[Change]) -> str:
    """ "3 SLOWER, 5 SAME, 2 AMBIGUOUS"."""
    counts = {
        verdict: sum(change.verdict == verdict for change in changes)
        for verdict in dict.fromkeys((*(change.verdict for change in changes), SAME, AMBIGUOUS))
    }
    return joined(f"{count} {verdict}" for verdict, count in counts.items() if count)


def _print_lists(found: Comparison, console: Console) -> None:
    for heading, names in case_lists(found):
        say(console, f"{heading}:", "red" if names is found.broken else "")
        for name in names:
            say(console, f"  {name}")
    say(console, verdict_counts(found.changes))
