"""Which argument of a kernel each global access of its PTX reads or writes, and how wide it is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_REGISTER = re.compile(r"%[a-z]+\d+")
_ACCESS = re.compile(r"\b(ld|st|cp\.async\S*|atom|red)\S*\.global(\S*)\s+(.*);")
_VECTOR = re.compile(r"\.v(\d)\.")
_BITS = re.compile(r"\.[bfsu](\d+)")
_COPIED = re.compile(r"\],\s*0x([0-9a-f]+)")
_ADDRESS = re.compile(r"\[\s*(%rd\d+)")
_POINTER_PARAMETER = re.compile(r"ld\.param\.[bu]64\s+(%rd\d+), \[\w+_param_(\d+)\]")


@dataclass(frozen=True)
class Access:
    """A global access: the argument ("?" where it is not told), whether it stores, the bytes of a thread."""

    argument: str
    store: bool
    bytes: int


def global_accesses(ptx: str, parameters: Sequence[tuple[str, str]]) -> list[Access]:
    """The global accesses in a kernel's PTX. `parameters`: (name, type) without constants, as in a specialization.

    An address is followed back through 64-bit arithmetic to the pointer parameter it starts from.
    """
    sources: dict[str, set[str]] = {}
    bases: dict[str, str] = {}
    accesses: list[tuple[str, bool, int]] = []
    for line in ptx.splitlines():
        parameter = _POINTER_PARAMETER.search(line)
        if parameter:
            index = int(parameter[2])
            if index < len(parameters) and parameters[index][1].startswith("*"):
                bases[parameter[1]] = parameters[index][0]
            continue
        access = _ACCESS.search(line)
        if access:
            address = _ADDRESS.search(access[3])
            accesses.append((address[1] if address else "", access[1] in ("st", "atom", "red"), _size(access)))
            continue
        registers = _REGISTER.findall(line)
        if registers and registers[0].startswith("%p") and line.lstrip().startswith("@"):
            registers = registers[1:]
        if registers and registers[0].startswith("%rd"):
            sources.setdefault(registers[0], set()).update(r for r in registers[1:] if r.startswith("%rd"))
    return [Access(_base(address, sources, bases), store, size) for address, store, size in accesses]


def _size(access: re.Match[str]) -> int:
    if access[1].startswith("cp.async"):
        copied = _COPIED.search(access[3])
        return int(copied[1], 16) if copied else 0
    bits, vector = _BITS.search(access[2]), _VECTOR.search(access[2])
    return int(bits[1]) // 8 * (int(vector[1]) if vector else 1) if bits else 0


def _base(address: str, sources: dict[str, set[str]], bases: dict[str, str]) -> str:
    seen: set[str] = set()
    todo = [address]
    found = set()
    while todo:
        register = todo.pop()
        if register in seen:
            continue
        seen.add(register)
        if register in bases:
            found.add(bases[register])
        todo.extend(sources.get(register, ()))
    return found.pop() if len(found) == 1 else "?"
