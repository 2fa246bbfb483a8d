"""How long a process that measures may give no sign of life before it is taken for hung."""

from __future__ import annotations

from collections.abc import Mapping

from ..measure.timing import RepetitionRule
from ..options import device_kind
from ..trajectory.backend import Subject
from ..trajectory.case import Case, Task
from ..trajectory.progress import expected_work
from ..trajectory.short_traces import is_compiled

# Reading weights from a slow disk, and compiling all kernels of a network, take minutes.
LEAST_S = 1800.0
# A peer's max-autotune tries out every matmul and convolution.
COMPILED_S = 7200.0
# GFLOP a second below which no machine is that anybody measures on: float64 or emulated bfloat16 on one core, and
# float64 on a small GPU.
SLOWEST_CPU, SLOWEST_GPU = 0.5, 20.0


def patience(case: Case, rule: RepetitionRule, subjects: Mapping[Task, Subject]) -> float:
    """Seconds that one phase of the case may take: by far more than any honest one does.

    A phase is a trajectory, or what is done once. A reference's trajectory may be of a wider dtype.
    """
    gflop, _ = expected_work(case, rule, subjects)
    slowest = SLOWEST_CPU if device_kind(case.device) == "cpu" else SLOWEST_GPU
    return (COMPILED_S if is_compiled(case) else LEAST_S) + gflop / slowest
