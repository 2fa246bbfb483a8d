"""One trajectory under torch's profiler, its work attributed to steps, blocks and operators by named ranges."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from ..measure.settings import measuring_settings
from ..options import CaseError
from .backend import Backend
from .case import BACKENDS, IDEAS, Case
from .network import Networks
from .ranges import ranged_trajectory
from .rungs import all_backends
from .short_traces import TRACE_STEPS, is_compiled
from .timeline import AttributedStep, Clock, step_times, without_shells

# A replayed graph has no ranges: the eager backend that runs what was captured.
EAGER_TWINS = {
    "graph": "triton+hoist+merge",
    "graph+pdl": "triton+hoist+merge",
    "graph+separate": "triton+hoist",
    "graph-invariant": "triton-invariant",
    "graph+fp8": "triton+fp8",
}


def attributed_case(case: Case) -> Case:
    """The case whose work is attributed for `case`: eager, and of at most `TRACE_STEPS` steps.

    Raises CaseError for a compiled backend, whose kernels merge operators, so that no range holds one, and for one
    of IDEAS.
    """
    if is_compiled(case):
        eager = ", ".join(name for name in BACKENDS if not is_compiled(case.model_copy(update={"backend": name})))
        raise CaseError(
            f"--backend: {case.backend} merges operators into kernels of its own, which no range can hold; "
            f"choose from {eager}"
        )
    if case.backend in IDEAS:
        raise CaseError(
            f"--backend: no eager backend launches what {case.backend} captures; choose graph+separate or graph"
        )
    backend = EAGER_TWINS.get(case.backend, case.backend)
    return case.model_copy(update={"backend": backend, "steps": min(case.steps, TRACE_STEPS)})


def clock_of(case: Case) -> Clock:
    """Whose times the work of a case has."""
    return "host" if case.device == "cpu" else "device"


def attributed(case: Case, backends: Mapping[str, Backend] | None = None) -> tuple[AttributedStep, dict[str, Any]]:
    """What a step of the case takes, and the Chrome trace that this was read from.

    A trajectory before it, untraced, prepares what the first one has to. Nothing is to be timed in this process
    afterwards (see short_traces.py). Raises RunError where the profiler saw nothing.
    """
    with measuring_settings():
        problem, _ = Networks().problem(case)
        is_cuda = torch.device(case.device).type == "cuda"
        backend = (backends or all_backends())[case.backend]
        trajectory = ranged_trajectory(backend, problem, torch.cuda.nvtx if is_cuda else None)
        inputs = problem.inputs(0)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
        trajectory(inputs)
        _wait(is_cuda, case)
        with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
            trajectory(inputs)
            _wait(is_cuda, case)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        trace = json.loads(file.read_bytes())
    trace["traceEvents"] = without_shells(trace["traceEvents"])
    return step_times(trace["traceEvents"], clock_of(case)), trace


def _wait(is_cuda: bool, case: Case) -> None:
    if is_cuda:
        torch.cuda.synchronize(torch.device(case.device))
