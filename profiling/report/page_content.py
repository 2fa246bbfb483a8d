"""What the template of the page shows, in the order of the page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..claims.catalogue import published_readings
from ..claims.summary import left_open, only_timed, shared_by_all, summaries
from ..claims.verdict import ClaimVerdicts
from ..figures import text
from ..figures.derived import PEER, Overview, Row, rung_place
from ..figures.phrases import environment_name, machine_name
from ..measure.conditions import commit
from ..terminal.visible import counted, visible
from ..trajectory.case import Case
from ..trajectory.records import Record
from . import details
from .columns import table_of
from .page_input import PageInput
from .page_tables import PageTable, claim_tables, pipelines_tables, rivals_tables, tables_of
from .pipelines_table import PIPELINES_NOTE
from .rivals_table import RIVALS_NOTE
from .tables import NOTHING

if TYPE_CHECKING:
    from .drawings import ChartSet, Drawing

# Without a headline; of kernels alone.
_TITLE = "What a sample costs, measured"
_TITLE_OF_KERNELS = "The kernels, one by one"
_TITLE_OF_QUALITY = "What quality costs, in a closed world"
# Charts that stand side by side.
_PAIRS = (
    *(("frechet-ms", "frechet-flops"), ("kid-ms", "kid-flops")),
    ("sliced-wasserstein-ms", "sliced-wasserstein-flops"),
    ("guidance-frechet", "guidance-kid", "guidance-sliced-wasserstein", "guidance-alignment"),
    *(("fid", "fid-flops"), ("cost", "images", "joules")),
)
# Tables with a heading of their own.
_OF_THEIR_OWN = ("pipelines", "rivals", "history")


def content_of(page: PageInput, charts: ChartSet, tables: Mapping[str, PageTable]) -> dict[str, object]:
    """The names that page.html.j2 shows; styles, scripts and data come from elsewhere.

    tables: `tables_in` the page.
    """
    shown, judged = page.overview, page.judged
    rows, table = shown.all_rows, table_of(shown)
    return {
        "title": _title(page),
        "headline": page.headline,
        "sentence": _sentence(rows) if rows else "" if page.sections else NOTHING,
        "sources": page.sources,
        "shared": text.joined(table.shared),
        "verdicts": summaries(judged),
        "only_timed": only_timed(judged),
        "left_open": left_open(judged),
        "verdicts_shared": text.joined(shared_by_all(judged).values()),
        "warnings": (*_rejected(page.rejected_lines), *table.warnings),
        "has_rows": bool(rows),
        "has_quality": bool(page.quality),
        "apart": len(shown.environments) > 1,
        "figures": _figures(charts),
        "small": {chart.name for chart in charts.charts if chart.is_small},
        "svgs": charts.svgs(),
        "of_quality": {chart.name for chart in charts.charts if chart.is_of_quality},
        "not_drawn": _not_drawn(page, charts),
        "titles": {*(of.title for of in page.side_by_side), *(of.title for of in page.sections)},
        "tables": [table for name, table in tables.items() if "-" not in name and name not in _OF_THEIR_OWN],
        "notes": table.notes,
        "checkpoints": sorted({(visible(r.name), visible(_origin(r.case))) for r in rows if r.case.is_checkpoint}),
        "pipelines": [table for name, table in tables.items() if name.startswith("pipelines")],
        "pipelines_note": PIPELINES_NOTE,
        "rivals": [table for name, table in tables.items() if name.startswith("rivals")],
        "rivals_note": RIVALS_NOTE,
        "history": page.history if "history" in tables else None,
        "history_table": tables.get("history"),
        "sides": [(side, tables.get(f"sides-{place}")) for place, side in enumerate(page.side_by_side)],
        "sections": [(section, tables.get(f"section-{place}")) for place, section in enumerate(page.sections)],
        "claims": [(of, _of_claim(of, tables)) for of in judged if of.has_figures],
        "published_readings": published_readings,
        "environments": _environments(shown),
        "harness": details.harness_lines([row.record for row in rows]),
        "has_energy": any(row.record.mean_power_w is not None for row in rows),
        "peer": PEER if any(row.case.backend == PEER for row in rows) else "",
    }


def tables_in(page: PageInput) -> dict[str, PageTable]:
    """Every table of a page that has rows, by its name."""
    found = [*tables_of(page.overview), *pipelines_tables(page.overview), *rivals_tables(page.overview)]
    if page.history is not None:
        found.append(PageTable("history", "Each case on each commit.", page.history.grid()))
    grids = [(f"sides-{at}", side.title, side.grid) for at, side in enumerate(page.side_by_side)]
    grids += [(f"section-{at}", section.title, section.grid) for at, section in enumerate(page.sections)]
    found += [PageTable(name, title, grid.without_empty()) for name, title, grid in grids]
    found += [table for of in page.judged if of.has_figures for table in claim_tables(of)]
    return {table.name: table for table in found if table.grid.rows}


def _of_claim(of: ClaimVerdicts, tables: Mapping[str, PageTable]) -> list[PageTable]:
    return [table for name, table in tables.items() if name.startswith(f"claim-{of.claim.id}-")]


def _not_drawn(page: PageInput, charts: ChartSet) -> list[Drawing]:
    """Charts that these records lack something for, of the kinds of records that are here."""
    has = {True: bool(page.quality), False: bool(page.overview.all_rows)}
    pairs = zip(charts.charts, charts.drawings, strict=True)
    return [drawing for chart, drawing in pairs if drawing.chart is None and has[chart.is_of_quality]]


def _figures(charts: ChartSet) -> list[list[Drawing]]:
    """The charts that are drawn, those of a pair together."""
    drawn = {drawing.name: drawing for drawing in charts.drawings if drawing.chart is not None}
    first_of = {name: pair for pair in _PAIRS for name in pair}
    groups = dict.fromkeys(first_of.get(name, (name,)) for name in drawn)
    return [[drawn[name] for name in group if name in drawn] for group in groups]


def _rejected(count: int) -> list[str]:
    if not count:
        return []
    one = count == 1
    return [
        f"{counted(count, 'line')} of the record files {'is' if one else 'are'} no whole record and "
        f"{'was' if one else 'were'} set aside; nothing here comes from {'it' if one else 'them'}."
    ]


def _title(page: PageInput) -> str:
    if page.headline is not None:
        return page.headline.sentence
    if page.quality and not page.overview.all_rows:
        return _TITLE_OF_QUALITY
    return _TITLE_OF_KERNELS if page.sections and not page.overview.all_rows else _TITLE


def _sentence(rows: Sequence[Row]) -> str:
    """What was measured, how much of it, and when."""
    apart = {"rival": "rival generator", "pipeline": "whole pipeline"}
    family = "latent-diffusion UNet"
    found = Counter(name for name, _ in {(apart.get(row.case.task, family), row.case.network) for row in rows})
    networks = [counted(found[name], name) for name in (family, *apart.values()) if found[name]]
    backends = sorted({visible(row.case.backend) for row in rows}, key=lambda name: (rung_place(name), name))
    timed = sum(row.record.wall_ms is not None for row in rows)
    days = sorted({row.record.started_at.date().isoformat() for row in rows})
    cases = len({row.record.case_key for row in rows})
    often = f", measured {len(rows)} times in {len({row.environment for row in rows})} environments"
    ends = ", from noise to latents," if found[family] else ""
    return (
        f"The wall-clock time of whole sampling trajectories{ends} of "
        f"{' and '.join(networks)} with {_listed(backends)}: {counted(cases, 'case')}"
        f"{often if len(rows) > cases else ''}, {timed} with a time and {len(rows) - timed} without, "
        f"{days[0] if len(days) == 1 else f'{days[0]} to {days[-1]}'} (UTC)."
    )


def _listed(names: Sequence[str]) -> str:
    """ "torch, triton and graph"."""
    return " and ".join([part for part in (text.joined(names[:-1]), *names[-1:]) if part])


def _environments(shown: Overview) -> list[tuple[str, list[tuple[str, str]]]]:
    """Name and lines of each; the rows of each are looked through once."""
    records: dict[int, list[Record]] = {}
    for row in shown.all_rows:
        records.setdefault(row.environment, []).append(row.record)
    return [
        (
            text.joined(
                (f"Environment {environment_name(index)}", visible(machine_name(environment)), commit(environment))
            ),
            details.environment_lines(shown.measured_in[index]) + details.device_lines(records.get(index, ())),
        )
        for index, environment in enumerate(shown.environments)
    ]


def _origin(case: Case) -> str:
    """Which checkpoint it is: where it lay, as older records have it, or what its files add up to."""
    return case.unet if case.weights_sha256 is None else f"whose weights have the SHA-256 {case.weights_sha256}"
