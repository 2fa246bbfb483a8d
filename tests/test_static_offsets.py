"""Addresses past 2^31 elements: no 32-bit operation on the way to one overflows, shown on Triton's IR.

Ranges of integers are followed through the IR: every integer that leads to an address gets the range that it can
have in one launch, from the launch's own numbers and its number of programs. A 32-bit operation whose exact result
does not fit is an overflow: a wrong address.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest

pytest.importorskip("triton")

import torch
import triton
import triton.language as tl

from ldmperf.kernels import OPERATORS, Launch
from ldmperf.profiling.machines import MACHINES
from ldmperf.profiling.static.compile import compile_launch
from ldmperf.profiling.static.shapes import SHAPES, Shape

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
class Operation:
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


class Ranges:
    """The ranges of a kernel's integers, computed when asked for, and the overflows met on the way."""

    def __init__(self, ttir: str, arguments: Mapping[str, Any], programs: int) -> None:
        self.programs = programs
        self.known: dict[str, Range] = {
            f"%{name}": (int(value), int(value)) for name, value in arguments.items() if isinstance(value, int)
        }
        # A name may be defined again in another region, so every definition gets a number.
        self.numbers: dict[str, str] = {}
        self.definitions = 0
        self.operations: dict[str, Operation] = {}
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
            self.operations[number] = Operation(operation, operands, text.rstrip())
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
    ranges = Ranges(ttir, arguments, programs)
    for offset in ranges.offsets:
        ranges.of(offset)
    return list(ranges.overflows.values())


def address_count(ttir: str) -> int:
    """How many pointer additions the IR has."""
    return len(re.findall(r"= tt\.addptr ", ttir))


# Tensors past 2^31 elements: many images, one large image, long rows of few channels.
MANY, LARGE = {"batch": 160, "height": 512, "width": 512}, {"batch": 2, "height": 8192, "width": 8192}
HUGE = {
    "attention": [
        Shape(batch=4096, height=64, width=64, head_dim=40),
        Shape(batch=1, height=8192, width=8192, head_dim=8),
        Shape(batch=4096, height=64, width=64, head_dim=40, context=77),
        Shape(batch=1, height=8192, width=8192, head_dim=8, context=77),
    ],
    "group_norm_silu": [
        Shape(**MANY, channels=128),
        Shape(**LARGE, channels=64),
        Shape(batch=8, height=4096, width=4096, channels=32),
        Shape(**MANY, channels=64, skip_channels=64),
        Shape(**LARGE, channels=64, skip_channels=64),
        Shape(batch=1, height=2, width=2, channels=2**30, groups=2**18),
    ],
    "layer_norm": [
        Shape(batch=64, height=512, width=512, channels=320),
        Shape(batch=1, height=2**15, width=2**14),
    ],
    "linear": [
        Shape(batch=128, height=512, width=512, channels=64),
        Shape(height=32767, width=16384, channels=32, features=32),
        Shape(batch=32, height=512, width=512, channels=640, features=320),
    ],
    "transformer_front": [
        Shape(**MANY, channels=128),
        Shape(**LARGE, channels=64),
        Shape(**MANY, channels=96),
    ],
    "transformer_tail": [
        Shape(**MANY, channels=128, context=77),
        Shape(**LARGE, channels=64, context=77),
        Shape(batch=2**17, height=16, width=16, channels=96, context=128),
    ],
    "conv3x3": [
        Shape(**MANY, channels=128),
        Shape(**LARGE, channels=64),
        Shape(**MANY, channels=64, features=32, skip_channels=64),
    ],
    "geglu": [Shape(batch=64, height=512, width=512, channels=1280), Shape(height=65535, width=16383, channels=8)],
    "residual_add": [Shape(**MANY, channels=128), Shape(**LARGE, channels=64)],
    "sampler_update": [
        Shape(batch=4096, height=512, width=512, channels=4),
        Shape(batch=1, height=32768, width=32768, channels=4),
    ],
}
LAYOUTS = ("as the step has it", "contiguous", "sliced")


def huge_arguments(operator, shape, layout):
    """Arguments of an operator; "contiguous" images instead of channels-last ones, "sliced" out of larger ones."""
    build, _, _ = SHAPES[operator]
    arguments = build(shape)
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor) or value.dim() < 3 or name == "table":
            continue
        if layout == "contiguous":
            arguments[name] = torch.empty(value.shape, dtype=value.dtype, device="meta")
        elif layout == "sliced":
            cut = value.dim() - (2 if value.dim() == 3 else 1)
            sizes = [size + (axis == cut) for axis, size in enumerate(value.shape)]
            order = sorted(range(value.dim()), key=lambda axis: -value.stride(axis))
            larger = torch.empty([sizes[axis] for axis in order], dtype=value.dtype, device="meta")
            larger = larger.permute([order.index(axis) for axis in range(value.dim())])
            arguments[name] = larger.narrow(cut, 0, value.shape[cut])
    return arguments


