"""Write the tables of docs/step-inventory.md and docs/performance.md: `make inventory`.

Every launch of one denoising step: diffusers' eager mode, our step with separate matmuls, and our step. Takes
diffusers, no GPU. Where the marker of a document names a record set (measured: bench/results/....jsonl), the times
of diffusers' step and of our captured one are from it. tests/test_inventory.py fails while a document differs from
what this writes.
"""

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import idea_gains
import torch
from markers import with_blocks

from ldmperf.model import AUTO, FAMILY, SEPARATE, Choices
from ldmperf.profiling import Record, load_records
from ldmperf.profiling.machines import BYTES_PER_S, EXPONENTIALS_PER_S, FLOP_PER_S
from ldmperf.profiling.measure.recorded import KernelTime
from ldmperf.profiling.measure.store import write_whole
from ldmperf.profiling.step.groups import OTHER, by_group
from ldmperf.profiling.step.launches import GROUPS, GpuLaunch, Total, total
from ldmperf.profiling.step.recorded_steps import diffusers_step, our_step
from ldmperf.profiling.step.rules import READ_BACK, launches_of

DOCS = Path(__file__).parents[1] / "docs"
SIZES = ("39M", "866M")
TEXT_TOKENS = 77
# What a captured step launches beside the eager one's: the gather of its shifts, and its count.
LAUNCHES_OF_A_CAPTURE = 2
RATES = (
    f"{BYTES_PER_S / 1e12:.2f} TB/s, {FLOP_PER_S / 1e12:.0f} TFLOP/s, "
    f"{EXPONENTIALS_PER_S / 1e12:.2f} T exponentials/s"
)
# The backends whose measured steps stand beside the counts.
MEASURED_BACKENDS = ("diffusers", "graph")


@dataclass(frozen=True)
class Measured:
    """Traced steps of a record set by size and backend, and the words that say where they are from."""

    steps: Mapping[tuple[str, str], Sequence[KernelTime]] = field(default_factory=dict)
    source: str = ""


@dataclass(frozen=True)
class Inventory:
    """The launches of one guided step of one image, in order; `separate`: ours without fused matmuls."""

    size: str
    diffusers: tuple[GpuLaunch, ...]
    separate: tuple[GpuLaunch, ...]
    ours: tuple[GpuLaunch, ...]

    @property
    def steps(self) -> tuple[tuple[GpuLaunch, ...], ...]:
        """All three, in that order."""
        return self.diffusers, self.separate, self.ours


@cache
def inventory(size: str, dtype: torch.dtype = torch.bfloat16) -> Inventory:
    """The inventory of a size of the family at 64x64 latents and 77 tokens; takes diffusers, no GPU, no memory."""
    config = FAMILY[size]
    return Inventory(
        size=size,
        diffusers=tuple(launches_of(diffusers_step(config, dtype))),
        separate=tuple(launches_of(our_step(config, dtype, choices=SEPARATE))),
        ours=tuple(launches_of(our_step(config, dtype))),
    )


@cache
def step_launches(choices: Choices, dtype: torch.dtype = torch.bfloat16) -> dict[str, list[GpuLaunch]]:
    """The launches of our eager step, by size of the family, with what is merged by `choices`."""
    return {size: launches_of(our_step(config, dtype, choices=choices)) for size, config in FAMILY.items()}


def markdown(inventories: Iterable[Inventory]) -> str:
    """The tables of docs/step-inventory.md, between its markers."""
    lines = [
        f"Operators as recorded from diffusers {version('diffusers')} and torch {version('torch').split('+')[0]}. "
        f"Rates: {RATES}. MB and GB are powers of ten.",
    ]
    for found in inventories:
        steps = found.steps
        lines += ["", f"## {found.size}", "", *_groups(steps), "", *_compute(steps), "", *_facts(found)]
        lines += ["", f"### {found.size}: what is merged", "", *_merges(found)]
        lines += ["", f"### {found.size}: kinds of launches that do no matrix work", "", *_kinds(steps)]
        for title, launches in zip(("diffusers eager", "ours, separate", "ours"), steps, strict=True):
            lines += ["", *_listing(f"{found.size}, {title}: every launch", launches)]
    return "\n".join(lines)


