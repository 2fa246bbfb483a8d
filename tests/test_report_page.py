"""The page and the charts: whole, offline, escaped, honest about what is missing, replaced in one go."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ldmperf.profiling import Case, Record
from ldmperf.profiling.figures import overview
from ldmperf.profiling.measure.environment import DeviceState, Gpu
from ldmperf.profiling.measure.recorded import Correctness, Samples
from ldmperf.profiling.paper import paper_sizes
from ldmperf.profiling.report import write_report
from ldmperf.profiling.report.charts import drawings

MakeRecord = Callable[..., Record]
VOID = {"meta", "link", "br", "img", "hr", "input"}
CHARTS = ["cost.png", "cost.svg", "steps.png", "steps.svg"]


class Page(HTMLParser):
    """Checks that tags nest, and collects what a test asks about."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
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
        if not self.open or self.open[-1] != "style":
            self.text += data

    def attributes(self, name: str) -> list[str]:
        return [value for _, attributes in self.tags if (value := attributes.get(name)) is not None]


def written(records: list[Record], folder: Path, rejected: int = 0) -> Page:
    write_report(overview(records), rejected, folder)
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def cpu_set(make_record: MakeRecord) -> list[Record]:
    return [
        make_record(Case(unet=unet, steps=steps, backend=backend))
        for unet in ("39M", "83M", "145M")
        for steps in (2, 4, 8)
        for backend in ("torch", "diffusers")
    ]


def test_the_page_and_the_charts_are_written(make_record: MakeRecord, tmp_path: Path) -> None:
    paths = write_report(overview(cpu_set(make_record)), 0, tmp_path / "new")
    assert [path.name for path in paths] == ["report.html", *CHARTS]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(["report.html", *CHARTS])
    for path in paths:
        content = path.read_bytes()
        assert len(content) > 1000
        assert content.startswith(b"\x89PNG\r\n\x1a\n") == (path.suffix == ".png")
        assert content.startswith(b"<svg") == (path.suffix == ".svg")


