"""Every operator of the family in the emulator, as compiled for GPUs that need not be there, against float64.

The calls are those of one step of every size, at latents of 16x16 so that they are small: same channels, head
dimensions, dtypes and default configurations. A code that another call has run is not run again. Attention is
planned once more as for a chip of one multiprocessor, whose tiles are those of many tokens. bench/emulate_page.py
writes the table.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ldmperf.kernels import OPERATORS
from ldmperf.kernels._launch import planned_for
from ldmperf.model import FAMILY
from ldmperf.profiling.emulator.emulated_calls import checked_call, run_operator
from ldmperf.profiling.emulator.emulation import Emulation, emulated
from ldmperf.profiling.emulator.operator_inputs import EmulatedInputs, made_inputs
from ldmperf.profiling.kernel_bench.plain import PLAIN
from ldmperf.profiling.static.compile import specialization_of
from ldmperf.profiling.static.shapes import Shape
from ldmperf.profiling.step.call import OperatorCall
from ldmperf.profiling.step.calls import FAMILY_HEAD_DIMS, family_calls

ARCHS = ("sm_90", "sm_80")
DTYPES = ("bfloat16", "float16", "float32")
LATENT = (16, 16)
# Matmuls of the largest sizes take minutes each, and are the same code with more channels.
LARGEST_LINEAR = 866e6
# Channels of x, of the result, pixels a side, channels of a skip connection: whole tiles and ragged ones, splits.
CONVOLUTIONS = (
    *((64, 64, 16, 0), (64, 32, 20, 96), (128, 128, 12, 0), (40, 48, 9, 24), (256, 64, 8, 0), (96, 96, 11, 0)),
    (320, 64, 8, 64),
)
# Channels and pixels a side of the image of a transformer: one part and two, whole tiles and ragged ones.
TRANSFORMERS = ((64, 16), (64, 9), (96, 8), (128, 8), (128, 5))
# Operators whose tiles depend on how many of them fill the chip.
_BY_ROWS = ("attention", "transformer_front", "transformer_tail")
# Of tests/gpu: relative RMS errors that are rounding alone, and how many times torch's own others may be.
FLOOR = {"float32": 5e-7, "float16": 6e-4, "bfloat16": 4e-3}
FACTOR = {"attention": 1.5}
# Of a sampler's update, whose exact result is known: tests/gpu compares registers and the model's input by these.
UPDATE_BOUND = {"float32": 2e-5, "bfloat16": 1e-2, "float16": 1e-2}


@dataclass(frozen=True)
class Job:
    """The calls of an operator in a dtype, run as compiled for an architecture."""

    operator: str
    dtype: str
    arch: str


@dataclass
class Row:
    """What the calls of a job came to; `share`: the largest error as a share of its bound."""

    job: Job
    calls: int = 0
    codes: int = 0
    launches: int = 0
    instructions: int = 0
    rms: float = 0.0
    share: float = 0.0
    seconds: float = 0.0
    findings: list[str] = dataclasses.field(default_factory=list)


def family_calls_of(job: Job, sizes: Iterable[str] = FAMILY) -> list[OperatorCall]:
    """The calls of a step of each size. Not inside `emulated`, where they would run."""
    return [
        call
        for size in sizes
        if job.operator != "linear" or _parameters(size) <= LARGEST_LINEAR
        for call in family_calls(size, 2, job.dtype, LATENT)
        if call.operator == job.operator
    ]


def others_of(job: Job) -> Iterator[EmulatedInputs]:
    """Calls that other networks make: masks of keys at every head dimension, sums of a layer norm."""
    dtype = getattr(torch, job.dtype)
    if job.operator == "attention":
        shape = Shape(dtype, batch=1, heads=2, height=12, width=12)
        for dim, mask, context in itertools.product(FAMILY_HEAD_DIMS, (0, 1), (0, 77)):
            made = dataclasses.replace(shape, head_dim=dim, mask=mask, context=context)
            yield made_inputs("attention", made, "random")
    elif job.operator == "conv3x3":
        for channels, features, side, skip_channels in CONVOLUTIONS:
            shape = Shape(
                dtype, channels=channels, features=features, height=side, width=side, skip_channels=skip_channels
            )
            yield made_inputs("conv3x3", shape, "random")
    elif job.operator in ("transformer_front", "transformer_tail"):
        widest = 96 if dtype == torch.float32 else 128
        for channels, side in TRANSFORMERS:
            if channels <= widest:
                shape = Shape(dtype, channels=channels, height=side, width=side, context=77)
                yield made_inputs(job.operator, shape, "random")
    elif job.operator in ("layer_norm", "residual_add", "group_norm_silu"):
        for channels in (64, 320, 1280):
            yield made_inputs(job.operator, Shape(dtype, channels=channels, height=12, width=12), "random")


def _parameters(size: str) -> float:
    return float(size[:-1]) * {"M": 1e6, "B": 1e9}[size[-1]]


def run_job(job: Job, limit: int | None = None) -> Row:
    """Runs one call of each code, `limit` at most."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    calls = family_calls_of(job)
    family = (EmulatedInputs(job.operator, "random", call.arguments("cpu", generator)) for call in calls)
    return run_inputs(job, itertools.chain(family, others_of(job)), limit)


