"""The blocks of pages that scripts write."""

from __future__ import annotations

import pytest
from markers import with_blocks

PAGE = """# Title
<!-- table: a.jsonl (do not edit) -->
old
<!-- end of table -->
between <!-- other: x -->
<!-- table: b.jsonl -->
<!-- end of table -->
<!-- finding: -->
older
<!-- end of finding -->
"""


def test_each_block_is_written_and_nothing_else() -> None:
    seen: list[str] = []

    def table(argument: str) -> str:
        seen.append(argument)
        return f"\n{len(seen)} \\1\n"

    written = with_blocks(PAGE, {"table": table})
    assert seen == ["a.jsonl (do not edit)", "b.jsonl"]
    assert written == PAGE.replace("old\n<", "\n1 \\1\n\n<").replace("b.jsonl -->\n", "b.jsonl -->\n\n2 \\1\n\n")
    assert with_blocks(written, {"table": lambda argument: f"{1 + (argument == 'b.jsonl')} \\1"}) == written


@pytest.mark.parametrize("page", ["", "<!-- table: a -->\n", "<!-- table: a -->\n<!-- end of finding -->"])
def test_a_page_without_its_block_is_refused(page: str) -> None:
    with pytest.raises(SystemExit, match="table"):
        with_blocks(page, {"table": str})
