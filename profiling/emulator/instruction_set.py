"""Which Python function executes which PTX instruction, and how an operand is read.

A file of instructions registers functions that turn a `PtxInstruction` into an action on `Threads`. All that can
be done once for an instruction, such as reading its literals, is done there; the action runs once for each
execution, for all threads at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .program import DTYPES, UNSIGNED, PtxInstruction, UnknownInstruction
from .threads import Threads

Array = NDArray[Any]
Action = Callable[[Threads], None]
Reader = Callable[[Threads], Array]
Builder = Callable[[PtxInstruction], Action | None]

_BUILDERS: dict[str, list[Builder]] = {}
# Executed by the loop in execution.py.
CONTROL = ("bra", "ret", "exit")


def executes(*opcodes: str) -> Callable[[Builder], Builder]:
    """Registers a function that makes the action of an instruction, None for a form that it does not know.

    Several may know forms of one opcode, such as integers and floats.
    """

    def register(builder: Builder) -> Builder:
        for opcode in opcodes:
            _BUILDERS.setdefault(opcode, []).append(builder)
        return builder

    return register


def action_of(instruction: PtxInstruction) -> Action:
    """What executes an instruction. UnknownInstruction for one that nothing executes."""
    built = (builder(instruction) for builder in _BUILDERS.get(instruction.opcode, ()))
    actions = [action for action in built if action is not None]
    if len(actions) > 1:
        raise AssertionError(f"two functions execute {instruction.text}")
    if not actions:
        where = f" ({instruction.source})" if instruction.source else ""
        raise UnknownInstruction(f"line {instruction.line}: {instruction.text}{where}")
    return actions[0]


def form(instruction: PtxInstruction, pattern: str) -> re.Match[str] | None:
    """Matches all modifiers of an instruction with a pattern of what is known: `ftz.f32` with r"(ftz\\.)?f32"."""
    return re.fullmatch(pattern, ".".join(instruction.modifiers))


def reader(text: str, kind: str) -> Reader:
    """Reads a register, a special register or a literal as an array of [1] or [lanes] of the kind's dtype."""
    dtype = DTYPES[kind]
    if text.startswith("%"):
        return lambda threads: threads.register(text, dtype)
    constant = literal(text, dtype)
    return lambda threads: constant


def reads(instruction: PtxInstruction, *kinds: str) -> list[Reader]:
    """Readers of the operands after the first, which is the result."""
    return [reader(instruction.operand(number), kind) for number, kind in enumerate(kinds, start=1)]


def sources(instruction: PtxInstruction, *kinds: str) -> list[Reader]:
    """Readers of all operands after the first, lane by lane: a literal beside a register is read as a scalar."""
    if len(instruction.operands) != len(kinds) + 1:
        raise UnknownInstruction(instruction.text)
    texts = [instruction.operand(number) for number in range(1, len(kinds) + 1)]
    if not any(text.startswith("%") for text in texts):
        return reads(instruction, *kinds)

    # numpy is twice as fast with an array of no dimensions as with one of [1].
    def source(text: str, kind: str) -> Reader:
        if text.startswith("%"):
            return reader(text, kind)
        constant = literal(text, DTYPES[kind]).reshape(())
        return lambda threads: constant

    return [source(text, kind) for text, kind in zip(texts, kinds, strict=True)]


def computes(instruction: PtxInstruction, function: Callable[..., Array], *kinds: str) -> Action:
    """Writes a function of one, two or three operands of these kinds to the first operand."""
    result = instruction.operand(0)
    a, *others = sources(instruction, *kinds)
    if not others:
        return lambda threads: threads.write(result, function(a(threads)))
    b, *others = others
    if not others:
        return lambda threads: threads.write(result, function(a(threads), b(threads)))
    (c,) = others
    return lambda threads: threads.write(result, function(a(threads), b(threads), c(threads)))


def literal(text: str, dtype: np.dtype[Any]) -> Array:
    """[1]: a literal as PTX writes it. 0f3F800000 is the bits of a float, -1 fits every integer (ISA 4.5)."""
    if re.fullmatch(r"0[fF][0-9A-Fa-f]{8}", text):
        return np.array([int(text[2:], 16)], np.uint32).view(dtype)
    if re.fullmatch(r"0[dD][0-9A-Fa-f]{16}", text):
        return np.array([int(text[2:], 16)], np.uint64).view(dtype)
    try:
        number = int(text.removesuffix("U"), 0)
    except ValueError:
        raise UnknownInstruction(f"operand {text}") from None
    if dtype == np.bool_:
        return np.array([number != 0])
    return np.array([number & ((1 << 8 * dtype.itemsize) - 1)], UNSIGNED[dtype.itemsize]).view(dtype)
