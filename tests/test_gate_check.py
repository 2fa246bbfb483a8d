"""bench/gate_check.py on a clock of its own and on records made by hand."""

from __future__ import annotations

import json
import pickle
import time
from argparse import Namespace
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import gate_check
import pytest
import torch

from ldmperf.profiling import Case, Record, cli
from ldmperf.profiling.compare.comparison import VerdictRule, compare_sets
from ldmperf.profiling.compare.gate import Threshold
from ldmperf.profiling.compare.sets import MeasuredRun, RecordSet
from ldmperf.profiling.measure.recorded import Samples
from ldmperf.profiling.measure.timing import Deadline, RepetitionRule
from ldmperf.profiling.options import CaseError
from ldmperf.profiling.rivals.subjects import all_subjects
from ldmperf.profiling.sweep.group_task import GroupTask
from ldmperf.profiling.sweep.local import Workers
from ldmperf.profiling.trajectory.backend import Configured
from ldmperf.profiling.trajectory.rungs import all_backends

MakeRecord = Callable[..., Record]
FIVE = Threshold(gate_check.METRIC, 0.05)


def test_a_slowed_trajectory_has_its_latents_and_takes_its_share_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def clock() -> float:
        # Each look at the clock takes a hundredth of a second.
        now[0] += 0.01
        return now[0]

    def trajectory(inputs: Any) -> torch.Tensor:
        now[0] += 10.0
        return torch.ones(3)

    monkeypatch.setattr(time, "perf_counter", clock)
    start = now[0]
    latents = gate_check.slowed(trajectory, 0.05, torch.device("cpu"))(None)  # type: ignore[arg-type]
    assert torch.equal(latents, torch.ones(3))
    assert 10.5 <= now[0] - start <= 10.6


def test_a_slowed_backend_is_the_other_in_all_else(
    monkeypatch: pytest.MonkeyPatch, make_record: Callable[..., Record]
) -> None:
    """Of every backend that the command has, in the processes that measure."""
    given: list[Workers] = []
    tasks: list[GroupTask] = []
    monkeypatch.setattr(cli, "main", lambda arguments, workers: given.append(workers))
    monkeypatch.setattr(gate_check, "measured", tasks.append)
    gate_check.run_slowed(0.05, ["profile"])
    given[0].executor(GroupTask((Case(unet="39M"),), RepetitionRule(), "run", make_record().environment))
    # As another process gets it.
    subjects = pickle.loads(pickle.dumps(tasks[0])).subjects()
    assert set(subjects) == set(all_subjects())
    ran, usual = subjects["t2i"].backends, all_backends()
    assert list(ran) == list(usual)
    assert all(isinstance(backend, gate_check.SlowedBackend) for backend in ran.values())
    for name, backend in ran.items():
        assert backend.implementation == usual[name].implementation
        assert isinstance(backend, Configured) == isinstance(usual[name], Configured)


def recorded(make_record: MakeRecord, name: str, factor: float, first: int) -> RecordSet:
    case = Case(unet="39M", steps=2)
    runs = []
    for number in range(6):
        samples = Samples.of([100 * factor * (1 + 0.001 * number)] * 3)
        record = make_record(case, wall_ms=samples)
        start = datetime(2026, 11, 23, tzinfo=UTC) + timedelta(minutes=first + 2 * number)
        runs.append(MeasuredRun(f"{name}{number}", start, {case.key: record}))
    return RecordSet(Path(name), tuple(runs))


@pytest.fixture
def repeat(make_record: MakeRecord) -> Callable[..., dict[str, Any]]:
    def made(threshold: Threshold, rounds: int, profile: Any, force: bool, is_injected: bool) -> dict[str, Any]:
        first = recorded(make_record, "a", 1.0, 0)
        others = {"noise": recorded(make_record, "b", 1.0, 1)}
        if is_injected:
            others["injected"] = recorded(make_record, "c", 1.05, 1)
        return {
            name: gate_check.summary(
                compare_sets(first, other, [gate_check.METRIC], VerdictRule()), threshold, VerdictRule()
            )
            for name, other in others.items()
        }

    return made


def arguments(out: Path, repeats: str, seconds: float | None = None, rounds: str = "6") -> Namespace:
    return Namespace(
        inject="5%", injections="2", repeats=repeats, rounds=rounds, seconds=seconds, out=out, force=False
    )


def test_the_result_has_every_median_and_counts_what_the_gate_says(
    repeat: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments(tmp_path / "gate.json", "3")
    gate_check.check(given, ["--size", "39M"], repeat)
    written = json.loads(given.out.read_text())
    assert written["counts"] == {
        "noise_comparisons": 3,
        "noise_gate_fails": 0,
        "noise_differs": 0,
        "injected_comparisons": 2,
        "injected_gate_fails": 2,
        "injected_differs": 2,
    }
    (case,) = written["repeats"][0]["injected"]["cases"]
    assert case["ratio"] == pytest.approx(1.05)
    assert case["b_ms"] == pytest.approx([1.05 * ms for ms in case["a_ms"]])
    assert "the gate failed 2 of 2 comparisons of it with 5% injected" in capsys.readouterr().out


def test_the_same_call_goes_on_and_another_is_refused(
    repeat: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, out, made = [0.0], tmp_path / "gate.json", []
    monkeypatch.setattr(gate_check, "Deadline", lambda seconds: Deadline(seconds, lambda: now[0]))

    def minute(*given: Any) -> dict[str, Any]:
        now[0] += 60.0
        made.append(given[-1])
        return repeat(*given)

    # The first repeat tells how long one is: the third would not end in time.
    gate_check.check(arguments(out, "5", seconds=150.0), ["--size", "39M"], minute)
    assert made == [True, True]
    gate_check.check(arguments(out, "5"), ["--size", "39M"], minute)
    assert made == [True, True, False, False, False]
    assert json.loads(out.read_text())["counts"]["noise_comparisons"] == 5
    others = (arguments(out, "6"), ["--size", "83M"]), (arguments(out, "6", rounds="7"), ["--size", "39M"])
    for given, profile in others:
        with pytest.raises(CaseError, match="of another check"):
            gate_check.check(given, profile, minute)
    out.write_text("{}")
    with pytest.raises(CaseError, match="or of none"):
        gate_check.check(arguments(out, "6"), ["--size", "39M"], minute)
    assert len(made) == 5
