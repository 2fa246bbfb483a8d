"""README and docs: figures are those of the committed records, examples run, links and paths lead somewhere."""

import json
import re
import runpy
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted(
    path.relative_to(ROOT) for folder in (".", "docs", "bench", "kernels") for path in (ROOT / folder).glob("*.md")
)
# The first screen: up to the first heading below the title.
SCREEN = README.split("\n## ")[0]


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def anchors(page):
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        *(f"docs/{name}.md" for name in ("results", "comparing", "batch-invariance", "pipelines", "closed-world")),
    ],
)
def test_the_figures_are_those_of_the_committed_records(page):
    tool = runpy.run_path(str(ROOT / "bench" / "readme.py"))
    assert page in tool["PAGES"]
    assert tool["with_figures"](text_of(page)) == text_of(page)


def test_the_finding_follows_from_the_raw_samples():
    """Counted here from the lines of the file, by the formulas of docs/measuring.md."""
    (path,) = re.findall(r"<!-- finding: (\S+) dtype=bfloat16 ", README)
    ms, busy = {}, {}
    for record in map(json.loads, text_of(path).splitlines()):
        case = record["case"]
        if (case["dtype"], case["task"], case["steps"]) == ("bfloat16", "t2i", 20):
            key = case["unet"], case["backend"]
            ms[key] = median(record["wall_ms"]["samples"]) / record["evaluations"]
            busy[key] = (record["trace"] or {}).get("step_busy_ms")
    costs = {
        size["name"]: size["paper_normalized_cost"]
        for size in json.loads(next((ROOT / "profiling").rglob("paper.json")).read_text())["sizes"]
    }
    words = " ".join(SCREEN.split())
    ours, theirs = (ms["39M", backend] / ms["2B", backend] for backend in ("graph", "diffusers"))
    assert f"39M costs {ours:.2f} of 2B; its FLOPs say {costs['39M'] / costs['2B']:.2g}." in words
    assert f"(diffusers: {theirs:.2f})" in words
    sizes = ("39M", "866M", "2B")
    of_kernels = [busy[size, "diffusers"] / busy[size, "graph"] for size in sizes]
    assert f"alone take {min(of_kernels):.2f} to {max(of_kernels):.2f} times as long as ours" in words
    by_clock = [ms[size, "diffusers"] / ms[size, "graph"] for size in sizes]
    assert f"By the clock ours has {min(by_clock):.2f}x to {max(by_clock):.2f}x the speed" in words
    whole = {
        record["case"]["backend"]: median(record["wall_ms"]["samples"])
        for record in map(json.loads, text_of(path).splitlines())
        if record["case"]["task"] == "pipeline"
    }
    for backend in ("pipe-accelerated", "pipe-rebuilt", "sample-graph"):
        assert re.search(rf"{whole[backend]:.0f} ms [^(]*\({whole['pipe'] / whole[backend]:.2f}x\)", words), (
            backend
        )


def test_the_first_screen_is_short():
    """At most four rows of figures, three commands, and no figure typed by hand: all are in the written block."""
    rows = [line for line in SCREEN.splitlines() if line.startswith("| ")]
    assert 1 < len(rows) <= 1 + 4
    (commands,) = re.findall(r"```console\n(.*?)```", SCREEN, re.DOTALL)
    assert len(commands.splitlines()) == 3
    by_hand = re.sub(r"<!-- (finding|pipelines).*?end of \1 -->|\(https://.*?\)", "", SCREEN, flags=re.DOTALL)
    assert set(re.findall(r"\d[\d.]*", by_hand)) <= {"2404.01367"}


@pytest.mark.parametrize(
    ("page", "link"), [(page, link) for page in PAGES for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page))]
)
def test_links_lead_somewhere(page, link):
    if link.startswith("https://"):
        return
    target, _, anchor = link.partition("#")
    found = (ROOT / page).parent / target if target else ROOT / page
    assert found.exists()
    assert not anchor or anchor in anchors(found)


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=str)
def test_paths_of_the_checkout_exist(page):
    """Files and folders that a page names: those without a placeholder, of the folders that are committed."""
    paths = re.findall(
        r"(?<![\w/.~-])((?:kernels|model|samplers|profiling|tests|bench|docs)/[\w./-]+)(?![\w<*-])", text_of(page)
    )
    missing = {path for path in paths if not (ROOT / path.rstrip(".")).exists()}
    assert not {path for path in missing if not path.startswith(("bench/results/", "kernels/tuned"))}


