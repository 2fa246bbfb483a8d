"""Write the tables of docs/step-inventory.md and docs/performance.md: `make inventory`.

Takes diffusers, no GPU. Where the marker of a document names a record set (measured: bench/results/....jsonl),
the times of our captured step are from it. tests/test_inventory.py fails while a document differs from what this
writes.
"""

import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from ldmperf.profiling import Record, load_records
from ldmperf.profiling.measure.recorded import KernelTime
from ldmperf.profiling.step.inventory import SIZES, TEXT_TOKENS, Inventory, floors_markdown, inventory, markdown

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
Measured = Mapping[str, Sequence[KernelTime]]
WRITERS: dict[str, Callable[[Sequence[Inventory], Measured], str]] = {
    "step-inventory.md": lambda inventories, _: markdown(inventories),
    "performance.md": floors_markdown,
}
BLOCK = re.compile(r"(<!-- inventory: (.*?)-->\n).*?(<!-- end of inventory -->)", re.DOTALL)


def with_inventory(name: str, document: str) -> str:
    """The text of a document of that name with the tables between its markers."""
    match = BLOCK.search(document)
    if match is None:
        raise SystemExit(f"{name}: no '<!-- inventory: ... -->' ... '<!-- end of inventory -->'")
    tables = WRITERS[name]([inventory(size) for size in SIZES], measured(match[2]))
    return f"{document[: match.end(1)]}\n{tables}\n\n{document[match.start(3) :]}"


def measured(marker: str) -> Measured:
    """The steps of the record set that a marker names, none where it names none."""
    named = re.search(r"measured: (\S+\.jsonl)", marker)
    return {} if named is None else measured_steps(load_records(ROOT / named[1])[0])


def measured_steps(records: Iterable[Record]) -> dict[str, tuple[KernelTime, ...]]:
    """By size, the kernels of our captured step in the inventory's case: guided, one image, bf16, 64x64."""
    found = {}
    for record in records:
        case = record.case
        sizes = (case.batch, case.latent_height, case.latent_width, case.context_tokens)
        is_ours = case.backend == "graph" and case.guided and case.dtype == "bfloat16"
        if is_ours and sizes == (1, 64, 64, TEXT_TOKENS) and record.trace is not None:
            found[case.network] = record.trace.step
    return {size: step for size, step in found.items() if step}


def main() -> None:
    for name in WRITERS:
        path = DOCS / name
        path.write_text(with_inventory(name, path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
