"""A throttled or shared GPU is flagged in every table: of trajectories and kernels, printed, markdown and page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest
from rich.console import Console

from ldmperf.profiling import Case, Record
from ldmperf.profiling.figures import overview
from ldmperf.profiling.kernel_bench.attention_table import attention_grid, attention_rows
from ldmperf.profiling.kernel_bench.kernel_records import KernelRecord, record_key
from ldmperf.profiling.kernel_bench.table import markdown, print_records
from ldmperf.profiling.measure.conditions import flag_notes, flags, marks
from ldmperf.profiling.measure.device_watch import DeviceWatch
from ldmperf.profiling.measure.environment import DeviceState, Environment
from ldmperf.profiling.measure.recorded import Correctness, KernelTime, Samples
from ldmperf.profiling.report import markdown_table, print_table, write_report
from ldmperf.profiling.report.details import cases_grid, device_lines, lines_grid
from ldmperf.profiling.report.ladder import costs_grid, costs_title, groups_grid, ladder_grid
from ldmperf.profiling.report.page_input import PageInput
from ldmperf.profiling.step.call import OperatorCall
from ldmperf.profiling.step.calls import attention_calls
from ldmperf.profiling.trajectory.record_parts import Energy, Trace

MakeRecord = Callable[..., Record]
CAPPED = DeviceState(throttle_reasons=("ApplicationsClocksSetting", "SwPowerCap"))
SHARED = DeviceState(throttle_reasons=(), foreign_processes=2)
FREE = DeviceState(throttle_reasons=("GpuIdle", "UserDefinedClocks"), foreign_processes=0)


@pytest.mark.parametrize(
    ("before", "during", "after", "expected"),
    [
        (DeviceState(), DeviceState(), DeviceState(), ()),
        (FREE, FREE, FREE, ()),
        (FREE, CAPPED, FREE, ("throttled: SwPowerCap",)),
        # What held before, or when it was over, did not slow it; older records know only that.
        (CAPPED, FREE, CAPPED, ()),
        (CAPPED, DeviceState(), FREE, ()),
        (FREE, DeviceState(), CAPPED, ("throttled: SwPowerCap",)),
        # Somebody who was there at its beginning or end was there.
        (SHARED, FREE, FREE, ("shared GPU: 2 other processes",)),
        (FREE, FREE, FREE.model_copy(update={"foreign_processes": 1}), ("shared GPU: 1 other process",)),
        (SHARED, CAPPED, FREE, ("throttled: SwPowerCap", "shared GPU: 2 other processes")),
    ],
)
def test_flags_are_what_lowered_the_clocks_and_who_else_computed(
    make_record: MakeRecord,
    before: DeviceState,
    during: DeviceState,
    after: DeviceState,
    expected: tuple[str, ...],
) -> None:
    record = make_record(device_before=before, device_during=during, device_after=after)
    assert flags(record) == expected
    assert marks(record) == ", ".join(flag.partition(":")[0] for flag in expected)


def test_each_flag_is_noted_once_with_how_many_have_it(make_record: MakeRecord) -> None:
    capped = make_record(device_during=CAPPED)
    both = make_record(device_during=CAPPED, device_before=SHARED)
    assert flag_notes([make_record()], "case") == []
    shared, throttled = flag_notes([capped, both, make_record()], "case")
    assert "1 of 3 cases marked shared GPU: 2 other processes" in shared
    assert "2 of 3 cases marked throttled: SwPowerCap" in throttled
    assert marks(capped, both, make_record()) == "throttled, shared GPU"


def test_a_watch_keeps_all_reasons_the_last_reading_and_the_most_others() -> None:
    watch = DeviceWatch()
    watch.read_throttling()
    assert watch.state == DeviceState()
    for reading in (
        DeviceState(sm_clock_mhz=1980, throttle_reasons=("SwPowerCap",), foreign_processes=2),
        DeviceState(sm_clock_mhz=1500, throttle_reasons=("HwSlowdown",)),
        DeviceState(sm_clock_mhz=1700, foreign_processes=1),
    ):
        watch.add(reading)
    assert watch.state == DeviceState(
        sm_clock_mhz=1700, throttle_reasons=("HwSlowdown", "SwPowerCap"), foreign_processes=2
    )


def printed(records: Sequence[Record]) -> str:
    stream = io.StringIO()
    print_table(overview(records), Console(file=stream))
    return stream.getvalue()


@pytest.fixture
def measured(make_record: MakeRecord) -> Callable[..., list[Record]]:
    """Two sizes on three rungs at two step counts; of the graph of the 39M, `changes`."""

    def made(**changes: object) -> list[Record]:
        found = []
        trace = Trace(launches=9, busy_ms=1.0, step=(KernelTime(name="linear_kernel", launches=1.0, ms=0.25),))
        for unet in ("39M", "866M"):
            for backend in ("diffusers", "torch", "graph"):
                for steps in (4, 8):
                    case = Case(unet=unet, backend=backend, steps=steps, batch=2, device="cuda")
                    own = changes if (unet, backend) == ("39M", "graph") else {}
                    times = {"wall_ms": Samples.of([1e3 + steps] * 3), "trace": trace}
                    found.append(make_record(case, **(times | own)))
        return found

    return made


def test_every_table_of_trajectories_shows_the_flags(
    measured: Callable[..., list[Record]], tmp_path: Path
) -> None:
    plain, flagged = measured(), measured(device_during=CAPPED, device_before=SHARED)
    mark = "throttled, shared GPU"
    for records, count in ((plain, 0), (flagged, 2)):
        shown = overview(records)
        grids = [ladder_grid(shown), groups_grid(shown)]
        for grid in grids:
            assert ("flags" in grid.headings) == bool(count)
            assert sum(mark in row for row in grid.rows) == count
        full = [row for row in cases_grid(shown, shown.rows).rows if row[-1] != "-" and "SwPowerCap" in row[-1]]
        assert len(full) == count
        # A line has both step counts, and the column of costs the small size alone: the large one is the measure.
        lines = lines_grid(shown)
        assert sum(mark in row for row in lines.rows) == count / 2
        costs = costs_grid(shown)
        assert sum(cell.endswith("*") for row in costs.rows for cell in row) == count
        assert ("*" in costs_title(shown)) == bool(count)
        table = printed(records)
        for text in (table, markdown_table(shown)):
            assert text.count("marked throttled: SwPowerCap") == bool(count)
            assert text.count("marked shared GPU: 2 other processes") == bool(count)
        # Of the main table's lines alone: those begin with the size and the backend.
        marked = [line for line in table.splitlines() if re.match(r"39M +graph ", line) and line.endswith(mark)]
        assert len(marked) == count
        main = markdown_table(shown).partition("What each rung gains")[0]
        assert len(re.findall(rf"\| 39M \| graph \|.*\| {mark} \|\n", main)) == count
    write_report(PageInput(overview(flagged)), tmp_path)
    page = (tmp_path / "report.html").read_text()
    # Two rows in the ladder and the groups; one line; the full text of both cases.
    assert page.count(f'<td class="word">{mark}</td>') == 2 * 2 + 1
    assert page.count("throttled: SwPowerCap; shared GPU: 2 other processes") == 2


def test_a_failed_case_has_no_flag(measured: Callable[..., list[Record]], make_record: MakeRecord) -> None:
    failed = make_record(Case(unet="39M", device="cuda"), status="oom", device_during=CAPPED)
    assert "throttled" not in printed([failed])


def test_energy_has_a_column_where_there_is_any(measured: Callable[..., list[Record]]) -> None:
    energy = Energy(joules=640.0, window_s=2.0, trajectories=4, counted_s=1.9, relative_error=0.0025)
    records = measured(energy=energy)
    text, plain = printed(records), printed(measured())
    assert "J per" not in plain
    (row,) = (line for line in text.splitlines() if re.match(r"39M +graph ", line) and line.split()[4] == "251.0")
    # 160 J a trajectory: two images, four steps; 640 J in 2 s.
    assert row.split()[-1] == "80.00"
    assert "what it takes when idle is not subtracted" in " ".join(text.split())
    shown = overview(records)
    grid = cases_grid(shown, shown.rows)
    cells = next(dict(zip(grid.headings, row, strict=True)) for row in grid.rows if row[0] == "39M, graph")
    assert (cells["J per image"], cells["J per step"], cells["mean W"]) == ("80.00", "40.00", "320")
    assert (cells["energy window s"], cells["energy error"]) == ("2.000", "0.2%")
    why = Energy(message="NVML's energy counter did not move in 6.0 s")
    grid = cases_grid(shown := overview(measured(energy=why)), shown.rows)
    assert "no energy because" in grid.headings
    assert sum(why.message in row for row in grid.rows) == 2
    assert "J per image" not in grid.headings


def test_the_power_limit_and_others_are_among_what_was_seen(make_record: MakeRecord) -> None:
    states = [DeviceState(power_limit_w=watts, foreign_processes=1) for watts in (500.0, 700.0)]
    record = make_record(device_before=states[0], device_during=states[1])
    lines = dict(device_lines([record]))
    assert lines["power limit in force, W"] == "500 to 700"
    assert lines["other processes on the GPU"] == "1"


def kernel(call: OperatorCall, peer: str, ms: float, during: DeviceState) -> KernelRecord:
    return KernelRecord(
        case_key=record_key(call, "cuda", peer, "graph"),
        size="39M",
        batch=2,
        case=call,
        peer=peer,
        mode="graph",
        device="cuda",
        status="ok",
        correctness=Correctness(error_before=1e-3, error_after=1e-3, tolerance=1e-2, reference="ours, float64"),
        ms=Samples.of([ms]),
        clock="device",
        calls_per_sample=8,
        input_sets=2,
        l2="cold",
        device_during=during,
        environment=Environment(os="Linux", python="3.12"),
        started_at=datetime(2026, 11, 26, tzinfo=UTC),
    )


def test_every_table_of_kernels_shows_the_flags() -> None:
    call = attention_calls(12, 64, 2, "float32")[0]
    for during, mark in ((FREE, None), (CAPPED, "throttled"), (SHARED, "shared GPU")):
        records = [kernel(call, "triton", 1.0, during), kernel(call, "eager", 2.0, FREE)]
        stream = io.StringIO()
        print_records(records, Console(file=stream))
        for text in (stream.getvalue(), markdown(records)):
            rows = [line for line in text.splitlines() if "triton" in line and "0.1966" in line]
            assert len(rows) == 1
            assert ("flags" in text) == (mark is not None)
            assert mark is None or mark in rows[0]
            assert ("1 of 2 times marked" in text) == (mark is not None)
        grid = attention_grid(attention_rows(records))
        assert grid.headings[-1] == ("ratio" if mark is None else "flags")
        assert mark is None or grid.rows[0][-1] == f"triton {mark}"
