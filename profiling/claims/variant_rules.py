"""What stays the same, and what it costs, when the sampler or the guidance changes."""

from __future__ import annotations

from collections.abc import Iterable

from ..figures.derived import Overview, Row, alike, names_by_size, ratio, step_samples
from ..figures.text import short_ratio, times
from ..measure.intervals import ratio_interval
from ..paper import paper_sizes
from ..step.groups import by_group
from ..terminal.layout import MISSING, Grid, number
from ..trajectory.records import Record
from .catalogue import Claim
from .cost_rules import paper_ratio
from .trajectory_cost import by_conditions
from .verdict import Evidence, Verdict, interval_text


def sampler_independent(claim: Claim, shown: Overview) -> list[Verdict]:
    """The time of the smallest size over the largest under each sampler, and the samplers' shares of a step."""
    found = []
    for group in by_conditions(shown.rows, "sampler"):
        rows = [row for row in group if row.name in paper_sizes() and row.record.ms_per_step]
        by_sampler: dict[str, dict[str, Row]] = {}
        for row in rows:
            by_sampler.setdefault(row.case.sampler, {})[row.name] = row
        names = [name for name in names_by_size(rows) if all(name in sizes for sizes in by_sampler.values())]
        if len(by_sampler) > 1 and len(names) > 1:
            found.append(_sampler_verdict(claim, by_sampler, names, shown))
    return found


def _sampler_verdict(
    claim: Claim, by_sampler: dict[str, dict[str, Row]], names: list[str], shown: Overview
) -> Verdict:
    first, last = names[0], names[-1]
    cells = []
    for name in names:
        steps = {sampler: sizes[name].record.ms_per_step or 0.0 for sampler, sizes in by_sampler.items()}
        for sampler, sizes in by_sampler.items():
            over = ratio_interval(step_samples(sizes[name]), step_samples(sizes[last]))
            cells.append(
                (
                    name,
                    sampler,
                    number(steps[sampler]),
                    _sampler_share(sizes[name].record),
                    f"{1 - min(steps.values()) / steps[sampler]:.1%}",
                    MISSING if over is None else short_ratio(over.value),
                    MISSING if over is None or name == last else interval_text(over),
                )
            )
    headings = (
        *("size", "sampler", "ms per step", "sampler's share of a step, traced", "beyond the fastest sampler"),
        *(f"over {last}", "interval"),
    )
    ratios = {
        sampler: (sizes[first].record.ms_per_step or 0.0) / (sizes[last].record.ms_per_step or 1.0)
        for sampler, sizes in by_sampler.items()
    }
    told = ", ".join(f"{short_ratio(value)} with {sampler}" for sampler, value in ratios.items())
    sentence = (
        f"the time of the {first} over that of the {last} is {told}; {short_ratio(paper_ratio(first, last))} in "
        f"the paper; under the samplers it differs by up to {times(max(ratios.values()) / min(ratios.values()))}"
    )
    rows = [sizes[name] for sizes in by_sampler.values() for name in names]
    grid = Grid(headings, tuple(cells), ("size", "sampler")).without_empty()
    return Evidence(claim, rows, shown.environments, grid, names).undecidable(sentence)


def _sampler_share(record: Record) -> str:
    """The sampler's part of the kernels' time of a step, where it was traced and has a kernel of its own."""
    groups = by_group(record.trace.step) if record.trace is not None else {}
    share = ratio(groups["sampler"][1], sum(ms for _, ms in groups.values())) if "sampler" in groups else None
    return MISSING if share is None else f"{share:.1%}"


def cfg_quality_not_alignment(claim: Claim, shown: Overview) -> list[Verdict]:
    """The time of a guided trajectory over that of the same one without, for each network and batch."""
    found = []
    for group in by_conditions(shown.rows, "batch", "guidance_scale"):
        pairs = [pair for rows in alike(group, "guidance_scale") if (pair := _guidance_pair(rows)) is not None]
        if pairs:
            found.append(_guidance_verdict(claim, pairs, shown))
    return found


def _guidance_pair(rows: Iterable[Row]) -> tuple[Row, Row] | None:
    """Without guidance and with it, at the lowest rate: the rate is a number in the same computation."""
    ordered = sorted(rows, key=lambda row: row.case.guidance_scale)
    guided = next((row for row in ordered if row.case.guided), None)
    return None if guided is None or ordered[0].case.guided else (ordered[0], guided)


def _guidance_verdict(claim: Claim, pairs: list[tuple[Row, Row]], shown: Overview) -> Verdict:
    order = names_by_size(row for pair in pairs for row in pair)
    pairs = sorted(pairs, key=lambda pair: (order.index(pair[0].name), pair[0].case.batch))
    cells, prices = [], {}
    for without, guided in pairs:
        over = ratio_interval(step_samples(guided), step_samples(without))
        if over is not None:
            prices[without.name, without.case.batch] = over.value
        cells.append(
            (
                without.name,
                str(without.case.batch),
                number(without.record.ms_per_step),
                number(guided.record.ms_per_step),
                MISSING if over is None else times(over.value),
                MISSING if over is None else interval_text(over),
            )
        )
    headings = ("size", "batch", "ms per step without", "with guidance", "its price", "interval")
    told = [
        f"{times(price)} ({name}, batch {batch})"
        for (name, batch), price in sorted(prices.items(), key=lambda item: item[1])
    ]
    span = " to ".join(dict.fromkeys((told[0], told[-1]))) if told else "nothing that can be told"
    sentence = f"guidance costs {span}; 2.00x in FLOPs"
    rows = [row for pair in pairs for row in pair]
    names = list(dict.fromkeys(without.name for without, _ in pairs))
    return Evidence(claim, rows, shown.environments, Grid(headings, tuple(cells), ("size",)), names).undecidable(
        sentence
    )
