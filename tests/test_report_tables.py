"""The tables hold the right numbers, every case, and nothing that is no number."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from ldmperf.profiling import Case, Record
from ldmperf.profiling.figures import overview
from ldmperf.profiling.figures.text import statuses_in_words
from ldmperf.profiling.measure.environment import DeviceState
from ldmperf.profiling.measure.recorded import Samples
from ldmperf.profiling.report import markdown_table, print_table
from ldmperf.profiling.report.details import harness_lines

MakeRecord = Callable[..., Record]
# Words of their own: "inf" is in "information".
NO_NUMBER = re.compile(r"\b(nan|inf|None|null)\b")


def printed(records: list[Record], width: int | None = None) -> str:
    """What a pipe gets, or with a width what a terminal of that width shows, its styles taken away."""
    stream = io.StringIO()
    console = Console(file=stream) if width is None else Console(file=stream, force_terminal=True, width=width)
    print_table(overview(records), console)
    return re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())


def small_set(make_record: MakeRecord) -> list[Record]:
    times = {("39M", "torch"): 800.0, ("145M", "torch"): 2000.0, ("39M", "diffusers"): 1000.0}
    records = [
        make_record(Case(unet=unet, steps=4, batch=2, backend=backend), wall_ms=Samples.of([ms, ms, 1.5 * ms]))
        for (unet, backend), ms in times.items()
    ]
    failed = Case(unet="145M", steps=4, batch=2, backend="diffusers")
    return [*records, make_record(failed, status="oom", message="tried to allocate 20.00 GiB")]


def test_a_row_has_the_cases_numbers(make_record: MakeRecord) -> None:
    lines = printed(small_set(make_record)).splitlines()
    (row,) = (line for line in lines if line.startswith("39M") and "torch" in line)
    # 800 ms over 4 steps; p80 of (800, 800, 1200) is 1040; two images; 0.07 / 0.20 in the paper; 1000 / 800.
    assert row.split() == [
        "39M", "torch", "38.8M", "53.0", "200.0", "200.0..260.0", "400.0", "0.40", "0.35", "1.25x",
    ]  # fmt: skip
    (largest,) = (line for line in lines if line.startswith("145M") and "torch" in line)
    assert largest.split()[-3:] == ["1.00", "1.00", "-"]


def test_what_was_cut_short_is_said(make_record: MakeRecord) -> None:
    assert "Cut short" not in printed(small_set(make_record))
    first, *others = small_set(make_record)
    harness = first.harness.model_copy(update={"stopped_by": "seconds", "order": (("torch", "diffusers"),)})
    records = [first.model_copy(update={"harness": harness}), *others]
    said = "Cut short by --seconds: 1 of 4 cases with fewer trajectories than were asked for"
    assert said in printed(records)
    assert said in markdown_table(overview(records))
    # In the details too; alike but for the order of their rounds are one setting.
    assert harness_lines(records) == [
        "at least 3 trajectories and 0 s of them, after 0 for warm-up; timed in turn: torch, diffusers"
        f"{cut}" for cut in ("; cut short by --seconds", "")
    ]  # fmt: skip
    # Of those that have a time, where one has.
    failed = make_record(status="oom", harness=harness.model_copy(update={"warmup_count": 9}))
    assert harness_lines([*records, failed]) == harness_lines(records)
    assert harness_lines([failed]) != []
    ordered = [r.model_copy(update={"harness": r.harness.model_copy(update={"order": ((b,),)})})
               for r, b in zip(others, "abc", strict=True)]  # fmt: skip
    assert len(harness_lines(ordered)) == 1


def test_a_failed_case_is_a_row_with_its_reason_and_no_time(make_record: MakeRecord) -> None:
    output = printed(small_set(make_record))
    (row,) = (line for line in output.splitlines() if line.startswith("145M") and "diffusers" in line)
    assert row.split("  ")[-1] == "oom: tried to allocate 20.00 GiB"
    assert not re.search(r"\b0(\.0+)?\b ", row)
    # Out of memory is a finding, as unsupported is; wrong results and errors are failures.
    assert "1 of 4 cases without a time: 1 out of memory" in output
    assert "failed" not in output
    assert statuses_in_words(["unsupported"]) == "1 unsupported"
    found = statuses_in_words(["error", "oom", "incorrect", "unsupported", "error"])
    assert found == "3 failed (2 error, 1 incorrect), 1 out of memory, 1 unsupported"


def test_what_is_the_same_everywhere_is_said_once(make_record: MakeRecord) -> None:
    output = printed(small_set(make_record))
    for phrase in ("AMD EPYC", "float32", "batch 2", "guidance 7.5", "ddim", "4 steps"):
        assert output.count(phrase) == 1, phrase


def test_conditions_that_vary_head_their_rows(make_record: MakeRecord) -> None:
    records = [make_record(Case(unet="39M", steps=n, guidance_scale=g)) for n in (2, 4) for g in (1.0, 7.5)]
    lines = printed(records).splitlines()
    assert [line for line in lines if line.endswith(("no guidance", "guidance 7.5"))] == [
        "2 steps, no guidance",
        "2 steps, guidance 7.5",
        "4 steps, no guidance",
        "4 steps, guidance 7.5",
    ]


def test_a_checkpoint_has_a_dash_for_the_paper_and_a_labelled_gflop_ratio(make_record: MakeRecord) -> None:
    records = [
        make_record(Case(unet="145M", steps=4), gflop_per_forward=200.0),
        make_record(Case(unet="/models/mine", steps=4), gflop_per_forward=100.0),
    ]
    output = printed(records)
    (row,) = (line for line in output.splitlines() if line.startswith("mine"))
    assert row.split()[-2:] == ["-", "0.50"]
    assert "GFLOP ratio:" in output


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_of_usual_width_has_no_longer_line(make_record: MakeRecord, width: int) -> None:
    assert max(map(len, printed(small_set(make_record), width).splitlines())) <= width


def test_mixed_environments_are_told(make_record: MakeRecord) -> None:
    other = make_record().environment.model_copy(update={"git_commit": "b" * 40, "git_dirty": True})
    records = [make_record(Case(unet="39M")), make_record(Case(unet="83M"), environment=other)]
    output = printed(records)
    assert "environment A\n" in output
    assert "environment B\n" in output
    assert "Environment B is not environment A (git dirty: no, yes; commit: 7d35813a1b2c, bbbbbbbbbbbb)" in output
    assert "bbbbbbb with uncommitted changes" in output


def test_unsteady_times_are_told(make_record: MakeRecord) -> None:
    wide = make_record(Case(unet="39M"), wall_ms=Samples.of([100.0, 100.0, 120.0]))
    steady = make_record(Case(unet="83M"), wall_ms=Samples.of([100.0, 100.0, 116.0]))
    assert "more than 10% of the median in 1 of 2 cases (39M torch)" in printed([wide, steady])
    assert "Unsteady" not in printed([steady])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_too_few_samples_for_a_spread_are_told(make_record: MakeRecord, count: int) -> None:
    few = make_record(wall_ms=Samples.of([100.0] * count))
    note = "Fewer than 3 samples in 1 of 2 cases: their p20 to p80 says nothing"
    assert (note in printed([few, make_record(Case(unet="83M"))])) == (count < 3)


@pytest.mark.parametrize(("load", "is_told"), [(2.4, False), (2.6, True)])
def test_a_busy_machine_is_told(make_record: MakeRecord, load: float, is_told: bool) -> None:
    # Two usable cores.
    record = make_record(device_before=DeviceState(load_average_1min=load))
    note = f"1 of 1 case saw a load average above 1.25 per usable core, up to {load:.2f}"
    assert (note in printed([record])) == is_told


def test_markup_and_control_characters_in_names_are_text(make_record: MakeRecord) -> None:
    record = make_record(Case(unet="/m/[red]x[red]\x1b[2J|y", steps=4))
    assert r"[red]x[red]\x1b[2J|y" in printed([record])
    assert r"\[red\]x\[red\]\\x1b\[2J\|y" in markdown_table(overview([record]))


def test_markdown_has_the_same_figures(make_record: MakeRecord) -> None:
    records = small_set(make_record)
    lines = markdown_table(overview(records)).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + len(records)
    assert len({line.count("|") for line in table}) == 1
    assert table[2] == ("| 39M | torch | 38.8M | 53.0 | 200.0 | 200.0..260.0 | 400.0 | 0.40 | 0.35 | 1.25x |")
    assert "| 145M | diffusers | 38.8M | 159.9 | oom: tried to allocate 20.00 GiB | - | - | - | - | - |" in table
    assert "AMD EPYC" in lines[0]


def test_no_records(make_record: MakeRecord) -> None:
    assert printed([]).strip() == markdown_table(overview([])).strip() == "No cases were measured."


def test_the_tables_need_neither_charts_nor_page() -> None:
    code = """
