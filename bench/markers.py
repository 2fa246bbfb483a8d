"""Blocks of pages that scripts write: from `<!-- NAME: ARGUMENT -->` to `<!-- end of NAME -->`."""

import re
from collections.abc import Callable, Mapping


def with_blocks(page: str, writers: Mapping[str, Callable[[str], str]]) -> str:
    """The page with each block of these names written anew: `writers[NAME](ARGUMENT)`, an empty line around it.

    SystemExit where the page has no such block.
    """
    names = "|".join(map(re.escape, writers))
    block = re.compile(rf"(<!-- ({names}): ([^\n]*?) ?-->\n).*?(<!-- end of \2 -->)", re.DOTALL)
    page, found = block.subn(lambda m: f"{m[1]}\n{writers[m[2]](m[3]).strip()}\n\n{m[4]}", page)
    if not found:
        raise SystemExit(f"no '<!-- {names}: ... -->' with its '<!-- end of ... -->'")
    return page
