"""Every launch of one denoising step, for diffusers' eager mode, for our step, and for what is planned of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import torch

from ldmperf.model import FAMILY

from .launch_rules import READ_BACK, launches_of
from .launches import BYTES_PER_S, EXP_PER_S, FLOP_PER_S, GROUPS, GpuLaunch, Group, Total, total
from .opstream import diffusers_step, our_step

SIZES = ("39M", "866M")


@dataclass(frozen=True)
class Merge:
    """A planned change: launches of these names, one directly after the other, become one.

    What the first returned is then neither written nor read.
    """

    idea: str
    names: tuple[str, ...]
    becomes: str
    group: Group


# In this order: a later one may name what an earlier one made.
PLAN = (
    Merge(
        "the last convolution's bias goes to the sampler's update",
        ("bias of a convolution", "sampler_update"),
        "sampler_update",
        "sampler",
    ),
    Merge("GEGLU in the epilogue of its product", ("linear", "geglu"), "linear + geglu", "linear"),
    Merge(
        "a layer norm at the start of the projection that reads it",
        ("layer_norm", "linear"),
        "layer_norm + linear",
        "linear",
    ),
    Merge(
        "the same for the feed-forward",
        ("layer_norm", "linear + geglu"),
        "layer_norm + linear + geglu",
        "linear",
    ),
    Merge(
        "cross-attention with its two projections",
        ("layer_norm + linear", "cross-attention", "linear"),
        "layer_norm + linear + cross-attention + linear",
        "attention",
    ),
)


@dataclass(frozen=True)
class Inventory:
    """The launches of one guided step of one image, in order."""

    size: str
    diffusers: tuple[GpuLaunch, ...]
    ours: tuple[GpuLaunch, ...]

    @property
    def planned(self) -> tuple[GpuLaunch, ...]:
        """Ours after every merge of the plan."""
        launches = self.ours
        for merge in PLAN:
            launches = apply(merge, launches)
        return launches


def inventory(size: str, dtype: torch.dtype = torch.bfloat16) -> Inventory:
    """The inventory of a size of the family at 64x64 latents and 77 tokens; takes diffusers, no GPU, no memory."""
    config = FAMILY[size]
    return Inventory(
        size=size,
        diffusers=tuple(launches_of(diffusers_step(config, dtype))),
        ours=tuple(launches_of(our_step(config, dtype))),
    )


# What a captured step launches beside the eager one's: the gather of its shifts, and its count.
LAUNCHES_OF_A_CAPTURE = 2


def launch_counts(dtype: torch.dtype = torch.bfloat16) -> dict[str, int]:
    """The launches of our eager step, by size of the family."""
    return {size: len(launches_of(our_step(config, dtype))) for size, config in FAMILY.items()}


def apply(merge: Merge, launches: Sequence[GpuLaunch]) -> tuple[GpuLaunch, ...]:
    """The launches after a merge, wherever its names follow each other; the step's start follows its end."""
    names = [launch.name for launch in launches]
    if names and names[-1] == merge.names[0] and names[0] == merge.names[1]:
        launches = (launches[-1], *launches[:-1])
        names = [names[-1], *names[:-1]]
    merged: list[GpuLaunch] = []
    at, width = 0, len(merge.names)
    while at < len(launches):
        if tuple(names[at : at + width]) == merge.names:
            merged.append(_joined(launches[at : at + width], merge))
            at += width
        else:
            merged.append(launches[at])
            at += 1
    return tuple(merged)


def _joined(parts: Sequence[GpuLaunch], merge: Merge) -> GpuLaunch:
    between = sum(part.first_result for part in parts[:-1])
    return GpuLaunch(
        name=merge.becomes,
        group=merge.group,
        reads=parts[0].reads,
        writes=parts[-1].writes,
        nbytes=sum(part.nbytes for part in parts) - 2 * between,
        flops=sum(part.flops for part in parts),
        exponentials=sum(part.exponentials for part in parts),
        first_result=parts[-1].first_result,
    )


