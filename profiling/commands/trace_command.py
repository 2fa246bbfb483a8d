"""The command `ldmperf trace`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..measure.folders import RunError
from ..measure.timing import Deadline
from ..options import CaseError
from ..terminal.visible import console, say
from ..trajectory.case import Case
from ..trajectory.case_options import OPTIONS, Choices
from ..trajectory.checkpoints import check_loadable, identified
from ..trajectory.presets import check_devices, preset_named, select_cases, usual_preset
from .shared import (
    DEFAULT_OUT,
    alone_on_gpu,
    stop,
    tell,
    terminated_as_interrupted,
    whole_option,
    with_options,
)

if TYPE_CHECKING:
    from ..trajectory.records import Record

TRACE_NAME = "trace.json"
TABLES_NAME = "trace.md"
TOP = 15
# What a trace is of unless told; everything else is the preset's of the device.
_USUAL = {"size": ["39M"], "steps": ["4"], "batch": ["1"]}
# Where the help of `ldmperf profile` says something else.
_HELP = {
    "size": "A size of the family, 39M ... 5B; 39M unless told.",
    "unet": "A checkpoint instead: a diffusers folder or a .safetensors file.",
    "task": "t2i, or sr: 8 input channels, without guidance; t2i unless told.",
    "sampler": "ddim, ddpm, dpmpp_2m, ...; ddim unless told.",
    "steps": f"Sampling steps, {_USUAL['steps'][0]} unless told.",
    "batch": f"Images made at once, {_USUAL['batch'][0]} unless told.",
    "guidance": "Guidance scale; 1 is without.",
    "latent": "Latent size, height x width: 64x64 (unless told) is an image of 512x512.",
    "seed": "Seed of the noise, the context and a size's weights; 0 unless told.",
    "backend": "Any that is not compiled; graph on a GPU and torch on a CPU unless told.",
}


def _one_option(text: str) -> Any:
    # A list, so that a second value is refused and not dropped.
    return Annotated[list[str] | None, typer.Option(help=text, metavar="VALUE")]


@with_options("choices", {name: _one_option(_HELP.get(name, option.help)) for name, option in OPTIONS.items()})
def trace(
    choices: Choices,
    top: Annotated[int, whole_option("Rows of the table of kernels.", 1)] = TOP,
    out: Annotated[Path, typer.Option(help="Where the trace's folder goes.")] = DEFAULT_OUT,
) -> None:
    """Trace one trajectory, and time it apart.

    The trace has named ranges for each step, block and operator. Writes a folder with trace.json (opens in
    ui.perfetto.dev and chrome://tracing), classes.json (a step by class of operator), trace.md (the tables that
    are printed) and records.jsonl (the timed run). It times first, without the profiler: on a GPU the captured
    graph, unless --backend names another. Then it attributes work to ranges on an eager run of at most 8 steps. On
    CUDA the ranges are NVTX's too, for nsys.

    \b
    Examples:
      ldmperf trace
      ldmperf trace --size 866M --steps 20 --batch 8
      ldmperf trace --unet ./my-unet --latent 128x128 --backend diffusers
    """
    case = _chosen(choices)
    from ..measure.environment import collect_environment
    from ..measure.folders import locked, new_folder
    from ..measure.recorded import utc_now
    from ..trajectory.attribution import attributed_case

    check_loadable([case])
    (case,) = identified([case], tell)
    eager = attributed_case(case)
    try:
        folder = new_folder(out, utc_now(), collect_environment(case.device), "-trace")
        lock = locked(folder, tell)
    except OSError as failure:
        stop(f"cannot write to {out} ({failure.strerror}); choose another folder with --out", 1)
    with lock:
        try:
            with terminated_as_interrupted(), alone_on_gpu(case.device):
                _traced(case, eager, folder, top)
        except KeyboardInterrupt:
            stop(f"stopped; {folder} is not complete: trace again", 130)


def _chosen(choices: Choices) -> Case:
    """The one case that the options name."""
    for name, values in choices.items():
        found = OPTIONS[name].split(values)
        if len(found) != 1:
            raise CaseError(f"--{name}: a trace is of one case: give one value, not {len(found)}")
        if found == ["pipeline"]:
            raise CaseError("--task pipeline: a trace is of the UNet's steps: give t2i or sr, or leave it out")
    if "size" in choices and "unet" in choices:
        raise CaseError("--size and --unet name two networks, and a trace is of one: leave one out")
    preset = usual_preset(choices)
    usual: Choices = {name: values for name, values in _USUAL.items() if name != "size" or "unet" not in choices}
    # The first of a preset's backends: ours, on a GPU as a captured graph.
    usual["backend"] = [preset_named(preset).sweeps[0].backends[0]]
    (case,) = select_cases(preset, usual | choices)
    check_devices(preset, [case])
    return case


def _traced(case: Case, eager: Case, folder: Path, top: int) -> None:
    """Times and traces into the folder, and prints the tables."""
    from ..measure.store import write_whole
    from ..report.trace_tables import TraceReport
    from ..step.class_times import CLASSES_NAME, ClassTimes
    from ..trajectory.attribution import attributed
    from ..trajectory.timeline import shared

    record = _timed(case, folder)
    tell(f"tracing {eager.label} on {eager.backend}")
    try:
        times, chrome = attributed(eager)
    except RunError as nothing:
        stop(str(nothing), 1)
    report = TraceReport(record, eager.backend, times, top)
    about = {"case": record.case_key, "backend": eager.backend, "clock": times.clock, "about": report.lines}
    classes = ClassTimes(
        case_key=record.case_key,
        unet=record.case.unet,
        backend=eager.backend,
        clock=times.clock,
        steps=times.steps,
        step_ms=times.step_ms,
        classes=dict(times.classes),
        other=times.other,
        environment=record.environment,
    )
    write_whole(folder / TRACE_NAME, json.dumps(shared(chrome, about), separators=(",", ":")).encode())
    write_whole(folder / CLASSES_NAME, (classes.model_dump_json(indent=2) + "\n").encode())
    write_whole(folder / TABLES_NAME, report.markdown().encode())
    printed = console()
    report.show(printed)
    say(printed)
    say(printed, f"{folder / TRACE_NAME}: open it in https://ui.perfetto.dev or chrome://tracing")


def _timed(case: Case, folder: Path) -> Record:
    """The record of the case, checked and timed as by `ldmperf profile`; ends the command where it has no time."""
    from ..measure.ceiling_cache import KeptCeilings
    from ..trajectory.progress import ProgressLines
    from ..trajectory.records import RECORDS_NAME, RecordStore
    from ..trajectory.runner import profile

    rule = preset_named(usual_preset({"device": [case.device]})).rule
    lines = ProgressLines(console(stderr=True), [case], rule, Deadline(None))
    with lines:
        (record,) = profile(
            [case],
            rule=rule,
            store=RecordStore(folder / RECORDS_NAME),
            listener=lines,
            ceilings=KeptCeilings(tell),
        )
    if record.status != "ok":
        stop(f"no trace: {case.label} on {case.backend} ended as {record.status} ({record.message})", 1)
    return record
