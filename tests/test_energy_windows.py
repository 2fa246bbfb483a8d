"""Energy in a profile: after all timing of a group, in its own share of the seconds, null with its reason."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldmperf.profiling import Case, Record, load_records, profile
from ldmperf.profiling.measure.energy import CountedEnergy, CounterWatch, NoEnergy
from ldmperf.profiling.measure.nvml import ON_A_CPU, Sensor
from ldmperf.profiling.measure.recorded import Samples
from ldmperf.profiling.measure.timing import Deadline, RepetitionRule
from ldmperf.profiling.trajectory import energy_windows, runner
from ldmperf.profiling.trajectory.backend import Backend, Inputs, Problem, Trajectory
from ldmperf.profiling.trajectory.checkpoints import identified
from ldmperf.profiling.trajectory.energy_windows import ENERGY_SHARE, EnergyTime, seconds_of_a_window
from ldmperf.profiling.trajectory.lane import Lane
from ldmperf.profiling.trajectory.ours import OurBackend
from ldmperf.profiling.trajectory.record_parts import Energy, Trace
from ldmperf.profiling.trajectory.records import RecordStore
from ldmperf.profiling.trajectory.theirs import DiffusersBackend

pytestmark = pytest.mark.usefixtures("_one_thread")

TWICE = RepetitionRule(2, 0.0)
BOTH: dict[str, Backend] = {"torch": OurBackend("torch"), "diffusers": DiffusersBackend()}
MakeRecord = Callable[..., Record]


def tiny_case(checkpoint: Path, **changes: object) -> Case:
    fields: dict[str, object] = {"unet": str(checkpoint), "steps": 2, "latent_height": 16, "latent_width": 16}
    return identified([Case(**(fields | changes))])[0]


class Noted(runner.Listener):
    """Hears of a profile; `log` has what a listener is told and whatever a test adds."""

    def __init__(self) -> None:
        self.log: list[tuple[str, str]] = []

    def begin(self, cases: Sequence[Case]) -> None: ...

    def ran(self, case: Case, phase: str) -> None:
        self.log.append((phase, case.backend))

    def recorded(self, record: Record) -> None:
        self.log.append(("recorded", record.case.backend))

    def end(self) -> None: ...


class Nvml(types.SimpleNamespace):
    """A GPU whose throttle reasons, SM clock and counter are these."""

    nvmlClocksEventReasonSwPowerCap, nvmlClocksEventReasonSwThermalSlowdown = 4, 32  # noqa: N815
    NVML_CLOCK_SM = 1

    def __init__(self, reasons: int = 0) -> None:
        self.reasons = reasons

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: object) -> int:  # noqa: N802
        return self.reasons

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: object) -> int:  # noqa: N802
        return 12_345

    def nvmlDeviceGetClockInfo(self, handle: object, kind: int) -> int:  # noqa: N802
        return 1755


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Nvml:
    """The NVML of what is a GPU to a profile."""
    found = Nvml()
    monkeypatch.setattr(runner.Sensor, "of", lambda device: Sensor(found, "handle"))
    return found


def counting(
    monkeypatch: pytest.MonkeyPatch, calls: int, updates: int = 0, failure: Exception | None = None
) -> None:
    """`count_energy` makes so many calls, sees so many updates and finds 100 J a call, or fails."""

    def count_energy(call: Callable[[], object], watch: CounterWatch) -> CountedEnergy:
        for _ in range(calls):
            call()
        for _ in range(updates):
            assert watch.on_update is not None
            watch.on_update()
        if failure is not None:
            raise failure
        return CountedEnergy(100.0 * calls, 0.5 * calls, calls, 2.0, 0.0025)

    monkeypatch.setattr(energy_windows, "count_energy", count_energy)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_energy_comes_after_all_timing_and_completes_the_record(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nvml: Nvml, sampler: str
) -> None:
    heard = Noted()

    class Called:
        implementation = "torch"

        def build(self, problem: Problem) -> Trajectory:
            right = OurBackend("torch").build(problem)

            def trajectory(inputs: Inputs) -> Tensor:
                heard.log.append(("called", "torch"))
                return right(inputs)

            return trajectory

    counting(monkeypatch, calls=4, updates=1)
    store = RecordStore(tmp_path / "records.jsonl")
    cases = [tiny_case(tiny_checkpoint, sampler=sampler, batch=3, backend=name) for name in BOTH]
    records = profile(cases, rule=TWICE, store=store, backends=BOTH | {"torch": Called()}, listener=heard)
    kinds = [kind for kind, _ in heard.log]
    last_recorded = len(kinds) - 1 - kinds[::-1].index("recorded")
    # The peer goes first, by importance; ours then runs once, and four times in the window.
    assert heard.log[last_recorded + 1 :] == [
        ("energy", "diffusers"),
        *[("called", "torch")] * 5,
        ("energy", "torch"),
    ]
    assert "energy" not in kinds[:last_recorded]
    for record in records:
        assert record.energy == Energy(
            joules=400.0, window_s=2.0, trajectories=4, counted_s=2.0, relative_error=0.0025
        )
        assert (record.joules_per_image, record.joules_per_step) == (pytest.approx(100 / 3), pytest.approx(50.0))
        assert record.mean_power_w == 200.0
        assert record.device_during.sm_clock_mhz == 1755
    # The times are those of before: on disk first without the energy, and read as one record each.
    assert store.path.read_bytes().count(b"\n") == 4
    assert sorted(store.load(), key=lambda r: r.case_key) == sorted(records, key=lambda r: r.case_key)


def test_a_window_that_left_work_out_has_no_energy(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, nvml: Nvml
) -> None:
    """All its trajectories have the same inputs: a remembered result would take no time and no joules."""
    seen: list[bytes] = []

    class Called:
        implementation = "torch"

        def build(self, problem: Problem) -> Trajectory:
            right = OurBackend("torch").build(problem)

            def trajectory(inputs: Inputs) -> Tensor:
                seen.append(inputs.noise.numpy().tobytes())
                return right(inputs)

            return trajectory

    for seconds, is_told in ((1e-9, False), (1e3, True)):

        def count_energy(
            call: Callable[[], object], watch: CounterWatch, window_s: float = seconds
        ) -> CountedEnergy:
            call()
            return CountedEnergy(1.0, window_s, 1, 2.0, 0.0025)

        monkeypatch.setattr(energy_windows, "count_energy", count_energy)
        seen.clear()
        (record,) = profile([tiny_case(tiny_checkpoint)], rule=TWICE, backends=BOTH | {"torch": Called()})
        assert record.status == "ok", record.message
        assert record.energy is not None
        assert (record.energy.joules is not None) == is_told
        assert is_told or "so work was left out" in (record.energy.message or "")
        # None of the first call and of the samples: the last two are the window's.
        assert seen[-1] == seen[-2]
        assert seen[-1] not in seen[:-2]


def test_throttling_is_read_after_each_sample_and_in_the_window(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, nvml: Nvml
) -> None:
    case = tiny_case(tiny_checkpoint)

    class Hot:
        """The second sample throttles by power, the window by heat; when it is over neither does."""

        implementation, calls = "torch", 0

        def build(self, problem: Problem) -> Trajectory:
            right = OurBackend("torch").build(problem)

            def trajectory(inputs: Inputs) -> Tensor:
                self.calls += 1
                # The first call, two samples, and one call before the window.
                nvml.reasons = {3: 4, 5: 32}.get(self.calls, 0)
                return right(inputs)

            return trajectory

    counting(monkeypatch, calls=1, updates=1)
    (record,) = profile([case], rule=TWICE, backends=BOTH | {"torch": Hot()})
    assert record.status == "ok", record.message
    assert record.device_during.throttle_reasons == ("SwPowerCap", "SwThermalSlowdown")
    assert record.device_before.throttle_reasons == ()


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (NoEnergy("NVML's energy counter did not move in 6.0 s"), "NVML's energy counter did not move in 6.0 s"),
        (torch.OutOfMemoryError("20 GiB"), "the trajectories for it failed: OutOfMemoryError: 20 GiB"),
    ],
)
def test_what_goes_wrong_in_a_window_leaves_the_time_and_a_reason(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, nvml: Nvml, failure: Exception, said: str
) -> None:
    counting(monkeypatch, calls=1, updates=1, failure=failure)
    (record,) = profile([tiny_case(tiny_checkpoint)], rule=TWICE, backends=BOTH)
    assert record.status == "ok"
    assert record.energy == Energy(message=said)
    assert (record.joules_per_image, record.joules_per_step, record.mean_power_w) == (None, None, None)
    assert record.device_during.sm_clock_mhz == 1755


def test_a_gpu_without_a_counter_says_so(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, nvml: Nvml
) -> None:
    monkeypatch.setattr(nvml, "nvmlDeviceGetTotalEnergyConsumption", None, raising=False)
    (record,) = profile([tiny_case(tiny_checkpoint)], rule=TWICE, backends=BOTH)
    assert record.energy is not None
    assert (record.energy.message or "").startswith("NVML has no energy counter of this GPU")


def test_on_a_cpu_nothing_runs_and_the_reason_is_in_the_first_record(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting(monkeypatch, calls=1, failure=AssertionError("measured"))
    store = RecordStore(tmp_path / "records.jsonl")
    heard = Noted()
    cases = [tiny_case(tiny_checkpoint), tiny_case(tiny_checkpoint, steps=1, backend="broken")]
    backends = BOTH | {"broken": Broken()}
    good, bad = profile(cases, rule=TWICE, store=store, backends=backends, listener=heard)
    assert good.energy == Energy(message=ON_A_CPU)
    assert (bad.status, bad.energy) == ("error", None)
    assert store.path.read_bytes().count(b"\n") == 2
    assert "energy" not in dict(heard.log)
    assert good.device_during == type(good.device_during)()


def test_a_kill_in_the_window_leaves_the_time(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nvml: Nvml
) -> None:
    counting(monkeypatch, calls=1, failure=KeyboardInterrupt())  # type: ignore[arg-type]
    store = RecordStore(tmp_path / "records.jsonl")
    with pytest.raises(KeyboardInterrupt):
        profile([tiny_case(tiny_checkpoint)], rule=TWICE, store=store, backends=BOTH)
    (record,) = store.load()
    assert (record.status, record.energy) == ("ok", None)


class Broken:
    implementation = "torch"

    def build(self, problem: Problem) -> Trajectory:
        raise ZeroDivisionError


class Clock(Noted):
    """Seconds that pass by one for each trajectory that is heard of, and by so many for a window."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def ran(self, case: Case, phase: str) -> None:
        super().ran(case, phase)
        self.now += phase != "energy"