def test_the_index_names_every_page_of_docs():
    linked = set(re.findall(r"\]\(([\w-]+\.md)", text_of("docs/README.md")))
    assert linked == {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}


def test_contributing_names_every_room():
    rooms = {path.stem for path in (ROOT / "profiling").glob("[!_]*") if path.is_dir() or path.suffix == ".py"}
    assert rooms <= set(re.findall(r"`(\w+)(?:/|\.py)`", text_of("CONTRIBUTING.md")))


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_examples_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {}
    if "rebuild(pipe)" in code:
        pytest.importorskip("diffusers")
        from .dropin_models import make_pipeline

        given["pipe"] = make_pipeline("text")
    exec(compile(code, "README.md", "exec"), given)
    if "pipe" in given:
        from ldmperf.model.dropin import PipelineUNet

        assert isinstance(given["pipe"].unet, PipelineUNet)


def test_a_marker_can_name_one_claim():
    tool = runpy.run_path(str(ROOT / "bench" / "readme.py"))
    page = "<!-- verdicts: {}claim=steps-linear -->\n<!-- end of verdicts -->"
    path = "bench/results/cpu-intel-xeon-2-cores/2026-11-26-0da889c.jsonl"
    (told,) = (line for line in tool["with_figures"](page.format(path + " ")).splitlines() if line[:2] == "- ")
    assert told.startswith("- **cost grows linearly with steps**")


def test_the_gate_on_a_machine_is_told_from_its_file(tmp_path):
    """bench/gate_check.py's JSON, reduced to what the page says of it."""
    tool = runpy.run_path(str(ROOT / "bench" / "readme.py"))
    made = [{"noise": {"cases": [{"noise": noise, "a_ms": [50, 51, 54.2]}]}} for noise in (0.011, 0.023, 0.052)]
    counts = {"noise_comparisons": 20, "noise_gate_fails": 1, "noise_differs": 2}
    content = {
        "environment": {
            **{"os": "Linux", "python": "3", "cpu": "Some CPU", "torch_threads": 2},
            "git_commit": 4 * "0123456789",
        },
        "profile": ["--size", "39M"],
        "rounds": 6,
        "fail_over": "wall_ms:5%",
        "counts": counts | {"injected_comparisons": 10, "injected_gate_fails": 9, "injected_differs": 8},
        "repeats": made,
    }
    made[0]["injected"] = {"cases": [{"ratio": 1.031, "interval": [0.9989, 1.0433], "gate": "undecided"}]}
    made[1]["injected"] = {"cases": [{"ratio": 1.051, "interval": [1.0395, 1.0633], "gate": "fails"}]}
    (tmp_path / "gate.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit, match="No such file"):
        tool["with_figures"]("<!-- gate: bench/none.json -->\n<!-- end of gate -->")
    # An absolute path stands for itself.
    told = " ".join(tool["with_figures"](f"<!-- gate: {tmp_path / 'gate.json'} -->\n<!-- end of gate -->").split())
    assert "Some CPU, 2 threads; commit 0123456; 6 rounds of `profile --size 39M`" in told
    assert "the gate `wall_ms:5%` fails 1 of 20 comparisons of a checkout with itself, and 9 of 10" in told
    assert "differ by at most 2.3% (median over cases and comparisons; largest 5.2%)" in told
    assert "2 of the former have a verdict `FASTER` or `SLOWER`, and 8 of the latter" in told
    assert "the rounds of one side differ by up to 8.4%" in told
    assert "was measured as +3.1% (-0.1% to +4.3%), which the gate leaves undecided." in told
    assert told.count("One case") == 1
