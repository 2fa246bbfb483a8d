"""The results of a bench as people read them: in the terminal and as markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console

from ldmperf.model import FAMILY

from ..measure.conditions import busy_notes, commit, flag_notes, marks
from ..options import device_kind
from ..terminal.layout import MISSING, Grid, formatted, laid_out, number
from ..terminal.visible import counted, for_markdown, say, say_wrapped, width_of
from .attention_table import attention_figures, attention_grid, attention_lines, attention_rows, attention_title
from .kernel_records import MODES, KernelRecord, Mode, best_kernel
from .ratios import ratios

HEADINGS = (
    *("peer", "calls", "p20 ms", "p50 ms", "p80 ms", "x fastest", "GB/s", "% of copy"),
    *("TFLOP/s", "% of bound", "error", "L2", "flags"),
)
_WORDS = ("peer", "calls", "L2", "flags")
NOTHING = "No kernel was measured."
NOTE = (
    "x fastest: times as long as the fastest peer of the call. GB/s: every argument and result once. % of copy: "
    "of a copy's in the same run. % of bound: the least time of matmuls and exponentials."
)


def by_conditions(records: Sequence[KernelRecord]) -> list[list[KernelRecord]]:
    """The records of each kind of machine, dtype and commit apart: times of two do not belong in one table.

    Of a call that several runs have there is one record (`best_kernel`).
    """
    found: dict[object, dict[str, list[KernelRecord]]] = {}
    for record in sorted(records, key=lambda record: record.started_at):
        of = (record.environment.kind, device_kind(record.device), record.case.dtype, record.in_turns)
        found.setdefault(of, {}).setdefault(record.case_key, []).append(record)
    order = {id(record): place for place, record in enumerate(records)}
    return [
        sorted(map(best_kernel, group.values()), key=lambda record: order[id(record)]) for group in found.values()
    ]


def conditions(records: Sequence[KernelRecord]) -> str:
    """Device, dtype, versions, commit and the copy bandwidth that percentages are of."""
    first = records[0]
    environment = first.environment
    parts = [
        machine_of(first),
        ", ".join(dict.fromkeys(record.case.dtype for record in records)),
        f"torch {environment.torch}",
        f"triton {environment.triton}" if environment.triton else "no triton",
        commit(environment),
    ]
    if any(record.seed for record in records):
        parts.append(f"seed {', '.join(dict.fromkeys(str(record.seed) for record in records))}")
    if first.copy_bandwidth is not None:
        parts.append(f"copy {number(first.copy_bandwidth.gb_per_s)} GB/s")
    if first.in_turns:
        parts.append("in turn with another side")
    return ", ".join(parts)


def machine_of(record: KernelRecord) -> str:
    """The GPU or the processor that it was measured on."""
    environment = record.environment
    gpu = environment.gpu if _on_gpu(record) else None
    return gpu.name if gpu else environment.cpu or "CPU of unknown name"


def _on_gpu(record: KernelRecord) -> bool:
    return device_kind(record.device) == "cuda"


def notes(records: Sequence[KernelRecord]) -> list[str]:
    """What to know before the numbers: a busy machine, a throttled or shared GPU."""
    # The device's state is read around a call with all its peers.
    calls = {(record.case.key, record.device): record for record in records}
    timed = [record for record in records if record.ms is not None]
    return [f"Note: {note}" for note in (*busy_notes(list(calls.values()), "call"), *flag_notes(timed, "time"))]


def print_records(records: Sequence[KernelRecord], console: Console) -> None:
    """Of each group of `by_conditions` a section per call with a line per peer and mode, then the ratios.

    Nothing is cut: see `laid_out`.
    """
    if not records:
        say(console, NOTHING)
    for place, group in enumerate(by_conditions(records)):
        if place:
            say(console)
        _print_group(group, console)


def _print_group(records: Sequence[KernelRecord], console: Console) -> None:
    width = width_of(console)
    say_wrapped(console, conditions(records), "bold")
    for note in notes(records):
        say_wrapped(console, note, "yellow")
    _print_calls(_by_call(records), console)
    beside_the_best = attention_lines(attention_rows(records), width)
    if beside_the_best:
        say(console)
        say(console, beside_the_best[0], "bold cyan")
    for line in beside_the_best[1:]:
        say(console, line)
    say(console)
    for line in summary_lines(records):
        say_wrapped(console, line)


def _print_calls(sections: Sequence[tuple[str, Sequence[KernelRecord]]], console: Console) -> None:
    records = [record for _, group in sections for record in group]
    headings, fastest = _headings(records), _fastest(records)
    cells = [_cells(record, headings, fastest) for record in records]
    width = width_of(console)
    laid = laid_out(headings, cells, words=_WORDS, width=width, leading=headings.index("p20 ms"))
    if laid.head is not None:
        say(console, laid.head, "dim")
    lines = iter(laid.rows)
    for title, group in sections:
        say(console)
        say_wrapped(console, title, "bold cyan")
        for record in group:
            for line in next(lines):
                say(console, line, "" if record.ms is not None else "red")


def summary_lines(records: Sequence[KernelRecord]) -> list[str]:
    """Our kernels' bandwidth on the call that moves most, by operator and mode; the peers' ratios; attention's."""
    largest: dict[tuple[str, Mode], KernelRecord] = {}
    for record in records:
        group = (record.case.operator, record.mode)
        if record.peer != "triton" or record.percent_of_copy is None:
            continue
        if group not in largest or record.bytes_moved > largest[group].bytes_moved:
            largest[group] = record
    bandwidths = [
        f"{operator}, calls {MODES[mode]}: triton has {record.percent_of_copy:.1f}% of the copy bandwidth at "
        f"{number(record.bytes_moved / 1e6)} MB ({record.size} batch {record.batch} {record.case.label})"
        for (operator, mode), record in largest.items()
    ]
    compared = [
        f"{r.operator}, calls {MODES[r.mode]}: {r.peer} takes {number(r.mean)} times as long as triton "
        f"(geometric mean of {counted(r.calls, 'call')}; least {number(r.worst)}: {r.worst_call})"
        for r in ratios(records)
    ]
    return [*bandwidths, *compared, *attention_figures(attention_rows(records))]


