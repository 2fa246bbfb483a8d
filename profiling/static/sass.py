"""NVIDIA machine code read from the text of NVIDIA's tools: instructions, resources, and the hot loop."""

from __future__ import annotations

import itertools
import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

_LINE = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P[T\d]+)\s+)?([A-Z][A-Z0-9_]*)((?:\.[A-Za-z0-9_]+)*)\s*(.*?)\s*;"
)
# Of an instruction, since Volta.
_BYTES = 16
_TARGET = re.compile(r"(?:^|[\s(])(0x[0-9a-f]+)\)?$")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
# What a warp repeats until a barrier lets it pass: a copy that has not landed, another partition's work.
_WAITING = {"SYNCS", "BRA", "PLOP3", "USETMAXREG", "NANOSLEEP", "WARPSYNC", "NOP", "YIELD"}


@dataclass(frozen=True)
class Instruction:
    """One instruction: `LDG.E.128 R4, [R2.64]` under `@P0` has opcode LDG, modifiers (E, 128), predicate P0."""

    address: int
    opcode: str
    modifiers: tuple[str, ...] = ()
    operands: str = ""
    predicate: str | None = None

    @property
    def target(self) -> int | None:
        """The address that a branch names."""
        found = _TARGET.search(self.operands)
        return int(found[1], 16) if found else None

    @property
    def conditional(self) -> bool:
        """Whether a branch may fall through: under a predicate, or with one among its operands."""
        return self.predicate is not None or "," in self.operands


@dataclass(frozen=True)
class Resources:
    """Per thread registers, bytes of stack and local memory; spill loads and stores as instructions."""

    registers: int
    stack: int
    local: int
    spill_loads: int
    spill_stores: int


@dataclass(frozen=True)
class Region:
    """The part of a kernel that runs most: its longest innermost loop, or all of it where there is no loop."""

    instructions: tuple[Instruction, ...] = field(repr=False)
    loop: bool

    def __len__(self) -> int:
        return len(self.instructions)


def disassemble(cubin: bytes) -> str:
    """The text of `cuobjdump -sass -res-usage`."""
    return _said("cuobjdump", "-sass", "-res-usage", of=cubin)


