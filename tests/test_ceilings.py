"""Ceilings: the best of many samples, kept at the best ever seen. Clocks and rates here are made up."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldmperf.profiling.machines import Rates
from ldmperf.profiling.measure import ceiling_probes as module
from ldmperf.profiling.measure.ceiling_cache import MOST_ANEW, KeptCeilings, ceilings_folder
from ldmperf.profiling.measure.ceiling_probes import measure_ceilings
from ldmperf.profiling.measure.ceilings import MARGIN, Ceiling, CeilingDevice, Ceilings, best_of
from ldmperf.profiling.measure.environment import DeviceState, Environment
from ldmperf.profiling.measure.timing import Timed
from ldmperf.profiling.options import DTYPES, DType

AT = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
HERE = Environment(
    machine_id="ab", cpu="EPYC", os="Linux", python="3", torch="2.13", torch_threads=2, usable_cores=2
)
DEVICE = CeilingDevice.of(HERE)
rates = st.none() | st.floats(1e3, 1e18)


def ceiling(per_s: float | None) -> Ceiling:
    return Ceiling(per_s=per_s, how="given", at=AT, message=None if per_s else "why not")


def ceilings(
    moved: float | None = 4e10,
    flop: tuple[float | None, float | None, float | None] = (4e11, 2e12, 1e11),
    exponentials: float | None = 1e10,
    device: CeilingDevice = DEVICE,
) -> Ceilings:
    """`flop` in the order of DTYPES: float32, bfloat16, float16."""
    of_each = dict(zip(DTYPES, map(ceiling, flop), strict=True))
    return Ceilings(device=device, bytes=ceiling(moved), flop=of_each, exponentials=ceiling(exponentials), last=AT)


some_ceilings = st.builds(ceilings, rates, st.tuples(rates, rates, rates), rates)


def per_s(found: Ceilings) -> list[float | None]:
    return [one.per_s for one in (found.bytes, *found.flop.values(), found.exponentials)]


class FakeDevice:
    """A clock that goes on by what each call takes: `ms_of` a call's index and its number of calls."""

    def __init__(self, sample_ms: Iterator[float]) -> None:
        self.now, self.sample_ms, self.runs = 0.0, sample_ms, 0

    def clock(self) -> float:
        return self.now

    def timer(self, call: Callable[[], Any], device: torch.device) -> Timed[object]:
        before = self.runs
        call()
        ms = next(self.sample_ms) * (self.runs - before)
        self.now += ms / 1e3
        return Timed(None, ms, None)

    def make(self) -> Callable[[], Any]:
        def call() -> None:
            self.runs += 1

        return call


def best(fake: FakeDevice, amounts: list[float], seconds: float = 1.0, **makes: Any) -> Ceiling:
    probes = [module._Probe(f"{n:g}", n, makes.get(f"make{i}", fake.make)) for i, n in enumerate(amounts)]
    return module._best(probes, torch.device("cpu"), seconds, fake.timer, fake.clock)


def test_the_ceiling_is_the_best_sample_of_all_sizes() -> None:
    # Of 10 units a call: 5 ms mostly, 4 ms at best.
    fake = FakeDevice(itertools.cycle([5.0, 5.0, 4.0, 9.0, 100.0]))
    found = best(fake, [1.0, 10.0, 5.0])
    assert found.per_s == pytest.approx(10 / 4e-3)
    assert (found.how, found.message) == ("10", None)
    # In about the seconds given.
    assert fake.now < 1.5


def test_a_sample_is_as_many_calls_as_the_clock_can_tell() -> None:
    fake = FakeDevice(itertools.repeat(0.001))
    found = best(fake, [1.0], seconds=0.1)
    assert found.per_s == pytest.approx(1e6)
    assert fake.runs > 40 * module.SAMPLE_MS / 0.001


def test_slow_calls_are_few_and_larger_sizes_left_out() -> None:
    fake = FakeDevice(itertools.repeat(5000.0))
    found = best(fake, [1.0, 2.0, 3.0])
    assert (found.per_s, found.how, fake.runs) == (pytest.approx(0.2), "1", 2)