def test_the_page_is_whole_offline_and_accessible(make_record: MakeRecord, tmp_path: Path) -> None:
    page = written(cpu_set(make_record), tmp_path)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    # The namespaces of inline SVG are names; nothing else may look like an address.
    assert set(re.findall(r"https?://[^\"'\s<)]*", html)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object", "base", "image"}
    assert "@import" not in html
    assert page.attributes("src") == []
    assert page.attributes("href") == CHARTS
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    assert all("scope" in attributes for tag, attributes in page.tags if tag == "th")
    assert sum(attributes.get("role") == "img" and "aria-label" in attributes for _, attributes in page.tags) >= 2
    assert sum(tag == "caption" for tag, _ in page.tags) == sum(tag == "table" for tag, _ in page.tags) == 3
    assert page.tags[0] == ("html", {"lang": "en"})


def test_the_page_shows_the_records_numbers(make_record: MakeRecord, tmp_path: Path) -> None:
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
    assert "random, untrained weights" in text


def test_charts_without_data_say_why(make_record: MakeRecord, tmp_path: Path) -> None:
    written(cpu_set(make_record), tmp_path)
    page = written([make_record()], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html"], "charts of the earlier report stay"
    assert "Not drawn: it takes two sizes measured under the same conditions." in page.text
    assert "Not drawn: it takes a size measured at two step counts or more." in page.text
    assert page.attributes("href") == []


def test_no_records_and_only_failures(make_record: MakeRecord, tmp_path: Path) -> None:
    assert "No cases were measured." in written([], tmp_path).text
    failed = [make_record(Case(unet=unet), status="oom", message=f"{unet} is too large") for unet in ("2B", "5B")]
    page = written(failed, tmp_path)
    # In its row, and in the list of failures.
    assert page.text.count("oom: 5B is too large") == 2
    assert "2 cases, 0 with a time and 2 without" in page.text


def test_names_and_messages_are_escaped_in_page_and_charts(make_record: MakeRecord, tmp_path: Path) -> None:
    evil = "/models/<script>alert('&1\")\x1b\u202e"
    records = [make_record(Case(unet=unet, steps=n)) for unet in ("39M", evil) for n in (2, 4)]
    records.append(make_record(Case(unet=evil, steps=8), status="error", message="<img src=x onerror=alert(1)>"))
    page = written(records, tmp_path)
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert "<script>alert('&1\")\\x1b\\u202e" in page.text
    assert not {"\x1b", "\u202e"} & set(page.text)
    assert "error: <img src=x onerror=alert(1)>" in page.text
    assert "<script" not in (tmp_path / "cost.svg").read_text()


def test_set_aside_lines_mixed_environments_and_uncommitted_changes_are_told(
    make_record: MakeRecord, tmp_path: Path
) -> None:
    dirty = make_record().environment.model_copy(update={"git_dirty": True, "cpu": "Other"})
    page = written([make_record(), make_record(Case(unet="83M"), environment=dirty)], tmp_path, rejected=3)
    assert "3 lines of the record file are no whole record" in page.text
    assert "Environment B is not environment A (cpu: AMD EPYC, Other; git dirty: no, yes)" in page.text
    assert "7d35813 with uncommitted changes" in page.text
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
    rows = sum(attributes.get("scope") == "row" for _, attributes in page.tags)
    assert rows == 2 * len(cases)
    assert not re.search(r"\b(nan|inf|None|undefined|NaN)\b", page.text)
    assert "super-resolution, heun, batch 8" in page.text


def points_of(name: str, records: list[Record]) -> list[dict[str, float | str]]:
    """What the marks of a chart stand for."""
    (drawing,) = (drawing for drawing in drawings(overview(records)) if drawing.name == name)
    assert drawing.chart is not None
    spec = drawing.chart.to_dict()
    layers = [layer for panel in spec["concat"] for layer in panel["layer"] if layer["mark"]["type"] == "point"]
    return [point for layer in layers for point in spec["datasets"][layer["data"]["name"]]]


def test_both_charts_hold_every_case_once(make_record: MakeRecord) -> None:
    records = cpu_set(make_record)
    steps = points_of("steps", records)
    walls = [record.wall_ms for record in records if record.wall_ms]
    assert sorted(point["p50"] for point in steps) == sorted(wall.p50 for wall in walls)
    assert sorted(point["p80"] for point in steps) == sorted(wall.p80 for wall in walls)
    cost = points_of("cost", records)
    assert len(cost) == len(records)
    small = [point for point in cost if point["size"] == "39M"]
    assert {point["paper"] for point in small} == {0.07 / 0.20}
    # plausible_record: 4 ms (torch) or 5 ms per GFLOP, two samples for guidance, 40 ms fixed.
    per_gflop = {"torch": 4.0, "diffusers": 5.0}
    expected = [
        (53.0 * 2 * n * ms + 40) / (159.9 * 2 * n * ms + 40) for n in (2, 4, 8) for ms in per_gflop.values()
    ]
    assert sorted(point["p50"] for point in small) == pytest.approx(sorted(expected))


def test_backends_relative_to_different_sizes_have_panels_of_their_own(make_record: MakeRecord) -> None:
    cases = [
        Case(unet=unet, steps=2, backend=b) for unet in ("39M", "83M", "145M") for b in ("torch", "diffusers")
    ]
    records = [make_record(case) for case in cases[:-1]] + [make_record(cases[-1], status="oom")]
    cost, *_ = drawings(overview(records))
    assert cost.chart is not None
    panels = cost.chart.to_dict()["concat"]
    titles = [(panel["title"], panel["layer"][0]["encoding"]["x"]["title"]) for panel in panels]
    assert titles == [
        ("torch", "the paper's cost (FLOPs), 145M = 1"),
        ("diffusers", "the paper's cost (FLOPs), 83M = 1"),
    ]


def test_a_zero_time_or_an_instant_step_breaks_no_chart(make_record: MakeRecord, tmp_path: Path) -> None:
    records = [
        make_record(Case(unet=unet, steps=n), wall_ms=Samples.of([ms, 0.0]))
        for unet, ms in (("39M", 0.0), ("83M", 0.0), ("145M", 1e-3))
        for n in (1, 2)
    ]
    assert not re.search(r"\b(nan|inf|None|NaN)\b", written(records, tmp_path).text)


def test_a_failed_write_leaves_the_earlier_page(
    make_record: MakeRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_report(overview([make_record()]), 0, tmp_path)
    before = (tmp_path / "report.html").read_bytes()

    def torn(descriptor: int) -> None:
        os.truncate(descriptor, os.fstat(descriptor).st_size // 2)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", torn)
    with pytest.raises(OSError, match="No space left"):
        write_report(overview([make_record(Case(unet="83M"))]), 0, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_bytes() == before


def test_the_same_records_give_the_same_page(make_record: MakeRecord, tmp_path: Path) -> None:
    records = cpu_set(make_record)
    first = [path.read_bytes() for path in write_report(overview(records), 0, tmp_path)]
    assert [path.read_bytes() for path in write_report(overview(records), 0, tmp_path)] == first
