"""Write the figures of README.md and docs from the record sets that their markers name: `make readme`.

tests/test_readme.py fails while a page differs from what this writes, so no figure there was typed by hand.
"""

import json
import textwrap
from functools import partial
from pathlib import Path
from statistics import median

from batch_invariance_table import table as calls_table
from closed_world import further_tables
from closed_world import tables as closed_world
from markers import with_blocks
from training_step import training_table

from ldmperf.profiling import Record
from ldmperf.profiling.claims import judge
from ldmperf.profiling.claims.summary import shared_by_all, summaries
from ldmperf.profiling.figures import overview
from ldmperf.profiling.figures.derived import PEER, Overview, Row, Section
from ldmperf.profiling.figures.headline import headline
from ldmperf.profiling.figures.phrases import processor_name
from ldmperf.profiling.figures.text import joined, short_ratio
from ldmperf.profiling.measure.conditions import commit, is_unsteady, marks
from ldmperf.profiling.measure.environment import Environment
from ldmperf.profiling.measure.store import write_whole
from ldmperf.profiling.record_files import Gathered, gather
from ldmperf.profiling.report import markdown_table
from ldmperf.profiling.terminal.layout import formatted, number
from ldmperf.profiling.terminal.visible import for_markdown

ROOT = Path(__file__).parents[1]
PAGES = (
    *("README.md", "docs/results.md", "docs/comparing.md", "docs/batch-invariance.md", "docs/pipelines.md"),
    "docs/closed-world.md",
)


def finding(shown: Overview) -> str:
    """The headline, and at most four rows of its section: sizes that our backend and diffusers both have."""
    told = headline(shown)
    if told is None:
        raise SystemExit("no two sizes were measured under the same conditions")
    sizes = _both(told.section, told.small.case.backend)
    (small, of_peer), (large, _) = sizes[0], sizes[-1]
    saves = "less" if small.cost and small.cost.p50 > (small.paper_cost or 0) else "more"
    words = (
        f"**A small network saves {saves} time than FLOPs promise: {told.sentence}.** These are times of a "
        f"sampling step ({PEER}: {_cost(of_peer)}) and the paper's cost, which counts FLOPs."
    )
    on_gpu = large.record.case.device != "cpu"
    heads = ["GFLOP", "ms per step: ours", PEER, *(("its kernels alone: ours", PEER) if on_gpu else ())]
    heads += [f"time relative to {large.name}: ours", PEER, "cost in the paper"]
    lines = [f"| size | {' | '.join(heads)} |", f"|---|{'---:|' * len(heads)}"]
    for row, peer in (sizes[i] for i in sorted({round(part * (len(sizes) - 1) / 3) for part in range(4)})):
        times = [number(one.record.ms_per_step) for one in (row, peer)]
        if on_gpu:
            times += [_kernels_ms(one) for one in (row, peer)]
        shares = (_cost(row), _cost(peer), short_ratio(row.paper_cost))
        cells = (row.name, formatted(row.record.gflop_per_forward, ".1f"), *times, *shares)
        lines.append(f"| {' | '.join(cells)} |")
    ours = told.small.case.backend
    faster = [row.times_faster for row in shown.rows if row.case.backend == ours and row.times_faster]
    below = (
        f"**Measured**: {joined((*shown.conditions.shared, shown.conditions.heading(told.section)))}; medians. "
        + (_of_a_gpu(sizes) if on_gpu else "On a CPU our code uses torch's operators: ")
        + f"{short_ratio(min(faster))}x to {short_ratio(max(faster))}x the speed of {PEER}."
    )
    return "\n".join([textwrap.fill(words, 125), "", *lines, "", textwrap.fill(below, 125)])