def test_a_size_that_fails_counts_only_where_all_do() -> None:
    def fails() -> Callable[[], Any]:
        raise RuntimeError("\"addmm_impl_cpu_\" not implemented for 'Half'")

    found = best(FakeDevice(itertools.repeat(4.0)), [1.0, 2.0], make0=fails)
    assert found.per_s == pytest.approx(2 / 4e-3)
    found = best(FakeDevice(itertools.repeat(4.0)), [1.0, 2.0], make0=fails, make1=fails)
    assert found.per_s is None
    assert "not implemented for 'Half'" in (found.message or "")
    # A clock that stands tells no rate.
    standing = best(FakeDevice(itertools.repeat(0.0)), [1.0], seconds=0.0)
    assert (standing.per_s, standing.message) == (None, "no sample has a length")


@pytest.mark.usefixtures("_one_thread")
def test_all_rates_of_a_cpu_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_COPY_SIZES", {"cpu": (2**12,)})
    monkeypatch.setattr(module, "_MATMUL_SIZES", {"cpu": (8,)})
    monkeypatch.setattr(module, "_EXPONENTIALS", (64,))
    before = torch.get_float32_matmul_precision()
    taken: list[str] = []

    def timer(call: Callable[[], Any], device: torch.device) -> Timed[object]:
        call()
        taken.append(torch.get_float32_matmul_precision())
        return Timed(None, 2.0, None)

    found = measure_ceilings("cpu", HERE, seconds_each=0.0, timer=timer)
    assert found.device == DEVICE
    # One call of 2 ms: bytes read and written, two FLOPs per multiply-add.
    assert per_s(found) == [2 * 2**12 / 2e-3, *[2 * 8**3 / 2e-3] * 3, 64 / 2e-3]
    assert set(taken) == {"highest"}
    assert torch.get_float32_matmul_precision() == before


def test_beside_other_work_one_thread_alone_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_COPY_SIZES", {"cpu": (2**12,)})
    monkeypatch.setattr(module, "_MATMUL_SIZES", {"cpu": (8,)})
    monkeypatch.setattr(module, "_EXPONENTIALS", (64,))
    before = torch.get_num_threads()

    def timer(call: Callable[[], Any], device: torch.device) -> Timed[object]:
        # Threads that wait for each other.
        return Timed(None, 2.0 if torch.get_num_threads() == 1 else 900.0, None)

    # Each look at the clock takes a tenth of a second: both counts have their turn.
    ticks = itertools.count(0.0, 0.1)
    torch.set_num_threads(2)
    try:
        found = measure_ceilings("cpu", HERE, timer=timer, clock=lambda: next(ticks))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert per_s(found) == [2 * 2**12 / 2e-3, *[2 * 8**3 / 2e-3] * 3, 64 / 2e-3]
    assert found.bytes.how == "copy of 0 MiB on 1 thread"


