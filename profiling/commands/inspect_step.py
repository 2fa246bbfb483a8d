"""`ldmperf inspect SIZE` and `ldmperf inspect CHECKPOINT`: the roofline of a step by class of operator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ldmperf.model import AUTO, FAMILY, RELEASED, SEPARATE, Choices, UNetConfig, load_unet

from ..figures.step_times import times_by_name, times_by_range
from ..machines import MACHINES
from ..measure.ceiling_cache import KeptCeilings
from ..measure.ceilings import CeilingDevice
from ..measure.environment import Environment, collect_environment
from ..measure.folders import RunError
from ..measure.outcomes import Unsupported, failure
from ..options import CaseError, best_device, known_name
from ..report.roofline_table import StepRoofline, print_roofline, roofline_json
from ..step.class_times import ClassTimes, read_class_times
from ..step.roofline import Roof, published_roof, published_source, step_parts
from ..terminal.visible import console
from ..trajectory.case import DEFAULT_GUIDANCE, Case
from ..trajectory.case_options import OPTIONS
from ..trajectory.checkpoints import check_loadable
from ..trajectory.floors import measured_roof
from ..trajectory.network import IN_CHANNELS, family_config
from ..trajectory.records import RECORDS_NAME, Record, load_records
from ..trajectory.rungs import all_backends
from ..trajectory.short_traces import trace_order
from ..trajectory.unet_problem import step_shape
from .shared import given_records, print_json, tell

# The fields of a case that each option sets, as OPTIONS reads it.
_FIELDS = {
    "task": ("task",),
    "batch": ("batch",),
    "guidance": ("guidance_scale",),
    "dtype": ("dtype",),
    "device": ("device",),
    "latent": ("latent_height", "latent_width"),
    "tokens": ("context_tokens",),
}

# Whose times those of a trace are.
_CLOCKS = {"device": "the device's clock", "host": "the host's clock, the profiler's own work included"}


def inspect_step(
    unet: str,
    given: dict[str, str],
    *,
    arch: str | None,
    trace: Path | None,
    records: Path | None,
    separate: bool,
    as_json: bool,
) -> None:
    """Prints the roofline of a step of that network; `given` are options of its case as they were typed."""
    if trace is not None and records is not None:
        raise CaseError("--trace and --records both tell what a step took: give one of them")
    network = unet if unet in (*FAMILY, *RELEASED) else str(OPTIONS["unet"].read("unet", unet))
    chosen = _read(given)
    record = times = None
    backend, measured_by = "", None
    if trace is not None:
        found = read_class_times(trace)
        record = _timed_beside(trace, found)
        times, backend = times_by_range(found), found.backend
        measured_by = f"{trace}: the mean of {found.steps} steps of {backend}, eager, by {_CLOCKS[found.clock]}"
        _check_network(network, found.unet, trace)
    elif records is not None:
        record = _traced_record(records, network, chosen)
        assert record.trace is not None
        times, backend = times_by_name(record.trace.step), record.case.backend
        measured_by = f"{records}: the mean traced step of {backend}, kernels told by their names"
    case = _case(network, chosen, None if record is None else record.case, arch)
    environment = found.environment if trace is not None else None if record is None else record.environment
    roof, rates = _roof(case, arch, record, environment)
    is_merged = not separate and (not backend or _choices(backend) != SEPARATE)
    try:
        parts = step_parts(_config(case), step_shape(case), _choices(backend) if is_merged else SEPARATE)
    except Exception as error:
        raise CaseError(f"{case.label}: no step of this shape can be counted: {failure(error)[1]}") from None
    told = StepRoofline(
        case,
        roof,
        rates,
        arch is not None,
        is_merged,
        parts,
        times=times,
        measured_by=measured_by,
        timed=record,
    )
    if as_json:
        print_json(roofline_json(told))
    else:
        print_roofline(told, console())


def _read(given: dict[str, str]) -> dict[str, Any]:
    """The fields of a case that the options set."""
    chosen: dict[str, Any] = {}
    for name, text in given.items():
        value = OPTIONS[name].read(name, text)
        chosen |= zip(_FIELDS[name], value if isinstance(value, tuple) else (value,), strict=True)
    if chosen.get("task", "t2i") not in IN_CHANNELS:
        raise CaseError(f"--task {chosen['task']}: a step is one of the UNet: give t2i or sr, or leave it out")
    return chosen


def _case(network: str, chosen: dict[str, Any], measured: Case | None, arch: str | None) -> Case:
    """The case that the options name; what they leave out is the measured case's, else the usual."""
    if measured is not None:
        for name, value in chosen.items():
            if getattr(measured, name) != value:
                raise CaseError(
                    f"what was measured has {name.replace('_', ' ')} {getattr(measured, name)}, not {value}; "
                    "leave that option out"
                )
        return measured.model_copy(update={"unet": network, "weights_sha256": None})
    device = chosen.pop("device", None) or best_device()
    is_gpu = arch is not None or device != "cpu"
    task = chosen.get("task", "t2i")
    usual = {"dtype": "bfloat16" if is_gpu else "float32", "guidance_scale": DEFAULT_GUIDANCE[task]}
    return Case(unet=network, device=device, **(usual | chosen))


