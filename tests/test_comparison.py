"""`ldmperf compare` on synthetic records: verdicts, the gate, what both promise about noise, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldmperf.profiling import Case, Record
from ldmperf.profiling.compare.comparison import AMBIGUOUS, SAME, Comparison, VerdictRule, compare_sets
from ldmperf.profiling.compare.gate import answers, thresholds_named
from ldmperf.profiling.compare.metrics import METRICS, metrics_named
from ldmperf.profiling.compare.sets import MeasuredRun, RecordSet, differences, in_turn, read_set
from ldmperf.profiling.measure.environment import DeviceState, Environment
from ldmperf.profiling.measure.recorded import Samples
from ldmperf.profiling.trajectory.records import Energy, RecordStore

MakeRecord = Callable[..., Record]
Run = Callable[..., Any]
START = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
CASES = [
    Case(unet=size, steps=2, backend=backend) for size in ("39M", "83M") for backend in ("torch", "diffusers")
]


def environment(make_record: MakeRecord, **changes: Any) -> Environment:
    return make_record().environment.model_copy(update=changes)


def side(records: Sequence[Sequence[Record]], name: str = "a", first: int = 0, every: int = 2) -> RecordSet:
    """A set of runs, made of their records, one every so many minutes."""
    runs = tuple(
        MeasuredRun(
            f"{name}{number}",
            START + timedelta(minutes=first + every * number),
            {record.case_key: record for record in of_run},
        )
        for number, of_run in enumerate(records)
    )
    return RecordSet(Path(name), runs)


def simulated(
    base: Record, draw: np.random.Generator, rounds: int, factor: float, *, noise: float, drift: np.ndarray
) -> list[list[Record]]:
    """Runs of all cases: a level for each run and case beside the round's drift, and samples around it."""
    made = []
    for number in range(rounds):
        of_run = []
        for place, case in enumerate(CASES):
            level = 100 * (1 + place) * factor * drift[number] * draw.lognormal(0, noise)
            samples = Samples.of(list(level * draw.lognormal(0, 0.01, 5)))
            of_run.append(base.model_copy(update={"case": case, "case_key": case.key, "wall_ms": samples}))
        made.append(of_run)
    return made


def comparisons(base: Record, count: int, factor: float, *, noise: float, seed: int = 1) -> list[Comparison]:
    draw = np.random.default_rng(seed)
    metrics, rule = metrics_named([]), VerdictRule()
    found = []
    for _ in range(count):
        # A neighbour who comes and goes: what is slow in a round is slow for both sides.
        drift = draw.lognormal(0, 0.1, 6)
        a, b = (simulated(base, draw, 6, f, noise=noise, drift=drift) for f in (1.0, factor))
        found.append(compare_sets(side(a), side(b, "b", first=1), metrics, rule))
    return found


def gate_fails(comparison: Comparison, text: str) -> bool:
    rule = VerdictRule()
    return any(answer == "fails" for _, _, answer in answers(comparison, thresholds_named([text]), rule))


@pytest.mark.parametrize("noise", [0.003, 0.05])
def test_noise_raises_a_false_alarm_in_at_most_one_of_twenty_comparisons(
    make_record: MakeRecord, noise: float
) -> None:
    """An A/A comparison of four cases with a verdict but SAME and AMBIGUOUS, or a gate that fails, is one."""
    found = comparisons(make_record(), 300, 1.0, noise=noise)
    assert all(c.in_turn for c in found)
    alarms = [any(change.verdict not in (SAME, AMBIGUOUS) for change in c.changes) for c in found]
    gates = [gate_fails(c, "wall_ms:5%") for c in found]
    # Three standard deviations of 300 draws at the promised rate.
    most = 0.05 + 3 * np.sqrt(0.05 * 0.95 / len(found))
    assert np.mean(alarms) <= most
    assert np.mean(gates) <= most
    significant = [any(change.p is not None and change.p <= 0.05 for change in c.changes) for c in found]
    # The promise is kept, not overdone: that would be a gate that catches nothing.
    assert 0.01 <= np.mean(significant) <= most


