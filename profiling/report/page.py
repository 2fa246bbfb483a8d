"""The page of a run and its charts, written to a folder."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from ..claims.catalogue import published_readings
from ..claims.summary import left_open, only_timed, shared_by_all, summaries
from ..claims.verdict import ClaimVerdicts
from ..figures import text
from ..figures.derived import PEER, Overview, Row
from ..figures.phrases import environment_name
from ..measure.store import write_whole
from ..terminal.visible import counted, visible
from ..trajectory.case import Case
from . import details, ladder
from .columns import table_of
from .rivals_table import RIVALS_NOTE, RIVALS_TITLE, rivals_grid
from .tables import NOTHING

if TYPE_CHECKING:
    from .charts import Drawing

PAGE_NAME = "report.html"


class ReportUnavailable(ModuleNotFoundError):
    """A package that charts or page need (`name`) is not installed; the text is one line on how to install it."""


def write_report(
    shown: Overview, rejected_lines: int, directory: Path, judged: Sequence[ClaimVerdicts] = ()
) -> list[Path]:
    """Writes report.html and the charts (PNG and SVG) to the folder; returns their paths, the page first.

    judged: what the records say of the paper's claims, with which the page opens.

    Each file is replaced whole or not at all. A chart of an earlier report is removed where these records have no
    data for it. Raises ReportUnavailable when a package is missing, OSError when the folder cannot be written.
    """
    try:
        import jinja2
        import vl_convert  # noqa: F401  altair loads it when it renders, which is too late to say so

        from .charts import drawings
    except ImportError as missing:
        name = missing.name or "altair"
        raise ReportUnavailable(
            f"charts and page need {name}: pip install altair vl-convert-python jinja2", name=name
        ) from missing
    charts = drawings(shown)
    svgs = {drawing.name: drawing.svg() for drawing in charts if drawing.chart is not None}
    template = resources.files(__package__).joinpath("page.html.j2").read_text(encoding="utf-8")
    engine = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Whatever text the template shows; not the charts' markup.
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    page = engine.from_string(template).render(_content(shown, rejected_lines, judged), charts=charts, svgs=svgs)
    directory.mkdir(parents=True, exist_ok=True)
    written = write_charts(charts, svgs, directory)
    # The page last: whoever sees it finds the charts that it links.
    write_whole(directory / PAGE_NAME, page.encode())
    return [directory / PAGE_NAME, *written]


def _content(shown: Overview, rejected_lines: int, judged: Sequence[ClaimVerdicts]) -> dict[str, object]:
    """What the template shows: texts, and what makes them of a row."""
    rows, table = shown.all_rows, table_of(shown)
    return {
        "sentence": _sentence(rows),
        "table": table,
        "verdicts": summaries(judged),
        "only_timed": only_timed(judged),
        "left_open": left_open(judged),
        "verdicts_shared": text.joined(shared_by_all(judged).values()),
        "claims": [of for of in judged if of.has_figures],
        "published_readings": published_readings,
        "failure": text.failure,
        "facts": [column for column in table.columns if column.is_fact],
        "times": [column for column in table.columns if not column.is_fact],
        "failures": [(_case(row, shown), text.failure(row.record)) for row in rows if row.record.wall_ms is None],
        "checkpoints": sorted({(visible(r.name), visible(_origin(r.case))) for r in rows if r.case.is_checkpoint}),
        "lines": details.lines_grid(shown),
        "rivals": rivals_grid(shown),
        "rivals_title": RIVALS_TITLE,
        "rivals_note": RIVALS_NOTE,
        "ladder": ladder.ladder_grid(shown),
        "ladder_title": ladder.LADDER_TITLE,
        "groups": ladder.groups_grid(shown),
        "groups_title": ladder.GROUPS_TITLE,
        "costs": ladder.costs_grid(shown),
        "costs_title": ladder.costs_title(shown),
        "cases": details.cases_grid(shown),
        "environments": [
            (
                f"Environment {environment_name(index)}" if len(shown.environments) > 1 else "",
                details.environment_lines(environment)
                + details.device_lines(row.record for row in rows if row.environment == index),
            )
            for index, environment in enumerate(shown.environments)
        ],
        "harness": details.harness_lines([row.record for row in rows]),
        "has_energy": any(row.record.mean_power_w is not None for row in rows),
        "rejected_lines": rejected_lines,
        "peer": PEER if any(row.case.backend == PEER for row in rows) else "",
    }


def _sentence(rows: Sequence[Row]) -> str:
    """What was measured, how much of it, and when."""
    if not rows:
        return NOTHING
    family = {row.case.network for row in rows if row.case.task != "rival"}
    rivals = {row.case.network for row in rows if row.case.task == "rival"}
    networks = [counted(len(family), "latent-diffusion UNet")] if family else []
    networks += [counted(len(rivals), "rival generator")] if rivals else []
    backends = list(dict.fromkeys(visible(row.case.backend) for row in rows))
    timed = sum(row.record.wall_ms is not None for row in rows)
    days = sorted({row.record.started_at.date().isoformat() for row in rows})
    return (
        f"The wall-clock time of whole sampling trajectories{', from noise to latents,' if family else ''} of "
        f"{' and '.join(networks)} with {' and '.join(backends)}: "
        f"{counted(len(rows), 'case')}, {timed} with a time and {len(rows) - timed} without, "
        f"{days[0] if len(days) == 1 else f'{days[0]} to {days[-1]}'} (UTC)."
    )


def _origin(case: Case) -> str:
    """Which checkpoint it is: where it lay, as older records have it, or what its files add up to."""
    return case.unet if case.weights_sha256 is None else f"whose weights have the SHA-256 {case.weights_sha256}"


def _case(row: Row, shown: Overview) -> str:
    heading = shown.conditions.heading(row)
    return visible(text.joined((row.name, row.case.backend, heading)))


def write_charts(charts: Sequence[Drawing], svgs: dict[str, str], directory: Path) -> list[Path]:
    """Writes the charts as PNG and SVG (`svgs`, by name); returns their paths. Removes those not drawn."""
    written = []
    for drawing in charts:
        png, svg = directory / f"{drawing.name}.png", directory / f"{drawing.name}.svg"
        if drawing.chart is None:
            # An earlier report's chart would pass for one of these records.
            png.unlink(missing_ok=True)
            svg.unlink(missing_ok=True)
            continue
        write_whole(png, drawing.png())
        write_whole(svg, svgs[drawing.name].encode())
        written += [png, svg]
    return written
