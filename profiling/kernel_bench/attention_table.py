"""What a bench says of attention: a line per size, our kernel beside the best of its peers and its bound."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import geometric_mean

from ..measure.conditions import marks
from ..terminal.layout import MISSING, Grid, formatted, laid_out, number
from ..terminal.visible import counted
from .kernel_records import MODES, KernelRecord, Mode

# Ours: our kernel, what our dispatch takes, and our way to torch's.
OURS = ("triton", "auto", "reference")
# torch's own, in whatever backend: what an error is compared with.
_TORCH = ("eager", "sdpa-cudnn", "sdpa-flash", "sdpa-efficient")
SMALL_HEADS = range(8, 49)


@dataclass(frozen=True)
class AttentionRow:
    """One call in one mode: microseconds by peer, in the order of measuring, and what they are compared with."""

    head_dim: int
    queries: int
    keys: int
    batch: int
    mode: Mode
    us: dict[str, float]
    errors: dict[str, float]
    percent_of_bound: float | None = None
    unit: str | None = None
    # By peer, of those that have any.
    marks: dict[str, str] = field(default_factory=dict)

    @property
    def of_itself(self) -> bool:
        return self.queries == self.keys

    @property
    def best_peer(self) -> str | None:
        peers = [name for name in self.us if name not in OURS]
        return min(peers, key=lambda name: self.us[name], default=None)

    def ratio(self, name: str = "triton") -> float | None:
        """How many times as long as `name` the best peer takes; None unless both have a time."""
        best = self.best_peer
        return None if best is None or not self.us.get(name) else self.us[best] / self.us[name]

    @property
    def error_ratio(self) -> float | None:
        """Our error over the least of torch's own that was measured; None unless both are known."""
        torch_errors = [self.errors[name] for name in _TORCH if self.errors.get(name)]
        return self.errors["triton"] / min(torch_errors) if torch_errors and "triton" in self.errors else None


def attention_rows(records: Iterable[KernelRecord]) -> list[AttentionRow]:
    """The rows of the mode that shows the kernel: graph where one was measured, else eager. Longest first."""
    found = [record for record in records if record.case.attention is not None and record.ms is not None]
    mode: Mode = "graph" if any(record.mode == "graph" for record in found) else "eager"
    by_call: dict[str, list[KernelRecord]] = {}
    for record in found:
        if record.mode == mode:
            by_call.setdefault(f"{record.case.key} {record.device}", []).append(record)
    rows = [_row(group) for group in by_call.values()]
    return sorted(rows, key=lambda row: (not row.of_itself, -row.queries, row.head_dim, row.batch))


def attention_title(rows: Sequence[AttentionRow]) -> str:
    """Above the table of these rows."""
    return f"attention, calls {MODES[rows[0].mode]}: each beside the best of its peers"


def attention_grid(rows: Sequence[AttentionRow]) -> Grid:
    """Ours beside the best peer, a line for each row; with flags where a time of the table has some."""
    sizes = ("D", "queries", "keys", "batch")
    headings = (*sizes, "triton us", "% of bound", "limit", "auto us", "best peer", "its us", "ratio", "flags")
    grid = Grid(headings, tuple(_cells(row) for row in rows), ("limit", "best peer", "flags"))
    return grid if any(row[-1] != MISSING for row in grid.rows) else grid.without_last()


def attention_lines(rows: Sequence[AttentionRow], width: int | None = None) -> list[str]:
    """The rows as a table of text with its title and headings, see `laid_out`; empty where there are none."""
    if not rows:
        return []
    grid = attention_grid(rows)
    laid = laid_out(grid.headings, grid.rows, words=grid.words, width=width, leading=4)
    return [attention_title(rows), *laid.lines]


def _cells(row: AttentionRow) -> tuple[str, ...]:
    best = row.best_peer
    return (
        *(str(size) for size in (row.head_dim, row.queries, row.keys, row.batch)),
        number(row.us.get("triton")),
        formatted(row.percent_of_bound, ".1f"),
        row.unit or MISSING,
        number(row.us.get("auto")),
        best or MISSING,
        number(None if best is None else row.us[best]),
        formatted(row.ratio(), ".2f"),
        "; ".join(f"{name} {row.marks[name]}" for name in ("triton", "auto", best) if name in row.marks)
        or MISSING,
    )


def attention_figures(rows: Sequence[AttentionRow]) -> list[str]:
    """Geometric means of the best peer's time over ours, by kind of call, and their least; bound; largest error.

    Empty where there are no rows.
    """
    if not rows:
        return []
    kinds: list[tuple[str, Callable[[AttentionRow], bool]]] = [
        ("self-attention", lambda row: row.of_itself),
        ("self-attention, D 8 to 48", lambda row: row.of_itself and row.head_dim in SMALL_HEADS),
        ("cross-attention", lambda row: not row.of_itself),
    ]
    lines = []
    for kind, belongs in kinds:
        for name in ("triton", "auto"):
            ratios = [(ratio, row) for row in rows if belongs(row) and (ratio := row.ratio(name))]
            if ratios:
                mean = geometric_mean(ratio for ratio, _ in ratios)
                least, at = min(ratios, key=lambda pair: pair[0])
                lines.append(
                    f"{kind}: the best peer takes {number(mean)} times as long as {name} (geometric mean of "
                    f"{counted(len(ratios), 'call')}; least {number(least)}: {_call(at)}, {at.best_peer})"
                )
    bounded = [row for row in rows if row.of_itself and row.percent_of_bound is not None]
    if bounded:
        longest = max((row.queries, row.batch) for row in bounded)
        shares = [f"D={r.head_dim} {r.percent_of_bound:.0f}" for r in bounded if (r.queries, r.batch) == longest]
        lines.append(
            f"self-attention, {longest[0]} tokens, batch {longest[1]}: triton's percent of its bound: "
            + ", ".join(shares)
        )
    errors = [(ratio, row) for row in rows if (ratio := row.error_ratio) is not None]
    if errors:
        most, at = max(errors, key=lambda pair: pair[0])
        lines.append(f"attention: triton's error is at most {number(most)} times torch's least ({_call(at)})")
    peers = dict.fromkeys(name for row in rows for name in row.us if name not in OURS)
    lines.append(f"attention: peers with a time are {', '.join(peers) or 'none'}")
    return lines


def _row(group: Sequence[KernelRecord]) -> AttentionRow:
    first = group[0]
    sizes = first.case.attention
    assert sizes is not None
    ours = next((record for record in group if record.peer == "triton"), None)
    return AttentionRow(
        head_dim=sizes.head_dim,
        queries=sizes.queries,
        keys=sizes.keys,
        batch=sizes.batch,
        mode=first.mode,
        us={record.peer: 1e3 * record.ms.p50 for record in group if record.ms is not None},
        errors={
            record.peer: record.correctness.error_before
            for record in group
            if record.correctness is not None and record.correctness.error_before is not None
        },
        percent_of_bound=None if ours is None else ours.percent_of_bound,
        unit=None if ours is None or ours.bound is None else ours.bound.unit,
        marks={record.peer: found for record in group if (found := marks(record))},
    )


def _call(row: AttentionRow) -> str:
    return f"D={row.head_dim}, {row.queries} queries, {row.keys} keys, batch {row.batch}"
