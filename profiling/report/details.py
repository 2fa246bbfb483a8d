"""What the page shows below the table: each case with its check and spread, lines over steps, environments."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from ..figures import text
from ..figures.derived import Overview, Row, ratio
from ..measure.conditions import commit, flags, marks
from ..measure.environment import DeviceState, Environment
from ..measure.nvml import ON_A_CPU
from ..terminal.layout import MISSING, Grid, formatted, number
from ..terminal.visible import visible
from ..trajectory.record_parts import Energy
from ..trajectory.records import Record

GIB = 2**30


def cases_grid(shown: Overview, rows: Sequence[Row]) -> Grid:
    """A line for each of the rows, failed ones too: check, spread, both clocks, phases, memory, device state."""
    columns: dict[str, Callable[[Row], str]] = {
        "case": lambda row: visible(f"{row.name}, {row.case.backend}"),
        "conditions": lambda row: shown.conditions.heading(row) or MISSING,
        "status": lambda row: row.record.status,
        "relative RMS error": lambda row: largest_error(row.record),
        "tolerance": lambda row: f"{check.tolerance:.1e}" if (check := row.record.correctness) else MISSING,
        "reference": lambda row: visible(row.record.correctness.reference) if row.record.correctness else MISSING,
        "n": lambda row: str(row.record.wall_ms.n) if row.record.wall_ms else MISSING,
        "wall ms p20": lambda row: number(row.record.wall_ms.p20 if row.record.wall_ms else None),
        "wall ms p50": lambda row: number(row.record.wall_ms.p50 if row.record.wall_ms else None),
        "wall ms p80": lambda row: number(row.record.wall_ms.p80 if row.record.wall_ms else None),
        "wall ms min": lambda row: number(row.record.wall_ms.min if row.record.wall_ms else None),
        "images per s": lambda row: number(row.record.images_per_s),
        "GPU ms p50": lambda row: number(row.record.gpu_ms.p50 if row.record.gpu_ms else None),
        "wall beyond GPU": lambda row: _wall_beyond_gpu(row.record),
        "weights ms": lambda row: number(row.record.phases.weights_ms),
        "build ms": lambda row: number(row.record.phases.build_ms),
        "first call ms": lambda row: number(row.record.phases.first_call_ms),
        "warm-up ms": lambda row: number(row.record.phases.warmup_ms),
        "decoder ms p50": lambda row: number(row.record.decoder_ms.p50 if row.record.decoder_ms else None),
        "peak memory GiB": lambda row: number(ratio(row.record.peak_memory_bytes, GIB)),
        "settings": lambda row: visible("; ".join(row.record.settings)) or MISSING,
        "cut short by": lambda row: row.record.harness.stopped_by or MISSING,
        "load before, after": lambda row: _states(row.record, lambda s: formatted(s.load_average_1min, ".2f")),
        "SM MHz before, after": lambda row: _states(row.record, lambda s: formatted(s.sm_clock_mhz, "d")),
        "throttle reasons after": lambda row: ", ".join(row.record.device_after.throttle_reasons or ()) or MISSING,
        "J per image": lambda row: number(row.record.joules_per_image),
        "J per step": lambda row: number(row.record.joules_per_step),
        "mean W": lambda row: formatted(row.record.mean_power_w, ".0f"),
        "energy window s": lambda row: number(energy.window_s if (energy := _counted(row.record)) else None),
        "energy error": lambda row: formatted(
            energy.relative_error if (energy := _counted(row.record)) else None, ".1%"
        ),
        "no energy because": lambda row: _no_energy(row.record),
        "flags": lambda row: "; ".join(flags(row.record)) or MISSING,
    }
    cells = tuple(tuple(cell(row) for cell in columns.values()) for row in rows)
    words = (
        *("case", "conditions", "status", "reference", "settings", "cut short by", "throttle reasons after"),
        *("no energy because", "flags"),
    )
    # On a CPU nothing fills the GPU's columns.
    return Grid(tuple(columns), cells, words).without_empty()


def lines_grid(shown: Overview) -> Grid:
    """The lines over steps: slope, fixed part in ms and in steps, and R2 where there are three points."""
    rows = []
    for series in shown.series:
        line, heading = series.line, shown.conditions.heading(series, "steps")
        cells = (
            visible(text.joined((series.name, series.case.backend, heading))),
            ", ".join(str(row.record.evaluations) for row in series.rows),
            number(line.slope),
            number(line.intercept),
            text.short_ratio(ratio(line.intercept, line.slope) if line.slope > 0 else None),
            f"{len(series.rows)} points only" if line.r2 is None else _r2(line.r2),
            marks(*(row.record for row in series.rows)) or MISSING,
        )
        rows.append(cells)
    headings = ("case", "evaluations", "slope, ms per step", "fixed part, ms", "fixed part, steps", "R²", "flags")
    grid = Grid(headings, tuple(rows), ("case", "flags"))
    # The other columns stay, whatever is in them.
    return grid if any(row[-1] != MISSING for row in rows) else grid.without_last()


def environment_lines(environments: Iterable[Environment]) -> list[tuple[str, str]]:
    """Name and value of what is known of environments of one kind; of several machines each value once."""
    values: dict[str, dict[str, None]] = {}
    for environment in environments:
        for name, value in _of_one(environment):
            values.setdefault(name, {})[value] = None
    return [(name, " / ".join(of)) for name, of in values.items()]


def _of_one(environment: Environment) -> list[tuple[str, str]]:
    gpu = environment.gpu
    lines: list[tuple[str, object]] = [
        ("CPU", environment.cpu),
        ("cores", _cores(environment)),
        ("torch threads", environment.torch_threads),
        ("memory", _gib(environment.memory_bytes)),
        ("GPU", gpu and text.joined((gpu.name, f"{gpu.count} visible" if gpu.count > 1 else ""))),
        ("GPU memory", gpu and _gib(gpu.memory_bytes)),
        ("compute capability", gpu and gpu.compute_capability),
        ("driver", gpu and gpu.driver),
        ("power limit", f"{gpu.power_limit_w:.0f} W" if gpu and gpu.power_limit_w is not None else None),
        ("commit", commit(environment)),
        ("ldmperf", environment.ldmperf),
    ]
    told = {"cpu", "logical_cores", "usable_cores", "memory_bytes", "gpu", "git_commit", "git_dirty", "ldmperf"}
    others = environment.model_dump(exclude=told | {"torch_threads"})
    lines += [(name.replace("_", " "), value) for name, value in others.items()]
    return [(name, visible(text.value_of(value))) for name, value in lines if value is not None]


def device_lines(records: Iterable[Record]) -> list[tuple[str, str]]:
    """Ranges of what changes during a run, over all readings before, during and after a case."""
    states = [
        state for record in records for state in (record.device_before, record.device_during, record.device_after)
    ]
    ranges: list[tuple[str, Sequence[float | None], str]] = [
        ("load average (1 min)", [s.load_average_1min for s in states], "{:.2f}"),
        ("SM clock, MHz", [s.sm_clock_mhz for s in states], "{:.0f}"),
        ("memory clock, MHz", [s.memory_clock_mhz for s in states], "{:.0f}"),
        ("temperature, °C", [s.temperature_c for s in states], "{:.0f}"),
        ("power, W", [s.power_w for s in states], "{:.0f}"),
        ("power limit in force, W", [s.power_limit_w for s in states], "{:.0f}"),
        ("other processes on the GPU", [s.foreign_processes for s in states], "{:.0f}"),
    ]
    lines = [(name, _range(values, form)) for name, values, form in ranges if any(v is not None for v in values)]
    reasons = sorted({reason for state in states for reason in state.throttle_reasons or ()})
    if any(state.throttle_reasons is not None for state in states):
        lines.append(("throttle reasons seen", ", ".join(reasons) or "none"))
    return lines


def harness_lines(records: Sequence[Record]) -> list[str]:
    """How often trajectories were repeated, in the words of each distinct setting."""
    lines = []
    timed = [record for record in records if record.wall_ms is not None] or records
    for harness in (record.harness for record in timed):
        beside = f"; timed in turn: {', '.join(harness.interleaved)}" if len(harness.interleaved) > 1 else ""
        cut = "" if harness.stopped_by is None else f"; cut short by --{harness.stopped_by}"
        after = "; in a process that had measured other cases before" if harness.groups_before else ""
        lines.append(
            f"at least {harness.min_count} trajectories and {harness.min_seconds:g} s of them, "
            f"after {harness.warmup_count} for warm-up{beside}{cut}{after}"
        )
    return list(dict.fromkeys(lines))


def flags_cell(record: Record) -> str:
    """The flags of a time, without details; a case without a time has none."""
    return (marks(record) if record.wall_ms is not None else "") or MISSING


def largest_error(record: Record) -> str:
    """Of the latents against the reference's, before timing and after."""
    check = record.correctness
    errors = [e for e in (check.error_before, check.error_after) if e is not None] if check else []
    return formatted(max(errors, default=None), ".1e")