def test_windows_cost_no_sample_and_keep_to_their_share(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, nvml: Nvml
) -> None:
    """Of 30 seconds 24 are for timing and 3 for windows of 1.25; timing takes as long as without them."""
    monkeypatch.setattr(runner, "timing_deadline", lambda cases, deadline: deadline.after(0.8))
    monkeypatch.setattr(energy_windows, "seconds_of_a_window", lambda lane: 1.25)
    # Each takes a first call and two samples: three seconds.
    cases = [tiny_case(tiny_checkpoint, steps=1, seed=seed) for seed in range(10)]

    def measured(window: float) -> tuple[list[Record], float]:
        clock = Clock()

        def count_energy(call: Callable[[], object], watch: CounterWatch) -> CountedEnergy:
            clock.now += window
            return CountedEnergy(10.0, 2.0, 1, 2.0, 0.0)

        monkeypatch.setattr(energy_windows, "count_energy", count_energy)
        found = profile(cases, rule=TWICE, backends=BOTH, listener=clock, deadline=Deadline(30.0, clock))
        return found, clock.now

    free, seconds = measured(0.0)
    assert seconds == 24.0
    records, seconds = measured(1.25)
    assert len(records) == len(free) == 8
    assert [r.wall_ms.n for r in records if r.wall_ms] == [r.wall_ms.n for r in free if r.wall_ms]
    assert seconds == 24.0 + 2 * 1.25
    told = [record.energy.message for record in records if record.energy is not None]
    # Two windows fit three seconds; the third needs more than the half that is left.
    assert told[:2] == [None, None]
    said = "--seconds left 0.5 s for energy, 10% of them in all; a window takes 1.2 s"
    assert set(told[2:]) == {said}