def run_inputs(job: Job, inputs: Iterable[EmulatedInputs], limit: int | None = None) -> Row:
    """Runs those of the inputs whose code has not run; where tiles depend on how many fill the chip also as for a
    chip of one multiprocessor."""
    row, seen = Row(job), set()
    with emulated(job.arch) as emulation:
        few = dataclasses.replace(emulation.chip, multiprocessors=1)
        for one in inputs:
            for chip in (emulation.chip, few) if job.operator in _BY_ROWS else (emulation.chip,):
                with planned_for(chip):
                    codes = _codes(emulation, one) - seen
                    if codes and (limit is None or row.calls < limit):
                        seen |= codes
                        _run(emulation, one, row)
    row.codes = len(seen)
    row.launches, row.instructions, row.seconds = emulation.launches, emulation.instructions, emulation.seconds
    row.findings = [str(finding) for finding in emulation.findings]
    return row


def _codes(emulation: Emulation, inputs: EmulatedInputs) -> set[Any]:
    operator = OPERATORS[inputs.operator]
    launches = operator.plan(checked_call(operator, inputs.arguments))[1]
    return {specialization_of(launch, emulation.machine) for launch in launches if launch.programs}


def _run(emulation: Emulation, inputs: EmulatedInputs, row: Row) -> None:
    own = errors_of_torchs_own(inputs)
    for number, error in enumerate(run_operator(emulation, inputs).errors):
        if inputs.operator == "sampler_update":
            bound = UPDATE_BOUND[error.dtype]
        else:
            # In float32 all of the error is the order of additions.
            factor = 2.0 if error.dtype == "float32" else FACTOR.get(inputs.operator, 2.0)
            bound = max(FLOOR[error.dtype], factor * own[number])
        row.rms = max(row.rms, error.rms)
        row.share = max(row.share, error.rms / bound, float(error.not_finite))
    row.calls += 1


def errors_of_torchs_own(inputs: EmulatedInputs) -> list[float]:
    """Relative RMS errors of torch's operators in the same dtype, or of the operator's reference for a mask."""
    if inputs.operator == "sampler_update":
        return []
    masked = any(inputs.arguments.get(name) is not None for name in ("key_mask", "key_lengths"))
    given = {name: value for name, value in inputs.arguments.items() if masked or not name.startswith("key_")}
    plain = OPERATORS[inputs.operator].reference if masked else PLAIN[inputs.operator]
    results = plain(**given)
    results = results if isinstance(results, tuple) else (results,)
    return [
        float((a.double() - b).norm() / b.norm()) for a, b in zip(results, inputs.exact().values(), strict=True)
    ]


def jobs(operators: Iterable[str], dtypes: Iterable[str], archs: Iterable[str]) -> list[Job]:
    """Every combination of them."""
    return [Job(*one) for one in itertools.product(operators, dtypes, archs)]