def floors_markdown(inventories: Iterable[Inventory], measured: Measured | None = None) -> str:
    """The tables of docs/performance.md, between its markers."""
    measured = measured or Measured()
    lines = [f"Predicted launches and floors; rates {RATES}."]
    if measured.source:
        lines += ["", f"**Measured**: {measured.source}."]
    for found in inventories:
        lines += ["", f"### {found.size}", ""]
        lines += [
            "| group | launches: diffusers | separate | ours "
            "| floor with softmax, us: diffusers | separate | ours | measured, us: diffusers | ours |"
        ]
        lines += ["|---|---:|---:|---:|---:|---:|---:|---:|---:|"]
        steps = [measured.steps.get((found.size, backend), ()) for backend in MEASURED_BACKENDS]
        times = [by_group(step) for step in steps]
        for group in (*GROUPS, None):
            totals = [total(x for x in launches if group in (None, x.group)) for launches in found.steps]
            cells = [str(of.launches) for of in totals] + [f"{of.longest_floor_s * 1e6:.0f}" for of in totals]
            for step, of_groups in zip(steps, times, strict=True):
                us = 1e3 * sum(ms for of, (_, ms) in of_groups.items() if group in (None, of))
                cells.append(f"{us:.0f}" if step else "not measured")
            lines.append(f"| {group or '**all**'} | {' | '.join(cells)} |")
        others = [f"{1e3 * of_groups[OTHER][1]:.0f} us" if OTHER in of_groups else "none" for of_groups in times]
        if any(OTHER in of_groups for of_groups in times):
            lines += [
                "",
                f"Kernels of no group: {others[0]} of diffusers', {others[1]} of ours; they are in the sums.",
            ]
    lines += ["", "### Launches per step at every size", ""]
    lines += [
        "| size | separate, eager | norms merged | gates merged | ours, eager | ours, captured "
        "| at most 420 | at most 300 |"
    ]
    lines += ["|---|---:|---:|---:|---:|---:|---|---|"]
    separate = step_launches(SEPARATE)
    for size, launches in step_launches(AUTO).items():
        captured = len(launches) + LAUNCHES_OF_A_CAPTURE
        merged = [sum(word in x.name for x in launches) for word in ("layer_norm + ", " + geglu")]
        reached = ["yes" if captured <= most else "no" for most in (420, 300)]
        row = (size, len(separate[size]), *merged, len(launches), captured, *reached)
        lines.append(f"| {' | '.join(map(str, row))} |")
    lines += ["", "### Launches of our kernels, and what comes before each", ""]
    lines += ["| size | ours, eager | of our kernels | behind another of those | behind one of torch's |"]
    lines += ["|---|---:|---:|---:|---:|"]
    for size, launches in step_launches(AUTO).items():
        before = [first.is_ours for first, second in pairwise(launches) if second.is_ours]
        ours = sum(launch.is_ours for launch in launches)
        row = (size, len(launches), ours, sum(before), ours - sum(before))
        lines.append(f"| {' | '.join(map(str, row))} |")
    lines += ["", "### What each idea is predicted to gain alone", "", *idea_gains.table()]
    return "\n".join(lines)


def _groups(steps: Sequence[Sequence[GpuLaunch]]) -> list[str]:
    lines = [
        "| group | launches: diffusers | separate | ours | MB: diffusers | separate | ours "
        "| GFLOP: diffusers | separate | ours | floor without softmax, us: diffusers | separate | ours |",
        "|---|" + "---:|" * 12,
    ]
    for group in GROUPS:
        lines.append(_row(group, [total(x for x in launches if x.group == group) for launches in steps]))
    return [*lines, _row("**all**", [total(launches) for launches in steps])]


def _row(title: str, totals: Sequence[Total]) -> str:
    cells = [str(t.launches) for t in totals] + [f"{t.nbytes / 1e6:.1f}" for t in totals]
    cells += [f"{t.flops / 1e9:.1f}" for t in totals] + [f"{t.floor_s * 1e6:.0f}" for t in totals]
    return f"| {title} | {' | '.join(cells)} |"


def _compute(steps: Sequence[Sequence[GpuLaunch]]) -> list[str]:
    lines = ["| | diffusers | separate | ours |", "|---|---:|---:|---:|"]
    totals = [total(launches) for launches in steps]
    softmax = [total(x for x in launches if x.group == "attention") for launches in steps]
    rows = [
        ("exponentials of the softmax, billions", [f"{t.exponentials / 1e9:.3f}" for t in totals]),
        ("attention alone: matrix work or softmax, us", [f"{t.compute_floor_s * 1e6:.0f}" for t in softmax]),
        ("whole step: matrix work or softmax, no memory, ms", [f"{t.compute_floor_s * 1e3:.2f}" for t in totals]),
        ("whole step: memory, matrix work or softmax, ms", [f"{t.longest_floor_s * 1e3:.2f}" for t in totals]),
    ]
    return lines + [f"| {title} | {' | '.join(cells)} |" for title, cells in rows]


def _facts(found: Inventory) -> list[str]:
    """Counts that the text rests on."""

    def count(launches: Iterable[GpuLaunch], *names: str) -> int:
        return sum(launch.name in names for launch in launches)

    ours = total(found.ours)
    theirs = total(found.diffusers)
    last = ("group_norm", "group_norm_apply", "group_norm_given", "transformer_front")
    tails = count(found.diffusers, "group norm: apply"), count(found.ours, *last)
    idle = [sum(x.nbytes for x in launches if not x.flops) for launches in (found.diffusers, found.ours)]
    return [
        f"- Group norms: {tails[0]} in diffusers' step, {tails[1]} in ours, of which "
        f"{count(found.ours, 'group_norm_apply')} take two launches and {count(found.ours, last[-1])} are in a "
        "transformer's front.",
        f"- Ours against diffusers: {theirs.launches - ours.launches} launches and "
        f"{(theirs.nbytes - ours.nbytes) / 1e6:.0f} MB fewer. Launches without matrix work move "
        f"{idle[0] / 1e6:.0f} MB in diffusers' step and {idle[1] / 1e6:.0f} MB in ours.",
        f"- The host waits {count(found.diffusers, READ_BACK)} times in diffusers' "
        f"step and {count(found.ours, READ_BACK)} times in ours.",
    ]