import sys
for name in ("altair", "vl_convert", "jinja2"):
    sys.modules[name] = None
from pathlib import Path
from ldmperf.profiling.figures import overview
from ldmperf.profiling.report import ReportUnavailable, markdown_table, print_table, write_report
from ldmperf.profiling.report.page_input import PageInput
assert "ldmperf.profiling.report.charts" not in sys.modules and "torch" not in sys.modules
print(markdown_table(overview([])))
try:
    write_report(PageInput(overview([])), Path("never"))
except ReportUnavailable as missing:
    print(missing)
    assert isinstance(missing, ModuleNotFoundError) and missing.name == "jinja2"
assert not Path("never").exists()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert "pip install altair vl-convert-python jinja2" in result.stdout


UNETS = ("39M", "83M", "866M", "5B", "/models/<mine>", "/other/<mine>")
CASES = st.builds(
    Case,
    unet=st.sampled_from(UNETS),
    steps=st.sampled_from((1, 4, 50)),
    batch=st.sampled_from((1, 8)),
    backend=st.sampled_from(("torch", "diffusers", "graph")),
    sampler=st.sampled_from(("ddim", "heun")),
    task=st.sampled_from(("t2i", "sr")),
    guidance_scale=st.sampled_from((1.0, 7.5)),
)
TIMES = st.lists(st.floats(0, 1e7), min_size=1, max_size=5)
OUTCOMES = st.one_of(TIMES, st.sampled_from(("incorrect", "oom", "unsupported", "error")))


