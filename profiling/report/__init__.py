"""Terminal tables, charts and the HTML page of a run. The tables need neither of the others' packages.

`reporting` is `ldmperf report`. `tables`, `ladder`, `charts` and `page` show the numbers of `figures`; `columns`,
`details`, `notes`, `facts`, `chart_panels`, `drawings`, `palette`, `page_content`, `page_tables` are their parts.
"""

from .page import ReportUnavailable, write_page, write_report
from .tables import markdown_table, print_table

__all__ = ["ReportUnavailable", "markdown_table", "print_table", "write_page", "write_report"]
