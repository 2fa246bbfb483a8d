"""What is told of a run in the emulator: as tables, and as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from subprocess import SubprocessError
from typing import Any

from rich.console import Console

from ldmperf.kernels import Launch

from ..emulator.emulated_calls import EXAMPLE, EmulatedCall, ResultError, by_code
from ..emulator.emulation import Emulation
from ..emulator.findings import KINDS, Finding
from ..emulator.ptx_classes import CLASSES
from ..emulator.tallies import WARP, Accesses, Executions, Tallies
from ..machines import Machine
from ..static.inspection import Inspection, NvidiaCode, inspect_launch
from ..static.units import CLASSES as UNITS
from ..terminal.layout import MISSING, Grid, say_grid
from ..terminal.visible import counted, say, say_wrapped

# Where the texts beside the names of a kernel's lines begin.
_INDENT = 16
# Of the lines of a kernel's source, those that are shown.
_LINES = 8
_NO_LINE = "no line"


@dataclass(frozen=True)
class EmulatedCode:
    """What all launches of one code did, and what `ldmperf inspect` tells of it where the launch is known."""

    tallies: Tallies
    launch: Launch | None
    inspection: Inspection | None

    def as_json(self) -> dict[str, Any]:
        tallies = self.tallies
        return {
            "kernel": tallies.program.name,
            "launches": tallies.launches,
            "programs": tallies.programs,
            "threads": tallies.program.threads,
            "instructions": {
                "lanes": tallies.executions.lanes,
                "warps": tallies.executions.warps,
                "code": tallies.executions.code,
            },
            "classes": {name: _as_json(one) for name, one in tallies.by_class().items()},
            "units": {
                name: {"warps": warps, "machine_code": self.machine_code.get(name)}
                for name, warps in self.by_unit.items()
            },
            "multiply_adds": tallies.multiply_adds,
            "accesses": [
                {"space": space, "what": what, **_accesses_as_json(one)}
                for (space, what), one in tallies.accesses().items()
            ],
            "least_bytes": self.least_bytes,
            "split_warps": tallies.splits,
            "lines": [
                {"source": line, **_as_json(one), "split_warps": tallies.splits_by_line().get(line, 0)}
                for line, one in tallies.by_line().items()
            ],
            "accesses_by_line": [
                {"source": line, "space": space, "what": what, **_accesses_as_json(one)}
                for (line, space, what), one in tallies.accesses_by_line().items()
            ],
            "static": None if self.inspection is None else self.inspection.as_json(),
        }

    @property
    def by_unit(self) -> dict[str, int]:
        """Warp instructions by the classes of `ldmperf inspect`."""
        found: dict[str, int] = {}
        for name, executions in self.tallies.by_class().items():
            found[CLASSES[name]] = found.get(CLASSES[name], 0) + executions.warps
        return {name: found[name] for name in UNITS if name in found}

    @property
    def machine(self) -> NvidiaCode | None:
        """The machine code; None where the launch is not known."""
        return None if self.inspection is None else self.inspection.nvidia

    @property
    def machine_code(self) -> Mapping[str, int]:
        """Instructions of the machine code's hot region by class."""
        return {} if self.machine is None else self.machine.mix.by_class

    @property
    def least_bytes(self) -> int | None:
        """Bytes that the launches have to move: every tensor once, of one that is updated twice."""
        return None if self.launch is None else self.launch.nbytes * self.tallies.launches


@dataclass(frozen=True)
class EmulationReport:
    """A run: of an operator or FILE.py:NAME, its calls that were judged, findings, and counts by code."""

    name: str
    arch: str
    configuration: Any
    calls: tuple[EmulatedCall, ...]
    findings: tuple[Finding, ...]
    codes: tuple[EmulatedCode, ...]

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "arch": self.arch,
            "configuration": None if self.configuration is None else dataclasses.asdict(self.configuration),
            "errors": [_error_as_json(call, error) for call in self.calls for error in call.errors],
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
            "kernels": [code.as_json() for code in self.codes],
        }


