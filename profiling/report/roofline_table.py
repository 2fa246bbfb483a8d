"""The roofline of a step as a table for the terminal and as plain values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from ..figures.step_times import StepTimes, percent_of
from ..measure.conditions import flag_notes
from ..step.classes import OperatorClass
from ..step.roofline import Roof, StepPart, WorkSums, by_class, sums_of
from ..terminal.layout import MISSING, formatted, laid_out, number
from ..terminal.visible import counted, say, say_wrapped, width_of
from ..trajectory.case import Case
from ..trajectory.records import Record

_WORDS = ("class", "bound by")


@dataclass(frozen=True)
class StepRoofline:
    """What `ldmperf inspect` tells of a step.

    rates       whose the rates of `roof` are, in words
    prediction  whether they are a chip's published ones, and not measured here
    is_merged   whether matmuls, convolutions and transformers are merged with what stands beside them
    times       what was measured, and `measured_by`, in words, how; None where nothing was
    timed       the record of the run that was timed without the profiler; None without one
    """

    case: Case
    roof: Roof
    rates: str
    prediction: bool
    is_merged: bool
    parts: Sequence[StepPart]
    times: StepTimes | None = None
    measured_by: str | None = None
    timed: Record | None = None

    @property
    def classes(self) -> Mapping[OperatorClass, WorkSums]:
        return by_class(self.parts, self.roof)

    @property
    def step(self) -> WorkSums:
        return sums_of(self.parts, self.roof)

    def measured_ms(self, name: OperatorClass) -> float | None:
        return None if self.times is None else self.times.ms.get(name)

    @property
    def measured_step_ms(self) -> float | None:
        return None if self.times is None else self.times.step_ms


def roofline_json(found: StepRoofline) -> dict[str, Any]:
    """Plain values; measured ones are null where nothing was measured."""
    case, times = found.case, found.times
    shape = {"task", "batch", "guidance_scale", "dtype", "latent_height", "latent_width", "context_tokens"}
    return {
        "unet": case.label,
        **case.model_dump(include=shape),
        "rates": {"of": found.rates, "prediction": found.prediction, **dataclasses.asdict(found.roof)},
        "merged": found.is_merged,
        "measured_by": found.measured_by,
        "classes": [
            {"class": name, **_values(sums, found.measured_ms(name))} for name, sums in found.classes.items()
        ],
        "attention_measured_ms": None if times is None else times.attention_ms,
        "other_measured_ms": None if times is None else times.other_ms,
        "step": _values(found.step, found.measured_step_ms),
        "timed_ms_per_step": None if found.timed is None else found.timed.ms_per_step,
    }


def _values(sums: WorkSums, measured_ms: float | None) -> dict[str, Any]:
    beside = {"measured_ms": measured_ms, "percent_of_floor": percent_of(sums.floor_ms, measured_ms)}
    return dataclasses.asdict(sums) | beside


def print_roofline(found: StepRoofline, console: Console) -> None:
    """The rates, a line for each class, the sum, and what the columns mean."""
    case, roof = found.case, found.roof
    guidance = "guidance" if case.guided else "no guidance"
    say_wrapped(
        console,
        f"A step of {case.label}: {counted(case.batch, 'image')}, {guidance}, {case.dtype}, "
        f"latent {case.latent_height}x{case.latent_width}, {counted(case.context_tokens, 'text token')}",
        "bold",
    )
    label = "PREDICTION, not measured" if found.prediction else "Ceilings"
    say_wrapped(
        console,
        f"{label}: {found.rates}: {number(roof.bytes_per_s / 1e9)} GB/s, {number(roof.flop_per_s / 1e12)} TFLOP/s "
        f"in {case.dtype}, {number(roof.exponentials_per_s / 1e9)} G exponentials/s",
    )
    say(console)
    headings = (
        "class", "launches", "GFLOP", "MB", "G exp", "floor ms", "bound by", "measured ms", "% of floor"
    )  # fmt: skip
    for line in laid_out(headings, _rows(found), words=_WORDS, width=width_of(console)).lines:
        say(console, line)
    say(console)
    for note in _notes(found):
        say_wrapped(console, note, "dim")


def _rows(found: StepRoofline) -> list[list[str]]:
    rows = [_cells(name, sums, found.measured_ms(name)) for name, sums in found.classes.items()]
    return [*rows, _cells("all", found.step, found.measured_step_ms)]


def _cells(name: str, sums: WorkSums, measured_ms: float | None) -> list[str]:
    return [
        name,
        str(sums.launches),
        number(sums.flops / 1e9) if sums.flops else MISSING,
        number(sums.nbytes / 1e6),
        number(sums.exponentials / 1e9) if sums.exponentials else MISSING,
        number(sums.floor_ms),
        sums.bound or MISSING,
        number(measured_ms),
        formatted(percent_of(sums.floor_ms, measured_ms), ".0f"),
    ]


def _notes(found: StepRoofline) -> list[str]:
    times = found.times
    merged = (
        "all merged that is measured or predicted to gain by it (--separate: nothing)"
        if found.is_merged
        else "every matmul and convolution apart from what stands beside it"
    )
    notes = [
        "G exp: 1e9 exponentials. floor: each launch at the longest of its bytes, FLOPs and exponentials, summed; "
        "bound by: what bounds most of it.",
        f"Counts are of our step, launches those of a GPU; {merged}.",
    ]
    if times is None:
        return notes
    notes += [
        f"measured: {found.measured_by}",
        "% of floor: floor over measured; caches may serve bytes faster, so that more than 100 can be right.",
    ]
    if (timed := found.timed) is not None:
        share = formatted(percent_of(found.step.floor_ms, timed.ms_per_step), ".0f")
        notes.append(
            f"Timed on {timed.case.backend}, without the profiler: {number(timed.ms_per_step)} ms a step, "
            f"{share} % of floor."
        )
        notes += flag_notes([timed], "case")
    if times.attention_ms is not None:
        floor_ms = sums_of([part for part in found.parts if "attention" in part.of], found.roof).floor_ms
        share = formatted(percent_of(floor_ms, times.attention_ms), ".0f")
        notes.append(
            f"Self- and cross-attention together: {number(times.attention_ms)} ms, {share} % of their floor; the "
            "kernels' names do not tell them apart."
        )
    if times.other_ms:
        notes.append(f"Of no class: {number(times.other_ms)} ms; they are in the sum.")
    return notes
