"""An inspection as a table in the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console

from ..terminal.layout import MISSING, laid_out
from ..terminal.visible import counted, say, say_wrapped, width_of
from .inspection import Inspection, NvidiaCode
from .loop_order import order_text

# Where the texts beside the names of an inspection's lines begin.
_INDENT = 16


def print_inspection(inspection: Inspection, console: Console, *, sass: bool = False) -> None:
    """Resources as the compiler reports them, then the prediction, labelled so."""
    launch, compiled, machine = inspection.launch, inspection.compiled, inspection.compiled.machine
    size = f"{counted(launch.programs, 'program')} of {counted(launch.num_warps, 'warp')}"
    say(console)
    say_wrapped(console, f"{launch.name} for {machine.arch}: {size}")
    constants = ", ".join(f"{name}={value}" for name, value in compiled.specialization.constants)
    _tell(console, "compiled for", constants)
    _tell(console, "shared memory", counted(compiled.shared, "byte"))
    if inspection.amd is not None:
        used = inspection.amd
        _tell(
            console,
            "registers",
            f"{used.vgprs} vector ({used.agprs} accumulation), {used.sgprs} scalar; "
            f"spills {used.vgpr_spills} and {used.sgpr_spills}; scratch {counted(used.scratch, 'byte')}",
        )
    if inspection.nvidia is not None:
        _print_nvidia(inspection, inspection.nvidia, console)
    for fault in inspection.faults:
        _tell(console, "FAULT", fault)
    if sass:
        for line in inspection.code.expandtabs().splitlines():
            say(console, line)


def _tell(console: Console, name: str, text: str) -> None:
    say_wrapped(console, f"  {name:13} {text}", indent=_INDENT)


def _print_nvidia(inspection: Inspection, code: NvidiaCode, console: Console) -> None:
    machine, used, fit = inspection.compiled.machine, code.resources, code.occupancy
    where = "hot loop" if code.region.loop else "whole body, no loop"
    spills = f"{counted(used.spill_loads, 'load')}, {counted(used.spill_stores, 'store')}"
    fits = f"{counted(fit.programs, 'program')}, {fit.warps} of {counted(fit.max_warps, 'warp')}"
    moves = counted(code.mix.moves, "move")
    told = [
        (
            "registers",
            f"{used.registers} a thread; spills {spills}; stack {used.stack}, local {counted(used.local, 'byte')}",
        ),
        ("occupancy", f"{fits}, limited by {fit.limit}"),
        ("instructions", f"{code.instructions}, of them {len(code.region)} in the {where} ({moves})"),
        ("accesses", _accesses(code)),
        *_order_lines(inspection),
    ]
    for name, text in told:
        _tell(console, name, text)
    shares = [
        (name, str(count), f"{100 * count / len(code.region):.0f}%")
        for name, count in code.mix.by_class.items()
        if count
    ]
    _print_table(console, f"{where[0].upper()}{where[1:]}", ("instructions", "count", "share"), shares)
    prediction, attention = code.prediction, inspection.beside_its_bound
    columns = ("unit", "cycles") if attention is None else ("unit", "cycles", "of 128 x 128 scores")
    rows = [
        (
            unit,
            f"{value:.1f}",
            *(() if attention is None else (f"{attention['cycles_per_16384_scores'][unit]:.0f}",)),
            "<- bound" if unit == prediction.bound else "",
        )
        for unit, value in sorted(prediction.cycles.items(), key=lambda item: -item[1])
    ]
    _print_table(console, f"PREDICTION, not measured: {machine.chip}", (*columns, ""), rows)
    say(console)
    for name, text in [] if attention is None else _bound_lines(attention):
        _tell(console, name, text)
    say_wrapped(
        console,
        f"  predicted cycles of one multiprocessor for {prediction.per_pass}, with perfect overlap; memory: "
        f"{prediction.memory_bytes:.0f} bytes at the data sheet's {machine.memory_tb_per_s} TB/s and "
        f"{machine.clock_ghz} GHz",
        indent=2,
    )


def _print_table(console: Console, title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    laid = laid_out(headings, rows, words=("instructions", "unit", ""), width=width_of(console))
    say(console)
    for line in (title, *laid.lines):
        say(console, line)


def _order_lines(inspection: Inspection) -> list[tuple[str, str]]:
    """The hot loop's order, and what runs between each kind of matmul and its wait; names and texts."""
    order = inspection.order
    if order is None:
        return []
    lines = [("order", f"{order_text(order['steps'])}, and again: some waits are in the next pass")]
    if inspection.nvidia is not None and not inspection.nvidia.serialized:
        lines.append(("serialized", "no: ptxas makes no remark"))
    for matmul, beside in order["beside"].items():
        exponentials = (
            f"{beside['exponentials']} of {order['exponentials']} exponentials, " if order["exponentials"] else ""
        )
        text = f"{exponentials}{beside['instructions']} of {counted(order['instructions'], 'instruction')} issued"
        lines.append(("overlap", f"{text} between {matmul} and its wait"))
    return lines