def test_the_time_of_windows_is_bounded_by_what_is_left_of_all() -> None:
    clock = Clock()
    whole = Deadline(100.0, clock)
    timing = whole.after(0.8)
    time = EnergyTime(whole, timing, print)
    assert time.left == pytest.approx(100 * ENERGY_SHARE)
    time.take(4.0)
    assert (time.left, timing.seconds, whole.seconds) == (pytest.approx(6.0), pytest.approx(84.0), 100.0)
    clock.now = 98.0
    assert time.left == pytest.approx(2.0)
    clock.now = 200.0
    assert time.left == 0.0
    assert EnergyTime(Deadline(None), Deadline(None), print).left == float("inf")
    # Where there is one deadline for both, as on a CPU, windows put nothing off.
    same = EnergyTime(whole, whole, print)
    same.take(4.0)
    assert whole.seconds == 100.0


@pytest.mark.parametrize(("trajectory_ms", "seconds"), [(0.0, 2.0), (10.0, 2.21), (500.0, 3.0), (3000.0, 6.0)])
def test_a_window_is_expected_to_hold_whole_trajectories(
    make_record: MakeRecord, trajectory_ms: float, seconds: float
) -> None:
    """As many as 2.2 s need, and one before."""
    record = make_record(wall_ms=Samples.of([trajectory_ms]))
    lane: Lane = types.SimpleNamespace(made=record)  # type: ignore[assignment]
    assert seconds_of_a_window(lane) == pytest.approx(seconds)


def test_a_record_its_energy_and_its_trace_are_one(make_record: MakeRecord, tmp_path: Path) -> None:
    first, energy = make_record(), Energy(joules=1.0, window_s=2.0, trajectories=3)
    during = first.device_during.model_copy(update={"sm_clock_mhz": 1755})
    counted = first.model_copy(update={"energy": energy, "device_during": during})
    trace = Trace(launches=8, busy_ms=1.0)
    both = counted.model_copy(update={"trace": trace})
    traced = first.model_copy(update={"trace": trace})
    other = make_record(Case(unet="83M"))
    store = RecordStore(tmp_path / "records.jsonl")
    for lines, kept in (
        ([first, other, counted, both], [other, both]),
        ([first, counted, other], [counted, other]),
        ([first, traced], [traced]),
        ([first, first], [first, first]),
        ([counted, counted], [counted, counted]),
    ):
        store.path.unlink(missing_ok=True)
        for record in lines:
            store.append(record)
        assert load_records(store.path) == (kept, 0)


def test_energy_is_joules_or_a_reason() -> None:
    for wrong in ({}, {"joules": 1.0, "window_s": 2.0, "trajectories": 1, "message": "why"}, {"joules": 1.0}):
        with pytest.raises(ValueError, match="joules"):
            Energy(**wrong)
