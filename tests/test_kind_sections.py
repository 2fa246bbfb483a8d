"""The tables of kernels and compiled launches: what is in them, and that no two machines or commits share one."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ldmperf.profiling.kernel_bench.kernel_records import KernelRecord
from ldmperf.profiling.kernel_bench.table import by_conditions, markdown, print_records
from ldmperf.profiling.measure.environment import Environment, Gpu
from ldmperf.profiling.measure.recorded import Samples
from ldmperf.profiling.record_files import Gathered
from ldmperf.profiling.report.kind_sections import kind_sections
from ldmperf.profiling.report.page_input import GridSection
from ldmperf.profiling.static.inspection_table import print_inspections

Run_ = Make = Callable[..., Any]
WHEN = datetime(2026, 11, 27, 1, tzinfo=UTC)
HERE = Environment(os="Linux", python="3.12", triton="3.7.1", git_commit="7d35813" + "0" * 33)
H100 = HERE.model_copy(update={"gpu": Gpu(name="NVIDIA H100", count=1), "torch": "2.13.0"})
H200 = H100.model_copy(update={"gpu": Gpu(name="NVIDIA H200", count=1)})
LATER = H100.model_copy(update={"git_commit": "2b95aac" + "0" * 33})


@pytest.fixture
def kernel(make_kernel: Make) -> Make:
    """Makes a record of a GPU, without a time where `ms` is None."""

    def make(peer: str, ms: float | None, environment: Environment = H100, rows: int = 6, **changes: Any) -> Any:
        fields = {"peer": peer, "device": "cuda", "clock": "device", "environment": environment}
        if ms is None:
            fields |= {"status": "unsupported", "message": "no <b>kernel</b>", "ms": None, "correctness": None}
        else:
            fields["ms"] = Samples.of([ms])
        return make_kernel(rows, **(fields | changes))

    return make


def cells(section: GridSection, heading: str) -> list[str]:
    place = section.grid.headings.index(heading)
    return [row[place] for row in section.grid.rows]


def test_times_stand_beside_the_fastest_and_our_kernels_and_failures_apart(kernel: Make) -> None:
    records = (kernel("triton", 0.5), kernel("eager", 1.5), kernel("compile", 0.25), kernel("xformers", None))
    beside, each, failures = kind_sections(Gathered(kernels=records))
    assert cells(beside, "peer") == ["eager", "compile"]
    assert cells(beside, "x triton") == ["3.000", "0.5000"]
    assert cells(each, "peer") == ["triton", "eager", "compile"]
    assert cells(each, "x fastest") == ["2.00", "6.00", "1.00"]
    assert [row[:4] for row in failures.grid.rows] == [
        ("xformers", "one by one", "unsupported", "no <b>kernel</b>")
    ]
    assert all("NVIDIA H100, float32, 7d35813" in section.title for section in (beside, each, failures))
    for section in (beside, each):
        assert "torch 2.13.0" in section.note


def test_no_two_machines_or_commits_share_a_table_on_page_terminal_or_in_markdown(kernel: Make) -> None:
    environments = {"NVIDIA H100": H100, "NVIDIA H200": H200, "2b95aac": LATER}
    records = [
        kernel(peer, ms * scale, environment, run_id=name)
        for scale, (name, environment) in enumerate(environments.items(), 1)
        for peer, ms in (("triton", 0.5), ("eager", 0.75))
    ]
    sections = kind_sections(Gathered(kernels=tuple(records)))
    assert len(sections) == 6
    assert len({section.title for section in sections}) == 6
    # Compared with its own machine's alone.
    assert [cells(section, "x fastest") for section in sections[1::2]] == 3 * [["1.00", "1.50"]]
    buffer = io.StringIO()
    print_records(records, Console(file=buffer, width=300))
    for text in (buffer.getvalue(), markdown(records)):
        for name in ("NVIDIA H100", "NVIDIA H200", "2b95aac"):
            assert name in text
        assert text.count("NVIDIA H100") == 2
    assert "in turn with another side" in markdown([kernel("triton", 1.0, in_turns=True)])
    assert len(by_conditions([kernel("triton", 1.0), kernel("eager", 1.0, in_turns=True)])) == 2


def test_of_a_call_that_two_runs_have_there_is_the_last_with_a_time(kernel: Make) -> None:
    def at(hours: int, ms: float | None) -> KernelRecord:
        return kernel("triton", ms, run_id=str(hours), started_at=WHEN + timedelta(hours=hours))

    for records, expected in (
        ([at(2, 0.5), at(1, 0.25)], 0.5),
        ([at(1, 0.25), at(2, None)], 0.25),
        ([at(1, None), at(2, 0.75)], 0.75),
    ):
        ((record,),) = by_conditions(records)
        assert record.ms is not None
        assert record.ms.p50 == expected


def test_compiled_launches_stand_apart_by_chip_compiler_and_commit(make_inspection: Make) -> None:
    newer = HERE.model_copy(update={"triton": "3.9.0"})
    records = (
        make_inspection(),
        make_inspection(tile=128, registers=64, spills=2),
        make_inspection(environment=newer, registers=40),
        make_inspection(arch="gfx942"),
        make_inspection(status="error", message="no\x1b", registers=None, spills=None, shared_bytes=None, tile=32),
    )
    first, second, third = kind_sections(Gathered(inspections=records))
    assert [section.title.partition(": ")[2] for section in (first, second, third)] == [
        "sm_90, triton 3.7.1, 7d35813",
        "sm_90, triton 3.9.0, 7d35813",
        "gfx942, triton 3.7.1, 7d35813",
    ]
    assert cells(first, "registers") == ["32", "64", "-"]
    assert cells(first, "spills") == ["0", "2", "-"]
    assert cells(first, "tile") == ["BLOCK=64", "BLOCK=128", "BLOCK=32"]
    assert cells(first, "faults") == ["-", "-", "error: no\x1b"]
    assert cells(second, "registers") == ["40"]
    buffer = io.StringIO()
    print_inspections(records, Console(file=buffer, width=200))
    assert "\x1b" not in buffer.getvalue()


@pytest.mark.parametrize("kind", ["kernels", "inspections"])
def test_a_folder_of_kernels_or_inspections_gets_a_page(
    run: Run_, tmp_path: Path, kind: str, kernel: Make, make_inspection: Make
) -> None:
    lines = {
        "kernels": kernel("xformers", None).model_dump_json(),
        "inspections": make_inspection().model_dump_json(),
    }
    (tmp_path / f"{kind}.jsonl").write_text(lines[kind])
    outcome = run("report", tmp_path)
    assert outcome.code == 0, outcome.err
    page = (tmp_path / "report.html").read_text()
    assert str(tmp_path / "report.html") in outcome.out
    assert (tmp_path / "kernels.md").exists() == (kind == "kernels")
    if kind == "kernels":
        assert "no &lt;b&gt;kernel&lt;/b&gt;" in page
        assert "<b>kernel" not in page
    else:
        assert "Compiled launches: sm_90, triton 3.7.1" in page
        assert "geglu_kernel" in outcome.out


def test_many_calls_are_a_summary_on_the_terminal_unless_all_are_asked_for(
    run: Run_, tmp_path: Path, kernel: Make
) -> None:
    path = tmp_path / "many.jsonl"
    records = [kernel(peer, 1.0, rows=rows) for rows in range(1, 61) for peer in ("triton", "eager")]
    path.write_text("".join(json.dumps(json.loads(record.model_dump_json())) + "\n" for record in records))
    summary, everything = run("report", path), run("report", path, "--all")
    assert "120 times of 60 calls" in summary.out
    assert "eager takes 1.000 times as long as triton" in summary.out
    assert len(summary.out.splitlines()) < 20
    assert everything.out.count("geglu 6") >= 2
