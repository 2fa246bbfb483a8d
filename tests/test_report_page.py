"""The page and the charts' files: whole, offline, escaped, honest about what is missing, replaced in one go."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldmperf.profiling import Case, Record
from ldmperf.profiling.claims import judge
from ldmperf.profiling.figures import overview
from ldmperf.profiling.figures.derived import Spread
from ldmperf.profiling.figures.headline import headline
from ldmperf.profiling.measure.environment import DeviceState, Gpu
from ldmperf.profiling.measure.recorded import Correctness, Samples
from ldmperf.profiling.paper import paper_sizes
from ldmperf.profiling.report import write_page, write_report
from ldmperf.profiling.report.charts import Chart, all_charts
from ldmperf.profiling.report.drawings import Pane, panels_of, shown_first
from ldmperf.profiling.report.fact_tables import coded, natural
from ldmperf.profiling.report.facts import Facts
from ldmperf.profiling.report.page_input import GridSection, PageInput
from ldmperf.profiling.report.palette import COLOURS, NEUTRAL, PEER_COLOUR, Palette
from ldmperf.profiling.report.sources import RecordsLink, Sources
from ldmperf.profiling.terminal.layout import Grid
from ldmperf.profiling.terminal.visible import visible

MakeRecord = Callable[..., Record]
VOID = {"meta", "link", "br", "img", "hr", "input"}
DRAWN = ["fid", "fid-flops", "cost", "steps", "images"]
FILES = [f"{name}.{kind}" for name in DRAWN for kind in ("png", "svg")]


class Page(HTMLParser):
    """Checks that tags nest, and collects what a test asks about."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.island: dict[str, Any] = {}
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            if self.tags[-1][1].get("id") == "facts":
                self.island = json.loads(data)
        elif not self.open or self.open[-1] != "style":
            self.text += data

    def attributes(self, name: str) -> list[str]:
        return [value for _, attributes in self.tags if (value := attributes.get(name)) is not None]


def page_of(records: list[Record], **changes: Any) -> PageInput:
    shown = overview(records)
    return PageInput(shown, headline=headline(shown), **changes)


def written(records: list[Record], folder: Path, **changes: Any) -> Page:
    write_page(page_of(records, **changes), folder / "page.html")
    return Page((folder / "page.html").read_text(encoding="utf-8"))


def cpu_set(make_record: MakeRecord) -> list[Record]:
    return [
        make_record(Case(unet=unet, steps=steps, backend=backend))
        for unet in ("39M", "83M", "145M")
        for steps in (2, 4, 8)
        for backend in ("torch", "diffusers")
    ]


def test_a_folder_has_the_page_and_the_charts_and_a_file_the_page_alone(
    make_record: MakeRecord, tmp_path: Path
) -> None:
    page = page_of(cpu_set(make_record))
    paths = write_report(page, tmp_path / "new")
    assert [path.name for path in paths] == ["report.html", *FILES]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(["report.html", *FILES])
    for path in paths[1:]:
        content = path.read_bytes()
        assert len(content) > 1000
        assert content.startswith(b"\x89PNG\r\n\x1a\n") == (path.suffix == ".png")
        assert content.startswith(b"<svg") == (path.suffix == ".svg")
    write_page(page, tmp_path / "deep" / "one.html")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["one.html"]
    assert (tmp_path / "deep" / "one.html").read_bytes() == paths[0].read_bytes()


def test_the_page_is_whole_offline_and_accessible(make_record: MakeRecord, tmp_path: Path) -> None:
    link = RecordsLink("records.jsonl", "records.jsonl")
    page = written(cpu_set(make_record), tmp_path, sources=Sources(links=(link,)))
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"link", "iframe", "object", "base", "image", "img"}
    assert page.attributes("src") == []
    assert [href for href in page.attributes("href") if not href.startswith("#")] == ["records.jsonl"]
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    assert {href[1:] for href in page.attributes("href") if href.startswith("#")} <= {*ids}
    assert all("scope" in attributes for tag, attributes in page.tags if tag == "th")
    assert sum(tag == "caption" for tag, _ in page.tags) == sum(tag == "table" for tag, _ in page.tags)
    headings = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(headings))
    assert page.tags[0] == ("html", {"lang": "en"})


