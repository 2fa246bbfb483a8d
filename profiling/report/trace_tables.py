"""What `ldmperf trace` says: where each figure is from, a step by class, the top kernels."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console

from ..figures.derived import overview, step_ms
from ..figures.text import joined, short_ratio
from ..measure.conditions import busy_notes, commit, flag_notes
from ..terminal.layout import MISSING, Grid, laid_out, number
from ..terminal.visible import counted, for_markdown, say, say_wrapped, width_of
from ..trajectory.attribution import EAGER_TWINS
from ..trajectory.records import Record
from ..trajectory.timeline import AttributedStep

_WORDS = ("class", "kernel", "operator")
_REST = "the rest"


@dataclass(frozen=True)
class TraceReport:
    """The timed run, the backend and the times of the attributed one, and how many kernels are listed."""

    record: Record
    backend: str
    times: AttributedStep
    top: int

    @property
    def lines(self) -> list[str]:
        """The conditions, then which figure is from which run."""
        record = self.record
        environment = record.environment
        versions = f"torch {environment.torch}", commit(environment)
        conditions = joined([record.case.label, *overview([record]).conditions.shared, *versions])
        doubts = [*flag_notes([record], "case"), *busy_notes([record], "case")]
        return [conditions, self._timed(), self._attributed(), *doubts]

    def _timed(self) -> str:
        record = self.record
        assert record.wall_ms is not None
        step = step_ms(record)
        assert step is not None
        how = "each step a replay of the captured graph" if record.case.backend in EAGER_TWINS else "eager"
        runs = f"{counted(record.wall_ms.n, 'trajectory', 'trajectories')} of {counted(record.case.steps, 'step')}"
        busy = None if record.trace is None else record.trace.step_busy_ms
        return (
            f"Timed on {record.case.backend}, {how}, without the profiler: {number(step.p50)} ms a step, "
            f"{number(record.wall_ms.p50)} ms a trajectory (wall clock, median of {runs})"
            + ("" if busy is None else f"; the device is busy for {number(busy)} ms of a step")
            + "."
        )

    def _attributed(self) -> str:
        times, step = self.times, step_ms(self.record)
        assert step is not None
        start = f"Attributed on {self.backend}, eager, one trajectory of {counted(times.steps, 'step')} "
        if times.clock == "device":
            return start + (
                f"under torch's profiler: the kernels of a step take {number(times.step_ms)} ms by the device's "
                "clock. Times of kernels hold none of the profiler's own work; times of the host in trace.json do."
            )
        return start + (
            f"under torch's profiler: {number(times.step_ms)} ms a step, {short_ratio(times.step_ms / step.p50)} "
            "times the timed step. All times below are of the host, and hold the profiler's own work."
        )

    @property
    def tables(self) -> tuple[tuple[str, Grid], ...]:
        """Titles and tables."""
        what = "kernels" if self.times.clock == "device" else "operators of torch"
        return (
            ("A step by class of operator", self.classes_grid()),
            (f"The {what} that take longest in a step", self.kernels_grid()),
        )

    def classes_grid(self) -> Grid:
        """A row for each class, for what no class explains, and for their sum."""
        times = self.times
        count = "launches" if times.clock == "device" else "calls"
        other = "other" if times.clock == "device" else "other (between operators)"
        named = [*times.classes.items(), (other, times.other)]
        rows = [_row((name,), one.launches, one.ms, times.step_ms) for name, one in named]
        total = _row(("step",), sum(one.launches for _, one in named), times.step_ms, times.step_ms)
        return Grid(("class", count, "ms", "share"), (*rows, total), _WORDS)

    def kernels_grid(self) -> Grid:
        """A row for each of the top kernels and one for the rest of the step, so that all is accounted for."""
        times = self.times
        shown, others = times.kernels[: self.top], times.kernels[self.top :]
        rows = [_row((k.name, k.operator_class), k.launches, k.ms, times.step_ms) for k in shown]
        left_ms = max(times.step_ms - sum(k.ms for k in shown), 0.0)
        rest = _row((_REST, MISSING), sum(k.launches for k in others), left_ms, times.step_ms)
        names = ("kernel", "launches") if times.clock == "device" else ("operator", "calls")
        return Grid((names[0], "class", names[1], "ms", "share"), (*rows, rest), _WORDS)

    def show(self, console: Console) -> None:
        """Prints the lines and both tables; nothing is cut."""
        conditions, *lines = self.lines
        say_wrapped(console, conditions, "bold")
        for line in lines:
            say_wrapped(console, line)
        for title, grid in self.tables:
            say(console)
            say_wrapped(console, title, "bold cyan")
            laid = laid_out(grid.headings, grid.rows, words=_WORDS, width=width_of(console))
            for line in laid.lines:
                say(console, line)

    def markdown(self) -> str:
        """The same as GitHub markdown."""
        parts = [for_markdown(line) + "\n" for line in self.lines]
        for title, grid in self.tables:
            parts += [f"## {title}\n", *grid.markdown(), ""]
        return "\n".join(parts)


def _row(names: tuple[str, ...], launches: float, ms: float, whole: float) -> tuple[str, ...]:
    return (*names, f"{launches:g}", number(ms), f"{100 * ms / whole:.1f}%" if whole else MISSING)
