"""Compiled kernels with one thing taken away: what the emulator has to notice, by a finding or by wrong numbers.

A mutant that is not noticed is either a hole in the checks or code that was not needed: a barrier that another one
follows, a mask that is true for all elements of the shape.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

_GUARD = r"(?:@!?%p\d+\s+)?"


@dataclass(frozen=True)
class Mutant:
    """A kernel's PTX without one instruction, or with a weaker one.

    line  of the PTX, from 1, and `text` what was there
    """

    kind: str
    line: int
    text: str
    ptx: str = field(repr=False)


def _gone(_: re.Match[str]) -> str:
    return "// taken away"


def _less(found: re.Match[str]) -> str:
    return f"{found[1]}{int(found[2]) + 1}"


# What is done to the lines that a pattern fits: the whole line where it is taken away.
MUTATIONS: Mapping[str, tuple[str, Callable[[re.Match[str]], str]]] = {
    "barrier": (r"^\s*(?:bar|barrier)(?:\.cta)?\.sync\s.*$", _gone),
    "warp barrier": (r"^\s*bar\.warp\.sync\s.*$", _gone),
    "wait of a copy": (r"^\s*cp\.async\.wait_(?:group|all).*$", _gone),
    "wait of one copy less": (r"^(\s*cp\.async\.wait_group\s+)(\d+)", _less),
    "wait of a matmul": (r"^\s*wgmma\.wait_group.*$", _gone),
    "proxy fence": (r"^\s*fence\.proxy.*$", _gone),
    "mask of a load": (r"^(\s*)@!?%p\d+\s+(ld\.global.*)$", lambda found: found[1] + found[2]),
    "mask of a store": (r"^(\s*)@!?%p\d+\s+(st\.global.*)$", lambda found: found[1] + found[2]),
    "shared store": (rf"^\s*{_GUARD}(?:st\.shared|stmatrix).*$", _gone),
    "global store": (rf"^\s*{_GUARD}st\.global.*$", _gone),
}


def mutants(ptx: str) -> Iterator[Mutant]:
    """Every mutant of a kernel, kind by kind."""
    lines = ptx.split("\n")
    for kind, (pattern, change) in MUTATIONS.items():
        for number, line in enumerate(lines):
            changed = re.sub(pattern, change, line)
            if changed != line:
                yield Mutant(
                    kind, number + 1, line.strip(), "\n".join([*lines[:number], changed, *lines[number + 1 :]])
                )