def markdown(inventories: Iterable[Inventory]) -> str:
    """The tables of docs/step-inventory.md, between its markers."""
    lines = [
        f"Operators as recorded from diffusers {version('diffusers')} and torch {version('torch').split('+')[0]}. "
        f"Rates: {BYTES_PER_S / 1e12:.2f} TB/s, {FLOP_PER_S / 1e12:.0f} TFLOP/s, {EXP_PER_S / 1e12:.2f} T "
        "exponentials/s. MB and GB are powers of ten.",
    ]
    for found in inventories:
        steps = (found.diffusers, found.ours, found.planned)
        lines += ["", f"## {found.size}", "", *_groups(steps), "", *_compute(steps), "", *_facts(found)]
        lines += ["", f"### {found.size}: the plan, change by change", "", *_plan(found)]
        lines += ["", f"### {found.size}: kinds of launches that do no matrix work", "", *_kinds(steps)]
        for title, launches in zip(("diffusers eager", "our step", "the plan"), steps, strict=True):
            lines += ["", *_listing(f"{found.size}, {title}: every launch", launches)]
    return "\n".join(lines)


def floors_markdown(inventories: Iterable[Inventory]) -> str:
    """The tables of docs/performance.md, between its markers."""
    lines = [
        f"Predicted launches and floors; rates {BYTES_PER_S / 1e12:.2f} TB/s, {FLOP_PER_S / 1e12:.0f} TFLOP/s, "
        f"{EXP_PER_S / 1e12:.2f} T exponentials/s.",
    ]
    for found in inventories:
        lines += ["", f"### {found.size}", ""]
        lines += ["| group | launches: diffusers | ours | floor, us: diffusers | ours | measured, ours |"]
        lines += ["|---|---:|---:|---:|---:|---|"]
        for group in (*GROUPS, None):
            theirs, ours = (
                total(x for x in launches if group in (None, x.group))
                for launches in (found.diffusers, found.ours)
            )
            floors = [f"{of.longest_floor_s * 1e6:.0f}" for of in (theirs, ours)]
            counts = [str(of.launches) for of in (theirs, ours)]
            lines.append(f"| {group or '**all**'} | {' | '.join((*counts, *floors))} | not measured |")
    lines += ["", "### Launches per step at every size", ""]
    lines += ["| size | ours, eager | ours, captured | at most 420 |", "|---|---:|---:|---|"]
    for size, count in launch_counts().items():
        captured = count + LAUNCHES_OF_A_CAPTURE
        lines.append(f"| {size} | {count} | {captured} | {'yes' if captured <= 420 else 'no'} |")
    return "\n".join(lines)


def _groups(steps: Sequence[Sequence[GpuLaunch]]) -> list[str]:
    lines = [
        "| group | launches: diffusers | ours | plan | MB: diffusers | ours | plan "
        "| GFLOP: diffusers | ours | plan | floor, us: diffusers | ours | plan |",
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
    lines = ["| | diffusers | ours | plan |", "|---|---:|---:|---:|"]
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
    tails = count(found.diffusers, "group norm: apply"), count(found.ours, "group_norm", "group_norm_apply")
    idle = [sum(x.nbytes for x in launches if not x.flops) for launches in (found.diffusers, found.ours)]
    return [
        f"- Group norms: {tails[0]} in diffusers' step, {tails[1]} in ours, of which "
        f"{count(found.ours, 'group_norm_apply')} take two launches.",
        f"- Ours against diffusers: {theirs.launches - ours.launches} launches and "
        f"{(theirs.nbytes - ours.nbytes) / 1e6:.0f} MB fewer. Launches without matrix work move "
        f"{idle[0] / 1e6:.0f} MB in diffusers' step and {idle[1] / 1e6:.0f} MB in ours.",
        f"- The host waits {count(found.diffusers, READ_BACK)} times in diffusers' "
        f"step and {count(found.ours, READ_BACK)} times in ours.",
    ]


def _plan(found: Inventory) -> list[str]:
    lines = ["| change | launches fewer | MB fewer | launches left |", "|---|---:|---:|---:|"]
    launches: Sequence[GpuLaunch] = found.ours
    lines.append(f"| our step | | | {len(launches)} |")
    for merge in PLAN:
        after = apply(merge, launches)
        saved = total(launches).nbytes - total(after).nbytes
        lines.append(f"| {merge.idea} | {len(launches) - len(after)} | {saved / 1e6:.1f} | {len(after)} |")
        launches = after
    return lines


def _kinds(steps: Sequence[Sequence[GpuLaunch]]) -> list[str]:
    lines = [
        "| launch | launches: diffusers | ours | plan | MB: diffusers | ours | plan |",
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
