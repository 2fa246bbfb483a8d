"""docs/comparison.md: each cell about another tool has a source, and each source is described and used."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
TOOLS = (
    *("ldmperf", "optimum-benchmark", "tritonbench", "flashinfer-bench", "nvbench", "pytest-benchmark"),
    "diffusers `benchmarks/`",
)
ROWS = (
    *("timer", "stopping rule", "raw samples", "L2 state", "correctness gate"),
    *("integrity: cached outputs, patched timers, impossible times", "memory", "energy", "failure as data"),
    *("environment recorded", "isolation", "resume", "scale-out", "comparison (verdicts)", "traces", "exporters"),
)
NUMBER = re.compile(r"\[(\d+)\]")
LINK = re.compile(r"\]\(([^)]+)\)")


def rows():
    """The cells of each row of both tables, without the rule below the head."""
    lines = [line for line in PAGE.splitlines() if line.startswith("|") and set(line) - set("|-")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


BODY = [cells for cells in rows() if cells[0]]
SOURCES = {int(number): line for line in PAGE.splitlines() for number in re.findall(r"^(\d+)\. \[", line)}
DEFINED = dict(re.findall(r"^\[(\d+)\]: (\S+)$", PAGE, re.MULTILINE))
CELLS = [(row[0], tool, cell) for row in BODY for tool, cell in zip(TOOLS[1:], row[2:], strict=False)]


def test_every_row_has_every_tool():
    heads = [cells for cells in rows() if not cells[0]]
    assert heads == [["", *TOOLS]] * 2
    assert tuple(row[0] for row in BODY) == ROWS
    assert {row[0]: len(row) for row in BODY} == dict.fromkeys(ROWS, 1 + len(TOOLS))
    assert all(cell for row in BODY for cell in row)


@pytest.mark.parametrize(("row", "tool", "cell"), CELLS)
def test_every_cell_of_another_tool_has_a_source_of_that_tool(row, tool, cell):
    # The heading of a tool's sources begins with its name; the sources of a cell stand below it.
    heading = re.compile(rf"^{re.escape(tool.split()[0])} .*:$", re.MULTILINE)
    (start,) = (found.end() for found in heading.finditer(PAGE))
    below = re.match(r"\s*((?:\d+\. .*\n(?: +.*\n)*)+)", PAGE[start:])
    assert below is not None
    own = {int(number) for number in re.findall(r"^(\d+)\. ", below[1], re.MULTILINE)}
    numbers = {int(number) for number in NUMBER.findall(cell)}
    assert numbers, f"{row}: {tool} without a source"
    assert numbers <= own, f"{row}: {tool} with sources of another tool"


def test_every_number_is_described_and_used_once_in_order():
    assert list(SOURCES) == list(range(1, len(SOURCES) + 1))
    assert list(DEFINED) == [str(number) for number in SOURCES]
    assert all(url.startswith("https://") for url in DEFINED.values())
    before = PAGE.split("\n## Sources")[0]
    assert {int(number) for number in NUMBER.findall(before)} == set(SOURCES)
    for number, line in SOURCES.items():
        assert NUMBER.findall(line) == [str(number)], f"source {number} leads elsewhere"


def test_a_source_in_a_repository_names_a_commit_or_says_that_none_is_known():
    for number, url in DEFINED.items():
        if "github.com" in url and "/blob/" in url and not re.search(r"/blob/([0-9a-f]{40}|v[\d.]+)/", url):
            assert "its commit not known" in SOURCES[int(number)], url


def test_our_cells_lead_to_a_page_or_a_test():
    for row in BODY:
        links = LINK.findall(row[1])
        assert links, f"{row[0]}: nothing proves it"
        for link in links:
            assert (ROOT / "docs" / link.split("#")[0]).is_file(), link


def test_what_needs_a_gpu_says_that_it_is_not_measured():
    ours = {row[0]: row[1] for row in BODY}
    for name in ("L2 state", "isolation", "scale-out", "traces"):
        assert "not measured on a GPU" in ours[name]
