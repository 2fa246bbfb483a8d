"""`ldmperf report` of many sets and many cases: a screen on the terminal, one page, and what was put together."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from ldmperf.profiling import Case, Record, report
from ldmperf.profiling.measure.recorded import Samples
from ldmperf.profiling.measure.timing import RepetitionRule
from ldmperf.profiling.report.page_input import PageInput
from ldmperf.profiling.report.summary_text import MOST_CASES
from ldmperf.profiling.trajectory.records import RECORDS_NAME
from ldmperf.profiling.trajectory.runs import create_run

MakeRecord = Callable[..., Record]
Run = Callable[..., Any]


def many(make_record: MakeRecord, count: int) -> list[Record]:
    """So many cases of four sizes and two backends."""
    chosen = itertools.islice(
        itertools.product(range(1, 1000), ("torch", "diffusers"), ("39M", "83M", "145M", "866M")), count
    )
    return [make_record(Case(unet=unet, steps=steps, backend=backend)) for steps, backend, unet in chosen]


def written(folder: Path, name: str, records: Sequence[Any]) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(record.model_dump_json() + "\n" for record in records))
    return path


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> list[tuple[PageInput, Path]]:
    """What is written as a page, and where, without the time that drawing takes."""
    found: list[tuple[PageInput, Path]] = []

    def write_page(page: PageInput, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("a page")
        found.append((page, path))

    def write_report(page: PageInput, folder: Path) -> list[Path]:
        folder.mkdir(parents=True, exist_ok=True)
        write_page(page, folder / "report.html")
        return [folder / "report.html"]

    monkeypatch.setattr(report, "write_page", write_page)
    monkeypatch.setattr(report, "write_report", write_report)
    return found


def test_of_few_cases_every_one_is_printed_and_of_many_a_screen(
    run: Run, make_record: MakeRecord, tmp_path: Path
) -> None:
    few = written(tmp_path, "few.jsonl", many(make_record, MOST_CASES))
    told = run("report", few)
    assert (told.code, told.err) == (0, "")
    assert "Every case:" not in told.out
    assert "headline" not in told.out
    records = many(make_record, 300)
    for place, status in ((7, "oom"), (50, "oom"), (99, "incorrect")):
        records[place] = make_record(records[place].case, status=status, message=f"why {place}")
    path = written(tmp_path, "many.jsonl", records)
    told = run("report", path)
    assert told.code == 0
    lines = told.out.splitlines()
    assert len(lines) < 60
    assert lines[0].startswith("39M costs 0.0")
    assert "; its FLOPs say 0.070." in lines[0]
    assert "300 cases: 1 failed (1 incorrect), 297 ok, 2 out of memory." in lines
    for place in (7, 50, 99):
        assert sum(f"why {place}" in line for line in lines) == 1
    (fastest, *_) = (line for line in lines if line.startswith("fastest: "))
    assert "39M torch, 1 step" in fastest
    (slowest, *_) = (line for line in lines if line.startswith("slowest: "))
    assert "866M diffusers, 37 steps" in slowest
    assert f"ldmperf report {path} --all" in told.out
    assert f"ldmperf report {path} -o page.html" in told.out
    assert f"ldmperf export {path} --format csv" in told.out
    # The counts are those of the records.
    (cells,) = (line.split() for line in lines if line.startswith("  866M "))
    of_size = [record for record in records if record.case.unet == "866M"]
    failed = [record.status for record in of_size if record.status != "ok"]
    assert len(failed) == 2
    counted = [len([r for r in of_size if r.case.backend == name]) for name in ("diffusers", "torch")]
    assert cells[1] == str(counted[0])
    everything = run("report", path, "--all")
    assert len(everything.out.splitlines()) > 300
    assert "Every case:" not in everything.out


def test_many_failures_and_hostile_names_stay_a_screen(run: Run, make_record: MakeRecord, tmp_path: Path) -> None:
    name = "evil[red]\x1b[31m\u202e" + "x" * 30
    records = [
        make_record(
            Case(unet=f"{name}{n}", weights_sha256="ab" * 32, steps=3), status="error", message="\x1b[2J no"
        )
        for n in range(80)
    ]
    told = run("report", written(tmp_path, "mine.jsonl", records))
    assert told.code == 0
    assert "\x1b" not in told.out
    assert "\u202e" not in told.out
    assert "and 75 more without a time" in told.out
    assert "[red]" in told.out


def test_a_page_takes_run_folders_folders_of_such_and_files_of_every_kind(
    run: Run,
    make_record: MakeRecord,
    make_kernel: Callable[..., Any],
    tmp_path: Path,
    pages: list[tuple[PageInput, Path]],
) -> None:
    here = make_record().environment
    there = here.model_copy(update={"git_commit": "a" * 40})
    run_folder = create_run(tmp_path / "runs", [Case(unet="39M", steps=3)], RepetitionRule(3, 0.0), here)
    written(run_folder, RECORDS_NAME, [make_record()])
    written(tmp_path / "several" / "one", RECORDS_NAME, [make_record(Case(unet="83M", steps=3))])
    written(tmp_path / "several" / "two", RECORDS_NAME, [make_record(Case(unet="145M", steps=3))])
    file = written(tmp_path, "a.jsonl", [make_record(Case(unet="39M", steps=3), environment=there), make_kernel()])
    page = tmp_path / "deep" / "page.html"
    before = sorted(tmp_path.rglob("*"))
    told = run("report", run_folder, tmp_path / "several", file, file, "-o", page)
    assert (told.code, told.err) == (0, "")
    ((content, path),) = pages
    assert path == page
    # Nothing is written but the page.
    assert sorted(tmp_path.rglob("*")) == sorted([*before, page, page.parent])
    assert len(content.overview.rows) == 4
    assert len(content.overview.environments) == 2
    assert content.headline is not None
    assert content.headline.sentence.startswith("39M costs ")
    assert len(content.sections) == 1
    assert content.sources.commits == ("7d35813", "aaaaaaa") or content.sources.commits == ("aaaaaaa", "7d35813")
    assert len(content.sources.links) == 4
    assert content.history is not None
    assert [series.name for series in content.history.series] == ["39M torch"]
    (side,) = content.side_by_side
    assert side.lists == (("in A only", ("83M torch", "145M torch")),) or "in B only" in dict(side.lists)
    together = "4 records of trajectories and 1 record of kernels from 4 files, 2 commits"
    assert f"Put together: {together}" in told.out
    assert together in content.sources.together
    assert "Nothing is compared across environments" in told.out
    assert told.out.count(str(page)) == 1


def test_where_what_is_written(
    run: Run, make_record: MakeRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    pages: list[tuple[PageInput, Path]],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    folder = create_run(
        Path("runs"), [Case(unet="39M", steps=3)], RepetitionRule(3, 0.0), make_record().environment
    )
    written(folder, RECORDS_NAME, [make_record()])

    def at(*arguments: str | Path) -> Path | None:
        pages.clear()
        assert run("report", *arguments).code == 0
        return pages[0][1] if pages else None

    assert at() == folder / "report.html"
    assert at(folder) == folder / "report.html"
    assert at("-o", "latest.html") == Path("latest.html")
    # As ever: without paths a folder is where run folders are.
    assert at("--out", "runs") == folder / "report.html"
    assert at(folder, "--out", "there") == Path("there/report.html")
    assert at(folder, "-o", "there/PAGE.HTM") == Path("there/PAGE.HTM")
    assert at(folder / RECORDS_NAME) is None
    assert at(folder, folder / RECORDS_NAME) is None
    assert at("runs") is None
    # A folder stays a folder, whatever its name ends in.
    Path("odd.html").mkdir()
    assert at(folder, "-o", "odd.html") == Path("odd.html/report.html")


def test_the_records_can_be_had_at_an_address(
    run: Run, make_record: MakeRecord, tmp_path: Path, pages: list[tuple[PageInput, Path]]
) -> None:
    path = written(tmp_path, "mine.jsonl", [make_record()])
    url = "https://example.org/mine.jsonl"
    assert run("report", path, "-o", tmp_path / "p.html", "--records-url", url).code == 0
    assert [link.href for link in pages[0][0].sources.links] == [url]
    for wrong in (["-o", tmp_path / "p.html", "--records-url", "javascript:alert(1)"], ["--records-url", url]):
        told = run("report", path, *wrong)
        assert (told.code, told.err.count("\n")) == (2, 1)
        assert "--records-url" in told.err


def test_changes_over_commits_are_told_on_the_terminal(run: Run, make_record: MakeRecord, tmp_path: Path) -> None:
    here = make_record().environment
    records = [
        make_record(
            environment=here.model_copy(update={"git_commit": 40 * str(number)}),
            wall_ms=Samples.of([factor * ms for ms in (100.0, 100.1, 99.9, 100.2, 99.8, 100.3, 99.7)]),
            started_at=datetime(2026, 11, number, tzinfo=UTC),
        )
        for number, factor in ((1, 1.0), (2, 1.3))
    ]
    told = run("report", written(tmp_path, "mine.jsonl", records))
    assert "Over commits, 1 case, each step against the one before: 1 SLOWER." in told.out
    assert "SLOWER 1.30x the time at 2222222: 39M torch" in told.out
    assert "A 1111111 beside B 2222222, AMD EPYC: 1 SLOWER." in told.out