def _counted(record: Record) -> Energy | None:
    """Its energy, where that could be told."""
    return None if record.energy is None or record.energy.joules is None else record.energy


def _no_energy(record: Record) -> str:
    """Why a case on a GPU has none; on a CPU that is no news."""
    if record.energy is None or record.energy.message in (None, ON_A_CPU):
        return MISSING
    return visible(record.energy.message or "")


def _wall_beyond_gpu(record: Record) -> str:
    """The share of the wall clock's median that the device events do not span."""
    if record.wall_ms is None or record.gpu_ms is None:
        return MISSING
    return formatted(ratio(record.wall_ms.p50 - record.gpu_ms.p50, record.wall_ms.p50), ".1%")


def _states(record: Record, reading: Callable[[DeviceState], str]) -> str:
    before, after = reading(record.device_before), reading(record.device_after)
    return MISSING if before == after == MISSING else f"{before}, {after}"


def _r2(r2: float) -> str:
    # Never rounded up to a perfect fit.
    return f"{max(0.0, math.floor(r2 * 1e5) / 1e5):.5f}"


def _range(values: Iterable[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    low, high = form.format(min(known)), form.format(max(known))
    return low if low == high else f"{low} to {high}"


def _cores(environment: Environment) -> str | None:
    if environment.usable_cores is None:
        return None if environment.logical_cores is None else str(environment.logical_cores)
    return f"{environment.usable_cores} usable" + (
        "" if environment.logical_cores is None else f" of {environment.logical_cores}"
    )


def _gib(size: int | None) -> str | None:
    return None if size is None else f"{size / GIB:.1f} GiB"