def _bound_lines(attention: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The tile of attention and the analytic bound of its pass; names and texts."""
    tile, bound = attention["tile"], attention["bound"]
    passes = counted(tile["passes"], "pass", "passes")
    size = f"{tile['block_m']} queries x {tile['block_n']} keys ({tile['keys']} of them exist)"
    lines = [("tile", f"{size} of one head of {tile['head_dim']}, held as {tile['padded']}; {passes} a program")]
    if bound is None:
        return [*lines, ("distance", "not told: the analytic bound is of 16-bit dtypes")]
    moved = f", {tile['polynomial']} of 8 on the FMA units" if tile["polynomial"] else ""
    matrix = f"matrix {bound['matrix']:.1f} ({bound['matrix_unpadded']:.1f} without padding)"
    exponential = f"exponential {bound['exponential']:.1f}{moved}"
    return [
        *lines,
        ("analytic", f"{bound['cycles']:.1f} cycles a pass, {bound['unit']}: {matrix}, {exponential}"),
        ("distance", f"{attention['distance']:.2f} times the analytic bound (memory and L2 are not in it)"),
    ]


# Units of the work list, in its order.
UNITS = (
    "matrix",
    "exponential",
    "issue",
    "FMA",
    "ALU",
    "conversion",
    "load/store",
    "shared memory",
    "L2",
    "memory",
)


def by_distance(results: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Inspections of attention as plain values, the farthest from its bound first; without a bound, last."""
    return sorted(results, key=lambda result: -(result["attention"]["distance"] or 0.0))


def print_work_list(results: Iterable[Mapping[str, Any]], console: Console) -> None:
    """A line for each launch of attention: its tile, and cycles of 128 x 128 scores by unit beside the bound.

    overlap: exponentials issued between q k^T and its wait, of all.
    """
    names = (
        "D",
        "held",
        "tile",
        "warps",
        "registers",
        "faults",
        "overlap",
        *UNITS,
        "busiest",
        "analytic",
        "distance",
    )
    rows = []
    for result in by_distance(results):
        attention = result["attention"]
        tile, bound = attention["tile"], attention["bound"]
        cycles = attention["cycles_per_16384_scores"]
        per_pass = 128 * 128 / (tile["block_m"] * tile["keys"])
        rows.append(
            (
                str(tile["head_dim"]),
                str(tile["padded"]),
                f"{tile['block_m']}x{tile['block_n']}",
                str(result["num_warps"]),
                str(result["resources"]["registers"]),
                "; ".join(result["faults"]) or MISSING,
                _overlap(attention["overlap"]),
                *(f"{cycles.get(unit, 0.0):.0f}" for unit in UNITS),
                max(cycles, key=lambda unit: cycles[unit]),
                MISSING if bound is None else f"{per_pass * bound['cycles']:.0f} {bound['unit']}",
                MISSING if bound is None else f"{attention['distance']:.2f}",
            )
        )
    say_wrapped(console, "PREDICTION, not measured: cycles of 128 x 128 scores")
    laid = laid_out(names, rows, words=("tile", "faults", "busiest", "analytic"), width=width_of(console))
    for line in laid.lines:
        say(console, line)


def _overlap(overlap: Mapping[str, int] | None) -> str:
    return MISSING if overlap is None else f"{overlap['beside_scores']}/{overlap['exponentials']}"


def _accesses(code: NvidiaCode) -> str:
    """ "x_ptr loads 16 B x 4, out_ptr stores 16 B x 2": accesses of a thread by argument, direction and width."""
    counts: dict[tuple[str, bool, int], int] = {}
    for access in code.accesses:
        key = (access.argument, access.store, access.bytes)
        counts[key] = counts.get(key, 0) + 1
    return ", ".join(
        f"{name} {'stores' if store else 'loads'} {size} B x {count}"
        for (name, store, size), count in counts.items()
    )
