"""Traces of short trajectories, one for each case that has a time, after all timing of the process.

Once torch's profiler has run, CUPTI stays attached to the process and slows its launches by 10 to 20 percent
(pytorch/pytorch#144455). So nothing is timed after a trace, and a profile with a deadline keeps a share of its
time for traces.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch

from ..measure.outcomes import failure, release_memory
from ..measure.settings import measuring_settings
from ..measure.timing import Deadline
from .backend import Backend
from .case import Case
from .network import Networks
from .record_parts import Trace
from .records import Record

# Enough for a multistep solver to run mostly at its full order; the profiler's own work grows with each step.
TRACE_STEPS = 8
# The share of a profile's seconds in which it times; the rest is for traces.
TIMING_SHARE = 0.8
# Traced before all others, in this order: ours, the peer, and what merging is worth.
FIRST_BACKENDS = ("graph", "diffusers", "graph+separate")

# traced: the trace of a call on a device that evaluates a network so many times.
Tracer = Callable[[Callable[[], object], torch.device, int], Trace | None]


def is_traceable(case: Case) -> bool:
    """Whether torch's profiler sees the launches of the case's device."""
    return case.device != "cpu"


def wants_trace(record: Record) -> bool:
    """Whether there is a time whose device can be traced, and no trace yet."""
    return record.status == "ok" and record.trace is None and is_traceable(record.case)


def timing_deadline(cases: Iterable[Case], deadline: Deadline) -> Deadline:
    """Until when cases are timed: a share of the time where one of them can be traced, else all of it."""
    return deadline.after(TIMING_SHARE) if any(map(is_traceable, cases)) else deadline


def is_compiled(case: Case) -> bool:
    """Whether the backend's first call compiles for minutes, and does so again when it is built again."""
    return "compile" in case.backend


def trace_order(case: Case) -> tuple[bool, int]:
    """Sorts cases by importance; compiled peers come last, as they are compiled anew for their trace."""
    place = FIRST_BACKENDS.index(case.backend) if case.backend in FIRST_BACKENDS else len(FIRST_BACKENDS)
    return is_compiled(case), place


def short_traces(
    records: Sequence[Record],
    networks: Networks,
    backends: Mapping[str, Backend],
    deadline: Deadline,
    tracer: Tracer,
    cases: Mapping[str, Case],
    entered: Callable[[Case, str], None] = lambda case, phase: None,
) -> Iterator[Record]:
    """The records, completed by a trace, by `trace_order`; one whose trace fails gives a warning and is left out.

    No trace is begun once `deadline` has passed. A compiled peer is passed over where less time is left than its
    first build and call took. `cases`, by key, say where a checkpoint lies, which a record does not. `entered` is
    called before each trace with its case and "trace".
    """
    group = ""
    for record in sorted(records, key=lambda record: trace_order(record.case)):
        if deadline.passed:
            return
        preparation_ms = (record.phases.build_ms or 0.0) + (record.phases.first_call_ms or 0.0)
        if is_compiled(record.case) and 1e3 * deadline.left < preparation_ms:
            continue
        if record.case.group_key != group:
            torch.compiler.reset()
            group = record.case.group_key
        case = cases.get(record.case_key, record.case)
        entered(case, "trace")
        with measuring_settings():
            try:
                trace = _short_trace(case, networks, backends, tracer)
            except Exception as error:
                warnings.warn(f"{record.case.key}: no trace ({failure(error)[1]})", stacklevel=2)
                trace = None
            else:
                if trace is None:
                    warnings.warn(f"{record.case.key}: no trace (the profiler saw nothing)", stacklevel=2)
        release_memory()
        if trace is not None:
            yield record.model_copy(update={"trace": trace})


def _short_trace(case: Case, networks: Networks, backends: Mapping[str, Backend], tracer: Tracer) -> Trace | None:
    case = case.model_copy(update={"steps": min(case.steps, TRACE_STEPS)})
    problem, _ = networks.problem(case)
    trajectory = backends[case.backend].build(problem)
    inputs = problem.inputs(0)
    # Once before: what it has to prepare is not to be traced.
    trajectory(inputs)
    return tracer(lambda: trajectory(inputs), torch.device(case.device), problem.evaluations)
