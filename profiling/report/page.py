"""The page: one file that holds its figures, its charts and what draws them, and loads nothing."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..measure.store import write_whole
from ..terminal.visible import visible
from .page_content import content_of, tables_in
from .page_input import PageInput
from .page_tables import PageTable, label_of

if TYPE_CHECKING:
    from .drawings import ChartSet

PAGE_NAME = "report.html"
# Of what is in the page, only these scripts run, and nothing is fetched, whatever a record's text holds.
_POLICY = "default-src 'none'; script-src {}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'"


class ReportUnavailable(ModuleNotFoundError):
    """A package that charts or page need (`name`) is not installed; the text is one line on how to install it."""


def write_page(page: PageInput, path: Path) -> None:
    """Writes the page to one file, which is replaced whole or not at all.

    Raises ReportUnavailable when a package is missing, OSError when the file cannot be written.
    """
    html = _html(page, _chart_set(page))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, html.encode())


def write_report(page: PageInput, directory: Path) -> list[Path]:
    """Writes report.html and the charts (PNG and SVG) to the folder; returns their paths, the page first.

    Each file is replaced whole or not at all. A chart of an earlier report is removed where these records have no
    data for it. Raises as `write_page` does.
    """
    charts = _chart_set(page)
    html = _html(page, charts)
    directory.mkdir(parents=True, exist_ok=True)
    written = charts.write(directory)
    # The page last: whoever sees it finds the charts beside it.
    write_whole(directory / PAGE_NAME, html.encode())
    return [directory / PAGE_NAME, *written]


def _chart_set(page: PageInput) -> ChartSet:
    try:
        import jinja2  # noqa: F401

        from .drawings import ChartSet
    except ImportError as missing:
        name = missing.name or "altair"
        raise ReportUnavailable(
            f"charts and page need {name}: pip install altair vl-convert-python jinja2", name=name
        ) from missing
    first = None if page.headline is None else page.headline.small
    return ChartSet.of(page.overview, page.history, first, page.quality)


def _html(page: PageInput, charts: ChartSet) -> str:
    import jinja2

    scripts = (_vega(), _resource("page.js"))
    allowed = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    tables = tables_in(page)
    content = content_of(page, charts, tables) | {
        "policy": _POLICY.format(allowed),
        "css": _resource("page.css"),
        "scripts": scripts,
        "island": _island(page, charts, tables),
    }
    engine = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Whatever text the template shows; not the markup of charts, styles and scripts.
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    return engine.from_string(_resource("page.html.j2")).render(content)


def _island(page: PageInput, charts: ChartSet, tables: Mapping[str, PageTable]) -> str:
    """What the script works on, as JSON that no text in it can end."""
    value: dict[str, Any] = {
        "facts": {name: table.as_json() for name, table in charts.facts.tables.items()},
        "filters": [
            {"name": name, "label": label_of(name), "values": values}
            for name, values in charts.facts.filters.items()
        ],
        "first": charts.facts.first,
        "legend": {of.column: [asdict(series) for series in of.series] for of in charts.palettes},
        "charts": charts.for_browser(),
        "tables": {name: table.rest for name, table in tables.items()},
    }
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


@cache
def _vega() -> str:
    """What draws charts in the browser: Vega, as vl-convert has it, for a script element."""
    import vl_convert

    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return bundle.replace("</script", r"<\/script")


def _resource(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
