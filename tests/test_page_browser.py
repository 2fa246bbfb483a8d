"""The page in a browser: charts drawn, filters, tables, downloads; nothing asked for, nothing run but its own."""

from __future__ import annotations

import itertools
import re
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from ldmperf.profiling import Case, Record, cli
from ldmperf.profiling.compare.history import CaseHistory, History, HistoryPoint
from ldmperf.profiling.figures import overview
from ldmperf.profiling.figures.derived import Spread
from ldmperf.profiling.measure.environment import Gpu
from ldmperf.profiling.measure.recorded import Samples
from ldmperf.profiling.report import write_page
from ldmperf.profiling.report.page_input import GridSection, PageInput
from ldmperf.profiling.terminal.layout import Grid
from ldmperf.profiling.trajectory.record_parts import Energy

from .conftest import plausible_quality, plausible_record

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("no chromium to open a page in: apt-get install chromium", allow_module_level=True)

EVIL = '/models/</script><img src=x onerror="window.taken=1">\'&\u202e-' + "long" * 40
SIZES = ("39M", "83M", "145M")
BACKENDS = ("diffusers", "torch", "triton")
MARKS = (("■", "diffusers"), ("●", "torch"), ("▲", "triton"))
CHARTS = ["fid", "fid-flops", "cost", "images", "joules", "ladder", "steps", "batch", "history"]


def record(case: Case, gpu: str, commit: str, at: int) -> Record:
    environment = plausible_record().environment.model_copy(
        update={"gpu": Gpu(name=gpu, count=1), "git_commit": commit * 40}
    )
    made = plausible_record(case, environment=environment)
    assert made.wall_ms is not None
    faster = {"a": 1.0, "b": 0.5}[commit] * (1.5 if gpu == "NVIDIA A100" else 1.0)
    return made.model_copy(
        update={
            "wall_ms": Samples.of([ms * faster for ms in made.wall_ms.samples]),
            "energy": Energy(joules=made.wall_ms.p50 / 10, window_s=2.0, trajectories=4, counted_s=1.9),
            "started_at": datetime(2026, 11, 23, tzinfo=UTC) + timedelta(days=ord(commit), seconds=at),
        }
    )


def records() -> list[Record]:
    """Two GPUs, two commits on one of them, two batches, three backends and step counts, a hostile checkpoint."""
    combinations = itertools.product((*SIZES, EVIL), BACKENDS, (2, 4, 8), (1, 2))
    cases = [
        Case(unet=unet, backend=backend, steps=steps, batch=batch, device="cuda")
        for unet, backend, steps, batch in combinations
    ]
    places = (("NVIDIA H200", "a"), ("NVIDIA H200", "b"), ("NVIDIA A100", "a"))
    return [record(case, *place, at) for place in places for at, case in enumerate(cases)]