def test_an_injected_five_percent_fails_a_gate_of_five_percent(make_record: MakeRecord) -> None:
    found = comparisons(make_record(), 100, 1.05, noise=0.01)
    assert np.mean([gate_fails(c, "wall_ms:5%") for c in found]) >= 0.97
    verdicts = [change.verdict for c in found for change in c.changes]
    assert verdicts.count("SLOWER") / len(verdicts) >= 0.8
    assert not {"FASTER", SAME} & set(verdicts)


def test_a_change_far_below_the_threshold_passes_however_certain(make_record: MakeRecord) -> None:
    found = comparisons(make_record(), 20, 1.02, noise=0.002)
    assert not any(gate_fails(c, "wall_ms:5%") for c in found)
    assert all(gate_fails(c, "wall_ms:1%") for c in found)


def test_faster_and_same_are_found_and_more_noise_makes_both_ambiguous(make_record: MakeRecord) -> None:
    def verdicts(factor: float, noise: float) -> set[str]:
        return {c.verdict for found in comparisons(make_record(), 10, factor, noise=noise) for c in found.changes}

    assert verdicts(0.8, 0.01) == {"FASTER"}
    assert verdicts(1.0, 0.001) == {SAME}
    assert SAME not in verdicts(1.0, 0.2)


def timed(make_record: MakeRecord, *samples: float, case: Case = CASES[0], **changes: Any) -> Record:
    return make_record(case, wall_ms=Samples.of(samples), **changes)


def judged(a: Sequence[Sequence[Record]], b: Sequence[Sequence[Record]], *metrics: str) -> Comparison:
    return compare_sets(side(a), side(b, "b", first=1), metrics_named(list(metrics)), VerdictRule())


def test_too_few_samples_are_ambiguous_and_not_the_same(make_record: MakeRecord) -> None:
    record = timed(make_record, 100.0, 100.0, 100.0)
    (change,) = judged([[record]], [[record]]).changes
    assert change.verdict == AMBIGUOUS
    assert change.why == "one run each, 3 samples: 6 at least, or several runs"
    # Two pairs that agree by chance, for the same and for a difference.
    few = [[timed(make_record, 100.0)], [timed(make_record, 101.0)]]
    for factor in (1.0, 1.5):
        more = [
            [timed(make_record, *(factor * value for value in r[0].wall_ms.samples))] for r in few if r[0].wall_ms
        ]
        found = judged(few, more)
        assert (found.changes[0].verdict, found.changes[0].why) == (AMBIGUOUS, "too few runs")
        ((_, _, answer),) = answers(found, thresholds_named(["wall_ms:5%"]), VerdictRule())
        assert answer == "undecided"


def test_a_small_difference_is_the_same_however_certain(make_record: MakeRecord) -> None:
    a = [[timed(make_record, 100.0 + 0.01 * n)] for n in range(6)]
    b = [[timed(make_record, 101.0 + 0.01 * n)] for n in range(6)]
    (change,) = judged(a, b).changes
    assert change.p is not None
    assert change.p < 1e-6
    assert change.verdict == SAME


def test_one_run_each_tells_a_large_difference_and_no_small_one(make_record: MakeRecord) -> None:
    samples = np.linspace(99, 101, 9)
    a = timed(make_record, *samples)
    for factor, expected in ((2.0, "SLOWER"), (0.5, "FASTER"), (1.04, AMBIGUOUS), (1.0, AMBIGUOUS)):
        (change,) = judged([[a]], [[timed(make_record, *(factor * samples))]]).changes
        assert change.verdict == expected