@pytest.mark.parametrize("clock_mhz", [1980, None])
def test_exponentials_of_a_gpu_are_by_design(clock_mhz: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(uuid="1", multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    nvml = SimpleNamespace(
        NVML_CLOCK_SM=1,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: "handle",
        nvmlDeviceGetMaxClockInfo=lambda handle, kind: clock_mhz,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml if clock_mhz else None)
    found = module._design_exponentials(torch.device("cuda"))
    if clock_mhz is None:
        assert found.per_s is None
        assert "nvidia-ml-py" in (found.message or "")
    else:
        assert found.per_s == pytest.approx(16 * 132 * 1.98e9)
        assert found.per_s == pytest.approx(1e3 * Rates(1.0, 132, 1.98).exponentials_per_ms)


def test_a_16_bit_dtype_that_is_emulated_has_float32s_ceiling() -> None:
    found = ceilings(flop=(4e11, 2e12, 1e11))
    assert [found.flop_per_s(name) for name in DTYPES] == [4e11, 2e12, 4e11]
    assert ceilings(flop=(4e11, 2e12, None)).flop_per_s("float16") is None
    assert ceilings(flop=(None, 2e12, None)).flop_per_s("bfloat16") == 2e12


def test_the_hard_bound_takes_the_fastest_way_to_a_dtypes_accuracy() -> None:
    found = ceilings(flop=(4e11, 2e12, 1e11))
    # float32 by three products of bfloat16 parts.
    assert found.least_flop_per_s("float32") == pytest.approx(MARGIN * 2e12 / 3)
    assert found.least_flop_per_s("bfloat16") == found.least_flop_per_s("float16") == pytest.approx(MARGIN * 2e12)
    assert ceilings(flop=(4e11, 5e11, None)).least_flop_per_s("float32") == pytest.approx(MARGIN * 4e11)
    assert ceilings(flop=(4e11, 5e11, None)).least_flop_per_s("float16") is None


@given(found=some_ceilings, dtype=st.sampled_from(DTYPES))
def test_the_hard_bound_is_never_below_the_ceiling(found: Ceilings, dtype: DType) -> None:
    usual, least = found.flop_per_s(dtype), found.least_flop_per_s(dtype)
    assert (usual is None) == (least is None)
    if usual is not None and least is not None:
        assert least >= MARGIN * usual * (1 - 1e-12)


def test_what_is_missing_is_named() -> None:
    assert ceilings().missing("float32") is None
    assert ceilings(flop=(1.0, 1.0, None), moved=None).missing("float16") == (
        "bytes: why not; float16 matmuls: why not"
    )


@given(one=some_ceilings, other=some_ceilings)
def test_the_best_of_two_is_the_larger_of_each(one: Ceilings, other: Ceilings) -> None:
    pairs = zip(per_s(one), per_s(other), strict=True)
    expected = [max((x for x in pair if x is not None), default=None) for pair in pairs]
    assert per_s(best_of(one, other)) == per_s(best_of(other, one)) == expected
    assert best_of(one, other).measured == 2


def test_ceilings_of_two_devices_are_not_mixed() -> None:
    other = ceilings(device=DEVICE.model_copy(update={"threads": 1}))
    with pytest.raises(ValueError, match="not one device's"):
        best_of(ceilings(), other)


class Measured:
    """Stands for measuring: each time other ceilings, and what was told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path | None) -> None:
        monkeypatch.setattr(
            "ldmperf.profiling.measure.ceiling_cache.collect_environment", lambda device: self.environment
        )
        self.environment, self.folder = HERE, folder
        self.results: list[Ceilings] = []
        self.times = 0
        self.lines: list[str] = []

    def source(self, *results: Ceilings) -> KeptCeilings:
        """As a new process has it."""
        self.results = list(results)
        self.lines = []
        return KeptCeilings(self.lines.append, self.folder, self._measure)

    def _measure(self, device: str, environment: Environment) -> Ceilings:
        self.times += 1
        return self.results.pop(0)


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Measured:
    return Measured(monkeypatch, tmp_path / "new" / "ceilings")


def test_ceilings_are_measured_once_for_all_processes(measured: Measured) -> None:
    source = measured.source(ceilings())
    assert source.of("cpu") == source.of("cpu") == ceilings()
    assert "some seconds" in measured.lines[0]
    path = source.path("cpu")
    assert path is not None
    assert path.is_file()
    later = measured.source()
    assert later.of("cpu") == ceilings()
    assert (measured.times, measured.lines) == (1, [])


@pytest.mark.parametrize("field", ["machine_id", "cpu", "torch", "torch_threads", "usable_cores"])
def test_another_machine_torch_or_number_of_threads_has_its_own(measured: Measured, field: str) -> None:
    measured.source(ceilings()).of("cpu")
    changed = {"machine_id": "cd", "cpu": "Xeon", "torch": "2.14", "torch_threads": 1, "usable_cores": 1}[field]
    measured.environment = HERE.model_copy(update={field: changed})
    other = ceilings(5e10, device=CeilingDevice.of(measured.environment))
    assert measured.source(other).of("cpu") == other
    assert measured.times == 2
    measured.environment = HERE
    assert measured.source().of("cpu") == ceilings()


def test_measured_anew_the_best_ever_seen_is_kept(measured: Measured) -> None:
    source = measured.source(ceilings(4e10, exponentials=1e10), ceilings(3e10, exponentials=2e10))
    source.of("cpu")
    anew = source.anew("cpu")
    assert (anew.bytes.per_s, anew.exponentials.per_s, anew.measured) == (4e10, 2e10, 2)
    assert source.of("cpu") == measured.source().of("cpu") == anew
    # Asked for first: what is on disk counts too.
    assert measured.source(ceilings(1e10)).anew("cpu").bytes.per_s == 4e10


def test_without_a_folder_the_best_is_kept_in_the_process(measured: Measured) -> None:
    assert measured.folder is not None
    # A file in the place of the folder.
    measured.folder.parent.mkdir()
    measured.folder.touch()
    source = measured.source(ceilings(4e10), ceilings(3e10))
    source.of("cpu")
    anew = source.anew("cpu")
    assert (anew.bytes.per_s, anew.measured) == (4e10, 2)


def test_a_process_does_not_measure_anew_without_end(measured: Measured) -> None:
    source = measured.source(*[ceilings()] * (MOST_ANEW + 1))
    for _ in range(MOST_ANEW + 3):
        assert source.anew("cpu").bytes.per_s == 4e10
    assert measured.times == MOST_ANEW


@pytest.mark.parametrize(
    ("load_then", "load_now", "times"), [(2.6, 0.1, 2), (2.6, 2.6, 1), (2.4, 0.1, 1), (None, 0.1, 1)]
)
def test_what_was_measured_beside_other_work_is_measured_again_on_an_idle_machine(
    measured: Measured,
    monkeypatch: pytest.MonkeyPatch,
    load_then: float | None,
    load_now: float,
    times: int,
) -> None:
    monkeypatch.setattr(
        "ldmperf.profiling.measure.ceiling_cache.device_state", lambda: DeviceState(load_average_1min=load_now)
    )
    busy = ceilings(4e10).model_copy(update={"load_average_1min": load_then})
    idle = ceilings(8e10).model_copy(update={"load_average_1min": load_now})
    measured.source(busy).of("cpu")
    later = measured.source(idle)
    assert later.of("cpu").bytes.per_s == later.of("cpu").bytes.per_s == (8e10 if times == 2 else 4e10)
    assert measured.times == times
    # Once is enough.
    measured.source().of("cpu")
    assert measured.times == times


def test_a_gpus_ceilings_do_not_depend_on_the_hosts_load() -> None:
    gpu = CeilingDevice(machine_id="ab", device="H200", torch="2.13")
    assert not ceilings(device=gpu).model_copy(update={"load_average_1min": 99.0}).crowded


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"device": 1}', b"[]"])
def test_a_torn_file_is_told_and_measured_anew(measured: Measured, content: bytes) -> None:
    source = measured.source(ceilings(), ceilings(5e10))
    source.of("cpu")
    path = source.path("cpu")
    assert path is not None
    path.write_bytes(content)
    again = measured.source(ceilings(5e10))
    assert again.of("cpu").bytes.per_s == 5e10
    assert any(str(path) in line for line in measured.lines)
    assert measured.source().of("cpu").bytes.per_s == 5e10


def test_a_folder_that_cannot_be_written_is_no_failure(measured: Measured, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    measured.folder = tmp_path / "file" / "ceilings"
    assert measured.source(ceilings()).of("cpu") == ceilings()
    assert any("XDG_CACHE_HOME" in line for line in measured.lines)


def test_the_folder_is_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert ceilings_folder() == tmp_path / "cache" / "ldmperf" / "ceilings"
    for unset in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert ceilings_folder() == tmp_path / ".cache" / "ldmperf" / "ceilings"


@settings(max_examples=30)
@given(found=some_ceilings)
def test_ceilings_are_read_as_written(found: Ceilings) -> None:
    assert Ceilings.model_validate_json(found.model_dump_json()) == found