def _of_a_gpu(sizes: list[tuple[Row, Row]]) -> str:
    """How much of the speed is the host's: what the kernels of both take on the device."""
    busy = [[one.record.trace.step_busy_ms for one in pair if one.record.trace is not None] for pair in sizes]
    ratios = [theirs / ours for ours, theirs in (pair for pair in busy if len(pair) == 2)]
    environment = sizes[0][0].record.environment
    unfree = [f"{row.name}, {row.case.backend}" for pair in sizes for row in pair if marks(row.record)]
    said = f"torch {environment.torch}, triton {environment.triton}, {PEER} {environment.diffusers}. "
    said += f"Throttled while it was measured: {'; '.join(unfree)}. " if unfree else ""
    gaps = [row.record.host_gap for _, row in sizes if row.record.host_gap is not None]
    return (
        f"{said}Ours replays one captured graph a step. {PEER} is eager: its device waits for the host for "
        f"{100 * min(gaps):.0f}% to {100 * max(gaps):.0f}% of the time, and its kernels alone take "
        f"{short_ratio(min(ratios))} to {short_ratio(max(ratios))} times as long as ours. By the clock ours has "
    )


def _kernels_ms(row: Row) -> str:
    trace = row.record.trace
    return "-" if trace is None or trace.step_busy_ms is None else number(trace.step_busy_ms)


def pipelines(marker: str) -> str:
    """A sentence: what a whole pipeline takes on each backend, the peer's own first."""
    rows = [r for r in _records(marker) if r.case.task == "pipeline" and r.wall_ms is not None]
    by_backend = {row.case.backend: row for row in rows}
    peer, *others = (by_backend[name] for name in ("pipe", "pipe-accelerated", "pipe-rebuilt", "sample-graph"))
    names = ("after `accelerate`", "after `rebuild`", "with `ldmperf sample`'s own loop and networks")
    told = [
        f"{_whole_ms(row):.0f} ms {name} ({short_ratio(_whole_ms(peer) / _whole_ms(row))}x)"
        for name, row in zip(names, others, strict=True)
    ]
    case, times = peer.case, [row.wall_ms for row in (peer, *others) if row.wall_ms is not None]
    text = (
        f"**A whole pipeline from a prompt to an image** ({case.network}'s shape, {case.dtype}, {case.steps} "
        f"steps, the rest as above; medians of {min(one.n for one in times)} or more, "
        f"{sum(map(is_unsteady, times))} of {len(times)} unsteady) takes {_whole_ms(peer):.0f} ms in {PEER}, "
        f"{joined(told)}."
    )
    return textwrap.fill(text, 125, break_on_hyphens=False)


def _whole_ms(record: Record) -> float:
    assert record.wall_ms is not None
    return record.wall_ms.p50


def _both(section: Section, ours: str) -> list[tuple[Row, Row]]:
    """The rows of our backend and of diffusers for each size that both have a time for, the smallest first."""
    rows = {(row.case.backend, row.name): row for row in section.rows if row.cost is not None}
    return [
        (rows[ours, name], rows[PEER, name]) for backend, name in rows if backend == ours and (PEER, name) in rows
    ]


def _cost(row: Row) -> str:
    return short_ratio(None if row.cost is None else row.cost.p50)


def _records(marker: str) -> list[Record]:
    """The records that a marker names: "FILE steps=2 sampler=ddim" are those of the file with these conditions."""
    wanted = {name: value for name, value in _words(marker).items() if name != "claim"}
    found = _gathered(marker).trajectories
    return [r for r in found if all(str(getattr(r.case, name)) == value for name, value in wanted.items())]


def _gathered(marker: str) -> Gathered:
    """All records of the file that a marker names."""
    path = marker.split()[0]
    found = gather([ROOT / path])
    if found.aside.count:
        raise SystemExit(f"{path}: {found.aside.count} lines are not records")
    return found


def _words(marker: str) -> dict[str, str]:
    """The NAME=VALUE of a marker."""
    return dict(word.split("=") for word in marker.split() if "=" in word)


def verdicts(marker: str) -> str:
    """The conditions of the records, and a sentence for each claim that they decide, or leave undecided.

    With "claim=ID" in the marker for that claim alone.
    """
    judged = judge(_records(marker), _gathered(marker).qualities)
    only = _words(marker).get("claim")
    conditions = f"**Measured**: {joined(shared_by_all(judged).values())}."
    said = [of for of in summaries(judged) if only in (None, of.claim.id)]
    if only and not said:
        raise SystemExit(f"{marker}: the records say nothing of that claim")
    sentences = (f"- **{for_markdown(of.claim.text)}**: {for_markdown(of.sentence)}." for of in said)
    fill = partial(textwrap.fill, width=125, break_long_words=False, break_on_hyphens=False)
    return "\n".join([fill(conditions), "", *(fill(line, subsequent_indent="  ") for line in sentences)])


