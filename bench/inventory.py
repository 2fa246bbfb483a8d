"""Write the tables of docs/step-inventory.md: `make inventory`.

Takes diffusers, no GPU. tests/test_inventory.py fails while the document differs from what this writes.
"""

import re
import sys
from pathlib import Path

from ldmperf.profiling.inventory import SIZES, inventory, markdown

DOCUMENT = Path(__file__).parents[1] / "docs" / "step-inventory.md"
BLOCK = re.compile(r"(<!-- inventory: .*?-->\n).*?(<!-- end of inventory -->)", re.DOTALL)


def with_inventory(document: str) -> str:
    """The document's text with the tables between its markers."""
    match = BLOCK.search(document)
    if match is None:
        raise SystemExit(f"{DOCUMENT.name}: no '<!-- inventory: ... -->' ... '<!-- end of inventory -->'")
    tables = markdown(inventory(size) for size in SIZES)
    return f"{document[: match.end(1)]}\n{tables}\n\n{document[match.start(2) :]}"


def main() -> None:
    DOCUMENT.write_text(with_inventory(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