def report_of(
    name: str, emulation: Emulation, calls: Sequence[EmulatedCall], *, configuration: Any = None
) -> EmulationReport:
    """After a run. Launches that are known are inspected too, where their machine code can be read."""
    launches = [launch for call in calls for launch in call.launches]
    known = len(launches) == len(emulation.tallies)
    of_code: dict[int, Launch] = {}
    if known:
        for launch, tallies in zip(launches, emulation.tallies, strict=True):
            of_code.setdefault(id(tallies.program), launch)
    codes = []
    for tallies in by_code(emulation.tallies):
        first = of_code.get(id(tallies.program))
        codes.append(EmulatedCode(tallies, first, None if first is None else _inspected(first, emulation.machine)))
    return EmulationReport(
        name, emulation.machine.arch, configuration, tuple(calls), tuple(emulation.findings), tuple(codes)
    )


def _inspected(launch: Launch, machine: Machine) -> Inspection | None:
    """None where there are no tools to read machine code with."""
    from triton.errors import TritonError

    try:
        return inspect_launch(launch, machine)
    # Of ptxas and of what reads its code; the run itself needs neither.
    except (TritonError, RuntimeError, OSError, LookupError, ValueError, SubprocessError):
        return None


def _as_json(one: Executions) -> dict[str, Any]:
    return {"warps": one.warps, "lanes": one.lanes, "code": one.code}


def _accesses_as_json(one: Accesses) -> dict[str, Any]:
    return dataclasses.asdict(one) | {"efficiency": one.efficiency}


def _error_as_json(call: EmulatedCall, error: ResultError) -> dict[str, Any]:
    values = {"inputs": call.inputs, **dataclasses.asdict(error), "ratio": error.ratio}
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }


# ---------------------------------------------------------------- tables


def print_report(report: EmulationReport, console: Console) -> None:
    """Errors and findings first, then each kernel's counts."""
    say(console)
    say_wrapped(console, f"{report.name} for {report.arch}, emulated")
    if report.configuration is not None:
        _tell(console, "configuration", ", ".join(f"{k}={v}" for k, v in vars(report.configuration).items()))
    _print_errors(report.calls, console)
    say(console)
    if not report.findings:
        say(console, "Findings: none")
    for finding in report.findings:
        say_wrapped(console, f"FINDING {finding}", indent=2)
        say_wrapped(console, f"  {KINDS[finding.kind]}", indent=2)
    for code in report.codes:
        _print_code(code, console)


def _print_errors(calls: Sequence[EmulatedCall], console: Console) -> None:
    headings = (
        "inputs",
        "result",
        "dtype",
        "elements",
        "max error",
        "relative RMS",
        "rounding alone",
        "ratio",
        "not finite",
    )
    rows = [
        (
            call.inputs,
            error.name,
            error.dtype,
            str(error.elements),
            *(f"{value:.2e}" for value in (error.largest, error.rms, error.rounding)),
            f"{error.ratio:.3f}" if math.isfinite(error.ratio) else MISSING,
            str(error.not_finite) if error.not_finite else MISSING,
        )
        for call in calls
        for error in call.errors
    ]
    if rows:
        exact = "what the example expects" if calls[0].inputs == EXAMPLE else "float64"
        _print_table(
            console, f"Error against {exact}", Grid(headings, tuple(rows), ("inputs", "result", "dtype")), 2
        )


def _print_code(code: EmulatedCode, console: Console) -> None:
    tallies = code.tallies
    size = f"{counted(tallies.programs, 'program')} of {counted(tallies.program.threads // WARP, 'warp')}"
    often = "" if tallies.launches == 1 else f" in {counted(tallies.launches, 'launch', 'launches')}"
    say(console)
    say_wrapped(console, f"{tallies.program.name}: {size}{often}")
    for name, text in [*_machine_code_lines(code), *_count_lines(code)]:
        _tell(console, name, text)
    _print_classes(code, console)
    _print_accesses(code, console)
    _print_lines(tallies, console)


def _machine_code_lines(code: EmulatedCode) -> list[tuple[str, str]]:
    if code.inspection is None or code.machine is None:
        return []
    used, region = code.machine.resources, code.machine.region
    where = "hot loop" if region.loop else "whole body, no loop"
    instructions = f"{code.machine.instructions} instructions, {len(region)} of them in the {where}"
    told = ("machine code", f"{used.registers} registers a thread; {instructions}")
    return [told, *(("FAULT", fault) for fault in code.inspection.faults)]


