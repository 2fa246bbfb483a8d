"""PTX as Triton compiles it, read into instructions: one kernel, its parameters, its labels, its source lines.

PTX ISA 8.7, sections 4 (syntax), 5.2 (types), 11.1 (directives). What is not read raises `UnknownInstruction`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
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

# Special registers (PTX ISA 10) that the emulator has.
SPECIAL = frozenset(
    {f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"} | {"%laneid", "%warpid"}
)

Operand = str | tuple[str, ...]
# Access widths in bytes that memory is watched by, where a kernel has no narrower one.
_WIDEST = 16
# A register, special or not: %r1, %tid.x, and %p$3, which is p of the third block in braces.
_REGISTER = re.compile(r"%[\w$]+(?:\.\w+)?")
# A name that is not a register's, nor part of a number or of an instruction.
_SYMBOL = re.compile(r"(?<![\w%$.])[A-Za-z_$][\w$]*")


class UnknownInstruction(Exception):
    """PTX that the emulator does not execute; the message quotes it."""


@dataclass(frozen=True, slots=True)
class PtxInstruction:
    """One statement. `add.rn.f32 %f3, %f1, %f2;` has opcode "add", modifiers ("rn", "f32"), three operands.

    line            of the PTX, from 1
    source          where in the kernel's source it comes from: "kernel.py:86:25 @[ kernel.py:334:99 ]", or ""
    guard           the predicate of `@%p1`, None without; `negated`: of `@!%p1`
    modifiers       "::" in them is "__"
    operands        text; those in braces as tuples. `registers`: all that they name. One that a block in braces
                    declares has the block's number: %p$3
    register_bytes  of the program's registers, by their names or by those without the number
    """

    line: int
    text: str
    source: str
    guard: str | None
    negated: bool
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    registers: frozenset[str]
    register_bytes: Mapping[str, int] = field(repr=False, compare=False)

    @property
    def kind(self) -> str:
        """The last modifier: the type that it computes in."""
        return self.modifiers[-1] if self.modifiers else ""

    def operand(self, index: int) -> str:
        """An operand that is one value. UnknownInstruction where it is a list or missing."""
        value = self.operands[index] if index < len(self.operands) else ()
        if not isinstance(value, str):
            raise UnknownInstruction(self.text)
        return value

    def values(self, index: int) -> tuple[str, ...]:
        """An operand as a list of one or several. UnknownInstruction where it is missing."""
        value = self.operands[index] if index < len(self.operands) else ()
        if not value:
            raise UnknownInstruction(self.text)
        return (value,) if isinstance(value, str) else value

    def bytes_of(self, register: str) -> int:
        """The size of a register, as it was declared."""
        size = _declared(register, self.register_bytes)
        if size is None:
            raise UnknownInstruction(f"{self.text}: {register} is not declared")
        return size


def _registers(operands: tuple[Operand, ...]) -> frozenset[str]:
    parts = (part for operand in operands for part in ([operand] if isinstance(operand, str) else operand))
    return frozenset(name for part in parts for name in _REGISTER.findall(part) if name not in SPECIAL)


def _declared(register: str, widths: Mapping[str, int]) -> int | None:
    """The bytes of a register, None for one that was not declared."""
    return widths.get(register, widths.get(register.rstrip("0123456789")))


@dataclass(frozen=True)
class PtxProgram:
    """A kernel's code.

    parameters  (type, name) in order
    threads     of a program (a thread block)
    labels      the index of the instruction that follows each
    shared      names of arrays in shared memory, all of which are extern and start at address 0
    granules    "shared", "global": the narrowest access in bytes, which memory is watched by
    files       paths of the source files, by the names that `source` has; without names that two files share
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
    code = _without_comments(ptx)
    entry = re.search(r"\.visible\s+\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{", code)
    if entry is None:
        raise UnknownInstruction("no .visible .entry: this is no kernel in PTX")
    name, listed, attributes = entry.groups()
    parameters = _parameters(listed)
    shared = frozenset(re.findall(r"\.extern\s+\.shared[^;]*?\s([\w$]+)\[\];", code))
    widths: dict[str, int] = {}
    instructions, labels = _instructions(_Body(ptx, code, entry.end(), widths), widths)
    _check_names(instructions, {*shared, *labels, "_"})
    return PtxProgram(
        name,
        parameters,
        _threads(name, attributes),
        tuple(instructions),
        labels,
        shared,
        {space: _granule(instructions, space) for space in ("shared", "global")},
        _files(ptx),
        "".join(re.findall(r"^\.target (sm_\d+)", ptx, re.MULTILINE)[:1]),
    )