def test_every_metric_has_its_values_and_memory_has_its_words(make_record: MakeRecord) -> None:
    def record(memory: int, joules: float) -> Record:
        energy = Energy(joules=joules, window_s=2.0, trajectories=4)
        return timed(make_record, 10.0, 12.0, peak_memory_bytes=memory, energy=energy)

    assert METRICS["ms_per_step"].values(record(1, 8.0)) == (5.0, 6.0)
    assert METRICS["joules_per_image"].values(record(1, 8.0)) == (2.0,)
    assert METRICS["gpu_ms"].values(record(1, 8.0)) == ()
    assert METRICS["first_call_ms"].values(record(1, 8.0)) == (make_record(CASES[0]).phases.first_call_ms,)
    changes = {
        change.metric.name: change
        for change in judged(
            [[record(100, 8.0)]], [[record(106, 8.0)]], "peak_memory_bytes,joules_per_image"
        ).changes
    }
    assert changes["peak_memory_bytes"].verdict == "MORE"
    assert changes["peak_memory_bytes"].p is None
    # One value of each side says nothing of its noise.
    assert changes["joules_per_image"].verdict == AMBIGUOUS


def test_cases_of_one_set_and_failures_are_listed(make_record: MakeRecord) -> None:
    first, second, third, fourth = CASES
    a = [[make_record(first), make_record(second), make_record(third, status="oom")]] * 2
    b = [[make_record(first)], [make_record(first, status="error"), make_record(third), make_record(fourth)]]
    found = judged(a, b)
    assert found.broken == ("39M torch: 1 error of 2 runs: OutOfMemoryError: tried to allocate 20.00 GiB",)
    assert found.repaired == ("83M torch",)
    assert (found.only_a, found.only_b) == (("39M diffusers",), ("83M diffusers",))
    assert found.failing == ()


def test_a_case_that_no_run_of_b_can_do_is_a_regression_though_a_run_of_a_failed(make_record: MakeRecord) -> None:
    works, fails = make_record(CASES[0]), make_record(CASES[0], status="error")
    lost = judged([[works], [fails]], [[fails], [fails]])
    assert lost.broken == ("39M torch: 2 error of 2 runs: OutOfMemoryError: tried to allocate 20.00 GiB",)
    assert lost.failing == ()
    # As often as not on both sides: nothing is told.
    both = judged([[works], [fails]], [[fails], [works]])
    assert (both.broken, len(both.failing)) == ((), 1)


def test_the_gate_on_memory_is_exact(make_record: MakeRecord) -> None:
    """Memory that never varies has no noise: just the threshold fails, and no change passes one of nothing."""

    def answer(memory: int, threshold: str) -> str:
        a, b = (timed(make_record, 10.0, peak_memory_bytes=count) for count in (1000, memory))
        found = judged([[a]], [[b]], "peak_memory_bytes")
        ((_, _, answer),) = answers(found, thresholds_named([f"peak_memory_bytes:{threshold}"]), VerdictRule())
        return answer

    assert [answer(memory, "5%") for memory in (900, 1000, 1049, 1050, 1051)] == [*["passes"] * 3, *["fails"] * 2]
    assert [answer(memory, "0%") for memory in (999, 1000, 1001)] == ["passes", "passes", "fails"]


def test_the_gate_names_the_cases_that_lack_its_metric(run: Run, make_record: MakeRecord, tmp_path: Path) -> None:
    """Of two cases one has memory in both sets; the other's would pass unseen."""
    for name in "ab":
        with_memory = make_record(CASES[0], run_id=name, peak_memory_bytes=1000)
        written(tmp_path / name, with_memory, make_record(CASES[1], run_id=name, peak_memory_bytes=None))
    told = run("compare", tmp_path / "a", tmp_path / "b", "--fail-over", "peak_memory_bytes:5%")
    assert told.code == 0
    assert "--fail-over peak_memory_bytes:5%: 1 passes of 1 case" in told.out
    assert "not judged: 39M diffusers has no peak_memory_bytes in both sets" in told.out


def test_runs_in_turn_are_told_by_their_times() -> None:
    def at(*minutes: int) -> RecordSet:
        return RecordSet(Path("a"), tuple(MeasuredRun(str(m), START + timedelta(minutes=m), {}) for m in minutes))

    assert in_turn(at(0, 2, 4), at(1, 3, 5))
    # The order flipped in each round, as --commits does.
    assert in_turn(at(0, 3, 4), at(1, 2, 5))
    assert not in_turn(at(0, 1, 2), at(3, 4, 5))
    assert not in_turn(at(0, 2, 4), at(1, 3))