def _count_lines(code: EmulatedCode) -> list[tuple[str, str]]:
    tallies, executed = code.tallies, code.tallies.executions
    threads = (
        f"{executed.lanes} by threads, {executed.warps} by warps, with {executed.lanes_per_warp:.1f} of 32 threads"
    )
    lines = [("executed", f"{threads}; the PTX has {counted(executed.code, 'instruction')}")]
    where = ", ".join(f"{line or _NO_LINE} {count}" for line, count in tallies.splits_by_line().items())
    split = (
        f"{counted(tallies.splits, 'time')} a branch split a warp: {where}" if where else "no branch split a warp"
    )
    lines.append(("divergence", split))
    if tallies.multiply_adds:
        text = f"{tallies.multiply_adds} multiply-adds"
        if code.launch is not None and code.launch.flops:
            needed = code.launch.flops // 2 * tallies.launches
            text += f", {tallies.multiply_adds / needed:.2f} times those of the data"
        lines.append(("matmuls", text))
    return lines


def _print_classes(code: EmulatedCode, console: Console) -> None:
    total = max(code.tallies.executions.warps, 1)
    rows = tuple(
        (name, str(one.warps), _share(one.warps, total), f"{one.lanes_per_warp:.1f}", str(one.code))
        for name, one in code.tallies.by_class().items()
    )
    _print_table(
        console, "Executed, PTX", Grid(("class", "by warps", "share", "threads", "in the PTX"), rows, ("class",))
    )
    static, dynamic = code.machine_code, code.by_unit
    if code.machine is None:
        return
    where = "hot loop" if code.machine.region.loop else "whole body"
    hot = sum(static.values())
    rows = tuple(
        (unit, str(warps), _share(warps, total), str(static.get(unit, 0)), _share(static.get(unit, 0), hot))
        for unit, warps in ((unit, dynamic.get(unit, 0)) for unit in UNITS)
        if warps or static.get(unit)
    )
    _print_table(
        console,
        f"Executed PTX, beside the machine code's {where}",
        Grid(("instructions", "executed", "share", where, "of it"), rows, ("instructions",)),
    )


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f}%"


_COST = {"global": "sectors", "shared": "wavefronts"}


def _print_accesses(code: EmulatedCode, console: Console) -> None:
    found = code.tallies.accesses()
    rows = tuple((f"{space} {what}", *_access_cells(space, one)) for (space, what), one in found.items())
    if rows:
        _print_table(console, "Memory", Grid(("memory", *_ACCESS_HEADINGS), rows, ("memory", "")))
    asked = sum(one.bytes for (space, _), one in found.items() if space == "global")
    if code.least_bytes:
        times = f"{asked / code.least_bytes:.2f} times the {code.least_bytes} that the tensors have"
        say_wrapped(console, f"  threads ask for {asked} bytes of global memory, {times}", indent=2)


_ACCESS_HEADINGS = ("by warps", "bytes", "taken", "least", "", "efficiency")


def _access_cells(space: str, one: Accesses) -> tuple[str, ...]:
    if not one.touched:
        return (str(one.warps) if one.warps else MISSING, str(one.bytes), MISSING, MISSING, MISSING, MISSING)
    return (
        str(one.warps),
        str(one.bytes),
        str(one.touched),
        str(one.least),
        _COST[space],
        _share(one.least, one.touched),
    )


def _print_lines(tallies: Tallies, console: Console) -> None:
    total = max(tallies.executions.warps, 1)
    most = tuple(
        (line or _NO_LINE, str(one.warps), _share(one.warps, total), f"{one.lanes_per_warp:.1f}")
        for line, one in list(tallies.by_line().items())[:_LINES]
    )
    _print_table(console, "Lines executed most", Grid(("line", "by warps", "share", "threads"), most, ("line",)))
    wasteful = tuple(
        (line or _NO_LINE, f"{space} {what}", *_access_cells(space, one))
        for (line, space, what), one in tallies.accesses_by_line().items()
        if one.touched > one.least
    )
    if wasteful:
        title = "Lines whose accesses take more than the least"
        headings = ("line", "memory", *_ACCESS_HEADINGS)
        _print_table(console, title, Grid(headings, wasteful[:_LINES], ("line", "memory", "")), 2)


def _print_table(console: Console, title: str, grid: Grid, leading: int = 1) -> None:
    say(console)
    say(console, title)
    say_grid(console, grid, leading)


def _tell(console: Console, name: str, text: str) -> None:
    say_wrapped(console, f"  {name:13} {text}", indent=_INDENT)
