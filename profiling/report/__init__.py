"""Terminal tables, charts and the HTML page of a run. The tables need neither of the others' packages.

`reporting` is `ldmperf report`. `figures` derives numbers; `tables`, `ladder`, `charts` and `page` show them.
`columns`, `details`, `notes`, `phrases` and `text` are their parts.
"""

from .figures import overview
from .page import ReportUnavailable, write_report
from .tables import markdown_table, print_table

__all__ = ["ReportUnavailable", "markdown_table", "overview", "print_table", "write_report"]