def test_what_differs_is_named(make_record: MakeRecord) -> None:
    def of(**changes: Any) -> RecordSet:
        return side([[make_record(CASES[0], environment=environment(make_record, **changes))]], str(changes))

    base = of()
    assert differences(base, of(torch="2.14.0")) == ["torch: 2.13.0+cpu, 2.14.0"]
    assert differences(base, of(cpu="Xeon")) == ["cpu: AMD EPYC, Xeon"]
    assert differences(base, of(cudnn_tf32=True)) == ["cudnn_tf32: None, True"]
    # What comparing is for.
    assert differences(base, of(git_commit="0" * 40, ldmperf="0.2.0", tuned="1" * 16)) == []
    assert differences(of(git_dirty=True), base) == ["A was measured with uncommitted changes"]
    mixed = side(
        [
            [make_record(CASES[0])],
            [make_record(CASES[0], environment=environment(make_record, git_commit="1" * 40))],
        ]
    )
    assert differences(base, mixed) == ["B has records of several commits (7d35813, 1111111)"]


def written(folder: Path, *records: Record) -> Path:
    folder.mkdir(parents=True)
    RecordStore(folder / "records.jsonl").append(*records)
    return folder


def test_what_was_sampled_in_turn_with_another_side_is_not_alone(
    make_record: MakeRecord, make_kernel: Callable[..., Any], make_inspection: Callable[..., Any]
) -> None:
    alone = make_record()
    in_turns = alone.model_copy(update={"harness": alone.harness.model_copy(update={"in_turns": True})})
    pairs = [(alone, in_turns), (make_kernel(), make_kernel(in_turns=True))]
    for one, other in pairs:
        assert differences(side([[one]]), side([[one]], "b")) == []
        assert differences(side([[other]]), side([[other]], "b")) == []
        (why,) = differences(side([[one]]), side([[other]], "b"))
        assert "in turn with another side" in why
    # The compiler has no turns.
    compiled = make_inspection()
    assert differences(side([[compiled]]), side([[compiled]], "b")) == []


def test_of_compiled_launches_the_compiler_counts_and_not_the_machine(make_inspection: Callable[..., Any]) -> None:
    compiled = make_inspection()
    elsewhere = Environment(
        os="Windows", python="3.13", cpu="Intel", triton="3.7.1", ptxas="12.8", git_commit="b" * 40
    )
    other = make_inspection(environment=elsewhere)
    assert differences(side([[compiled]]), side([[other]], "b")) == []
    newer = make_inspection(environment=elsewhere.model_copy(update={"triton": "3.9.0", "ptxas": "12.9"}))
    assert differences(side([[other]]), side([[newer]], "b")) == ["triton: 3.7.1, 3.9.0", "ptxas: 12.8, 12.9"]


def test_a_set_is_a_file_a_run_or_a_folder_of_runs(make_record: MakeRecord, tmp_path: Path) -> None:
    records = [
        make_record(CASES[0], run_id=name, started_at=START + timedelta(minutes=n)) for n, name in enumerate("xyz")
    ]
    for n, record in enumerate(records):
        written(tmp_path / "deep" / f"round-{n}" / "run", record)
    one = written(tmp_path / "one", records[0], records[0])
    whole = written(tmp_path / "all", *reversed(records)) / "records.jsonl"
    assert [run.id for run in read_set(tmp_path / "deep").runs] == ["x", "y", "z"]
    assert [run.id for run in read_set(whole).runs] == ["x", "y", "z"]
    assert len(read_set(one).all_records) == 1
    with (one / "records.jsonl").open("a") as file:
        file.write("{torn\n")
    assert read_set(one).aside == 1


def several(make_record: MakeRecord, folder: Path, factor: float, first: int, **changes: Any) -> Path:
    for n in range(5):
        wall = Samples.of([100 * factor * (1 + 0.002 * ((n * 3) % 5))] * 3)
        record = make_record(
            CASES[0],
            run_id=f"{folder.name}{n}",
            wall_ms=wall,
            started_at=START + timedelta(minutes=first + 2 * n),
            **changes,
        )
        written(folder / str(n), record)
    return folder


