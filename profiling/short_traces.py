"""Traces of cases that have their times: of a short trajectory each, after all timing of the process.

Once torch's profiler has run, CUPTI stays attached to the process and slows its launches by 10 to 20 percent
(pytorch/pytorch#144455), which a time would take for the host's share. So nothing is timed after a trace.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from .backends import Backend
from .check import make_inputs
from .group import Networks, forget_compiled, make_problem, measuring_settings
from .lane import failure, release_memory
from .records import Record, Trace
from .timing import Deadline
from .trace import traced

# Enough for a multistep solver to reach its full order in most of them; the profiler's own work grows with each.
TRACE_STEPS = 8

# traced: the trace of a call on a device that evaluates a network so many times.
Tracer = Callable[[Callable[[], object], torch.device, int], Trace | None]


def wants_trace(record: Record) -> bool:
    """Whether there is a time whose device can be traced, and no trace yet."""
    return record.status == "ok" and record.trace is None and record.case.device != "cpu"


def short_traces(
    records: Sequence[Record],
    networks: Networks,
    backends: Mapping[str, Backend],
    deadline: Deadline,
    tracer: Tracer = traced,
) -> Iterator[Record]:
    """The records, completed by a trace, as they come; one whose trace fails gives a warning and is left out.

    Neighbours of one network should be neighbours in `records`, as the last network is kept.
    """
    group = ""
    for record in records:
        if deadline.passed:
            return
        if record.case.group_key != group:
            forget_compiled()
            group = record.case.group_key
        with measuring_settings():
            try:
                trace = _short_trace(record, networks, backends, tracer)
            except Exception as error:
                warnings.warn(f"{record.case.key}: no trace ({failure(error)[1]})", stacklevel=2)
                trace = None
            else:
                if trace is None:
                    warnings.warn(f"{record.case.key}: no trace (the profiler saw nothing)", stacklevel=2)
        release_memory()
        if trace is not None:
            yield record.model_copy(update={"trace": trace})


def _short_trace(
    record: Record, networks: Networks, backends: Mapping[str, Backend], tracer: Tracer
) -> Trace | None:
    case = record.case.model_copy(update={"steps": min(record.case.steps, TRACE_STEPS)})
    problem = make_problem(case, networks.get(case)[0])
    trajectory = backends[case.backend].build(problem)
    inputs = make_inputs(problem, 0)
    # Once before: what it has to prepare is not to be traced.
    trajectory(inputs)
    return tracer(lambda: trajectory(inputs), torch.device(case.device), len(problem.plan.steps))