def gate(marker: str) -> str:
    """What bench/gate_check.py has found on a machine, from its JSON."""
    path = ROOT / marker.split()[0]
    try:
        found = json.loads(path.read_bytes())
    except OSError as failure:
        raise SystemExit(f"{path}: {failure.strerror}") from None
    counts, threshold = found["counts"], found["fail_over"]
    cases = [case for one in found["repeats"] for case in one["noise"]["cases"]]
    noise = [case["noise"] for case in cases]
    drift = max(max(case["a_ms"]) / min(case["a_ms"]) - 1 for case in cases)
    environment = Environment.model_validate_json(json.dumps(found["environment"]))
    place = environment.gpu.name if environment.gpu else processor_name(environment)
    share = threshold.partition(":")[2]
    injected = f"{counts['injected_gate_fails']} of {counts['injected_comparisons']}"
    missed = "".join(
        f" One case with {share} injected was measured as {_percent(case['ratio'])} "
        f"({' to '.join(map(_percent, case['interval']))}), which the gate {_LET[case['gate']]}."
        for one in found["repeats"]
        for case in one.get("injected", {"cases": ()})["cases"]
        if case["gate"] != "fails"
    )
    words = (
        f"**Measured** ({place}; commit {commit(environment)}; {found['rounds']} rounds of "
        f"`profile {' '.join(found['profile'])}`): the gate `{threshold}` fails {counts['noise_gate_fails']} of "
        f"{counts['noise_comparisons']} comparisons of a checkout with itself, and {injected} of a checkout with "
        f"{share} injected. {counts['noise_differs']} of the former have a verdict `FASTER` or `SLOWER`, and "
        f"{counts['injected_differs']} of the latter. Two runs of one commit in one round differ by at most "
        f"{100 * median(noise):.2g}% (median over cases and comparisons; largest {100 * max(noise):.2g}%); the "
        f"rounds of one side differ by up to {100 * drift:.2g}%.{missed}"
    )
    return textwrap.fill(words, 125, break_long_words=False, break_on_hyphens=False)


def batch_invariance(marker: str) -> str:
    """The calls that bench/batch_invariance.py has found to depend on the batch, from its JSON."""
    found = json.loads((ROOT / marker.split()[0]).read_bytes())
    environment = Environment.model_validate_json(json.dumps(found["environment"]))
    first = found["steps"][0]
    place = f"{processor_name(environment)}, commit {commit(environment)}"
    case = f"a step of the {first['size']} at latent {first['latent']}x{first['latent']}"
    conditions = (
        f"**Measured**: {place}; {case}, on torch's operators. *Elements*: the largest share of a call's result "
        "that differs; *such as*: that call, with one image's shapes."
    )
    return f"{textwrap.fill(conditions, 125)}\n\n{calls_table(found)}"


# What the gate does with a case that does not fail, by its answer.
_LET = {"passes": "lets pass", "undecided": "leaves undecided"}


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f}%"


def with_figures(page: str) -> str:
    """The text of a page with the figures of the records between its markers."""
    writers = {
        "finding": lambda marker: finding(overview(_records(marker))),
        "pipelines": pipelines,
        "table": lambda marker: markdown_table(overview(_records(marker))),
        "verdicts": verdicts,
        "gate": gate,
        "batch-invariance": batch_invariance,
        "training-step": lambda marker: training_table(json.loads((ROOT / marker.split()[0]).read_bytes())),
        "closed-world": lambda marker: closed_world.tables(ROOT / marker.split()[0]),
        "closed-world-further": lambda marker: further_tables.tables(ROOT / marker.split()[0]),
        "closed-world-sentence": lambda marker: closed_world.sentence(ROOT / marker.split()[0]),
    }
    return with_blocks(page, writers)


def main() -> None:
    for name in PAGES:
        path = ROOT / name
        write_whole(path, with_figures(path.read_text(encoding="utf-8")).encode())


if __name__ == "__main__":
    main()