def test_the_command_tells_verdicts_and_fails_past_a_threshold(
    run: Run, make_record: MakeRecord, tmp_path: Path
) -> None:
    a, b = several(make_record, tmp_path / "a", 1.0, 0), several(make_record, tmp_path / "b", 1.06, 1)
    told = run("compare", a, b)
    assert told.code == 0
    assert "SLOWER" in told.out
    assert "1.060" in told.out
    assert "A/A noise" in told.out
    failed = run("compare", a, b, "--fail-over", "wall_ms:5%")
    assert failed.code == 1
    assert "fails: 39M torch, wall_ms 1.060 times A's" in failed.out
    assert run("compare", b, a, "--fail-over", "wall_ms:5%").code == 0
    assert "FASTER" in run("compare", b, a).out


def test_the_command_fails_where_a_case_no_longer_works(run: Run, make_record: MakeRecord, tmp_path: Path) -> None:
    a = written(tmp_path / "a", make_record(CASES[0], run_id="a"))
    b = written(tmp_path / "b", make_record(CASES[0], run_id="b", status="incorrect"))
    told = run("compare", a, b)
    assert told.code == 1
    assert "a regression" in told.out


def test_few_samples_still_show_the_ratio(run: Run, make_record: MakeRecord, tmp_path: Path) -> None:
    for name, ms in (("a", 100.0), ("b", 123.0)):
        written(tmp_path / name, timed(make_record, ms, run_id=name))
    told = run("compare", tmp_path / "a", tmp_path / "b").out
    assert "1.230" in told
    assert "one run each, 1 sample: 6 at least" in told


def test_sets_of_one_commit_are_an_aa_run_and_those_of_an_unknown_one_are_not(
    run: Run, make_record: MakeRecord, tmp_path: Path
) -> None:
    for commit in ("7" * 40, None):
        for name in "ab":
            record = make_record(CASES[0], run_id=name, environment=environment(make_record, git_commit=commit))
            written(tmp_path / str(commit) / name, record)
        told = run("compare", tmp_path / str(commit) / "a", tmp_path / str(commit) / "b")
        assert told.code == 0, told.err
        assert ("A/A: both sides are one commit" in told.out) == (commit is not None)


