"""Classes of PTX instructions, beside those of machine code, and the multiply-adds of a matrix instruction."""

from __future__ import annotations

import re
from collections.abc import Mapping

from .program import PtxInstruction

# Classes of instructions in the order that they are shown, and where `ldmperf inspect` counts their machine code.
# "integer" is arithmetic; "ALU" is the rest on registers: logic, moves, comparisons, selections.
CLASSES: Mapping[str, str] = {
    "matrix": "matrix",
    "exponential": "exponential",
    "FMA": "FMA",
    "integer": "ALU",
    "ALU": "ALU",
    "conversion": "conversion",
    "global load": "load/store",
    "global store": "load/store",
    "shared load": "load/store",
    "shared store": "load/store",
    "atomic": "load/store",
    "async copy": "load/store",
    "shuffle": "load/store",
    "param": "other",
    "barrier": "control",
    "branch": "control",
    "other": "other",
}

_OPCODES = {
    "matrix": "mma wmma",
    "exponential": "ex2 lg2 rcp sqrt rsqrt sin cos tanh popc clz bfind",
    "FMA": "fma",
    "integer": "add sub mul mad addc subc madc mul24 mad24 sad dp4a dp2a neg abs min max div rem shl shr shf",
    "ALU": "and or xor not cnot lop3 prmt bfe bfi brev bmsk szext mov selp slct setp set copysign testp cvta",
    "conversion": "cvt",
    "shared load": "ldmatrix",
    "shared store": "stmatrix",
    "atomic": "atom red",
    "shuffle": "shfl vote redux match activemask elect movmatrix",
    "barrier": "bar barrier fence membar mbarrier griddepcontrol",
    "branch": "bra brx call ret exit trap",
}
_OF_OPCODE = {opcode: name for name, opcodes in _OPCODES.items() for opcode in opcodes.split()}
_FLOATS = ("f16", "f16x2", "bf16", "bf16x2", "f32", "f32x2", "f64")
# Of floats, sums and products are the FMA unit's; what is compared is not.
_OF_FLOATS = {
    **dict.fromkeys(("add", "sub", "mul", "mad"), "FMA"),
    **dict.fromkeys(("neg", "abs", "min", "max"), "ALU"),
    "div": "exponential",
}
_SPACES = ("global", "shared", "param")
# What awaits an asynchronous copy or matmul, or orders it.
_WAITS = ("commit_group", "wait_group", "wait_all", "fence")


def class_of_ptx(i: PtxInstruction) -> str:
    """One of CLASSES."""
    if i.opcode in ("ld", "st"):
        space = next((m.partition("__")[0] for m in i.modifiers if m.startswith(_SPACES)), "global")
        return space if space == "param" else f"{space} {'store' if i.opcode == 'st' else 'load'}"
    if i.opcode in ("cp", "wgmma"):
        if not set(_WAITS).isdisjoint(i.modifiers):
            return "barrier"
        return "async copy" if i.opcode == "cp" else "matrix"
    if i.opcode in _OF_FLOATS and i.kind in _FLOATS:
        return _OF_FLOATS[i.opcode]
    return _OF_OPCODE.get(i.opcode, "other")


def multiply_adds_of(i: PtxInstruction) -> float:
    """Multiply-adds of a matrix instruction by one warp; those of a warp group are shared by its four."""
    shape = next(filter(None, (re.fullmatch(r"m(\d+)n(\d+)k(\d+)", m) for m in i.modifiers)), None)
    if shape is None or class_of_ptx(i) != "matrix":
        return 0
    m, n, k = map(int, shape.groups())
    return m * n * k / (4 if i.opcode == "wgmma" else 1)