def _without_comments(ptx: str) -> str:
    """PTX of the same length, with spaces for comments."""

    def blank(comment: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", comment[0])

    return re.sub(r"//[^\n]*|/\*.*?\*/", blank, ptx, flags=re.DOTALL)


def _parameters(listed: str) -> tuple[tuple[str, str], ...]:
    parameters = []
    for text in filter(None, (part.strip() for part in listed.split(","))):
        # A float16 or bfloat16 is passed as an array of two bytes.
        if half := re.fullmatch(r"\.param\s+\.align\s+2\s+\.b8\s+([\w$]+)\[2\]", text):
            parameters.append(("b16", half[1]))
            continue
        found = re.fullmatch(
            r"\.param\s+\.(\w+)(?:\s+\.ptr)?(?:\s+\.global)?(?:\s+\.align\s+\d+)?\s+([\w$]+)", text
        )
        if found is None or found[1] not in DTYPES:
            raise UnknownInstruction(f"parameter {' '.join(text.split())}")
        parameters.append((found[1], found[2]))
    return tuple(parameters)


def _threads(name: str, attributes: str) -> int:
    """Threads of a program: whole warps, in one dimension."""
    told: dict[str, str] = dict(re.findall(r"\.(\w+)\s+(\d+(?:\s*,\s*\d+)*)", attributes))
    sizes = [int(size) for size in told.get("reqntid", told.get("maxntid", "0")).split(",")]
    clusters = [int(size) for size in told.get("reqnctapercluster", "1").split(",")]
    if sizes[0] < 1 or sizes[0] % 32 or set(sizes[1:] + clusters) - {1}:
        raise UnknownInstruction(f"threads of {name}: {' '.join(attributes.split()) or 'not told'}")
    return sizes[0]


def _files(ptx: str) -> dict[str, str]:
    """Paths of source files by their names. A file is told by its path, or by its folder and name."""
    told = re.findall(r'^\s*\.file\s+\d+ "([^"]*)"(?: "([^"]*)")?', ptx, re.MULTILINE)
    paths = dict.fromkeys(f"{folder}/{file}" if file else folder for folder, file in told)
    names = [path.rsplit("/", 1)[-1] for path in paths]
    return {name: path for name, path in zip(names, paths, strict=True) if names.count(name) == 1}


# ---------------------------------------------------------------- statements


class _Block(dict[str, str]):
    """What a block in braces declares: names of registers and labels, and what they are in the whole kernel."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@dataclass(frozen=True)
class _Statement:
    line: int
    text: str
    source: str
    blocks: tuple[_Block, ...]


class _Body:
    """The statements of a kernel in order: iterating over it reads them, and what is declared on the way."""

    _PIECE = re.compile(
        r"[\s;]*(?:(?P<brace>[{}])|(?P<label>[\w$]+):(?!:)|(?P<loc>\.loc\b[^\n]*)|(?P<statement>[^{};\s][^;]*);)"
    )

    def __init__(self, ptx: str, code: str, begin: int, widths: dict[str, int]) -> None:
        self._ptx, self._code, self._begin, self._widths = ptx, code, begin, widths

    def __iter__(self) -> Iterator[_Statement]:
        at, line, source = self._begin, self._code.count("\n", 0, self._begin) + 1, ""
        blocks, opened = [_Block(0)], 0
        while blocks:
            piece = self._PIECE.match(self._code, at)
            if piece is None:
                raise UnknownInstruction(f"line {line}: {self._code[at : at + 80].strip()}")
            kind = str(piece.lastgroup)
            start = piece.start(kind)
            line, at = line + self._code.count("\n", at, start), start
            if kind == "brace" and piece[kind] == "{":
                opened += 1
                blocks.append(_Block(opened))
            elif kind == "brace":
                blocks.pop()
            elif kind == "loc" and not self._in_assembly(start):
                line_end = self._ptx.find("\n", start)
                told = self._ptx[start:line_end].partition("//")
                source = told[2].strip() or told[0].strip()
            elif kind == "label":
                if len(blocks) > 1:
                    blocks[-1][piece[kind]] = f"{piece[kind]}${blocks[-1].number}"
                yield _Statement(line, f"{piece[kind]}:", source, tuple(blocks))
            elif piece[kind].startswith(".reg"):
                self._declare(piece[kind], blocks)
            elif not piece[kind].startswith("."):
                yield _Statement(line, piece[kind].strip(), source, tuple(blocks))
            line, at = line + self._code.count("\n", at, piece.end()), piece.end()

    def _in_assembly(self, at: int) -> bool:
        """Whether a place is in inline assembly, all of which comes from the line before: triton 3.8 has more."""
        begun, ended = (self._ptx.rfind(f"// {what} inline asm", self._begin, at) for what in ("begin", "end"))
        return begun > ended

    def _declare(self, text: str, blocks: list[_Block]) -> None:
        """.reg .type names; of which p<3> is p0, p1, p2 (PTX ISA 5.4.2)."""
        found = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text, re.DOTALL)
        if found is None or found[1] not in DTYPES:
            raise UnknownInstruction(" ".join(text.split()))
        size = DTYPES[found[1]].itemsize
        for listed in (part.strip() for part in found[2].split(",")):
            name = re.fullmatch(r"(%?[A-Za-z_$][\w$]*)(?:<(\d+)>)?", listed)
            if name is None:
                raise UnknownInstruction(" ".join(text.split()))
            if len(blocks) == 1 and name[1].startswith("%"):
                self._widths[name[1]] = size
                continue
            for one in [name[1]] if name[2] is None else [f"{name[1]}{k}" for k in range(int(name[2]))]:
                whole = blocks[-1][one] = f"%{one.lstrip('%')}${blocks[-1].number}"
                self._widths[whole] = size


def _instructions(body: _Body, widths: Mapping[str, int]) -> tuple[list[PtxInstruction], dict[str, int]]:
    instructions: list[PtxInstruction] = []
    labels: dict[str, int] = {}
    # All are read first: a branch may go to a label further on in its block.
    for statement in list(body):
        if statement.text.endswith(":"):
            label = statement.text[:-1]
            labels[statement.blocks[-1].get(label, label)] = len(instructions)
        else:
            instructions.append(_instruction(statement, widths))
    return instructions, labels


def _instruction(statement: _Statement, widths: Mapping[str, int]) -> PtxInstruction:
    text = statement.text
    found = re.fullmatch(r"(?:@\s*(!?)\s*([%\w$]+)\s+)?([A-Za-z][\w.:]*)(?![\w$%])\s*(.*)", text, re.DOTALL)
    if found is None:
        raise UnknownInstruction(text)
    negated, guard, operation, rest = found.groups()
    guard = guard and _resolved(guard, statement.blocks)
    if guard and _declared(guard, widths) is None:
        raise UnknownInstruction(text)
    opcode, *modifiers = operation.replace("::", "__").split(".")
    operands = _operands(_resolved(rest, statement.blocks), text)
    return PtxInstruction(
        statement.line,
        text,
        statement.source,
        guard,
        bool(negated),
        opcode,
        tuple(modifiers),
        operands,
        _registers(operands),
        widths,
    )


def _resolved(text: str, blocks: tuple[_Block, ...]) -> str:
    """Names of the innermost block that declares them, as the whole kernel has them."""
    if not any(blocks):
        return text

    def name(found: re.Match[str]) -> str:
        return next((block[found[0]] for block in reversed(blocks) if found[0] in block), found[0])

    return re.sub(r"(?<![\w%$.])%?[A-Za-z_$][\w$]*", name, text)


def _operands(rest: str, text: str) -> tuple[Operand, ...]:
    """Operands are parted by commas outside of braces and brackets."""
    operands: list[Operand] = []
    for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", rest):
        values = [value.strip() for value in part[1:-1].split(",")] if part[0] == "{" else [part.strip()]
        if "|" in part:
            values = [re.sub(r"\s*\|\s*", "|", value) for value in values]
        if part[0] != "[" and any(len(value.split()) != 1 for value in values):
            raise UnknownInstruction(text)
        operands.append(tuple(values) if part[0] == "{" else values[0])
    return tuple(operands)


def _check_names(instructions: list[PtxInstruction], known: set[str]) -> None:
    """Refuses what is not there: registers that are not declared, other memories, functions."""
    checked: set[Operand] = set()
    for i in instructions:
        for operand in i.operands:
            if operand in checked:
                continue
            checked.add(operand)
            text = operand if isinstance(operand, str) else " ".join(operand)
            registers = (name for name in _REGISTER.findall(text) if name not in SPECIAL)
            unknown = [name for name in registers if _declared(name, i.register_bytes) is None]
            if "param" not in i.modifiers:
                unknown += [name for name in _SYMBOL.findall(text) if name not in known]
            if unknown:
                raise UnknownInstruction(f"line {i.line}: {i.text}: {unknown[0]} is not known")


def _granule(instructions: list[PtxInstruction], space: str) -> int:
    """The narrowest access of a space: matrix instructions take rows of 16 bytes."""
    least = _WIDEST
    for i in instructions:
        if i.opcode in ("ld", "st", "atom", "red") and any(m.startswith(space) for m in i.modifiers):
            least = min(least, DTYPES[i.kind].itemsize if i.kind in DTYPES else 1)
        if i.opcode == "cp" and len(i.operands) > 2 and i.modifiers[0] == "async":
            copied = i.operand(2)
            least = min(least, int(copied, 0) if re.fullmatch(r"0x[\dA-Fa-f]+|\d+", copied) else 4)
    return least