def test_unlike_sets_are_refused_unless_forced(run: Run, make_record: MakeRecord, tmp_path: Path) -> None:
    other = environment(make_record, torch="2.14.0", cpu="Xeon")
    a = written(tmp_path / "a", make_record(CASES[0], run_id="a"))
    b = written(tmp_path / "b", make_record(CASES[0], run_id="b", environment=other))
    told = run("compare", a, b)
    assert told.code == 2
    assert "cpu: AMD EPYC, Xeon; torch: 2.13.0+cpu, 2.14.0" in told.err
    forced = run("compare", a, b, "--force")
    assert forced.code == 0
    assert "Not alike: torch: 2.13.0+cpu, 2.14.0" in forced.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a"], "compare two sets"),
        (["a", "a"], "share 1 of their runs"),
        (["a", "none"], "is no run folder and no file of records"),
        (["a", "empty"], "without records"),
        (["a", "other"], "no case is in both"),
        (["a", "b", "--fail-over", "wall_ms"], "METRIC:PERCENT"),
        (["a", "b", "--fail-over", "wall_ms:5"], "no percentage"),
        (["a", "b", "--fail-over", "wall_ms:nan%"], "no percentage"),
        (["a", "b", "--fail-over", "wall_ms:5%,wall_ms:3%"], "twice"),
        (["a", "b", "--fail-over", "speed:5%"], "choose from wall_ms"),
        (["a", "b", "--fail-over", "gpu_ms:5%"], "no case has gpu_ms in both"),
        (["a", "b", "--metric", ","], "no value given"),
        (["a", "b", "--noise", "-1%"], "no percentage"),
        (["a", "b", "--rounds", "3"], "--rounds is for --commits"),
    ],
)
def test_a_wrong_call_is_one_line(
    run: Run,
    make_record: MakeRecord,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, case in (("a", CASES[0]), ("b", CASES[0]), ("other", CASES[1])):
        written(tmp_path / name, make_record(case, run_id=name))
    (tmp_path / "empty").mkdir()
    told = run("compare", *arguments)
    assert told.code == 2
    assert said in told.err
    assert told.err.count("\n") == 1


def test_a_message_with_control_characters_is_spelled_out(
    run: Run, make_record: MakeRecord, tmp_path: Path
) -> None:
    a = written(tmp_path / "a", make_record(CASES[0], run_id="a"))
    b = written(tmp_path / "b\x1b[31m", make_record(CASES[0], run_id="b", status="error", message="\x1b[2J"))
    told = run("compare", a, b)
    assert "\x1b" not in told.out + told.err


def test_what_was_measured_throttled_is_flagged(run: Run, make_record: MakeRecord, tmp_path: Path) -> None:
    slowed = DeviceState(throttle_reasons=("SwPowerCap",))
    a = written(tmp_path / "a", make_record(CASES[0], run_id="a"))
    b = written(tmp_path / "b", make_record(CASES[0], run_id="b", device_after=slowed))
    told = run("compare", a, b).out
    assert "throttled" in told
    assert "1 of 2 records marked throttled: SwPowerCap" in told


def test_kernels_are_compared_by_their_keys(run: Run, tmp_path: Path) -> None:
    """Records of `ldmperf kernels` with times by hand: those of the other set are three times as long."""
    call = ("--kernel", "geglu", "--size", "39M", "--batch", "2", "--latent", "8", "--peer", "eager")
    place = ("--device", "cpu", "--dtype", "float32", "--seconds", "60", "--out", tmp_path / "made")
    assert run("kernels", *call, *place).code == 0
    (made,) = (tmp_path / "made").glob("*/kernels.jsonl")
    lines = [json.loads(line) for line in made.read_text().splitlines()]
    for name, factor in (("a", 1.0), ("b", 3.0)):
        (tmp_path / name).mkdir()
        for line in lines:
            line["run_id"] = name
            line["ms"] = Samples.of([factor * (1 + 0.001 * n) for n in range(9)]).model_dump()
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / name / "kernels.jsonl").write_text(text)
    told = run("compare", tmp_path / "a", tmp_path / "b", "--force", "--fail-over", "ms:5%")
    assert told.code == 1
    assert told.out.count(" SLOWER") == len(lines) + 1 + told.out.count("FASTER, SLOWER")
    assert "geglu" in told.out


def test_records_of_all_kinds_in_one_file_are_compared_each_by_its_figures(
    run: Run,
    make_record: MakeRecord,
    make_kernel: Callable[..., Any],
    make_inspection: Callable[..., Any],
    tmp_path: Path,
) -> None:
    def written_to(name: str, registers: int) -> Path:
        records = (
            make_record(CASES[0], run_id=name),
            make_kernel(run_id=name, ms=Samples.of([0.125] * 6)),
            make_inspection(run_id=name, registers=registers, environment=make_record().environment),
        )
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(record.model_dump_json() + "\n" for record in records))
        return path

    a, b = written_to("a", 32), written_to("b", 40)
    found = compare_sets(read_set(a), read_set(b), metrics_named([]), VerdictRule())
    assert {(change.metric.name, change.verdict) for change in found.changes if change.contrast is not None} >= {
        ("registers", "MORE"),
        ("spills", SAME),
        ("ms", AMBIGUOUS),
    }
    assert {change.metric.name for change in found.changes} == {
        "wall_ms",
        "ms",
        "registers",
        "spills",
        "shared_bytes",
    }
    (name,) = {change.name for change in found.changes if change.metric.name == "registers"}
    assert name == "sm_90 geglu_kernel 866M batch=2 bfloat16 BLOCK=64 warps=4"
    assert run("compare", a, b, "--force", "--fail-over", "registers:25%").code == 1
    assert run("compare", a, b, "--force", "--fail-over", "registers:26%").code == 0
