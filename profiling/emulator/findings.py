"""What is wrong with a kernel, found while its code ran: each kind once for each line of its source."""

from __future__ import annotations

import linecache
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .program import PtxInstruction

# Every kind of finding, and what it means.
KINDS: Mapping[str, str] = {
    "race": "threads of a program access the same memory, one of them writes, and no barrier is between",
    "race of programs": "programs of one launch access the same memory, and one of them writes",
    "conflicting stores": "one instruction stores different values to one place",
    "out of bounds": "an access to what no tensor of the launch covers, or outside its shared memory",
    "misaligned": "an address that the width of its access does not divide",
    "uninitialised": "a read of memory that nothing wrote",
    "unwritten register": "a register is read that nothing wrote",
    "copy not awaited": "memory is read or written that a cp.async is still writing",
    "matmul not awaited": "memory or a register is used that a wgmma still reads or writes",
    "missing fence": "a wgmma reads what was stored, and no fence.proxy.async is between",
    "divergent barrier": "not all threads reach a barrier together",
    "divergent warp": "an instruction of a whole warp or warp group is reached by part of it",
    "differing descriptor": "the threads of a warp group give their wgmma different matrices",
    "division by zero": "an integer is divided by zero",
    "early read": "a dependent launch reads before its wait, while launches before it may still write",
    "early write": "a dependent launch writes before its wait, while launches before it may still read or write",
    "no wait": "a program of a dependent launch ends and has not waited for the launches before it",
    "unfinished": "the kernel ends while a cp.async or a wgmma is on its way",
    "unwritten result": "part of a result was never written",
}


@dataclass(frozen=True)
class Finding:
    """One kind of fault at one place.

    source   the line of the kernel: "kernel.py:86", with the lines that it was inlined at; "" where not told
    code     what stands in that line, or in the first of them that is not Triton's own; "" where it is not there
    count    how often: accesses, or executions of the instruction
    detail   the first example: bytes, threads, registers
    ptx      the instruction, and `line` its line in the PTX
    """

    kind: str
    kernel: str
    source: str
    code: str
    count: int
    detail: str
    ptx: str
    line: int

    def __str__(self) -> str:
        where = f"{self.kernel} at {self.source or 'an unknown line'}" + (f" `{self.code}`" if self.code else "")
        told = "; ".join(filter(None, [self.detail, f"PTX line {self.line}: {self.ptx}" if self.ptx else ""]))
        return f"{self.kind}: {where}, {self.count} times" + (f" ({told})" if told else "")


@dataclass
class Findings:
    """Collects faults of the launches that it is given to.

    kernel  the launch's, and `files` the paths of its source by their names
    """

    kernel: str = ""
    files: dict[str, str] = field(default_factory=dict)
    _found: dict[tuple[str, str, int, str], list[Any]] = field(default_factory=dict)

    def add(self, kind: str, instruction: PtxInstruction | None, count: int = 1, detail: str = "") -> None:
        """Notes `count` faults of a kind of `KINDS` at an instruction, None for the launch as a whole."""
        if kind not in KINDS:
            raise AssertionError(f"{kind} is no kind of finding")
        line, source = (0, "") if instruction is None else (instruction.line, lines_of(instruction.source))
        key = (kind, self.kernel, line, source)
        text = "" if instruction is None else " ".join(instruction.text.split())[:120]
        self._found.setdefault(key, [0, detail, text])[0] += int(count)

    def __iter__(self) -> Iterator[Finding]:
        """One for each kind and line of source: that of the instruction with the most, and the sum of all.

        Instructions whose source is not told are not put together.
        """
        groups: dict[tuple[str, str, str, int], list[tuple[int, int, str, str]]] = {}
        for (kind, kernel, line, source), (count, detail, text) in self._found.items():
            groups.setdefault((kind, kernel, source, 0 if source else line), []).append(
                (count, line, detail, text)
            )
        for (kind, kernel, source, _), found in groups.items():
            _, line, detail, text = max(found)
            total = sum(count for count, *_ in found)
            yield Finding(kind, kernel, source, self._code(source), total, detail, text, line)

    def _code(self, source: str) -> str:
        for place in source.split(" in "):
            name, _, line = place.rpartition(":")
            path = self.files.get(name, "")
            if path and "/triton/language/" not in path:
                return linecache.getline(path, int(line)).strip()
        return ""

    def __bool__(self) -> bool:
        return bool(self._found)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @property
    def kinds(self) -> set[str]:
        return {kind for kind, *_ in self._found}


def lines_of(source: str) -> str:
    """A source without columns: "kernel.py:86:25 @[ kernel.py:334:99 ]" -> "kernel.py:86 in kernel.py:334".

    Line 0, which Triton tells where it knows none, is left out.
    """
    places = (re.fullmatch(r"(.+?:\d+)(?::\d+)?", part.strip(" ]")) for part in source.split("@["))
    return " in ".join(place[1] for place in places if place and not place[1].endswith(":0"))
