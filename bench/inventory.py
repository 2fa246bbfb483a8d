"""Write the tables of docs/step-inventory.md and docs/performance.md: `make inventory`.

Takes diffusers, no GPU. tests/test_inventory.py fails while a document differs from what this writes.
"""

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ldmperf.profiling.inventory import SIZES, Inventory, floors_markdown, inventory, markdown

DOCS = Path(__file__).parents[1] / "docs"
WRITERS: dict[str, Callable[[Sequence[Inventory]], str]] = {
    "step-inventory.md": markdown,
    "performance.md": floors_markdown,
}
BLOCK = re.compile(r"(<!-- inventory: .*?-->\n).*?(<!-- end of inventory -->)", re.DOTALL)


def with_inventory(name: str, document: str) -> str:
    """The text of a document of that name with the tables between its markers."""
    match = BLOCK.search(document)
    if match is None:
        raise SystemExit(f"{name}: no '<!-- inventory: ... -->' ... '<!-- end of inventory -->'")
    tables = WRITERS[name]([inventory(size) for size in SIZES])
    return f"{document[: match.end(1)]}\n{tables}\n\n{document[match.start(2) :]}"


def main() -> None:
    for name in WRITERS:
        path = DOCS / name
        path.write_text(with_inventory(name, path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
