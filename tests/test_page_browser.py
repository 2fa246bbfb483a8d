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
from ldmperf.profiling.figures import overview
from ldmperf.profiling.measure.environment import Gpu
from ldmperf.profiling.measure.recorded import Samples
from ldmperf.profiling.report import write_page
from ldmperf.profiling.report.page_input import PageInput
from ldmperf.profiling.trajectory.record_parts import Energy

from .conftest import plausible_record

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("no chromium to open a page in: apt-get install chromium", allow_module_level=True)

EVIL = '/models/</script><img src=x onerror="window.taken=1">\'&\u202e-' + "long" * 40
SIZES = ("39M", "83M", "145M")
BACKENDS = ("diffusers", "torch", "triton")
CHARTS = ["fid", "fid-flops", "cost", "images", "ladder", "steps", "joules", "batch", "history"]


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
        """The points, or bars, of a chart."""
        return int(self.page.locator(f"#{chart} .mark-symbol path, #{chart} .mark-rect path").count())

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


def test_every_chart_is_drawn(opened: Opened) -> None:
    assert opened.page.locator("figure").evaluate_all("all => all.map((one) => one.id)") == CHARTS
    # A panel has each of its sizes, or steps, batches and commits, on each backend once.
    expected = {
        "fid": 2 * 3 * 3, "fid-flops": 2 * 3, "cost": 4 * 3, "images": 4 * 3, "joules": 4 * 3,
        "ladder": 4 * 3, "steps": 4 * 3 * 3, "batch": 4 * 2 * 3,
    }  # fmt: skip
    for chart, count in expected.items():
        panels = opened.page.locator(f"#{chart} .panel").count()
        assert (
            opened.marks(chart) == count * panels / max(1, {"fid": 2, "fid-flops": 2}.get(chart, 1)) or panels > 2
        ), chart
    assert opened.marks("history") > 0
    assert "FASTER" in opened.page.locator("#history").inner_text()
