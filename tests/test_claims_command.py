"""`ldmperf claims`, and the verdicts at the end of a report and at the top of its page."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from ldmperf.profiling import Case, Record
from ldmperf.profiling.claims.catalogue import all_claims
from ldmperf.profiling.claims.limits import COST_FACTOR
from ldmperf.profiling.measure.recorded import Samples
from ldmperf.profiling.paper import paper_sizes

MakeRecord = Callable[..., Record]


def family(make_record: MakeRecord, fixed_ms: float, batch: int = 1) -> list[Record]:
    """All sizes at 20 steps, whose time is the paper's cost and a fixed part of each step."""
    return [
        make_record(
            Case(unet=name, steps=20, batch=batch),
            wall_ms=Samples.of(
                [20 * (fixed_ms + 50.0 * size.normalized_cost) * (1 + n / 1000) for n in range(-4, 5)]
            ),
        )
        for name, size in paper_sizes().items()
    ]


RESULTS = sorted((Path(__file__).parents[1] / "bench" / "results").glob("*/*.jsonl"))


def test_the_command_reads_several_sets_of_every_version(
    run: Any, tmp_path: Path, make_record: MakeRecord
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    lines = [record.model_dump_json() + "\n" for record in family(make_record, 0.0)]
    (folder / "records.jsonl").write_text("".join(lines))
    versions = {json.loads(path.read_text().splitlines()[0])["schema_version"] for path in RESULTS}
    assert {1, 2} <= versions
    outcome = run("claims", folder, *RESULTS)
    assert outcome.code == 0
    for claim in all_claims():
        assert f"\n{claim.id}: {claim.text}\n" in outcome.out
    assert (
        "published elsewhere: SD1.5 UNet (512 px, batch 1, H100, fp16, torch 2.1): stable-fast 104.6"
        in outcome.out
    )
    assert "Environment B is not environment A" in outcome.out
    assert "holds in 1 of" in outcome.out


def test_json_has_the_numbers(run: Any, tmp_path: Path, make_record: MakeRecord) -> None:
    path = tmp_path / "mine.jsonl"
    records = family(make_record, 20.0)
    path.write_text("".join(record.model_dump_json() + "\n" for record in records))
    outcome = run("claims", path, "--json")
    assert outcome.code == 0
    told = {claim["id"]: claim for claim in json.loads(outcome.out)["claims"]}
    (verdict,) = told["cost-proportional"]["verdicts"]
    assert verdict["finding"] == "does not hold"
    assert verdict["judged"]["value"] == pytest.approx(23.5 / 70 / 0.075)
    assert verdict["judged"]["limit"] == COST_FACTOR
    assert verdict["conditions"]["batch"] == "batch 1"
    assert verdict["figures"]["headings"][0] == "size"
    assert told["energy-proportional"]["published"][0]["source"] == "arXiv 2511.17031"


def test_the_table_is_the_papers_with_the_note_on_the_misprint(run: Any) -> None:
    outcome = run("claims", "--table")
    assert outcome.code == 0
    (row,) = (line for line in outcome.out.splitlines() if line.split()[:1] == ["39M"])
    assert row.split() == ["39M", "38.8M", "53.0", "25.3", "0.07", "25.30", "0.305"]
    assert "The printed 25.3 GFLOPS of 39M contradicts the printed normalized cost 0.07" in outcome.out
    assert "arXiv 2404.01367v2, Table 1" in outcome.out
    sizes = {size["name"]: size for size in json.loads(run("claims", "--table", "--json").out)["sizes"]}
    assert sizes["5B"]["normalized_cost"] == 5.17
    assert run("claims", "--table", "x.jsonl").code == 2


def test_wrong_calls_are_one_line(run: Any, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "foreign.jsonl").write_text('{"a": 1}\n')
    for path in ("empty.jsonl", "foreign.jsonl", "absent.jsonl", "."):
        outcome = run("claims", tmp_path / path)
        assert outcome.code == 2
        assert len(outcome.err.splitlines()) == 1


def test_the_findings_of_each_claim_are_counted_first(run: Any, tmp_path: Path, make_record: MakeRecord) -> None:
    """The times hold at one batch and not at another; claims that nothing judged have no row."""
    records = [*family(make_record, 0.0), *family(make_record, 60.0, batch=4)]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(record.model_dump_json() + "\n" for record in records))
    told = json.loads(run("claims", path, "--json").out)["claims"]
    expected = {
        claim["id"]: [
            sum(verdict["finding"] == finding for verdict in claim["verdicts"])
            for finding in ("holds", "does not hold", "undecided", "not measured")
        ]
        for claim in told
        if claim["findings"] != ["not measured"]
    }
    assert expected["cost-proportional"] == [1, 1, 0, 0]
    heads, *lines = run("claims", path).out.partition("\n\n")[2].splitlines()
    rows = [line.split() for line in lines[: lines.index("")]]
    assert heads.split() == [
        "sets",
        "of",
        "conditions",
        "holds",
        "does",
        "not",
        "hold",
        "undecided",
        "not",
        "measured",
    ]
    assert {name: list(map(int, counts)) for name, *counts in rows} == expected


