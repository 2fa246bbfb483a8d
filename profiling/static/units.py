"""Which unit of an NVIDIA multiprocessor executes an instruction, and how many bytes it moves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from .sass import Instruction

# The classes of the instruction mix, in the order they are shown.
CLASSES = ("matrix", "exponential", "FMA", "ALU", "load/store", "conversion", "uniform", "control", "other")

_FMA = {
    "FFMA",
    "FMUL",
    "FADD",
    "FFMA32I",
    "FMUL32I",
    "FADD32I",
    "HFMA2",
    "HADD2",
    "HMUL2",
    "HADD2_32I",
    "HFMA2_32I",
}
_FMA_INTEGER = {"IMAD", "IMUL", "IDP"}
_SPECIAL = {"MUFU", "POPC", "FLO"}
_SLOW_CONVERSION = {"F2F", "F2I", "I2F", "FRND", "I2I"}
_PACKED_CONVERSION = {"F2FP", "I2FP", "F2IP", "I2IP"}
_ALU = {
    *(
        "IADD3",
        "IADD",
        "VIADD",
        "LOP3",
        "LOP",
        "LOP32I",
        "SHF",
        "SHL",
        "SHR",
        "LEA",
        "ISETP",
        "PRMT",
        "MOV",
        "MOV32I",
    ),
    *("SEL", "FSEL", "FMNMX", "FSETP", "FSET", "IMNMX", "VIMNMX", "VIADDMNMX", "IABS", "BREV", "SGXT", "BMSK"),
    *("PLOP3", "P2R", "R2P", "HSETP2", "HSET2", "HMNMX2", "ISCADD", "VABSDIFF", "FCHK", "VIMNMX3", "FMNMX3"),
}
_CONTROL = {
    *("BRA", "EXIT", "BAR", "BSSY", "BSYNC", "NOP", "WARPSYNC", "CALL", "RET", "DEPBAR", "LDGDEPBAR", "MEMBAR"),
    *("ERRBAR", "CCTL", "YIELD", "BREAK", "KILL", "BPT", "SYNCS", "WARPGROUP", "ELECT", "NANOSLEEP", "BRX", "JMP"),
    *("BMOV", "FENCE", "ARRIVES", "BPT", "PREEXIT", "ACQBULK", "WARPGROUPSET"),
}
_GLOBAL = {"LDG", "STG", "LDGSTS", "ATOMG", "RED", "LD", "ST", "ATOM"}
_SHARED = {"LDS", "STS", "LDSM", "STSM", "ATOMS"}
_LOCAL = {"LDL", "STL"}


def class_of(instruction: Instruction) -> str:
    """One of CLASSES. Moves count where they run: IMAD.MOV and HFMA2 with an immediate on the FMA pipe."""
    opcode = instruction.opcode
    # HFMA2.MMA is no matrix instruction but a spelling of HFMA2.
    if opcode.endswith("MMA"):
        return "matrix"
    if opcode in _SPECIAL:
        return "exponential"
    if opcode in _FMA or opcode in _FMA_INTEGER:
        return "FMA"
    if opcode in _SLOW_CONVERSION or opcode in _PACKED_CONVERSION:
        return "conversion"
    if opcode in _ALU:
        return "ALU"
    if opcode in _GLOBAL | _SHARED | _LOCAL or opcode == "SHFL":
        return "load/store"
    if opcode in _CONTROL:
        return "control"
    if opcode.startswith("U") or opcode in {"R2UR", "S2UR", "VOTEU"}:
        return "uniform"
    return "other"


def unit_counts(instructions: Iterable[Instruction]) -> Counter[str]:
    """Warp instructions by unit of `Machine.lanes` that they keep busy; bytes for shared memory, multiply-adds for
    matrix.

    One instruction may count for several units: all for `issue`, integer multiply-adds for the whole FMA pipe too.
    One that is never executed (a fence's `@!PT LDS`) is issued only.
    """
    counts: Counter[str] = Counter()
    for instruction in instructions:
        counts["issue"] += 1
        if instruction.predicate == "!PT":
            continue
        opcode, kind = instruction.opcode, class_of(instruction)
        if kind in ("FMA", "ALU", "exponential"):
            counts[kind] += 1
        if opcode in _FMA_INTEGER:
            counts["integer FMA"] += 1
        if kind == "conversion":
            counts["exponential" if opcode in _SLOW_CONVERSION else "conversion"] += 1
        if kind == "load/store":
            counts["load/store"] += 1
            counts["shared memory"] += width(instruction)
        if kind == "matrix":
            counts["matrix"] += multiply_adds(instruction) // 32 * (2 if "TF32" in instruction.modifiers else 1)
            counts["shared memory"] += shared_operand_bytes(instruction) // 32
    return counts


def width(instruction: Instruction) -> int:
    """Bytes a thread loads or stores; 4 for a shuffle, 0 for an instruction that moves none."""
    opcode, modifiers = instruction.opcode, instruction.modifiers
    if opcode in ("LDSM", "STSM"):
        return 4 * max((int(m) for m in modifiers if m in ("2", "4")), default=1)
    if class_of(instruction) != "load/store":
        return 0
    for modifier in modifiers:
        bits = modifier.lstrip("US")
        if bits in ("8", "16", "64", "128", "256"):
            return int(bits) // 8
    return 4


def is_global(instruction: Instruction) -> bool:
    return instruction.opcode in _GLOBAL


def is_move(instruction: Instruction) -> bool:
    """Whether it only moves a register or an immediate."""
    if instruction.opcode in ("MOV", "MOV32I"):
        return True
    if instruction.opcode == "IMAD":
        return "MOV" in instruction.modifiers
    return instruction.opcode == "HFMA2" and ", -RZ, RZ," in instruction.operands


def multiply_adds(instruction: Instruction) -> int:
    """Multiply-adds of one warp's matrix instruction; a warp group's HGMMA is shared by its four warps."""
    shape = next((m for m in instruction.modifiers if "x" in m or m.isdigit()), "")
    if "x" in shape:
        m, n, k = (int(part) for part in shape.split("x"))
        return m * n * k // 4
    known = {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8, "884": 8 * 8 * 4, "16832": 16 * 8 * 32, "1684": 16 * 8 * 4}
    return known.get(shape, 0)


def shared_operand_bytes(instruction: Instruction) -> int:
    """Bytes of shared memory read for one warp's part of a warp group's matmul.

    A quarter of B, [n, 32 bytes], and of A, [64, 32 bytes], unless that is in registers: each operand is assumed
    to be read once an instruction.
    """
    if instruction.opcode != "HGMMA":
        return 0
    columns = int(next(m for m in instruction.modifiers if "x" in m).split("x")[1])
    # HGMMA D, gdesc[UR4], D reads both; HGMMA D, A, gdesc[UR4], D reads B.
    both = instruction.operands.split(",")[1].strip().startswith("gdesc")
    return (columns + (64 if both else 0)) * 32 // 4


@dataclass(frozen=True)
class Mix:
    """Instructions of a region by class; how many of them are moves; global accesses by bytes of a thread; matrix
    instructions by opcode."""

    by_class: dict[str, int]
    moves: int
    global_widths: dict[str, int]
    matrix: dict[str, int]


def mix(instructions: Iterable[Instruction]) -> Mix:
    instructions = list(instructions)
    counts = Counter(class_of(instruction) for instruction in instructions)
    widths = Counter(str(width(instruction)) for instruction in instructions if is_global(instruction))
    moves = sum(is_move(instruction) for instruction in instructions)
    matrix = Counter(instruction.opcode for instruction in instructions if class_of(instruction) == "matrix")
    return Mix({name: counts[name] for name in CLASSES}, moves, dict(widths), dict(matrix))
