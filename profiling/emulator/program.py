"""PTX as Triton compiles it, read into instructions: one kernel, its parameters, its labels, its source lines.

PTX ISA 8.7, sections 4 (syntax), 5.2 (types), 11.1 (directives). What is not read raises `UnknownInstruction`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

# The types of instructions and the numpy dtypes that hold them. bf16 and f16 are held as their bits.
DTYPES: Mapping[str, np.dtype[np.generic]] = {
    kind: np.dtype(dtype)
    for kind, dtype in {
        **{"b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16, "u16": np.uint16, "s16": np.int16},
        **{"b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32, "f64": np.float64},
        **{"b64": np.uint64, "u64": np.uint64, "s64": np.int64, "bf16": np.uint16, "f16": np.uint16},
        **{"bf16x2": np.uint32, "f16x2": np.uint32, "tf32": np.uint32, "pred": np.bool_},
    }.items()
}
# By the bytes of a register.
UNSIGNED: Mapping[int, np.dtype[np.generic]] = {n: np.dtype(f"u{n}") for n in (1, 2, 4, 8)}

Operand = str | tuple[str, ...]
# Access widths in bytes that memory is watched by, where a kernel has no narrower one.
_WIDEST = 16


class UnknownInstruction(Exception):
    """PTX that the emulator does not execute; the message quotes it."""


@dataclass(frozen=True, slots=True)
class PtxInstruction:
    """One statement. `add.rn.f32 %f3, %f1, %f2;` has opcode "add", modifiers ("rn", "f32"), three operands.

    line            of the PTX, from 1
    source          where in the kernel's source it comes from: "kernel.py:86:25 @[ kernel.py:334:99 ]", or ""
    guard           the predicate of `@%p1`, None without; `negated`: of `@!%p1`
    modifiers       "::" in them is "__"
    operands        text; those in braces as tuples
    register_bytes  of the program's registers, by the prefix of their names
    """

    line: int
    text: str
    source: str
    guard: str | None
    negated: bool
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    register_bytes: Mapping[str, int] = field(repr=False, compare=False)

    @property
    def kind(self) -> str:
        """The last modifier: the type that it computes in."""
        return self.modifiers[-1] if self.modifiers else ""

    @property
    def registers(self) -> frozenset[str]:
        """Every register that its operands name."""
        return frozenset(
            name
            for operand in self.operands
            for part in ([operand] if isinstance(operand, str) else operand)
            for name in re.findall(r"%[a-z]+\d+", part)
        )

    def operand(self, index: int) -> str:
        """An operand that is one value. UnknownInstruction where it is a list or missing."""
        value = self.operands[index] if index < len(self.operands) else ()
        if not isinstance(value, str):
            raise UnknownInstruction(self.text)
        return value

    def values(self, index: int) -> tuple[str, ...]:
        """An operand as a list of one or several."""
        value = self.operands[index]
        return (value,) if isinstance(value, str) else value

    def bytes_of(self, register: str) -> int:
        """The size of a register, as it was declared."""
        return self.register_bytes[register.rstrip("0123456789")]


@dataclass(frozen=True)
class PtxProgram:
    """A kernel's code.

    parameters  (type, name) in order
    threads     of a program (a thread block)
    labels      the index of the instruction that follows each
    shared      names of arrays in shared memory, all of which start at address 0
    granules    "shared", "global": the narrowest access in bytes, which memory is watched by
    files       paths of the source files, by the names that `source` has
    arch        what it is compiled for: "sm_90", also of sm_90a
    """

    name: str
    parameters: tuple[tuple[str, str], ...]
    threads: int
    instructions: tuple[PtxInstruction, ...]
    labels: Mapping[str, int]
    shared: frozenset[str]
    granules: Mapping[str, int]
    files: Mapping[str, str]
    arch: str


def parse_ptx(ptx: str) -> PtxProgram:
    """Reads the first kernel of a PTX file. UnknownInstruction for syntax that it does not know."""
    entry = re.search(r"\.visible \.entry ([\w$]+)\((.*?)\)\s*(.*?)\{(.*?)\n\}", ptx, re.DOTALL)
    if entry is None:
        raise UnknownInstruction("no .visible .entry: this is no kernel in PTX")
    name, parameters, attributes, body = entry.groups()
    threads = re.search(r"\.(?:reqntid|maxntid) (\d+)(?:, (\d+), (\d+))?", attributes)
    if threads is None or (threads[2] or "1", threads[3] or "1") != ("1", "1"):
        raise UnknownInstruction(f"threads of {name} are not told, or in more than one dimension: {attributes}")
    widths = {
        prefix: 1 if kind == "pred" else DTYPES[kind].itemsize
        for kind, prefix in re.findall(r"\.reg\s+\.(\w+)\s+(%[a-z]+)<\d+>;", body)
    }
    first_line = ptx[: entry.start(4)].count("\n") + 1
    instructions, labels = _statements(body, first_line, widths)
    granules = {space: _granule(instructions, space) for space in ("shared", "global")}
    folders = re.findall(r'^\s*\.file\s+\d+ "([^"]*)"(?: "([^"]*)")?', ptx, re.MULTILINE)
    paths = [f"{folder}/{file}" if file else folder for folder, file in folders]
    return PtxProgram(
        name,
        tuple(re.findall(r"\.param \.(\w+)[^,\n]*?([\w$]+_param_\d+)", parameters)),
        int(threads[1]),
        tuple(instructions),
        labels,
        frozenset(re.findall(r"\.shared \.align \d+ \.b8 (\w+)\[\d*\];", ptx)),
        granules,
        {path.rsplit("/", 1)[-1]: path for path in paths},
        "".join(re.findall(r"^\.target (sm_\d+)", ptx, re.MULTILINE)[:1]),
    )


def _statements(
    body: str, first_line: int, widths: Mapping[str, int]
) -> tuple[list[PtxInstruction], dict[str, int]]:
    instructions: list[PtxInstruction] = []
    labels: dict[str, int] = {}
    source = ""
    for number, raw in enumerate(body.split("\n"), first_line):
        code, _, comment = raw.partition("//")
        text = code.strip()
        if text.startswith(".loc"):
            source = comment.strip() or text
        if not text or text.startswith(".") or text in "{}":
            continue
        if label := re.fullmatch(r"([$\w]+):", text):
            labels[label[1]] = len(instructions)
            continue
        for statement in filter(None, (part.strip() for part in text.strip("{}").split(";"))):
            if not statement.startswith("."):
                instructions.append(_instruction(number, statement, source, widths))
    return instructions, labels


def _instruction(line: int, text: str, source: str, widths: Mapping[str, int]) -> PtxInstruction:
    found = re.fullmatch(r"(?:@(!?)(%p\d+)\s+)?([\w.:]+)\s*(.*)", text, re.DOTALL)
    if found is None:
        raise UnknownInstruction(text)
    negated, guard, operation, rest = found.groups()
    opcode, *modifiers = operation.replace("::", "__").split(".")
    return PtxInstruction(
        line, text, source, guard, bool(negated), opcode, tuple(modifiers), _operands(rest), widths
    )


def _operands(text: str) -> tuple[Operand, ...]:
    """Operands are parted by commas outside of braces and brackets."""
    parts = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", text)
    return tuple(
        tuple(value.strip() for value in part[1:-1].split(",")) if part.startswith("{") else part.strip()
        for part in parts
    )


def _granule(instructions: list[PtxInstruction], space: str) -> int:
    """The narrowest access of a space: a matrix instruction's rows are 16 bytes, a wgmma reads single elements."""
    least = _WIDEST
    for i in instructions:
        if i.opcode in ("ld", "st", "atom", "red") and any(m.startswith(space) for m in i.modifiers):
            least = min(least, int(re.sub(r"\D", "", i.kind) or 32) // 8)
        if space == "shared" and i.opcode == "wgmma" and i.modifiers[0] == "mma_async":
            least = min(least, 2)
    return least
