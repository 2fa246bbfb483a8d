"""An inspection as a table in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from .inspection import Inspection, NvidiaCode


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
    prediction = code.prediction
    cycles = Table(
        "unit", "cycles", title=f"PREDICTION, not measured: {machine.chip}", title_justify="left", min_width=50
    )
    for unit, value in sorted(prediction.cycles.items(), key=lambda item: -item[1]):
        cycles.add_row(unit, f"{value:.1f}" + (" <- bound" if unit == prediction.bound else ""))
    console.print(cycles)
    console.print(
        f"  predicted cycles of one multiprocessor for {prediction.per_pass}, with perfect overlap; memory: "
        f"{prediction.memory_bytes:.0f} bytes at the data sheet's {machine.memory_tb_per_s} TB/s and "
        f"{machine.clock_ghz} GHz",
        highlight=False,
        soft_wrap=True,
    )


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