def _merges(found: Inventory) -> list[str]:
    """Launches that do what were several, and what they take away together."""
    lines = ["| merged launch | count | MB | floor, us |", "|---|---:|---:|---:|"]
    merged = [launch for launch in found.ours if " + " in launch.name]
    for name in sorted({launch.name for launch in merged}):
        of_name = total(launch for launch in merged if launch.name == name)
        lines.append(
            f"| {name} | {of_name.launches} | {of_name.nbytes / 1e6:.1f} | {of_name.longest_floor_s * 1e6:.0f} |"
        )
    before, after = total(found.separate), total(found.ours)
    return [
        *lines,
        "",
        f"Merging takes away {before.launches - after.launches} launches, "
        f"{(before.nbytes - after.nbytes) / 1e6:.0f} MB and "
        f"{(before.longest_floor_s - after.longest_floor_s) * 1e6:.0f} us of the floor.",
    ]


def _kinds(steps: Sequence[Sequence[GpuLaunch]]) -> list[str]:
    lines = [
        "| launch | launches: diffusers | separate | ours | MB: diffusers | separate | ours |",
        "|---|" + "---:|" * 6,
    ]
    kinds = {(x.group, x.name) for launches in steps for x in launches if not x.flops}
    totals = {
        kind: [total(x for x in launches if (x.group, x.name) == kind) for launches in steps] for kind in kinds
    }
    heaviest = sorted(kinds, key=lambda kind: (-max(t.nbytes for t in totals[kind]), kind))
    for kind in heaviest:
        cells = [str(t.launches) for t in totals[kind]] + [f"{t.nbytes / 1e6:.2f}" for t in totals[kind]]
        lines.append(f"| {kind[1]} ({kind[0]}) | {' | '.join(cells)} |")
    return lines


def _listing(title: str, launches: Sequence[GpuLaunch]) -> list[str]:
    """Distinct launches in the order in which they first come, folded."""
    lines = [
        f"<details><summary>{title} ({len(launches)})</summary>",
        "",
        "| count | launch | reads | writes | MB each | GFLOP each | floor, us each | us in all |",
        "|---:|---|---|---|---:|---:|---:|---:|",
    ]
    for launch, count in Counter(launches).items():
        floor = launch.floor_s * 1e6
        lines.append(
            f"| {count} | {launch.name} | {launch.reads} | {launch.writes} | {launch.nbytes / 1e6:.3f} "
            f"| {launch.flops / 1e9:.3f} | {floor:.2f} | {count * floor:.1f} |"
        )
    return [*lines, "", "</details>"]


WRITERS: dict[str, Callable[[Sequence[Inventory], Measured], str]] = {
    "step-inventory.md": lambda inventories, _: markdown(inventories),
    "performance.md": floors_markdown,
}


def with_inventory(name: str, document: str) -> str:
    """The text of a document of that name with the tables between its markers."""
    inventories = [inventory(size) for size in SIZES]
    return with_blocks(document, {"inventory": lambda marker: WRITERS[name](inventories, measured(marker))})


def measured(marker: str) -> Measured:
    """The steps of the record set that a marker names, none where it names none."""
    named = re.search(r"measured: (\S+\.jsonl)", marker)
    return Measured() if named is None else measured_steps(load_records(DOCS.parent / named[1])[0])


def measured_steps(records: Iterable[Record]) -> Measured:
    """The traced steps in the inventory's case: guided, one image, bf16, 64x64."""
    found, source = {}, ""
    for record in records:
        case = record.case
        sizes = (case.batch, case.latent_height, case.latent_width, case.context_tokens)
        is_asked = case.backend in MEASURED_BACKENDS and case.guided and case.dtype == "bfloat16"
        if is_asked and sizes == (1, 64, 64, TEXT_TOKENS) and record.trace is not None and record.trace.step:
            found[case.network, case.backend] = record.trace.step
            here = record.environment
            versions = f"torch {here.torch}, triton {here.triton}, diffusers {here.diffusers}"
            name = "GPU of unknown name" if here.gpu is None else here.gpu.name
            source = (
                f"{name}, {versions}: the device's time by torch's profiler, the mean over a trajectory's steps"
            )
    return Measured(found, source)


def main() -> None:
    for name in WRITERS:
        path = DOCS / name
        write_whole(path, with_inventory(name, path.read_text(encoding="utf-8")).encode())


if __name__ == "__main__":
    sys.exit(main())