class Opened:
    """A page in a tab of its own, with what it said, failed at, and asked for."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        self.context = browser.new_context(offline=True, accept_downloads=True, **options)
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda m: self.errors.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        if options.get("java_script_enabled", True):
            self.drawn()

    def drawn(self) -> None:
        """Waits until all charts are drawn."""
        self.page.wait_for_selector("html[data-drawn]", state="attached", timeout=60_000)

    def changed(self, act: Callable[[], None]) -> None:
        """Acts, and waits until all charts are drawn anew."""
        self.page.evaluate("delete document.documentElement.dataset.drawn")
        act()
        self.drawn()

    def chip(self, text: str) -> None:
        self.changed(lambda: self.page.locator(".chip", has_text=re.compile(rf"^\W*{re.escape(text)}$")).click())

    def marks(self, chart: str) -> int:
        """The points of a chart, or the bars of the ladder."""
        kind = "rect" if chart == "ladder" else "symbol"
        return int(self.page.locator(f"#{chart} .canvas .mark-{kind} path").count())

    def column(self, heading: str) -> list[str]:
        """The cells of a column of the table of cases."""
        return list(
            self.page.evaluate(
                """(heading) => {
                    const table = document.querySelector('[data-table="cases"] table');
                    const at = [...table.tHead.rows[0].cells].findIndex((cell) => cell.textContent === heading);
                    return [...table.tBodies[0].rows].map((row) => row.cells[at].textContent);
                }""",
                heading,
            )
        )


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    (folder / "records.jsonl").write_text("".join(one.model_dump_json() + "\n" for one in records()))
    with pytest.raises(SystemExit) as exited:
        cli.main(["report", str(folder / "records.jsonl"), "-o", str(folder / "page.html")])
    assert exited.value.code == 0
    return folder / "page.html"


@pytest.fixture
def opened(browser: Any, path: Path) -> Iterator[Opened]:
    """The page on a desk; nothing went wrong and nothing was asked for, whatever a test did."""
    page = Opened(browser, path)
    yield page
    assert page.errors == []
    assert page.requests == [path.as_uri()]
    assert page.page.evaluate("[window.taken, document.querySelectorAll('img').length]") == [None, 0]
    page.context.close()


def test_every_chart_is_drawn_with_each_fact_once(opened: Opened) -> None:
    assert opened.page.locator("figure").evaluate_all("all => all.map((one) => one.id)") == CHARTS
    # Sizes of the paper, or all four networks; on each backend; at each step count, batch or commit.
    expected = {
        "fid": 2 * 3 * 3, "fid-flops": 2 * 3, "cost": 4 * 3, "images": 4 * 3, "joules": 4 * 3, "ladder": 4 * 3,
        "steps": 4 * 3 * 3, "batch": 4 * 3 * 2,
    }  # fmt: skip
    assert {chart: opened.marks(chart) for chart in expected} == expected
    # With a ring around each, seen only where something changed.
    assert opened.marks("history") == 4 * 3 * 2 * 2
    assert opened.page.locator("h1").inner_text().startswith("39M costs 0.3")


def test_filters_change_charts_and_tables_and_are_cleared(opened: Opened) -> None:
    assert opened.page.locator("#kept").inner_text() == "All 216 cases"
    opened.chip("torch")
    opened.chip("NVIDIA A100")
    opened.chip("batch 2")
    assert opened.page.locator("#kept").inner_text() == f"{4 * 3} of 216 cases"
    assert {*opened.column("backend")} == {"torch"}
    assert {*opened.column("machine")} == {"NVIDIA A100"}
    assert {*opened.column("batch")} == {"batch 2"}
    assert (opened.marks("fid"), opened.marks("cost"), opened.marks("steps")) == (3, 4, 4 * 3)
    # One backend is no ladder; two more are.
    assert "Nothing to draw of these cases: it takes a size tried on 3 backends" in text_of(
        opened, "#ladder .choices"
    )
    opened.chip("triton")
    assert opened.marks("fid") == 2 * 3
    opened.changed(lambda: opened.page.get_by_role("button", name="Clear").click())
    assert opened.page.locator("#kept").inner_text() == "All 216 cases"
    assert opened.marks("ladder") == 4 * 3


def test_a_condition_is_chosen_and_no_panel_mixes_two(opened: Opened) -> None:
    ladder = opened.page.locator("#ladder")
    names = ladder.locator("select").evaluate_all("all => all.map((one) => one.name)")
    assert names == ["environment", "batch", "steps"]
    before = ladder.locator(".canvas").first.get_attribute("aria-label")
    ladder.locator("select[name=environment]").select_option(index=2)
    sync_api.expect(ladder.locator(".canvas").first).to_have_attribute("aria-label", re.compile("A100|bbbbbbb"))
    after = ladder.locator(".canvas").first.get_attribute("aria-label")
    assert before is not None
    assert after is not None
    assert before != after
    # The other charts are as they were, and each names one machine and one commit.
    for label in opened.page.locator("figure:not(#history) .canvas").evaluate_all(
        "all => all.map((one) => one.getAttribute('aria-label'))"
    ):
        assert len(re.findall("H200|A100", label)) == len(re.findall("aaaaaaa|bbbbbbb", label)) == 1, label


def test_tables_sort_by_mouse_and_keys_with_missing_values_last(opened: Opened) -> None:
    opened.chip("NVIDIA A100")
    heading = opened.page.locator('[data-table="cases"] th', has_text="ms per image")
    heading.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") == "ascending"
    times = [float(cell) for cell in opened.column("ms per image")]
    assert times == sorted(times)
    heading.get_by_role("button").focus()
    opened.page.keyboard.press("Enter")
    assert heading.get_attribute("aria-sort") == "descending"
    times = [float(cell) for cell in opened.column("ms per image")]
    assert times == sorted(times, reverse=True)
    # Networks that the paper does not have have no cost of the paper's; by size 83M comes before 145M.
    paper = opened.page.locator('[data-table="cases"] th', has_text="cost paper")
    for _ in range(2):
        paper.get_by_role("button").click()
        cells = opened.column("cost paper")
        assert "-" not in cells or set(cells[cells.index("-") :]) == {"-"}
    opened.page.locator('[data-table="cases"] th', has_text="size").get_by_role("button").click()
    sizes = list(dict.fromkeys(opened.column("size")))
    assert sizes[:3] == ["39M", "83M", "145M"]


def test_numbers_are_sorted_by_value_whatever_their_unit(browser: Any, tmp_path: Path) -> None:
    texts = ("2.19B", "-", "865.9M", "12.5 (3)", "0.002..0.1", "1.5e-05", "3x", "-4.5")
    grid = Grid(("kernel", "value"), tuple((f"k{place}", text) for place, text in enumerate(texts)), ("kernel",))
    write_page(PageInput(overview([]), sections=(GridSection("Kernels", grid),)), tmp_path / "page.html")
    opened = Opened(browser, tmp_path / "page.html")
    expected = ["-4.5", "1.5e-05", "0.002..0.1", "3x", "12.5 (3)", "865.9M", "2.19B"]
    for order in (expected, expected[::-1]):
        opened.page.get_by_role("button", name="value").click()
        assert texts_of(opened, "tbody td") == [*order, "-"]
    assert opened.errors == []
    opened.context.close()


def test_rows_beyond_the_first_are_shown_when_asked_for(opened: Opened) -> None:
    assert len(opened.column("size")) == 40
    opened.page.locator('[data-table="cases"]').get_by_role("button", name="Show more").click()
    assert len(opened.column("size")) == 216
    assert text_of(opened, '[data-table="cases"] output') == "216 rows"
    error = opened.page.locator('[data-table="cases"] th', has_text="relative RMS error")
    assert not error.is_visible()
    opened.page.get_by_label("all columns").check()
    assert error.is_visible()


def test_a_hostile_name_stays_text_in_tables_charts_and_tips(opened: Opened) -> None:
    name = visible_name(EVIL)
    opened.page.locator('[data-table="cases"] th', has_text="size").get_by_role("button").click()
    opened.page.locator('[data-table="cases"]').get_by_role("button", name="Show more").click()
    assert name in opened.column("size")
    ticks = opened.page.locator("#images .role-axis-label text").evaluate_all(
        "all => all.map((t) => t.textContent)"
    )
    assert any(tick.startswith(name[:10]) for tick in ticks)
    headings = opened.page.locator("#ladder h4").evaluate_all("all => all.map((one) => one.textContent)")
    assert name in headings
    # The last size of the chart is the checkpoint.
    opened.page.locator("#images .mark-symbol path").nth(3).hover(force=True)
    tip = opened.page.locator("#vg-tooltip-element.visible")
    tip.wait_for()
    assert "size" in tip.inner_text()


def test_charts_are_downloaded_as_svg_and_png(opened: Opened, tmp_path: Path) -> None:
    files = {}
    panel = opened.page.locator("#cost .panel").last
    for kind in ("SVG", "PNG"):
        with opened.page.expect_download() as found:
            panel.get_by_role("button", name=kind).click()
        name = found.value.suggested_filename
        assert re.fullmatch(rf"cost-[\w.-]{{1,80}}\.{kind.lower()}", name), name
        found.value.save_as(tmp_path / kind)
        files[kind] = (tmp_path / kind).read_bytes()
    assert files["PNG"].startswith(b"\x89PNG\r\n\x1a\n")
    assert int.from_bytes(files["PNG"][16:20], "big") > 1000
    texts = svg_texts(tmp_path / "SVG")
    # By itself it says what it is of.
    assert {"Measured cost against the paper's cost", *BACKENDS, *SIZES} <= {*texts}
    # Conditions of the panel, and those of all cases.
    for part in ("8 steps", "NVIDIA H200", "float32", "guidance 7.5"):
        assert part in " ".join(texts)
    assert b"currentColor" not in files["SVG"]


def test_a_chart_by_itself_tells_backends_and_predictions(opened: Opened, tmp_path: Path) -> None:
    for chart in ("fid", "images", "steps", "batch", "history", "joules"):
        assert texts_of(opened, f"#{chart} .legend li") == [f"{mark} {name}" for mark, name in MARKS], chart
        with opened.page.expect_download() as found:
            opened.page.locator(f"#{chart} .panel").last.get_by_role("button", name="SVG").click()
        found.value.save_as(tmp_path / chart)
        texts = svg_texts(tmp_path / chart)
        assert {*BACKENDS} <= {*texts}, chart
        assert ("predicted from 2, 4, 8 steps" in " ".join(texts)) == (chart == "fid")
    # Of few backends the legend has no more.
    opened.chip("torch")
    assert texts_of(opened, "#cost .legend li") == ["● torch"]


def test_what_all_panels_of_a_chart_share_is_said_where_the_page_has_more(opened: Opened) -> None:
    # Two commits were measured on one of the two GPUs alone.
    assert "machine NVIDIA H200" in text_of(opened, "#history .choices")
    # A history is of no environment: a filter of these leaves it.
    before = opened.marks("history")
    opened.chip("NVIDIA H200")
    assert opened.marks("history") == before > 0
    assert "relative to" in text_of(opened, "#cost .choices")


def test_predictions_are_hollow_and_changes_ringed(opened: Opened, browser: Any, tmp_path: Path) -> None:
    hollow = "all => all.map((one) => one.getAttribute('fill-opacity'))"
    assert {*opened.page.locator("#fid .mark-symbol path").evaluate_all(hollow)} == {"0"}
    made = [plausible_record(Case(unet=size, steps=50)) for size in SIZES]
    points = tuple(
        HistoryPoint(name, datetime(2026, 11, day, tzinfo=UTC), Spread(9.0, 10.0, 11.0), 4, verdict)
        for day, (name, verdict) in enumerate((("aaa", ""), ("bbb", "FASTER"), ("ccc", "SLOWER")), 1)
    )
    series = CaseHistory("39M torch", made[0].case_id, "", points)
    write_page(PageInput(overview(made), history=History((series,), "", ())), tmp_path / "page.html")
    other = Opened(browser, tmp_path / "page.html")
    assert {*other.page.locator("#fid .mark-symbol path").evaluate_all(hollow)} == {"1"}
    opacity = "all => all.map((one) => one.getAttribute('opacity'))"
    assert other.page.locator("#history .mark-symbol path").evaluate_all(opacity)[3:] == ["0", "1", "1"]
    assert [text for text in texts_of(other, "#history .mark-text text") if text in "▼▲"][-2:] == ["▼", "▲"]
    other.context.close()


def test_charts_side_by_side_begin_at_one_height(opened: Opened) -> None:
    left, right = (opened.page.locator(f"#{chart} .canvas").first.bounding_box() for chart in ("fid", "fid-flops"))
    assert left["x"] < right["x"]
    assert left["y"] == pytest.approx(right["y"], abs=1)


def test_long_times_have_readable_units(opened: Opened) -> None:
    ticks = texts_of(opened, "#steps .panel:first-child .role-axis-label text")
    assert {"1 s", "0"} <= {*ticks}
    assert "1,000" not in ticks
    assert any(re.fullmatch(r"[\d.]+ s", tick) for tick in texts_of(opened, "#fid .role-axis-label text"))


def test_words_in_tables_are_not_broken(opened: Opened) -> None:
    lines = opened.page.evaluate(
        """() => [...document.querySelectorAll('[data-table="cases"] td.word, [data-table] thead th button')]
            .filter((cell) => cell.offsetParent && !/[\\s-]/.test(cell.textContent)).map((cell) => {
                const range = document.createRange();
                range.selectNodeContents(cell);
                return [cell.textContent, new Set([...range.getClientRects()].map((part) => part.top)).size];
            })"""
    )
    assert "diffusers" in [text for text, _ in lines]
    assert [text for text, count in lines if count > 1] == []


def test_a_rung_without_a_time_says_why(browser: Any, tmp_path: Path) -> None:
    cases = [Case(unet="39M", backend=backend, steps=2) for backend in BACKENDS]
    made = [plausible_record(case, status="oom" if case.backend == "triton" else "ok") for case in cases]
    write_page(PageInput(overview(made)), tmp_path / "page.html")
    opened = Opened(browser, tmp_path / "page.html")
    assert "oom" in texts_of(opened, "#ladder .mark-text text")
    assert texts_of(opened, "#ladder .role-axis-label text")[-3:] == [*BACKENDS]
    assert opened.errors == []
    opened.context.close()


@pytest.mark.parametrize("width", [320, 390])
def test_a_phone_is_never_scrolled_sideways(browser: Any, path: Path, width: int) -> None:
    opened = Opened(browser, path, viewport={"width": width, "height": 800})
    assert opened.page.evaluate("document.documentElement.scrollWidth") == width
    assert opened.marks("cost") == 4 * 3
    for chart in opened.page.locator(".canvas svg").all():
        assert chart.bounding_box()["width"] <= width
    assert opened.errors == []
    opened.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_and_marks_stand_out_in_light_and_dark(browser: Any, path: Path, scheme: str) -> None:
    opened = Opened(browser, path, color_scheme=scheme)
    ground = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (luminance(ground) < 0.1) == (scheme == "dark")
    texts = ["p", "h1", "td", "figcaption", ".finding", "dt", "a", ".chip", "#cost .role-axis-label text"]
    for selector in texts:
        colour = opened.page.evaluate(
            "(s) => { const e = document.querySelector(s); const c = getComputedStyle(e); "
            "return e.tagName === 'text' ? c.fill : c.color }",
            selector,
        )
        assert contrast(colour, ground) >= 4.5, selector
    for colour in {
        *opened.page.locator("#cost .mark-symbol path, #ladder .mark-rect path").evaluate_all(
            "all => all.map((e) => getComputedStyle(e).stroke === 'none' ? getComputedStyle(e).fill : "
            "getComputedStyle(e).stroke)"
        )
    }:
        assert contrast(colour, ground) >= 3, colour
    opened.context.close()


def test_paper_has_all_that_is_folded_away_and_no_buttons(opened: Opened) -> None:
    assert opened.page.locator("#claims ~ details").first.get_attribute("open") is None
    opened.page.emulate_media(media="print", color_scheme="dark")
    assert opened.page.pdf().startswith(b"%PDF")
    assert opened.page.locator("details:not([open])").count() == 0
    assert not opened.page.locator("#filters").is_visible()
    assert not opened.page.get_by_role("button", name="PNG").first.is_visible()
    assert luminance(opened.page.evaluate("getComputedStyle(document.body).backgroundColor")) > 0.9
    assert opened.page.locator("#cost .legend").is_visible()


def test_without_scripts_there_are_sentences_tables_and_pictures(browser: Any, path: Path) -> None:
    opened = Opened(browser, path, java_script_enabled=False)
    assert opened.page.locator("h1").inner_text().startswith("39M costs")
    assert opened.page.locator('[data-table="cases"] tbody tr').count() == 40
    assert opened.page.locator("#fid .static svg").is_visible()
    assert opened.page.locator("#cost .static svg .mark-symbol path").count() == 4 * 3 + len(BACKENDS)
    assert opened.requests == [path.as_uri()]
    opened.context.close()


def test_ten_thousand_cases_open_with_a_few_charts_and_rows(browser: Any, tmp_path: Path) -> None:
    first = plausible_record()
    assert first.wall_ms is not None
    varied = itertools.product(
        range(1, 60), (1, 2, 4), ("ddim", "ddpm", "heun"), SIZES, (*BACKENDS, "graph"), (64, 32)
    )
    many = [
        made(first, Case(unet=u, steps=n, batch=b, sampler=s, backend=backend, latent_height=side))
        for n, b, s, u, backend, side in itertools.islice(varied, 10_000)
    ]
    write_page(PageInput(overview(many)), tmp_path / "page.html")
    opened = Opened(browser, tmp_path / "page.html")
    assert opened.page.locator("#kept").inner_text() == "All 10,000 cases"
    assert opened.page.evaluate("document.querySelectorAll('*').length") < 12_000
    for chart in ("cost", "images", "ladder", "steps"):
        assert opened.marks(chart) > 0
        assert opened.page.locator(f"#{chart} select").count() >= 2
        assert opened.page.locator(f"#{chart} .panel").count() <= 12
    assert len(opened.column("size")) == 40
    opened.chip("graph")
    assert opened.page.locator("#kept").inner_text() == "2,500 of 10,000 cases"
    assert {*opened.column("backend")} == {"graph"}
    assert opened.errors == []
    opened.context.close()


def test_quality_is_drawn_over_time_and_flops_and_filters_hold_there_too(browser: Any, tmp_path: Path) -> None:
    """Two networks at two steps under two samplers and batches, a stitched one, a sweep; names of hostile text."""
    evil = "w8</script><b>"
    timed = [
        plausible_record(
            Case(unet=name, weights_sha256=f"{place:064x}", steps=steps, batch=batch, guidance_scale=2.0),
            wall_ms=Samples.of([1.0 * (place + 1) * steps * batch] * 9),
        )
        for place, name in enumerate((evil, "w32"))
        for steps in (2, 8)
        for batch in (1, 64)
    ]
    quality = [
        plausible_quality(name, steps, sampler=sampler, guidance_scale=rate, tuned=rate == 2.0, parameters=size)
        for size, name in enumerate((evil, "w32"), 1)
        for steps in (2, 8)
        for sampler in ("ddim", "ddpm")
        for rate in (1.0, 2.0, 4.0)
    ]
    quality.append(plausible_quality(kind="stitched", steps=6, takes=((evil, 2), ("w32", 4))))
    quality.append(plausible_quality("real", 1, kind="real", sampler="none"))
    for name, found in (("records", timed), ("quality", quality)):
        (tmp_path / f"{name}.jsonl").write_text("".join(one.model_dump_json() + "\n" for one in found))
    with pytest.raises(SystemExit) as exited:
        cli.main(["report", *(str(tmp_path / f"{name}.jsonl") for name in ("records", "quality")), "-o",
                  str(tmp_path / "page.html")])  # fmt: skip
    assert exited.value.code == 0
    opened = Opened(browser, tmp_path / "page.html")
    # Two networks at two step counts, and the stitched one; a sweep has six marks.
    for metric in ("frechet", "kid", "sliced-wasserstein"):
        assert (opened.marks(f"{metric}-ms"), opened.marks(f"{metric}-flops")) == (5, 5)
        assert opened.marks(f"guidance-{metric}") == opened.marks("guidance-alignment") == 6
    assert texts_of(opened, "#frechet-ms .legend li") == [f"● {evil}", "▲ w32", "◆ stitched"]
    assert {"real samples", "w32", evil} <= {*texts_of(opened, "#frechet-flops .mark-text text")}
    assert "2048 samples; one training seed" in text_of(opened, "#frechet-ms .note")
    selects = opened.page.locator("#frechet-ms select").evaluate_all("all => all.map((one) => one.name)")
    assert selects == ["sampler", "batch"]
    # The times of a batch are filtered; FLOPs are of no batch.
    opened.chip("batch 64")
    assert (opened.marks("frechet-ms"), opened.marks("frechet-flops")) == (5, 5)
    assert "batch 64" in text_of(opened, "#frechet-ms .choices")
    assert opened.page.locator("#frechet-ms select").count() == 1
    opened.page.locator("#frechet-flops .mark-symbol path").last.hover(force=True)
    opened.page.locator("#vg-tooltip-element.visible").wait_for()
    with opened.page.expect_download() as download:
        opened.page.locator("#frechet-flops .panel").first.get_by_role("button", name="SVG").click()
    download.value.save_as(tmp_path / "svg")
    told = " ".join(svg_texts(tmp_path / "svg"))
    assert all(part in told for part in ("Frechet distance against FLOPs", "stitched", "intervals of 91%"))
    # What was timed is no condition of FLOPs.
    assert "float32" not in told
    assert opened.errors == []
    assert opened.page.evaluate("document.querySelectorAll('main b').length") == 0
    opened.context.close()


def made(first: Record, case: Case) -> Record:
    """A record of the case with a time that follows from it; not validated, which takes longest."""
    ms = {"39M": 53.0, "83M": 99.7, "145M": 159.9}[case.unet] * case.steps * case.batch
    wall = first.wall_ms.model_copy(update={"p20": ms, "p50": 1.01 * ms, "p80": 1.02 * ms})  # type: ignore[union-attr]
    changes = {"case": case, "case_key": case.key, "wall_ms": wall, "evaluations": case.steps}
    return first.model_copy(update=changes)


def svg_texts(path: Path) -> list[str]:
    texts = ET.fromstring(path.read_bytes()).iter("{http://www.w3.org/2000/svg}text")
    return ["".join(text.itertext()) for text in texts]


def text_of(opened: Opened, selector: str) -> str:
    return str(opened.page.locator(selector).first.inner_text())


def texts_of(opened: Opened, selector: str) -> list[str]:
    return list(opened.page.locator(selector).evaluate_all("all => all.map((one) => one.textContent)"))


def visible_name(path: str) -> str:
    """What a page calls a checkpoint at a path."""
    return path.rpartition("/")[2].replace("\u202e", "\\u202e")


def luminance(colour: str) -> float:
    """The relative luminance of "rgb(r, g, b)" (WCAG 2.2)."""
    channels = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two colours (WCAG 2.2)."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
