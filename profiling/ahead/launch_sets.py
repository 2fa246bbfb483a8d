"""What `ldmperf compile --for NAME` stands for: launches of whole runs, of single calls, of a tuner's choices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from ldmperf.kernels import OPERATORS

from ..kernel_bench.selection import BATCHES, SIZES, VAE, head_dim_jobs, jobs, steps_in_order
from ..machines import Machine
from ..options import CaseError, whole_number
from ..step.calls import family_calls, vae_calls
from ..trajectory.case import Case
from ..trajectory.presets import PRESETS
from .meta_runs import FEW_STEPS, candidates, launches_of_calls, our_backends, run_parts
from .tested_launches import SMOKE_SIZES, smoke_parts, tested_parts
from .work import Part, Work, plan

NAMES = (
    "smoke",
    "ladder",
    "family",
    "drop-in",
    "kernels",
    "tests",
    "tune:OPERATOR[+...][:SIZE[+...][:BATCH[+...]]]",
)
# Of attention in the GPU check (bench/gpu_check.py).
CHECKED_HEAD_DIMS = (40, 64, 80, 128, 160, 384, 8)


def work_for(names: Iterable[str], machine: Machine, *, processes: int | None = None) -> Work:
    """The launches of the named work (`NAMES`). Raises CaseError for a name that is none."""
    return plan([part for name in names for part in parts_of(name)], machine, processes=processes)


def parts_of(name: str) -> list[Part]:
    """The parts of the named work, each to be planned by a process. Raises CaseError for a name that is none."""
    kind, *rest = name.split(":")
    if kind == "tune" and 1 <= len(rest) <= 3:
        return tuning_parts(*rest)
    if rest or kind not in _SETS:
        raise CaseError(f"--for: there is no work {name!r}; choose from {', '.join(NAMES)}")
    return _SETS[kind]()


def _smoke() -> list[Part]:
    """Every operator at the calls of the smallest size and of Stable Diffusion's, and a trajectory of each."""
    cases = (
        Case(unet=size, steps=FEW_STEPS, dtype="bfloat16", device="cuda", backend=backend)
        for size in SMOKE_SIZES
        for backend in our_backends()
    )
    calls = [partial(launches_of_calls, partial(family_calls, size, 2, "bfloat16")) for size in SMOKE_SIZES]
    return [*calls, *run_parts(cases), *smoke_parts()]


def _ladder() -> list[Part]:
    """The preset `ladder`, and two of its sizes in float16 too."""
    sweeps = PRESETS["ladder"].sweeps
    in_half = (replace(sweep, unets=("866M", "39M"), dtypes=("float16",)) for sweep in sweeps)
    return run_parts(case for sweep in (*sweeps, *in_half) for case in sweep.cases())


def _family() -> list[Part]:
    """The preset `family`."""
    return run_parts(case for sweep in PRESETS["family"].sweeps for case in sweep.cases())


def _drop_in() -> list[Part]:
    """The preset `drop-in`."""
    return run_parts(case for sweep in PRESETS["drop-in"].sweeps for case in sweep.cases())


def _kernels() -> list[Part]:
    """`ldmperf kernels`, and attention by head dimension as the GPU check has it."""
    steps = [
        partial(vae_calls, "bfloat16") if size == VAE else partial(family_calls, size, batch, "bfloat16")
        for size, batch in steps_in_order(SIZES, BATCHES)
    ]
    by_head_dim = partial(head_dim_jobs, CHECKED_HEAD_DIMS, (4096,), BATCHES, "bfloat16")
    parts: list[Part] = [partial(launches_of_calls, calls) for calls in steps]
    return [*parts, partial(launches_of_calls, lambda: (job.call for job in by_head_dim()))]


def tuning_parts(operators: str, sizes: str = "", batches: str = "") -> list[Part]:
    """What bench/tune.py tries: every candidate at each tuning key, what is used now and torch's own operator."""
    chosen = _known("operator", operators, tuple(OPERATORS))
    of_sizes = _known("size", sizes, SIZES) if sizes else SIZES
    of_batches = tuple(whole_number("for tune", text, 1024) for text in batches.split("+")) if batches else BATCHES
    return [
        partial(candidates, partial(jobs, (operator,), (size,), (batch,), "bfloat16"))
        for operator in chosen
        for size, batch in steps_in_order(of_sizes, of_batches)
    ]


def _known(what: str, text: str, known: Sequence[str]) -> tuple[str, ...]:
    chosen = tuple(text.split("+"))
    for name in chosen:
        if name not in known:
            raise CaseError(f"--for tune: there is no {what} {name!r}; choose from {', '.join(known)}")
    return chosen


_SETS: Mapping[str, Callable[[], list[Part]]] = {
    "smoke": _smoke,
    "ladder": _ladder,
    "family": _family,
    "drop-in": _drop_in,
    "kernels": _kernels,
    "tests": lambda: [*_smoke(), *tested_parts()],
}
