"""Whether a kernel's addresses can leave 32 bits: ranges of integers followed through Triton's IR.

Every integer that leads to an address gets the range that it can have in one launch, from the launch's own numbers
and its number of programs. A 32-bit operation whose exact result does not fit is an overflow: a wrong address.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Range = tuple[int, int]
INT32: Range = (-(2**31), 2**31 - 1)
INT64: Range = (-(2**63), 2**63 - 1)

_LOCATION = re.compile(r"\s*loc\([^()]*(?:\([^()]*\))*[^()]*\)\s*$")
_RESULT = re.compile(r"^\s*(%[\w#$.-]+)(?::\d+)? = \"?([\w.]+)\"?(.*)$")
_VALUE = re.compile(r"%[\w$.-]+(?:#\d+)?")
_FOR = re.compile(r"scf\.for (%[\w$.-]+) = (%[\w$.-]+) to (%[\w$.-]+) step")
_CARRIED = re.compile(r"(%[\w$.-]+) = (%[\w$.-]+(?:#\d+)?)[,)]")
_BLOCK_ARGUMENT = re.compile(r"(%[\w$.-]+): ")
_RANGE = re.compile(r"end = (\d+) : i32, start = (\d+) : i32")
_CONSTANT = re.compile(r"^ (?:dense<)?(-?\d+)>? : ")


@dataclass(frozen=True)
class _Operation:
    name: str
    operands: tuple[str, ...]
    text: str

    @property
    def bits(self) -> int:
        """Of the integer result; 0 for another type."""
        found = re.search(r"[\sx]i(1|8|16|32|64)>?$", self.text)
        return int(found[1]) if found else 0


def _divided(a: Range, b: Range) -> Range:
    """Truncated division by what is positive."""
    low, high = max(b[0], 1), max(b[1], 1)
    ends = [abs(x) // y * (1 if x >= 0 else -1) for x in a for y in (low, high)]
    return min(ends), max(ends)


def _remainder(a: Range, b: Range) -> Range:
    largest = max(b[1] - 1, 0)
    return (0 if a[0] >= 0 else -largest), min(max(a[1], 0), largest)


def _multiplied(a: Range, b: Range) -> Range:
    products = [x * y for x in a for y in b]
    return min(products), max(products)


def _unsigned(function: Callable[[Range, Range], Range]) -> Callable[[Range, Range], Range]:
    """The same of what is not negative. Triton itself divides so the passes of a loop that it unrolls."""
    return lambda a, b: function((max(a[0], 0), max(a[1], 0)), (max(b[0], 0), max(b[1], 0)))


_ARITHMETIC: Mapping[str, Callable[[Range, Range], Range]] = {
    "arith.addi": lambda a, b: (a[0] + b[0], a[1] + b[1]),
    "arith.subi": lambda a, b: (a[0] - b[1], a[1] - b[0]),
    "arith.muli": _multiplied,
    "arith.divsi": _divided,
    "arith.remsi": _remainder,
    "arith.divui": _unsigned(_divided),
    "arith.remui": _unsigned(_remainder),
    "arith.minsi": lambda a, b: (min(a[0], b[0]), min(a[1], b[1])),
    "arith.maxsi": lambda a, b: (max(a[0], b[0]), max(a[1], b[1])),
}
_SAME = {
    "tt.splat",
    "tt.broadcast",
    "tt.expand_dims",
    "tt.reshape",
    "tt.trans",
    "arith.extsi",
    "ttg.convert_layout",
}


class _Ranges:
    """The ranges of a kernel's integers, computed when asked for, and the overflows met on the way."""

    def __init__(self, ttir: str, arguments: Mapping[str, Any], programs: int) -> None:
        self.programs = programs
        self.known: dict[str, Range] = {
            f"%{name}": (int(value), int(value)) for name, value in arguments.items() if isinstance(value, int)
        }
        # A name may be defined again in another region, so every definition gets a number.
        self.numbers: dict[str, str] = {}
        self.definitions = 0
        self.operations: dict[str, _Operation] = {}
        self.loops: dict[str, tuple[str, str]] = {}
        self.offsets: list[str] = []
        self.overflows: dict[str, str] = {}
        for line in ttir.splitlines():
            self._read(_LOCATION.sub("", line))

    def _define(self, name: str) -> str:
        self.definitions += 1
        number = f"{name} {self.definitions}"
        self.numbers[name] = number
        return number

    def _read(self, line: str) -> None:
        loop = _FOR.search(line)
        if loop:
            bounds = (self._use(loop[2]), self._use(loop[3]))
            self.loops[self._define(loop[1])] = bounds
        block_arguments = _BLOCK_ARGUMENT.findall(line) if line.lstrip().startswith("^") else []
        for unknown in [name for name, _ in _CARRIED.findall(line)] + block_arguments:
            self._define(unknown)
        result = _RESULT.match(line)
        if result is None:
            return
        name, operation, text = result.groups()
        operands = tuple(self._use(operand) for operand in _VALUE.findall(text))
        number = self._define(name)
        if loop is None:
            self.operations[number] = _Operation(operation, operands, text.rstrip())
        if operation == "tt.addptr":
            self.offsets.append(operands[1])

    def _use(self, name: str) -> str:
        return self.numbers.get(name, name)

    def of(self, value: str) -> Range:
        if value not in self.known:
            self.known[value] = INT64
            self.known[value] = self._compute(value)
        return self.known[value]

    def _compute(self, value: str) -> Range:
        if value in self.loops:
            first, end = (self.of(bound) for bound in self.loops[value])
            return first[0], max(end[1] - 1, first[0])
        operation = self.operations.get(value)
        if operation is None:
            # What a loop carries or a branch yields, or a number that is no integer.
            return INT64
        name, operands = operation.name, operation.operands
        limits = INT32 if operation.bits == 32 else INT64
        if name == "arith.constant":
            constant = _CONSTANT.match(operation.text)
            return (int(constant[1]), int(constant[1])) if constant else limits
        if name == "tt.get_program_id":
            return 0, max(self.programs - 1, 0)
        if name == "tt.get_num_programs":
            return self.programs, self.programs
        if name == "tt.make_range":
            found = _RANGE.search(operation.text)
            return (int(found[2]), int(found[1]) - 1) if found else limits
        if name in _SAME:
            return self.of(operands[0])
        if name == "arith.select":
            a, b = self.of(operands[1]), self.of(operands[2])
            return min(a[0], b[0]), max(a[1], b[1])
        if name not in _ARITHMETIC:
            return limits
        exact = _ARITHMETIC[name](self.of(operands[0]), self.of(operands[1]))
        if exact[0] < limits[0] or exact[1] > limits[1]:
            if operation.bits == 32:
                self.overflows[value] = (
                    f"{value.split()[0]} = {name}{operation.text} reaches {exact[0]} to {exact[1]}"
                )
            return limits
        return exact


def int32_overflows(ttir: str, arguments: Mapping[str, Any], programs: int) -> list[str]:
    """The 32-bit operations on the way to an address that overflow in a launch with these arguments, a line each.

    What a loop carries or memory holds counts as unknown: an operation on it that could overflow is told.
    """
    ranges = _Ranges(ttir, arguments, programs)
    for offset in ranges.offsets:
        ranges.of(offset)
    return list(ranges.overflows.values())


def address_count(ttir: str) -> int:
    """How many pointer additions the IR has."""
    return len(re.findall(r"= tt\.addptr ", ttir))
