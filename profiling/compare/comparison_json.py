"""A comparison as what JSON can hold, for dashboards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..measure.intervals import Interval
from .comparison import Change, Comparison, VerdictRule
from .comparison_table import notes
from .contrast import CONFIDENCE, Contrast
from .gate import Answer, Threshold
from .sets import RecordSet


def as_json(
    found: Comparison,
    rule: VerdictRule,
    given: Sequence[tuple[Threshold, Change, Answer]] = (),
    commits: tuple[str, str] | None = None,
    unlike: Sequence[str] = (),
) -> dict[str, Any]:
    """All that the tables say, in numbers; arguments as of `print_comparison` and `print_answers`.

    A ratio is null where there is none, and where it is infinite: B has some of what A has none of.
    """
    return {
        "a": _side(found.a, commits and commits[0]),
        "b": _side(found.b, commits and commits[1]),
        "in_turn": found.in_turn,
        "conditions": list(found.shared),
        "rule": {
            "min_effect": rule.min_effect,
            "assumed_noise": rule.assumed_noise,
            "alpha": rule.alpha,
            "confidence": CONFIDENCE,
        },
        "changes": [_change(change, found) for change in found.changes],
        "gate": [_answer(threshold, change, answer) for threshold, change, answer in given],
        "broken": list(found.broken),
        "repaired": list(found.repaired),
        "failing": list(found.failing),
        "only_a": list(found.only_a),
        "only_b": list(found.only_b),
        "notes": notes(found, rule, unlike),
    }


def _side(side: RecordSet, commit: str | None) -> dict[str, Any]:
    return {
        "path": str(side.path),
        "commits": [commit] if commit else side.commits,
        "runs": [run.id for run in side.runs],
        "lines_set_aside": side.aside,
    }


def _change(change: Change, found: Comparison) -> dict[str, Any]:
    record = next(record for side in (found.a, found.b) for record in side.of(change.key))
    return {
        "case_id": record.case_id,
        "case_key": change.key,
        "case": change.name,
        "metric": change.metric.name,
        "unit": change.metric.unit,
        "a": change.a,
        "b": change.b,
        "runs": list(change.runs),
        "verdict": change.verdict,
        "why": change.why,
        "p": change.p,
        "flags": change.marks,
        "contrast": None if change.contrast is None else _contrast(change.contrast),
    }


def _contrast(contrast: Contrast) -> dict[str, Any]:
    ratio: Interval = contrast.ratio
    return {
        "ratio": _finite(ratio.value),
        "low": _finite(ratio.low),
        "high": _finite(ratio.high),
        "noise": _finite(contrast.noise),
        "basis": contrast.basis,
    }


def _answer(threshold: Threshold, change: Change, answer: Answer) -> dict[str, Any]:
    return {
        "metric": threshold.metric.name,
        "threshold": threshold.worse,
        "case_key": change.key,
        "answer": answer,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