def _config(case: Case) -> UNetConfig:
    """The network's configuration; of a checkpoint only headers are read."""
    if not case.is_checkpoint:
        return family_config(case)
    check_loadable([case])
    return load_unet(case.path, device="meta", backend="torch").config


def _choices(backend: str) -> Choices:
    """What is merged in a backend, "" for none in particular; diffusers merges nothing."""
    return getattr(all_backends().get(backend), "choices", SEPARATE) if backend else AUTO


def _check_network(network: str, measured: str, trace: Path) -> None:
    label = Case(unet=network).label
    if Case(unet=measured).label != label:
        raise CaseError(f"{trace} is of {Case(unet=measured).label}, not of {label}; name that one")


def _timed_beside(trace: Path, times: ClassTimes) -> Record | None:
    """The timed run that a trace's folder has beside the trace; None where it has none."""
    folder = trace if trace.is_dir() else trace.parent
    if not (folder / RECORDS_NAME).is_file():
        return None
    return next((r for r in load_records(folder)[0] if r.case_key == times.case_key), None)


def _traced_record(path: Path, network: str, chosen: dict[str, Any]) -> Record:
    """The latest record with a traced step of the network, in the case that the options name; our graph first."""
    found, _ = given_records([path])
    label = Case(unet=network).label
    fitting = [
        record
        for record in found
        if record.case.label == label
        # The trace of a pipeline has its other networks too.
        and record.case.task in IN_CHANNELS
        and record.trace is not None
        and record.trace.step
        and all(getattr(record.case, name) == value for name, value in chosen.items())
    ]
    if not fitting:
        raise RunError(
            f"{path} has no record of {label} with a traced step and these options; `ldmperf profile` traces on a "
            "GPU, `ldmperf trace` everywhere"
        )
    return min(fitting, key=lambda record: (trace_order(record.case), -record.started_at.timestamp()))


def _roof(
    case: Case, arch: str | None, record: Record | None, measured_in: Environment | None
) -> tuple[Roof, str]:
    """The rates that bound the step, and whose they are."""
    if arch is not None:
        machine = MACHINES[known_name("arch", arch, MACHINES)]
        if measured_in is not None and measured_in.gpu is None:
            raise CaseError("that was measured on a CPU, which --arch says nothing of: leave it out")
        try:
            return published_roof(machine, case.dtype), published_source(machine, case.dtype)
        except ValueError as reason:
            raise CaseError(f"--arch: {reason}; choose sm_80 or sm_90") from None
    if record is not None and (floor := record.floor) is not None:
        rates = Roof(floor.bytes_per_s, floor.flop_per_s, floor.exponentials_per_s)
        return rates, f"those that the record has, of {CeilingDevice.of(record.environment).device}"
    here = CeilingDevice.of(collect_environment(case.device))
    if measured_in is not None and CeilingDevice.of(measured_in).device != here.device:
        raise CaseError(
            f"that was measured on {CeilingDevice.of(measured_in).device}, and the ceilings here are of "
            f"{here.device}; give --arch for a chip's published rates"
        )
    try:
        ceilings = KeptCeilings(tell).of(case.device)
        beside = ", beside other work, so that they may be too low" if ceilings.crowded else ""
        return measured_roof(ceilings, case.dtype), f"measured on {here.device}{beside}"
    except Unsupported as reason:
        raise CaseError(f"{reason}; give --arch for a chip's published rates") from None
