"""An inspection as a table in the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from .inspection import Inspection, NvidiaCode
from .loop_order import order_text


def print_inspection(inspection: Inspection, console: Console, *, sass: bool = False) -> None:
    """Resources as the compiler reports them, then the prediction, labelled so."""
    launch, compiled, machine = inspection.launch, inspection.compiled, inspection.compiled.machine
    title = f"{launch.name} for {machine.arch}: {launch.programs} programs of {launch.num_warps} warps"
    console.print(f"\n{title}", highlight=False)
    constants = ", ".join(f"{name}={value}" for name, value in compiled.specialization.constants)
    console.print(f"  compiled for  {constants}", highlight=False, soft_wrap=True)
    console.print(f"  shared memory {compiled.shared} bytes", highlight=False)
    if inspection.amd is not None:
        used = inspection.amd
        console.print(
            f"  registers     {used.vgprs} vector ({used.agprs} accumulation), {used.sgprs} scalar; "
            f"spills {used.vgpr_spills} and {used.sgpr_spills}; scratch {used.scratch} bytes",
            highlight=False,
        )
    if inspection.nvidia is not None:
        _print_nvidia(inspection, inspection.nvidia, console)
    for fault in inspection.faults:
        console.print(f"  FAULT         {fault}", highlight=False)
    if sass and inspection.nvidia is not None:
        console.print(inspection.nvidia.text, highlight=False, markup=False, soft_wrap=True)
    elif sass:
        console.print(compiled.asm["amdgcn"], highlight=False, markup=False, soft_wrap=True)


def _print_nvidia(inspection: Inspection, code: NvidiaCode, console: Console) -> None:
    machine, used, fit = inspection.compiled.machine, code.resources, code.occupancy
    where = "hot loop" if code.region.loop else "whole body, no loop"
    lines = [
        f"  registers     {used.registers} a thread; spills {used.spill_loads} loads, {used.spill_stores} stores; "
        f"stack {used.stack}, local {used.local} bytes",
        f"  occupancy     {fit.programs} programs, {fit.warps} of {fit.max_warps} warps, limited by {fit.limit}",
        f"  instructions  {code.instructions}, of them {len(code.region)} in the {where} ({code.mix.moves} moves)",
        f"  accesses      {_accesses(code)}",
    ]
    lines += _order_lines(inspection)
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
    shares = Table(
        "instructions",
        "count",
        "share",
        title=f"{where[0].upper()}{where[1:]}",
        title_justify="left",
        min_width=40,
    )
    for name, count in code.mix.by_class.items():
        if count:
            shares.add_row(name, str(count), f"{100 * count / len(code.region):.0f}%")
    console.print(shares)
    prediction, attention = code.prediction, inspection.beside_its_bound
    title = f"PREDICTION, not measured: {machine.chip}"
    columns = ("unit", "cycles") if attention is None else ("unit", "cycles", "of 128 x 128 scores")
    cycles = Table(*columns, title=title, title_justify="left", min_width=50)
    for unit, value in sorted(prediction.cycles.items(), key=lambda item: -item[1]):
        row = [unit, f"{value:.1f}" + (" <- bound" if unit == prediction.bound else "")]
        if attention is not None:
            row.append(f"{attention['cycles_per_16384_scores'][unit]:.0f}")
        cycles.add_row(*row)
    console.print(cycles)
    if attention is not None:
        _print_bound(attention, console)
    console.print(
        f"  predicted cycles of one multiprocessor for {prediction.per_pass}, with perfect overlap; memory: "
        f"{prediction.memory_bytes:.0f} bytes at the data sheet's {machine.memory_tb_per_s} TB/s and "
        f"{machine.clock_ghz} GHz",
        highlight=False,
        soft_wrap=True,
    )


def _order_lines(inspection: Inspection) -> list[str]:
    """The hot loop's order, and what runs between each kind of product and its wait."""
    order = inspection.order
    if order is None:
        return []
    lines = [f"  order         {order_text(order['steps'])}, and again: some waits are in the next pass"]
    if inspection.nvidia is not None and not inspection.nvidia.serialized:
        lines.append("  serialized    no: ptxas makes no remark")
    for product, beside in order["beside"].items():
        exponentials = (
            f"{beside['exponentials']} of {order['exponentials']} exponentials, " if order["exponentials"] else ""
        )
        lines.append(
            f"  overlap       {exponentials}{beside['instructions']} of {order['instructions']} instructions are "
            f"issued between {product} and its wait"
        )
    return lines


def _print_bound(attention: Mapping[str, Any], console: Console) -> None:
    tile, bound = attention["tile"], attention["bound"]
    lines = [
        f"  tile          {tile['block_m']} queries x {tile['block_n']} keys ({tile['keys']} of them exist) "
        f"of one head of {tile['head_dim']}, held as {tile['padded']}; {tile['passes']} passes a program"
    ]
    if bound is None:
        lines.append("  distance      not told: the analytic bound is of 16-bit dtypes")
    else:
        moved = f", {tile['polynomial']} of 8 on the FMA units" if tile["polynomial"] else ""
        lines += [
            f"  analytic      {bound['cycles']:.1f} cycles a pass, {bound['unit']}: matrix {bound['matrix']:.1f} "
            f"({bound['matrix_unpadded']:.1f} without padding), exponential {bound['exponential']:.1f}{moved}",
            f"  distance      {attention['distance']:.2f} times the analytic bound (memory and L2 are not in it)",
        ]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


# Units of the work list, in its order.
UNITS = ("matrix", "exponential", "issue", "FMA", "ALU", "conversion", "load/store", "shared memory", "L2", "memory")


def by_distance(results: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Inspections of attention as plain values, the farthest from its bound first; without a bound, last."""
    return sorted(results, key=lambda result: -(result["attention"]["distance"] or 0.0))


def print_work_list(results: Iterable[Mapping[str, Any]], console: Console) -> None:
    """A line for each launch of attention: its tile, and cycles of 128 x 128 scores by unit beside the bound.

    overlap: exponentials issued between the score product and its wait, of all.
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
    table = Table(*names, title="PREDICTION, not measured: cycles of 128 x 128 scores", title_justify="left")
    for result in by_distance(results):
        attention = result["attention"]
        tile, bound = attention["tile"], attention["bound"]
        cycles = attention["cycles_per_16384_scores"]
        per_pass = 128 * 128 / (tile["block_m"] * tile["keys"])
        table.add_row(
            str(tile["head_dim"]),
            str(tile["padded"]),
            f"{tile['block_m']}x{tile['block_n']}",
            str(result["num_warps"]),
            str(result["resources"]["registers"]),
            "; ".join(result["faults"]) or "-",
            _overlap(attention["overlap"]),
            *(f"{cycles.get(unit, 0.0):.0f}" for unit in UNITS),
            max(cycles, key=lambda unit: cycles[unit]),
            "-" if bound is None else f"{per_pass * bound['cycles']:.0f} {bound['unit']}",
            "-" if bound is None else f"{attention['distance']:.2f}",
        )
    # No figure is ever cut: on a narrow terminal lines are as long as the table.
    width = max(console.width, Measurement.get(console, console.options.update(width=1000), table).maximum)
    console.print(table, width=width, crop=False, soft_wrap=True)


def _overlap(overlap: Mapping[str, int] | None) -> str:
    return "-" if overlap is None else f"{overlap['beside_scores']}/{overlap['exponentials']}"


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
