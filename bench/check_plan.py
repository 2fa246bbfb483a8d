"""The plan of a GPU check as a table: limits, compilations, and what they are estimated to take."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from typing import Any

from check_parts import Part

# Of one compilation, from 356 CPU seconds for 792 kernels on one core; and of a process before its first.
CPU_SECONDS, START_SECONDS = 356 / 792, 20.0
CORES = 16


def launches_of(names: Sequence[str]) -> Set[Any]:
    """The distinct launches that `ldmperf compile --for` these names compiles for an sm_90."""
    from ldmperf.profiling.ahead.launch_sets import work_for
    from ldmperf.profiling.machines import MACHINES

    return set(work_for(names, MACHINES["sm_90"]).launches)


def seconds_on(cores: int, launches: int) -> float:
    """An estimate: of the compilations alone, shared by the cores evenly."""
    return START_SECONDS + launches * CPU_SECONDS / cores


def plan_lines(
    chosen: Sequence[Part],
    seconds: float,
    grace: float,
    find: Callable[[Sequence[str]], Set[Any]] = launches_of,
) -> list[str]:
    """A line for each part, and when it begins if those before it take their limits."""
    on_cores = f"s on {CORES} cores"
    lines = [f"{'part':28} {'limit s':>8} {'floor s':>8} {'to compile':>11} {on_cores:>14} {'begins by':>12}"]
    compiled: set[Any] = set()
    # Seconds of compilation that go on beside another part.
    beside: dict[str, float] = {}
    begins = 0.0
    for part in chosen:
        cells = [f"{part.name:28} {part.limit:8.0f} {part.floor:8.0f}"]
        takes = part.limit
        if part.own_launches:
            new = find(part.own_launches) - compiled
            compiled |= new
            launches = len(new)
            done = sum(beside.get(name, 0.0) for name in part.own_launches)
            estimate = max(seconds_on(CORES, launches) - done, START_SECONDS)
            takes = min(part.limit, estimate) if part.evidence == "compilation" else part.limit
            cells.append(f"{launches:11d} {estimate:14.0f}")
        else:
            cells.append(f"{'':11} {'':14}")
        reached = part.reason is None and begins + part.floor + grace <= seconds
        cells.append(f"{begins:12.0f}" if reached else f"{part.reason or 'if time is left':>12}")
        lines.append(" ".join(cells).rstrip())
        if reached:
            takes = min(takes, seconds - grace - begins)
            begins += takes
            beside |= dict.fromkeys(part.beside, max(takes - START_SECONDS, 0.0))
    lines.append(
        f"{seconds:.0f} s in all; {len(compiled)} launches to compile, estimated at {CPU_SECONDS:.2f} CPU seconds "
        f"each and {START_SECONDS:.0f} s of start; what a part does not use, those behind it may"
    )
    return lines
