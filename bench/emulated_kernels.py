"""Write the tables of docs/emulate.md: every operator of the family in the emulator, and the mutants that it noticed.

`make emulate-tables`. Takes no GPU, two processes and some ten minutes. The calls are those of one step of every
size, at latents of 16x16 so that they are small: same channels, head dimensions, dtypes and default configurations.
A launch that another size has compiled to the same code is run once. Attention is planned once more as for a chip of
one multiprocessor, whose tiles are those of many tokens.
"""

import argparse
import dataclasses
import itertools
import multiprocessing
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from markers import with_blocks

from ldmperf.kernels import OPERATORS
from ldmperf.kernels._launch import planned_for
from ldmperf.model import FAMILY
from ldmperf.profiling.emulator.emulated_calls import checked_call, run_operator
from ldmperf.profiling.emulator.emulation import Emulation, emulated
from ldmperf.profiling.emulator.operator_inputs import EmulatedInputs, made_inputs
from ldmperf.profiling.kernel_bench.plain import PLAIN
from ldmperf.profiling.measure.store import write_whole
from ldmperf.profiling.static.compile import specialization_of
from ldmperf.profiling.static.shapes import Shape
from ldmperf.profiling.step.call import OperatorCall
from ldmperf.profiling.step.calls import FAMILY_HEAD_DIMS, family_calls

PAGE = Path(__file__).parents[1] / "docs" / "emulate.md"
ARCHS = ("sm_90", "sm_80")
DTYPES = ("bfloat16", "float16", "float32")
LATENT = (16, 16)
# Matmuls of the largest sizes take minutes each, and are the same code with more channels.
LARGEST_LINEAR = 866e6
# tests/gpu: relative RMS errors that are rounding alone, and how much larger than that of torch's own others may be.
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
    """Calls that other networks make: masks of keys at every head dimension, sums of a layer norm, ragged images."""
    dtype = getattr(torch, job.dtype)
    if job.operator == "attention":
        shape = Shape(dtype, batch=1, heads=2, height=12, width=12)
        for dim, mask, context in itertools.product(FAMILY_HEAD_DIMS, (0, 1), (0, 77)):
            made = dataclasses.replace(shape, head_dim=dim, mask=mask, context=context)
            yield made_inputs("attention", made, "random")
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
    """Runs those of the inputs whose code has not run; attention also as for a chip of one multiprocessor."""
    row, seen = Row(job), set()
    with emulated(job.arch) as emulation:
        few = dataclasses.replace(emulation.chip, multiprocessors=1)
        for one in inputs:
            for chip in (emulation.chip, few) if job.operator == "attention" else (emulation.chip,):
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
    own = _errors_of_torchs_own(inputs)
    for number, error in enumerate(run_operator(emulation, inputs).errors):
        if inputs.operator == "sampler_update":
            bound = UPDATE_BOUND[error.dtype]
        else:
            bound = max(FLOOR[error.dtype], FACTOR.get(inputs.operator, 2.0) * own[number])
        row.rms = max(row.rms, error.rms)
        row.share = max(row.share, error.rms / bound, float(error.not_finite))
    row.calls += 1


def _errors_of_torchs_own(inputs: EmulatedInputs) -> list[float]:
    """Relative RMS errors of torch's operators in the same dtype; 0 where they do not do the call."""
    plain = PLAIN.get(inputs.operator)
    masks = any(inputs.arguments.get(name) is not None for name in ("key_mask", "key_lengths"))
    if plain is None or masks:
        return [0.0, 0.0]
    given = {name: value for name, value in inputs.arguments.items() if name not in ("key_mask", "key_lengths")}
    results = plain(**given)
    results = results if isinstance(results, tuple) else (results,)
    exact = inputs.exact().values()
    return [
        float((a.double() - b).norm() / b.norm()) for a, b in zip(results, exact, strict=False) if b.norm() > 0
    ] + [0.0, 0.0]


# ---------------------------------------------------------------- pages


def jobs(operators: Iterable[str], dtypes: Iterable[str], archs: Iterable[str]) -> list[Job]:
    return [Job(*one) for one in itertools.product(operators, dtypes, archs)]


def run_jobs(chosen: Sequence[Job], limit: int | None, processes: int) -> list[Row]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        rows = []
        for row in pool.map(run_job, chosen, itertools.repeat(limit)):
            print(_line(row), *row.findings, sep="\n", flush=True)
            rows.append(row)
        return rows


HEAD = (
    "| operator | dtype | arch | codes | launches | thread-instructions | relative RMS error | of its bound | findings |"
)


def _line(row: Row) -> str:
    job = row.job
    return (
        f"| {job.operator} | {job.dtype} | {job.arch} | {row.codes} | {row.launches} | {row.instructions / 1e6:,.1f} M "
        f"| {row.rms:.1e} | {row.share:.2f} | {len(row.findings)} |"
    )


def table(rows: Sequence[Row]) -> str:
    total = sum(row.instructions for row in rows)
    seconds = sum(row.seconds for row in rows)
    return "\n".join(
        [
            f"Triton {version('triton')}. {sum(row.codes for row in rows)} codes, {total / 1e9:.1f} billion "
            f"thread-instructions, {sum(len(row.findings) for row in rows)} findings.",
            "",
            HEAD,
            "|---|---|---|---|---|---|---|---|---|",
            *map(_line, rows),
        ]
    ) + ("" if not seconds else "")


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--operator", action="append", choices=sorted(OPERATORS))
    parser.add_argument("--dtype", action="append", choices=DTYPES)
    parser.add_argument("--arch", action="append", choices=ARCHS)
    parser.add_argument("--limit", type=int, help="calls of each operator, dtype and architecture at most")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--print", action="store_true", help="print the table and write nothing")
    options = parser.parse_args(arguments)
    chosen = jobs(options.operator or OPERATORS, options.dtype or DTYPES, options.arch or ARCHS)
    rows = run_jobs(chosen, options.limit, options.processes)
    if options.print:
        print(table(rows))
        return
    writers: Mapping[str, Any] = {"operators": lambda _: table(rows)}
    write_whole(PAGE, with_blocks(PAGE.read_text(), writers))


if __name__ == "__main__":
    main(sys.argv[1:])