def test_only_the_pages_own_scripts_may_run_and_nothing_may_be_fetched(
    make_record: MakeRecord, tmp_path: Path
) -> None:
    import base64
    import hashlib

    page = written(cpu_set(make_record), tmp_path)
    (policy,) = (a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert "connect-src" not in rules
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    scripts = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert rules["script-src"].split() == [f"'sha256-{digest}'" for digest in digests]
    assert "unsafe" not in rules["script-src"]


def test_the_page_begins_with_the_headline_commit_command_records_and_verdicts(
    make_record: MakeRecord, tmp_path: Path
) -> None:
    records = cpu_set(make_record)
    sources = Sources(
        commits=("7d35813",),
        command="ldmperf profile --size 39M",
        is_command=True,
        links=(RecordsLink("<records>", "https://example.org/r.jsonl?a=1&b=2"),),
    )
    judged = judge(records)
    text = written(records, tmp_path, sources=sources, judged=judged).text
    parts = (
        "39M costs 0.33 of 145M; its FLOPs say 0.35.", "commit7d35813", "ldmperf profile --size 39M", "<records>",
        "cost of sampling = normalized cost x steps", "The paper's FID against measured time",
        "The paper's FID against FLOPs", "Measured cost against the paper's cost", "Every case", "AMD EPYC",
    )  # fmt: skip
    at = text.index("What a sample costs, measured · ldmperf")
    for part in parts:
        at = text.index(part, at)
    assert text.count("in all 6 sets of conditions") >= 1
    assert "random, untrained weights" in text


def test_the_table_shows_the_records_numbers(make_record: MakeRecord, tmp_path: Path) -> None:
    check = Correctness(error_before=3e-6, error_after=7.4e-6, tolerance=2e-4, reference="diffusers float32")
    records = [
        make_record(Case(unet="39M", steps=n), wall_ms=Samples.of([40.0 + 10.0 * n]), correctness=check)
        for n in (2, 4, 8)
    ]
    text = written(records, tmp_path).text
    for shown in ("7.4e-06", "2.0e-04", "diffusers float32", "7d35813", "AMD EPYC", "guidance doubles the batch"):
        assert shown in text, shown
    (line,) = re.findall(r"39M, torch2, 4, 8(\S+)", text)
    assert line == "10.00" + "40.00" + "4.00" + "1.00000"


def test_rows_beyond_the_first_are_all_in_the_data(make_record: MakeRecord, tmp_path: Path) -> None:
    records = [make_record(Case(unet="39M", steps=n)) for n in range(1, 101)]
    page = written(records, tmp_path)
    rest = page.island["tables"]["cases"]
    steps = rest["columns"][1]
    assert [steps["texts"][place] for place in steps["at"]] == [f"{n} steps" for n in range(41, 101)]
    assert rest["cases"] == [[place] for place in range(100)]
    assert page.text.count("The first 40 of 100 rows") == 1


def test_charts_without_data_say_why_and_earlier_files_go(make_record: MakeRecord, tmp_path: Path) -> None:
    write_report(page_of(cpu_set(make_record)), tmp_path)
    write_report(page_of([make_record()]), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html"], "charts of the earlier report stay"
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "cost (it takes two sizes measured under the same conditions)" in page.text
    assert "steps (it takes a size measured at two step counts or more)" in page.text
    assert page.island["charts"] == []


def test_no_records_and_only_failures(make_record: MakeRecord, tmp_path: Path) -> None:
    assert "No cases were measured." in written([], tmp_path).text
    failed = [make_record(Case(unet=unet), status="oom", message=f"{unet} is too large") for unet in ("2B", "5B")]
    page = written(failed, tmp_path)
    assert page.text.count("oom: 5B is too large") == 1
    assert "2 cases, 0 with a time and 2 without" in page.text


def test_kernels_alone_make_a_page(tmp_path: Path) -> None:
    grid = Grid(("kernel", "us"), (("group_norm<T>", "12.5"),), ("kernel",))
    page = PageInput(overview([]), sections=(GridSection("Kernels & launches", grid, "Medians."),))
    write_page(page, tmp_path / "page.html")
    text = Page((tmp_path / "page.html").read_text(encoding="utf-8")).text
    assert "Kernels & launches" in text
    assert "group_norm<T>12.5" in text
    assert "No cases were measured." not in text
    assert "The kernels, one by one." in text


HOSTILE = st.text(st.sampled_from("<>&\"'/ \\!-]scriptimg=\x1b\u202e\u2028{}%`"), min_size=1, max_size=40)


@settings(deadline=None, max_examples=4)
@given(texts=st.lists(HOSTILE, min_size=30, max_size=30, unique=True))
def test_whatever_a_record_says_stays_text(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    from .conftest import plausible_record

    folder = tmp_path_factory.mktemp("hostile")
    texts = ["</script><script>alert(1)</script>", "<!--<script>", *texts]
    names = ["39M", *(f"/{text}" for text in texts)]
    cases = [Case(unet=name, backend=backend) for name, backend in zip(names, ["torch", *texts], strict=False)]
    failed = [(Case(unet="83M", steps=place + 1), text) for place, text in enumerate(texts)]
    records = [plausible_record(case) for case in cases]
    records += [plausible_record(case, status="error", message=text) for case, text in failed]
    links = tuple(RecordsLink(text, "records.jsonl") for text in texts)
    page = written(records, folder, sources=Sources(commits=tuple(texts), command=texts[0], links=links))
    tags = Counter(tag for tag, _ in page.tags)
    assert tags["script"] == 3
    assert not {"img", "m", "s", "i", "rip", "iframe"} & {*tags}
    assert not {"\x1b", "\u202e", "\u2028"} & set(page.text)
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    # All of it is there to read.
    for text in texts:
        assert visible(text).strip() in page.text


def test_names_and_messages_are_escaped_in_page_and_charts(make_record: MakeRecord, tmp_path: Path) -> None:
    evil = "/models/<script>alert('&1\")\x1b\u202e"
    records = [make_record(Case(unet=unet, steps=n)) for unet in ("39M", evil) for n in (2, 4)]
    records.append(make_record(Case(unet=evil, steps=8), status="error", message="<img src=x onerror=alert(1)>"))
    write_report(page_of(records), tmp_path)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "img" not in {tag for tag, _ in page.tags}
    assert "<script>alert('&1\")\\x1b\\u202e" in page.text
    assert not {"\x1b", "\u202e"} & set(page.text)
    assert "error: <img src=x onerror=alert(1)>" in page.text
    assert "<script" not in (tmp_path / "cost.svg").read_text()


def test_set_aside_lines_mixed_environments_and_uncommitted_changes_are_told(
    make_record: MakeRecord, tmp_path: Path
) -> None:
    dirty = make_record().environment.model_copy(update={"git_dirty": True, "cpu": "Other"})
    mixed = [make_record(), make_record(Case(unet="83M"), environment=dirty)]
    text = written(mixed, tmp_path, rejected_lines=3).text
    assert "3 lines of the record files are no whole record" in text
    assert "Environment B is not environment A (cpu: AMD EPYC, Other; git dirty: no, yes)" in text
    assert "7d35813 with uncommitted changes" in text
    assert "No chart, ratio or line mixes machines, commits or conditions" in text
    assert "set aside" not in written([make_record()], tmp_path).text


def test_a_gpus_state_both_clocks_and_memory_are_shown(make_record: MakeRecord, tmp_path: Path) -> None:
    gpu = Gpu(name="NVIDIA H200", count=1, driver="580.65", power_limit_w=700.0, memory_bytes=150 * 2**30)
    record = make_record(
        Case(unet="39M", device="cuda", dtype="bfloat16"),
        environment=make_record().environment.model_copy(update={"gpu": gpu}),
        wall_ms=Samples.of([100.0]),
        gpu_ms=Samples.of([80.0]),
        peak_memory_bytes=3 * 2**29,
        device_before=DeviceState(sm_clock_mhz=1980, throttle_reasons=("GpuIdle",)),
        device_after=DeviceState(sm_clock_mhz=1755, throttle_reasons=("SwPowerCap",)),
    )
    text = written([record], tmp_path).text
    for shown in (
        "NVIDIA H200", "580.65", "700 W", "150.0 GiB", "80.00", "20.0%", "1.500", "1980, 1755", "1755 to 1980",
        "GpuIdle, SwPowerCap",
    ):  # fmt: skip
        assert shown in text, shown
    cpu = written([make_record()], tmp_path).text
    assert "SM MHz" not in cpu
    assert "wall beyond GPU" not in cpu


def test_the_whole_family_with_batches_tasks_and_samplers(make_record: MakeRecord, tmp_path: Path) -> None:
    cases = [
        Case(unet=unet, steps=2, batch=batch, sampler=sampler, task=task, backend=backend)
        for unet in paper_sizes()
        for batch in (1, 8)
        for sampler in ("ddim", "heun")
        for task in ("t2i", "sr")
        for backend in ("torch", "diffusers")
    ]
    page = written([make_record(case) for case in cases], tmp_path)
    assert len(page.island["tables"]["cases"]["cases"]) == len(cases)
    filters = {of["name"]: of["values"] for of in page.island["filters"]}
    assert filters == {
        "task": ["super-resolution", "text-to-image"],
        "batch": ["batch 1", "batch 8"],
        "sampler": ["ddim", "heun"],
        "backend": ["diffusers", "torch"],
    }
    assert not re.search(r"\b(nan|inf|None|undefined|NaN)\b", page.text)
    assert "NaN" not in json.dumps(page.island["facts"])


def chart_of(name: str, records: list[Record]) -> tuple[Chart, tuple[Pane, ...], Facts]:
    facts = Facts.of(overview(records))
    palette = Palette.of(record.case.backend for record in records)
    (chart,) = (chart for chart in all_charts(palette) if chart.name == name)
    return chart, panels_of(chart, facts.table(chart.table)), facts


def points_of(name: str, records: list[Record]) -> list[dict[str, Any]]:
    return [fact for panel in chart_of(name, records)[1] for fact in panel.facts]


def test_charts_hold_every_case_once(make_record: MakeRecord) -> None:
    records = cpu_set(make_record)
    steps = points_of("steps", records)
    walls = [record.wall_ms for record in records if record.wall_ms]
    assert sorted(point["wall_p50"] for point in steps) == sorted(wall.p50 for wall in walls)
    assert sorted(point["wall_p80"] for point in steps) == sorted(wall.p80 for wall in walls)
    cost = points_of("cost", records)
    assert len(cost) == len(records)
    small = [point for point in cost if point["size"] == "39M"]
    assert {point["paper"] for point in small} == {0.07 / 0.20}
    # plausible_record: 4 ms (torch) or 5 ms per GFLOP, two samples for guidance, 40 ms fixed.
    per_gflop = {"torch": 4.0, "diffusers": 5.0}
    expected = [
        (53.0 * 2 * n * ms + 40) / (159.9 * 2 * n * ms + 40) for n in (2, 4, 8) for ms in per_gflop.values()
    ]
    assert sorted(point["cost_p50"] for point in small) == pytest.approx(sorted(expected))


def test_the_time_at_50_steps_is_measured_or_that_of_the_line_and_says_which(make_record: MakeRecord) -> None:
    def image_ms(unet: str, steps: int) -> float:
        return {"39M": 100.0, "83M": 200.0}[unet] * steps + 30.0

    def of(unet: str, *steps: int) -> list[Record]:
        cases = [Case(unet=unet, steps=n, batch=2) for n in steps]
        return [make_record(case, wall_ms=Samples.of([2 * image_ms(unet, case.steps)])) for case in cases]

    points = points_of("fid", [*of("39M", 4, 8, 16), *of("83M", 4, 50)])
    found = {point["size"]: (point["fid"], point["ms"], point["predicted"], point["basis"]) for point in points}
    assert found["39M"] == (25.30, pytest.approx(image_ms("39M", 50)), 1.0, "predicted from 4, 8, 16 steps")
    assert found["83M"] == (24.30, image_ms("83M", 50), 0.0, "measured at 50 steps")
    # The paper's cost of it: its normalized cost, 50 times.
    assert [point["paper_image"] for point in points] == pytest.approx([3.5, 6.5])
    # Two step counts say nothing of the fiftieth, another guidance or sampler has no FID in the paper.
    assert points_of("fid", [*of("39M", 4, 8), *of("83M", 4, 8)]) == []
    other = [make_record(Case(unet=u, steps=50, guidance_scale=5.0)) for u in ("39M", "83M")]
    assert points_of("fid", other) == []


def test_the_floor_is_relative_to_the_reference_of_the_same_backend(make_record: MakeRecord) -> None:
    from ldmperf.profiling.trajectory.record_parts import Floor

    def floor(ms: float) -> Floor:
        rates = {"bytes_per_s": 1.0, "flop_per_s": 1.0, "exponentials_per_s": 1.0}
        return Floor(step_ms=ms, least_step_ms=0.0, nbytes=1, flops=1, exponentials=0, **rates)

    records = [make_record(Case(unet=unet), floor=floor(ms)) for unet, ms in (("39M", 3.0), ("145M", 12.0))]
    assert {point["size"]: point["floor_cost"] for point in points_of("cost", records)} == {
        "39M": 0.25,
        "145M": 1.0,
    }
    assert {point["floor_cost"] for point in points_of("cost", [records[0], make_record(Case(unet="145M"))])} == {
        None
    }


def test_backends_relative_to_different_sizes_have_panels_of_their_own(make_record: MakeRecord) -> None:
    cases = [
        Case(unet=unet, steps=2, backend=b) for unet in ("39M", "83M", "145M") for b in ("torch", "diffusers")
    ]
    records = [make_record(case) for case in cases[:-1]] + [make_record(cases[-1], status="oom")]
    _, panels, _ = chart_of("cost", records)
    found = {panel.key["reference"]: {fact["backend"] for fact in panel.facts} for panel in panels}
    assert found == {"145M = 1": {"torch"}, "83M = 1": {"diffusers"}}


CHARTS = all_charts(Palette.of(("torch", "diffusers", "graph")))
CONDITIONS = st.fixed_dictionaries(
    {
        "unet": st.sampled_from(("39M", "83M", "145M")),
        "backend": st.sampled_from(("torch", "diffusers", "graph")),
        "sampler": st.sampled_from(("ddim", "heun")),
        "steps": st.sampled_from((2, 10)),
        "batch": st.sampled_from((1, 2)),
    }
)


@settings(deadline=None, max_examples=40)
@given(made=st.lists(st.tuples(CONDITIONS, st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=30))
def test_no_panel_mixes_machines_commits_or_conditions(made: list[tuple[dict[str, Any], int, int]]) -> None:
    from .conftest import plausible_record

    base = plausible_record()
    records = [
        plausible_record(
            Case(**conditions),
            environment=base.environment.model_copy(update={"cpu": f"cpu {cpu}", "git_commit": "ab"[at] * 40}),
            evaluations=conditions["steps"],
        )
        for conditions, cpu, at in made
    ]
    shown = overview(records)
    facts = Facts.of(shown)
    for chart in CHARTS:
        if chart.table != "cases":
            continue
        panels = panels_of(chart, facts.cases)
        free = {"unet", "weights_sha256", "backend", *chart.without} - ({"unet"} if chart.is_small else set())
        for panel in panels:
            rows = [shown.rows[place] for place in panel.places]
            assert len({row.environment for row in rows}) == 1
            assert len({tuple(row.case.model_dump(exclude=free).items()) for row in rows}) == 1
            assert len({row.reference for row in rows}) == 1 or "reference" not in chart.beside
        first = shown_first(chart, panels, facts.first)
        assert {*map(id, first)} <= {*map(id, panels)}
        assert bool(first) == bool(panels)
        assert len(first) <= (12 if chart.is_small else chart.most)
        if chart.is_small:
            assert len({tuple(value for name, value in of.key.items() if name != "size") for of in first}) <= 1


def test_a_condition_that_varies_is_chosen_as_the_headline_has_it(make_record: MakeRecord) -> None:
    records = [make_record(Case(unet=u, steps=n)) for u in ("39M", "83M") for n in (2, 4, 8)]
    shown = overview(records)
    first = next(row for row in shown.rows if row.case.steps == 4)
    facts = Facts.of(shown, first=first)
    (cost,) = (chart for chart in CHARTS if chart.name == "cost")
    panels = panels_of(cost, facts.cases)
    assert [panel.key["steps"] for panel in panels] == ["2 steps", "4 steps", "8 steps"]
    assert [panel.key["steps"] for panel in shown_first(cost, panels, facts.first)] == ["4 steps"]
    # Without a headline that of the fullest panel, and among as full ones the first.
    assert [panel.key["steps"] for panel in shown_first(cost, panels, {})] == ["2 steps"]


def test_filters_have_commits_by_time_and_backends_by_rung(make_record: MakeRecord) -> None:
    environment = make_record().environment
    commits = ("9f1", "10a", "0bb")
    made = [
        make_record(
            Case(unet="39M", backend=backend),
            environment=environment.model_copy(update={"git_commit": commit * 13}),
            started_at=datetime(2026, 11, 23 + day, tzinfo=UTC),
        )
        for day, commit in enumerate(commits)
        for backend in ("graph", "torch", "diffusers", "triton")
    ]
    filters = Facts.of(overview(made)).filters
    assert filters["commit"] == tuple((commit * 13)[:7] for commit in commits)
    assert filters["backend"] == ("diffusers", "torch", "triton", "graph")


def test_a_case_of_several_commits_is_counted_once(make_record: MakeRecord, tmp_path: Path) -> None:
    environment = make_record().environment
    made = [
        make_record(environment=environment.model_copy(update={"git_commit": commit * 40}))
        for commit in ("a", "b")
    ]
    assert "1 case, measured 2 times in 2 environments, 2 with a time" in written(made, tmp_path).text


def test_a_zero_time_or_an_instant_step_breaks_no_chart(make_record: MakeRecord, tmp_path: Path) -> None:
    records = [
        make_record(Case(unet=unet, steps=n), wall_ms=Samples.of([ms, 0.0]))
        for unet, ms in (("39M", 0.0), ("83M", 0.0), ("145M", 1e-3))
        for n in (1, 2)
    ]
    assert not re.search(r"\b(nan|inf|None|NaN)\b", written(records, tmp_path).text)


def test_a_history_has_a_panel_for_each_size_and_the_changes_in_words(make_record: MakeRecord) -> None:
    from ldmperf.profiling.compare.history import CaseHistory, History, HistoryPoint

    record = make_record()
    points = tuple(
        HistoryPoint(commit, datetime(2026, 11, day, tzinfo=UTC), Spread(ms, ms, ms), 4, verdict)
        for commit, day, ms, verdict in (("aaa", 2, 10.0, ""), ("bbb", 1, 5.0, "FASTER"))
    )
    series = CaseHistory("39M torch", record.case_id, "", points)
    facts = Facts.of(overview([record]), History((series,), "", ()))
    rows = facts.history.rows()
    assert [(row["commit"], row["place"], row["step_p50"], row["verdict"]) for row in rows] == [
        ("aaa", 1.0, 10.0, ""),
        ("bbb", 0.0, 5.0, "FASTER"),
    ]


@given(st.lists(st.text(max_size=3)))
def test_coded_texts_are_told_by_their_places(texts: list[str]) -> None:
    found = coded(texts)
    assert [found["texts"][place] for place in found["at"]] == texts
    assert len(found["texts"]) == len({*texts})


def test_texts_are_sorted_by_their_numbers() -> None:
    texts = ["10 steps", "2 steps", "batch 8", "batch 16", "1.5"]
    assert sorted(texts, key=natural) == ["1.5", "2 steps", "10 steps", "batch 8", "batch 16"]


@pytest.mark.parametrize("ground", ["#ffffff", "#14171a"])
def test_series_stand_out_on_white_and_on_dark(ground: str) -> None:
    def luminance(colour: str) -> float:
        channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for colour in (*COLOURS, PEER_COLOUR, NEUTRAL):
        low, high = sorted((luminance(colour), luminance(ground)))
        assert (high + 0.05) / (low + 0.05) >= 3, colour


def test_a_failed_write_leaves_the_earlier_page(
    make_record: MakeRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_report(page_of([make_record()]), tmp_path)
    before = (tmp_path / "report.html").read_bytes()

    def torn(descriptor: int) -> None:
        os.truncate(descriptor, os.fstat(descriptor).st_size // 2)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", torn)
    with pytest.raises(OSError, match="No space left"):
        write_report(page_of([make_record(Case(unet="83M"))]), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_bytes() == before


def test_the_same_records_give_the_same_page(make_record: MakeRecord, tmp_path: Path) -> None:
    page = page_of(cpu_set(make_record))
    first = [path.read_bytes() for path in write_report(page, tmp_path)]
    assert [path.read_bytes() for path in write_report(page, tmp_path)] == first