def huge_calls():
    for operator in OPERATORS:
        for shape in HUGE[operator]:
            for layout in LAYOUTS:
                yield operator, huge_arguments(operator, shape, layout)
    small = huge_arguments("residual_add", Shape(batch=2, height=4096, width=4096, channels=64), LAYOUTS[0])
    for width in (8192, 8191):
        yield "residual_add", small | {"size": (8192, width)}
    # An enlarged image, larger than what it is made of.
    image = huge_arguments("conv3x3", Shape(batch=80, height=512, width=512, channels=64), LAYOUTS[0])
    image = {name: image[name] for name in ("x", "weight", "bias")} | {"upsample": True}
    yield "conv3x3", image
    yield (
        "conv3x3",
        image | {"weight": torch.empty(4, 64, 2, 2, 64, dtype=torch.bfloat16, device="meta").movedim(-1, 2)},
    )
    # Registers whose stride fits 32 bits, and its multiples do not.
    shape = Shape(batch=1, height=20_000, width=20_000, channels=4)
    registers = torch.empty(5, 1, 20_000, 20_000, 4, device="meta").permute(0, 1, 4, 2, 3)
    update = huge_arguments("sampler_update", shape, LAYOUTS[0])
    yield "sampler_update", update | {"registers": registers, "table": torch.empty(50, 5, 7, device="meta")}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "offsets-cache"))


def overflows(launch):
    """Of a launch compiled for sm_90; every pointer of the IR has been looked at."""
    ttir = compile_launch(launch, MACHINES["sm_90"]).asm["ttir"]
    assert address_count(ttir) > 0
    return int32_overflows(ttir, launch.arguments, launch.programs)


@pytest.mark.parametrize(("operator", "arguments"), list(huge_calls()))
def test_no_address_overflows_past_2_31_elements(operator, arguments):
    result, launches = OPERATORS[operator].plan(OPERATORS[operator].bind(**arguments))
    sizes = [value.numel() for value in (*arguments.values(), result) if isinstance(value, torch.Tensor)]
    assert launches
    assert max(sizes) > 2**31
    for launch in launches:
        assert overflows(launch) == []


@triton.jit
def copy_kernel(x_ptr, out_ptr, rows, columns, stride, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    start = row.to(tl.int64) * stride if WIDE else row * stride
    tl.store(out_ptr + row.to(tl.int64) * columns + offs, tl.load(x_ptr + start + offs, mask=offs < columns))


@triton.jit
def loop_kernel(x_ptr, out_ptr, rows, columns, stride, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for row in range(tl.program_id(0), rows):
        start = row.to(tl.int64) * stride if WIDE else row * stride
        total += tl.load(x_ptr + start + offs)
    tl.store(out_ptr + offs, total)


@pytest.mark.parametrize("kernel", [copy_kernel, loop_kernel])
@pytest.mark.parametrize(
    ("rows", "wide", "overflow"), [(2**20, False, True), (2**20, True, False), (2**18, False, 0)]
)
def test_the_overflow_of_a_kernel_without_64_bit_offsets_is_found(kernel, rows, wide, overflow):
    x = torch.empty(rows, 4096, device="meta")
    arguments = {
        "x_ptr": x,
        "out_ptr": x,
        "rows": rows,
        "columns": 4096,
        "stride": 4096,
        "WIDE": wide,
        "BLOCK": 1024,
    }
    found = overflows(Launch(kernel, rows, arguments))
    assert bool(found) == bool(overflow)
    if found:
        assert "arith.muli" in found[0]
        assert str(4096 * (2**20 - 1)) in found[0]


def test_division_and_remainder_bound_a_range():
    ttir = """
  tt.func public @k(%p: !tt.ptr<f32>, %n: i32) {
    %c3_i32 = arith.constant 3 : i32 loc(#loc1)
    %pid = tt.get_program_id x : i32 loc(#loc("a"("f.py":1:2)))
    %a = arith.divsi %pid, %c3_i32 : i32
    %b = arith.remsi %pid, %n : i32
    %c = arith.muli %a, %b : i32 loc(#loc3)
    %q = tt.addptr %p, %c : !tt.ptr<f32>, i32
"""
    assert int32_overflows(ttir, {"n": 1000}, 3 * 2**20) == []
    (line,) = int32_overflows(ttir, {"n": 2**12}, 3 * 2**20)
    assert line.startswith("%c = arith.muli")
    assert str((2**20 - 1) * (2**12 - 1)) in line