@st.composite
def record_sets(draw: st.DrawFn, make_record: MakeRecord) -> list[Record]:
    records = []
    environment = make_record().environment
    for of in draw(st.lists(CASES, max_size=8)):
        outcome = draw(OUTCOMES)
        facts = {
            "parameters": draw(st.sampled_from((None, 38_800_580))),
            "gflop_per_forward": draw(st.sampled_from((None, 0.0, 53.0))),
            "environment": draw(st.sampled_from((environment, environment.model_copy(update={"torch": None})))),
        }
        if isinstance(outcome, str):
            records.append(make_record(of, status=outcome, correctness=None, **facts))
        else:
            records.append(make_record(of, wall_ms=Samples.of(outcome), **facts))
    return records


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), width=st.sampled_from((None, 40, 80, 120)))
def test_any_record_set_prints_every_case_and_only_numbers(
    make_record: MakeRecord, data: st.DataObject, width: int | None
) -> None:
    records = data.draw(record_sets(make_record))
    expected = {(record.environment, record.case_key) for record in records}
    output, markdown = printed(records, width), markdown_table(overview(records))
    assert not NO_NUMBER.search(output)
    assert not NO_NUMBER.search(markdown)
    assert sum(line.startswith("| ") for line in markdown.splitlines()) == (2 + len(expected) if records else 0)
    rows = re.findall(r"^\S+ +(?:torch|diffusers|graph) +(?:-|38\.8M) +(?:-|[\d.]+)(?: |$)", output, re.MULTILINE)
    assert len(rows) == len(expected)


def test_times_faster_is_of_each_rows_backend_another_peer_too(make_record: MakeRecord) -> None:
    times = {"graph": 10.0, "diffusers-compile": 20.0, "diffusers": 40.0}
    records = [make_record(Case(unet="39M", backend=b), wall_ms=Samples.of([ms])) for b, ms in times.items()]
    lines = printed(records).splitlines()
    # The table is first, the ladder below it.
    said = {line.split()[1]: line.split()[-1] for line in lines[: lines.index("", 3)] if line.startswith("39M")}
    # Four times and twice as fast as the peer; the peer itself has no such figure.
    assert said == {"graph": "4.00x", "diffusers-compile": "2.00x", "diffusers": "-"}
    note = next(line for line in lines if line.startswith("times faster"))
    assert note == "times faster: the time of diffusers over that of the row's backend, same case and environment"
