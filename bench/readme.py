"""Write the table of README.md from the record set that its marker names: `make readme`.

tests/test_readme.py fails while the two differ, so no figure in the table was typed by hand.
"""

import re
import sys
from pathlib import Path

from ldmperf.profiling import load_records
from ldmperf.profiling.report import markdown_table, overview

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- table: (\S+) .*?-->\n).*?(<!-- end of table -->)", re.DOTALL)


def with_table(readme: str) -> str:
    """README's text with the table of the records between its markers."""
    match = BLOCK.search(readme)
    if match is None:
        raise SystemExit("README.md: no '<!-- table: PATH ... -->' ... '<!-- end of table -->'")
    records, rejected = load_records(ROOT / match.group(2))
    if rejected:
        raise SystemExit(f"{match.group(2)}: {rejected} lines are not records")
    table = markdown_table(overview(records))
    return readme[: match.end(1)] + "\n" + table.strip() + "\n\n" + readme[match.start(3) :]


def main() -> None:
    path = ROOT / "README.md"
    path.write_text(with_table(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
