"""The ladder and the headline costs, against figures worked out by hand."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from ldmperf.profiling import Case, Record
from ldmperf.profiling.figures import overview
from ldmperf.profiling.measure.recorded import KernelTime, Samples
from ldmperf.profiling.report import markdown_table, print_table, write_report
from ldmperf.profiling.report.drawings import ChartSet
from ldmperf.profiling.report.ladder import costs_grid, groups_grid, ladder_grid, ladders
from ldmperf.profiling.report.page_input import PageInput
from ldmperf.profiling.trajectory.case import RUNGS
from ldmperf.profiling.trajectory.records import Trace

MakeRecord = Callable[..., Record]
# Milliseconds of a trajectory of ten steps.
TIMES = {
    "39M": {
        "diffusers": 200.0,
        "diffusers-accelerated": 180.0,
        "torch": 160.0,
        "triton": 120.0,
        "triton+hoist": 100.0,
        "triton+hoist+merge": 80.0,
        "graph+separate": 25.0,
        "graph+products": 24.0,
        "graph+statistics": 26.0,
        "graph": 20.0,
        "graph+pdl": 19.0,
    },
    "866M": {
        "diffusers": 400.0,
        "diffusers-accelerated": 360.0,
        "torch": 400.0,
        "triton": 250.0,
        "triton+hoist": 220.0,
        "triton+hoist+merge": 210.0,
        "graph+separate": 250.0,
        "graph+products": 240.0,
        "graph+statistics": 260.0,
        "graph": 200.0,
        "graph+pdl": 190.0,
    },
}


STEP = (
    KernelTime(name="sm90_xmma_fprop_implicit_gemm", launches=52.0, ms=1.25),
    KernelTime(name="linear_kernel", launches=11.0, ms=0.25),
    KernelTime(name="nvjet_tst_128x256", launches=128.0, ms=0.25),
)


@pytest.fixture
def records(make_record: MakeRecord) -> list[Record]:
    found = []
    for size, times in TIMES.items():
        for backend in reversed(RUNGS):
            case = Case(unet=size, steps=10, backend=backend, device="cuda")
            if backend not in times:
                message = "torch.compile: Unsupported: a graph break"
                found.append(make_record(case, status="error", message=message))
                continue
            wall = times[backend]
            found.append(
                make_record(
                    case,
                    wall_ms=Samples.of([wall]),
                    trace=Trace(launches=4000, launches_per_step=394, busy_ms=19.8, step=STEP),
                    peak_memory_bytes=3 * 2**29,
                )
            )
    return found


def test_rungs_are_in_order_and_gain_over_the_last_that_has_a_time(records: list[Record]) -> None:
    small, large = ladders(overview(records))
    assert (small.name, large.name) == ("39M", "866M")
    assert [rung.row.record.case.backend for rung in small.rungs] == list(RUNGS)
    gains = {rung.row.record.case.backend: rung.gain for rung in small.rungs}
    assert gains == {
        "diffusers": None,
        "diffusers-accelerated": 200 / 180,
        "diffusers-compile": None,
        "diffusers-accelerated-compile": None,
        "diffusers-compile-max": None,
        "torch": 180 / 160,
        "triton": 160 / 120,
        "triton+hoist": 120 / 100,
        "triton+hoist+merge": 100 / 80,
        "graph+separate": 80 / 25,
        # An idea alone is compared with the rung without any, and so are all together.
        "graph+products": 25 / 24,
        "graph+statistics": pytest.approx(25 / 26),
        "graph+convolutions": None,
        "graph+tails": None,
        "graph": 25 / 20,
        "graph+pdl": 20 / 19,
    }


def test_what_stands_beside_a_rung_is_compared_with_it(make_record: MakeRecord) -> None:
    times = {"graph+separate": 25.0, "graph": 20.0, "graph+pdl": 30.0, "graph-invariant": 40.0, "graph+fp8": 16.0}
    times["triton+fp8"] = 10.0
    made = [
        make_record(Case(unet="866M", steps=10, backend=name, device="cuda"), wall_ms=Samples.of([wall]))
        for name, wall in times.items()
    ]
    (found,) = ladders(overview(made))
    gains = {rung.row.record.case.backend: rung.gain for rung in found.rungs}
    assert (gains["graph"], gains["graph+pdl"]) == (25 / 20, pytest.approx(20 / 30))
    assert (gains["graph-invariant"], gains["graph+fp8"], gains["triton+fp8"]) == (20 / 40, 20 / 16, None)


def test_the_grid_shows_every_rung_and_why_one_has_no_time(records: list[Record]) -> None:
    grid = ladder_grid(overview(records))
    rows = {(row[0], row[1]): row for row in grid.rows}
    assert len(rows) == 2 * len(RUNGS)
    assert grid.headings == (
        "size", "rung", "ms per step", "gain over the rung before", "gain over diffusers", "launches per step",
        "host gap", "peak memory GiB", "relative RMS error", "no time because",
    )  # fmt: skip
    assert rows["39M", "graph"][:8] == ("39M", "graph", "2.000", "1.25x", "10.00x", "394", "1.0%", "1.500")
    assert rows["39M", "graph"][8:] == ("2.1e-06", "-")
    assert rows["39M", "diffusers"][3:5] == ("-", "-")
    failed = rows["39M", "diffusers-compile"]
    assert failed[2:8] == ("-",) * 6
    assert failed[9] == "error: torch.compile: Unsupported: a graph break"


def test_a_steps_device_time_is_told_by_group_of_kernels(records: list[Record]) -> None:
    grid = groups_grid(overview(records))
    assert grid.headings == ("size", "rung", "convolution", "linear")
    # Of a compiled peer that failed there is no trace.
    assert len(grid.rows) == sum(map(len, TIMES.values()))
    assert ("866M", "graph", "1.250 (52)", "0.5000 (139)") in grid.rows


def test_the_headline_sets_the_clock_beside_the_paper(records: list[Record]) -> None:
    grid = costs_grid(overview(records))
    assert grid.headings == ("size", "the paper's", *RUNGS)
    graphs = ("0.10", "0.10", "0.10", "-", "-", "0.10", "0.10")
    assert grid.rows == (
        ("39M", "0.070", *["0.50"] * 2, *["-"] * 3, "0.40", "0.48", "0.45", "0.38", *graphs),
        ("866M", *["1.00"] * 3, *["-"] * 3, *["1.00"] * 7, "-", "-", "1.00", "1.00"),
    )


def test_a_run_of_two_backends_has_no_ladder(make_record: MakeRecord, tmp_path: Path) -> None:
    two = [make_record(Case(unet=u, steps=2, backend=b)) for u in ("39M", "83M") for b in ("torch", "diffusers")]
    shown = overview(two)
    assert ladders(shown) == ()
    assert ladder_grid(shown).rows == groups_grid(shown).rows == costs_grid(shown).rows == ()
    (drawing,) = (drawing for drawing in ChartSet.of(shown).drawings if drawing.name == "ladder")
    assert drawing.chart is None
    assert "3 backends" in drawing.reason
    assert "rung" not in markdown_table(overview(two))


def test_terminal_markdown_page_and_chart_show_it(
    records: list[Record], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    print_table(overview(records), Console(width=400))
    printed, markdown = capsys.readouterr().out, markdown_table(overview(records))
    for shown in (printed, markdown):
        assert "What each rung gains, at each size" in shown
        assert "Measured cost of a step relative to 866M, beside the paper's" in shown
        assert "1.25x" in shown
        assert "Where a step's device time goes: ms (launches)" in shown
    assert re.search(r"39M +graph +2\.000 +1\.25x +10\.00x +394 +1\.0% +1\.500", printed)
    paths = write_report(PageInput(overview(records)), tmp_path)
    assert {"ladder.png", "ladder.svg"} <= {path.name for path in paths}
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = re.sub(r"<(script|style)\b.*?</\1>", "", html, flags=re.DOTALL)
    assert "What each rung gains, at each size" in page
    assert "a graph break" in page
    assert not re.search(r"\b(nan|inf|None|undefined|NaN)\b", re.sub(r"<[^>]*>", " ", page))
