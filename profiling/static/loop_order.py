"""The order of a hot loop on sm_90: what is issued between an asynchronous matmul and the wait for it.

A warp group issues HGMMA instructions (PTX: wgmma) and goes on; `gsb0` on the last of a group closes it, and
`WARPGROUP.DEPBAR.LE gsb0, N` waits until N groups are unfinished. Counts of instructions cannot tell a loop that
overlaps from one that waits right away; the order can.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .sass import Instruction, Region

# Matmuls by where their first operand lies: q of q k^T in shared memory, p of p v in registers.
SHARED, REGISTERS = "product", "product from registers"
ATTENTION = {SHARED: "q k^T", REGISTERS: "p v"}
# What else of a loop tells its order.
_STEPS = {"HMMA": "mma.sync", "BAR": "barrier"}


@dataclass(frozen=True)
class Beside:
    """What is issued between the first instruction of a kind of matmul and the wait for it, in one pass."""

    exponentials: int
    instructions: int


@dataclass(frozen=True)
class LoopOrder:
    """One pass of a loop with asynchronous matmuls.

    steps         (matmul, wait, exponential, mma.sync or barrier; how many in a row), in order
    beside        for each kind of matmul, what does not wait for it
    exponentials  all of the pass
    instructions  all of the pass that are no asynchronous matmul
    """

    steps: tuple[tuple[str, int], ...]
    beside: dict[str, Beside]
    exponentials: int
    instructions: int

    @property
    def overlap(self) -> tuple[int, int]:
        """(Exponentials issued between the matmul of shared memory and its wait, all exponentials)."""
        beside = self.beside.get(SHARED)
        return (0 if beside is None else beside.exponentials), self.exponentials

    def named(self, names: dict[str, str]) -> dict[str, Any]:
        """Plain values, with other names for the kinds of matmuls."""
        return {
            "steps": [[names.get(name, name), count] for name, count in self.steps],
            "beside": {
                names.get(kind, kind): {"exponentials": found.exponentials, "instructions": found.instructions}
                for kind, found in self.beside.items()
            },
            "exponentials": self.exponentials,
            "instructions": self.instructions,
        }


def loop_order(region: Region) -> LoopOrder | None:
    """The order of a hot loop; None without a loop, or without HGMMA in it."""
    body = region.instructions
    kinds = [kind for kind in (SHARED, REGISTERS) if any(_matmul(instruction) == kind for instruction in body)]
    if not region.loop or not kinds:
        return None
    under_way = _under_way(body)
    others = [i for i, instruction in enumerate(body) if _matmul(instruction) is None]
    exponentials = [i for i in others if _is_exponential(body[i])]
    beside = {
        kind: Beside(
            sum(kind in under_way[i] for i in exponentials),
            sum(kind in under_way[i] for i in others),
        )
        for kind in kinds
    }
    return LoopOrder(_steps(body), beside, len(exponentials), len(others))


def order_text(steps: Iterable[Sequence[Any]]) -> str:
    """Steps in one line: "q k^T x4, wait, exponential x34"."""
    return ", ".join(f"{name} x{count}" if count > 1 else str(name) for name, count in steps)


def _matmul(instruction: Instruction) -> str | None:
    if instruction.opcode != "HGMMA":
        return None
    # HGMMA D, gdesc[UR4], D reads both operands from shared memory; HGMMA D, A, gdesc[UR4], D has A in registers.
    return SHARED if instruction.operands.split(",")[1].strip().startswith("gdesc") else REGISTERS


def _is_exponential(instruction: Instruction) -> bool:
    return instruction.opcode == "MUFU" and "EX2" in instruction.modifiers


def _unfinished(instruction: Instruction) -> int | None:
    """Groups of matmuls that a wait leaves unfinished; None for another instruction."""
    if instruction.opcode != "WARPGROUP" or "DEPBAR" not in instruction.modifiers:
        return None
    return int(instruction.operands.split(",")[-1].strip(), 16)


def _under_way(body: Sequence[Instruction]) -> list[set[str]]:
    """For each instruction, the kinds of matmuls under way when it is issued, once the loop has gone around."""
    groups: list[set[str]] = []
    group: set[str] = set()
    found: list[set[str]] = []
    for instruction in (*body, *body):
        kind, unfinished = _matmul(instruction), _unfinished(instruction)
        if kind is not None:
            group.add(kind)
            if "gsb0" in instruction.operands:
                groups.append(group)
                group = set()
        elif unfinished is not None:
            groups = groups[len(groups) - unfinished :] if unfinished < len(groups) else groups
        found.append(set().union(group, *groups))
    return found[len(body) :]


def _steps(body: Sequence[Instruction]) -> tuple[tuple[str, int], ...]:
    steps: list[tuple[str, int]] = []
    for instruction in body:
        unfinished = _unfinished(instruction)
        name = _matmul(instruction) or _STEPS.get(instruction.opcode)
        if _is_exponential(instruction):
            name = "exponential"
        if unfinished is not None:
            name = "wait" if unfinished == 0 else f"wait for all but {unfinished}"
        if name is None:
            continue
        count = steps.pop()[1] + 1 if steps and steps[-1][0] == name else 1
        steps.append((name, count))
    return tuple(steps)