def test_nothing_is_counted_where_nothing_is_judged(run: Any, tmp_path: Path, make_record: MakeRecord) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(make_record(status="error").model_dump_json() + "\n")
    told = json.loads(run("claims", path, "--json").out)["claims"]
    assert {finding for claim in told for finding in claim["findings"]} == {"not measured"}
    # Columns without a cell have no heading.
    assert not [line for line in run("claims", path).out.splitlines() if line.split()[:1] == ["sets"]]


def test_a_line_that_is_no_record_is_named(run: Any, tmp_path: Path, make_record: MakeRecord) -> None:
    path = tmp_path / "torn.jsonl"
    path.write_text(make_record().model_dump_json() + '\n{"torn\n')
    outcome = run("claims", path)
    assert outcome.code == 1
    assert f"{path}:2:" in outcome.err


def test_a_report_ends_with_the_verdicts_and_its_page_opens_with_them(
    run: Any, tmp_path: Path, make_record: MakeRecord
) -> None:
    path = tmp_path / "mine.jsonl"
    records = family(make_record, 0.0)
    path.write_text("".join(record.model_dump_json() + "\n" for record in records))
    outcome = run("report", path, "--out", tmp_path / "page")
    assert outcome.code == 0
    title, first, *_, last = outcome.out[outcome.out.index("What these records say") :].splitlines()
    assert first.startswith("cost-proportional: holds: a step of the ")
    assert last.startswith(f"Figures and conditions: ldmperf claims {path}; timing alone does not judge ")
    page = (tmp_path / "page" / "report.html").read_text()
    main = page[page.index("<main>") :]
    assert main.index("<h2") == main.index('<h2 id="verdicts">')
    assert "<strong>cost of sampling = normalized cost x steps</strong><p>A step of the " in main
    assert "Timing alone does not judge small-wins-at-budget, large-wins-relaxed" in main
    assert title == "What these records say of the paper's claims"


def test_records_without_figures_say_nothing_of_the_claims(
    run: Any, tmp_path: Path, make_record: MakeRecord
) -> None:
    path = tmp_path / "failed.jsonl"
    path.write_text(make_record(status="oom").model_dump_json() + "\n")
    assert "claims" not in run("report", path).out


def test_environments_have_the_same_letters_in_a_report_and_its_verdicts(
    run: Any, tmp_path: Path, make_record: MakeRecord
) -> None:
    """Two environments in one file, the later one first: letters go by time, not by lines."""
    later = family(make_record, 0.0)
    environment = later[0].environment.model_copy(update={"torch": "2.12.0"})
    earlier = [
        record.model_copy(update={"environment": environment, "started_at": record.started_at - timedelta(days=1)})
        for record in family(make_record, 20.0)
    ]
    path = tmp_path / "merged.jsonl"
    path.write_text("".join(record.model_dump_json() + "\n" for record in [*later, *earlier]))
    told = run("report", path).out
    assert "Environment B is not environment A (torch: 2.12.0, 2.13.0+cpu)" in told
    assert "holds in 1 of 2 sets of conditions (environment B)" in " ".join(told.split())