def markdown(records: Sequence[KernelRecord]) -> str:
    """The same as GitHub tables: of each group of `by_conditions` one of times and one of failures."""
    if not records:
        return NOTHING + "\n"
    return "\n".join(_markdown(group) for group in by_conditions(records))


def _markdown(records: Sequence[KernelRecord]) -> str:
    lines = [for_markdown(line) + "\n" for line in (conditions(records), *notes(records))]
    lines += time_grid(records).markdown()
    if (failures := failure_grid(records)).rows:
        lines += ["", "Without a time:", "", *failures.markdown()]
    if of_attention := attention_rows(records):
        lines += ["", attention_title(of_attention), "", *attention_grid(of_attention).markdown()]
    lines += ["", *(f"- {for_markdown(line)}" for line in summary_lines(records))]
    return "\n".join(lines) + "\n"


def time_grid(records: Sequence[KernelRecord]) -> Grid:
    """A line for each record with a time."""
    headings, fastest = _headings(records), _fastest(records)
    rows = tuple(
        (title, *_cells(record, headings, fastest))
        for title, group in _by_call(records)
        for record in group
        if record.ms is not None
    )
    return Grid(("call", *headings), rows, ("call", *_WORDS))


def failure_grid(records: Sequence[KernelRecord]) -> Grid:
    """A line for each peer and each reason why it has no time, with the calls of which that is so."""
    found: dict[tuple[str, ...], list[str]] = {}
    for title, group in _by_call(records):
        for record in group:
            if record.ms is None:
                reason = (record.peer, MODES[record.mode], record.status, record.message or MISSING)
                found.setdefault(reason, []).append(title)
    rows = tuple((*reason, str(len(titles)), titles[0]) for reason, titles in found.items())
    return Grid(
        ("peer", "calls", "status", "why", "of calls", "first"), rows, ("peer", "calls", "status", "why", "first")
    )


def ratio_grid(records: Sequence[KernelRecord]) -> Grid:
    """By operator and peer: how many times as long as our kernel it takes; no rows where ours has no time."""
    rows = tuple(
        (r.operator, MODES[r.mode], r.peer, str(r.calls), number(r.mean), number(r.worst), r.worst_call)
        for r in ratios(records)
    )
    headings = ("operator", "calls", "peer", "of calls", "x triton", "least", "at")
    return Grid(headings, rows, ("operator", "calls", "peer", "at"))


def _fastest(records: Sequence[KernelRecord]) -> dict[tuple[str, Mode], float]:
    """The least median of a call in a mode."""
    found: dict[tuple[str, Mode], float] = {}
    for record in records:
        if record.ms is not None:
            call = (record.case.key, record.mode)
            found[call] = min(record.ms.p50, found.get(call, record.ms.p50))
    return found


def _by_call(records: Sequence[KernelRecord]) -> list[tuple[str, list[KernelRecord]]]:
    found: dict[str, list[KernelRecord]] = {}
    for record in records:
        case = record.case
        times = f", {case.count} a step" if record.size in FAMILY else ""
        title = f"{case.operator} {case.label} ({record.size} batch {record.batch}{times}, "
        found.setdefault(title + f"{number(case.bytes_moved / 1e6)} MB)", []).append(record)
    return list(found.items())


def _headings(records: Sequence[KernelRecord]) -> list[str]:
    """HEADINGS; without "calls" where all records have one mode, and "flags" where no time has one."""
    needless = set()
    if len({record.mode for record in records}) == 1:
        needless.add("calls")
    if not any(marks(record) for record in records if record.ms is not None):
        needless.add("flags")
    return [heading for heading in HEADINGS if heading not in needless]


def _cells(record: KernelRecord, headings: Sequence[str], fastest: Mapping[tuple[str, Mode], float]) -> list[str]:
    """A cell for each heading; of a record without a time, the cells that name the row and its message."""
    named = [record.peer, MODES[record.mode]] if "calls" in headings else [record.peer]
    if record.ms is None:
        return [*named, f"{record.status}: {record.message}"]
    errors, least = record.correctness, fastest[record.case.key, record.mode]
    worst = None if errors is None else max(errors.error_before or 0.0, errors.error_after or 0.0)
    return [
        *named,
        *(number(value) for value in (record.ms.p20, record.ms.p50, record.ms.p80)),
        formatted(record.ms.p50 / least if least else None, ".2f"),
        number(record.gb_per_s),
        formatted(record.percent_of_copy, ".1f"),
        number(record.tflops),
        formatted(record.percent_of_bound, ".1f"),
        formatted(worst, ".1e"),
        record.l2 or MISSING,
        *([marks(record) or MISSING] if "flags" in headings else []),
    ]