def instructions_of(cubins: Sequence[bytes], target: str) -> list[list[Instruction]]:
    """The instructions of each cubin, compiled for the PTX `target`, "sm_90a".

    One nvdisasm reads all codes, one behind the other, as its start takes longer than its work. Addresses count
    from the first one's. Raises ValueError for what is no cubin of one function, and where an instruction is not
    told.
    """
    codes = [_code(cubin) for cubin in cubins]
    joined = b"".join(codes)
    instructions = parse(_said("nvdisasm", "-novliw", "--binary", target.replace("sm_", "SM"), of=joined))
    if [one.address for one in instructions] != list(range(0, len(joined), _BYTES)):
        raise ValueError("nvdisasm does not tell every instruction of the code")
    rest = iter(instructions)
    return [list(itertools.islice(rest, len(code) // _BYTES)) for code in codes]


def _code(cubin: bytes) -> bytes:
    """The section of instructions of an ELF file."""
    try:
        (sections,), (count, names) = struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<HH", cubin, 60)
        # Of each: its name's place, and its own offset and size.
        headers = [struct.unpack_from("<I20xQQ", cubin, sections + 64 * i) for i in range(count)]
    except struct.error:
        raise ValueError("the cubin is no ELF file, or a part of one") from None
    start = headers[names][1] if names < count else 0
    codes = [cubin[at : at + size] for name, at, size in headers if cubin.startswith(b".text.", start + name)]
    if len(codes) != 1:
        raise ValueError(f"a cubin holds the code of {len(codes)} functions, not of one")
    return codes[0]


def _said(tool: str, *options: str, of: bytes) -> str:
    """What a tool that the triton package brings says of a file with these bytes."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(of)
        file.flush()
        command = [str(path), *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def parse(text: str) -> list[Instruction]:
    """The instructions of a disassembly, in address order."""
    found = []
    for line in text.splitlines():
        match = _LINE.match(line)
        if match:
            address, predicate, opcode, modifiers, operands = match.groups()
            parts = tuple(modifiers.split(".")[1:])
            found.append(Instruction(int(address, 16), opcode, parts, operands, predicate))
    if not found:
        raise ValueError("no instruction in the disassembly; is it cuobjdump's?")
    return found


def resource_usage(cubin: bytes) -> str:
    """The text of `cuobjdump -res-usage`."""
    return _said("cuobjdump", "-res-usage", of=cubin)


def resources(text: str, instructions: Sequence[Instruction]) -> Resources:
    """The resources of the one function of a `resource_usage`, or of a disassembly that has them too."""
    found = _RESOURCES.search(text)
    if found is None:
        raise ValueError("no resource usage in the disassembly; cuobjdump needs -res-usage")
    registers, stack, _, local = (int(value) for value in found.groups())
    opcodes = [instruction.opcode for instruction in instructions]
    return Resources(registers, stack, local, opcodes.count("LDL"), opcodes.count("STL"))


def hot_region(instructions: Sequence[Instruction]) -> Region:
    """The longest innermost loop; without a loop, all that the entry reaches but subroutines and padding.

    A loop in which a warp only waits for a barrier is none, and part of what is around it.
    """
    successors = _successors(instructions)
    reached, loops = _walk(successors)
    loops = {
        header: body for header, body in loops.items() if not all(instructions[i].opcode in _WAITING for i in body)
    }
    innermost = [
        body for header, body in loops.items() if not any(other != header and other in body for other in loops)
    ]
    body = max(innermost, key=len, default=reached)
    chosen = [
        instruction for i, instruction in enumerate(instructions) if i in body and instruction.opcode != "NOP"
    ]
    return Region(tuple(chosen), bool(innermost))


def _successors(instructions: Sequence[Instruction]) -> list[list[int]]:
    index = {instruction.address: i for i, instruction in enumerate(instructions)}
    reconverge: dict[str, int] = {}
    successors: list[list[int]] = []
    for i, instruction in enumerate(instructions):
        after = [i + 1] if i + 1 < len(instructions) else []
        target = index.get(-1 if instruction.target is None else instruction.target)
        if instruction.opcode == "BSSY" and target is not None:
            reconverge[instruction.operands.split(",")[0].strip()] = target
            successors.append(after)
        elif instruction.opcode == "BSYNC":
            # Waits for the warp, then goes on where its BSSY said.
            successors.append([reconverge.get(instruction.operands.strip(), i + 1)])
        elif instruction.opcode in ("BRA", "JMP") and target is not None:
            # A branch to itself is the trap behind the code.
            successors.append([t for t in ([target, *after] if instruction.conditional else [target]) if t != i])
        elif instruction.opcode in ("EXIT", "RET") and instruction.predicate is None:
            successors.append([])
        else:
            successors.append(after)
    return successors


def _walk(successors: list[list[int]]) -> tuple[set[int], dict[int, set[int]]]:
    """(What the entry reaches, {header: body} of the loops), by depth-first search: an edge to a place on the
    search path closes a loop, whose body is all that reaches the edge without passing the header."""
    reached: set[int] = set()
    path: set[int] = set()
    back: list[tuple[int, int]] = []
    stack: list[tuple[int, int]] = [(0, 0)]
    while stack:
        node, edge = stack.pop()
        if edge == 0:
            reached.add(node)
            path.add(node)
        if edge < len(successors[node]):
            stack.append((node, edge + 1))
            to = successors[node][edge]
            if to in path:
                back.append((node, to))
            elif to not in reached:
                stack.append((to, 0))
        else:
            path.discard(node)
    predecessors: dict[int, list[int]] = {node: [] for node in reached}
    for node in reached:
        for to in successors[node]:
            predecessors[to].append(node)
    loops: dict[int, set[int]] = {}
    for source, header in back:
        body = loops.setdefault(header, {header})
        todo = [source]
        while todo:
            node = todo.pop()
            if node not in body:
                body.add(node)
                todo.extend(predecessors[node])
    return reached, loops
