"""Compiled kernels with one instruction taken away or weakened: how many does the emulator notice?

bench/emulate_page.py writes the table. A mutant counts where it changes what is executed: not where no lane comes
by, or where a mask that is removed was true for all. It is noticed by a finding, or by an error that has grown
by a fifth.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from ldmperf.kernels import dependent_launches, planned_for
from ldmperf.profiling.emulator.emulated_calls import run_operator
from ldmperf.profiling.emulator.emulation import Emulation, emulated
from ldmperf.profiling.emulator.mutants import MUTATIONS, Mutant, mutants
from ldmperf.profiling.emulator.operator_inputs import made_inputs
from ldmperf.profiling.static.shapes import Shape

# An error that is not finite, or that has grown by so much, is a wrong result.
GROWN = 1.2
BF16, FP32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Subject:
    """A call whose kernels are mutated: ragged shapes, so that masks matter.

    few        planned as for a chip of one multiprocessor: the tiles of many tokens
    dependent  by dependent launches
    """

    name: str
    operator: str
    shape: Shape
    few: bool = True
    dependent: bool = False


SUBJECTS = (
    Subject(
        "attention, D = 64", "attention", Shape(BF16, 1, height=10, width=13, heads=1, head_dim=64, context=300)
    ),
    Subject("attention, D = 128", "attention", Shape(BF16, 1, height=12, width=12, heads=1, head_dim=128)),
    Subject("attention, float32", "attention", Shape(FP32, 1, height=7, width=10, heads=1, context=200)),
    Subject("attention, a text", "attention", Shape(BF16, 1, height=10, width=13, heads=1, context=77)),
    Subject(
        "group norm, two launches", "group_norm_silu", Shape(BF16, 1, channels=40, height=33, width=31, groups=4)
    ),
    Subject("group norm, one launch", "group_norm_silu", Shape(BF16, 1, channels=80, height=9, width=7, groups=8)),
    Subject("linear", "linear", Shape(BF16, 1, channels=96, height=3, width=11, features=144), few=False),
    Subject("layer norm", "layer_norm", Shape(BF16, 1, channels=130, height=3, width=3), few=False),
)


@dataclass
class Noticed:
    """Of mutants of a kind: `idle` ones change nothing that is executed, and are not counted in `made`."""

    kind: str
    made: int = 0
    found: int = 0
    wrong: int = 0
    idle: int = 0
    unnoticed: list[Mutant] = field(default_factory=list)


def try_mutants(subject: Subject, arch: str, limit: int | None = None) -> dict[str, Noticed]:
    """By kind of MUTATIONS: what became of a subject's mutants, `limit` of each kind and code at most."""
    texts: dict[str, str] = {}
    clean, error = run_subject(subject, arch, lambda ptx: texts.setdefault(ptx, ptx))
    if clean.findings:
        raise AssertionError(f"{subject.name} has findings before anything is taken away")
    lanes = {ptx: tallies.lanes_by_ptx_line() for ptx, tallies in zip(texts, clean.tallies, strict=True)}
    noticed = {kind: Noticed(kind) for kind in MUTATIONS}
    for ptx in texts:
        for mutant in _some(ptx, limit):
            _try(subject, arch, ptx, mutant, lanes[ptx], error, noticed[mutant.kind])
    return noticed


def _some(ptx: str, limit: int | None) -> Iterator[Mutant]:
    by_kind: dict[str, list[Mutant]] = {}
    for mutant in mutants(ptx):
        by_kind.setdefault(mutant.kind, []).append(mutant)
    for found in by_kind.values():
        step = 1 if limit is None else max(len(found) // limit, 1)
        yield from found[::step][:limit]


def _try(
    subject: Subject, arch: str, ptx: str, mutant: Mutant, lanes: dict[int, int], error: float, noticed: Noticed
) -> None:
    if not lanes.get(mutant.line):
        noticed.idle += 1
        return
    ran, mutated = run_subject(subject, arch, lambda text: mutant.ptx if text == ptx else text)
    if mutant.kind.startswith("mask") and lanes[mutant.line] in [
        tallies.lanes_by_ptx_line().get(mutant.line) for tallies in ran.tallies
    ]:
        noticed.idle += 1
        return
    wrong = not mutated <= GROWN * error
    noticed.made += 1
    noticed.found += bool(ran.findings)
    noticed.wrong += wrong
    if not ran.findings and not wrong:
        noticed.unnoticed.append(mutant)


def run_subject(subject: Subject, arch: str, edit) -> tuple[Emulation, float]:
    """(the emulation, the largest relative RMS error of the call)."""
    with emulated(arch, tallied=True, edit=edit) as emulation:
        chip = dataclasses.replace(emulation.chip, multiprocessors=1) if subject.few else emulation.chip
        with planned_for(chip), dependent_launches(subject.dependent):
            call = run_operator(emulation, made_inputs(subject.operator, subject.shape, "random"))
    return emulation, max(float("inf") if error.not_finite else error.rms for error in call.errors)


def summed(all_noticed: Sequence[dict[str, Noticed]]) -> list[Noticed]:
    """By kind over all subjects."""
    total = {kind: Noticed(kind) for kind in MUTATIONS}
    for noticed in all_noticed:
        for kind, one in noticed.items():
            for name in ("made", "found", "wrong", "idle", "unnoticed"):
                setattr(total[kind], name, getattr(total[kind], name) + getattr(one, name))
    return list(total.values())
