"""Search launch configurations on this GPU: kernels/tuned/<gpu>.json, which the kernels read.

For each tuning key of the family's calls, the most important first, every candidate is compared with the float64
reference and then timed in CUDA-graph replays; the fastest few are timed again in turn, with what is used now and
with torch's own operator. An entry is written, at once, where one is faster than what is used now by more than the
noise and its machine code has no fault (spills, serialized wgmma). The table names the keys where torch's operator
is faster than the best of ours, which "auto" then takes. A 16-bit entry serves both 16-bit dtypes.

All candidates are compiled first, by every core. Those that an operator lists first are tried first, the others in
a random but fixed order. `--l2 cold` rotates all inputs past the L2 cache. `--l2 step` is as in a denoising step:
activations were just written, weights were last read a step ago. The table tells which, for every entry.

    python bench/tune.py group_norm_silu
    python bench/tune.py geglu --size 39M,866M --batch 2 --seconds 120
    python bench/tune.py linear --size 866M --l2 step
    python bench/tune.py attention --head-dim 40,64 --tokens 4096 --batch 16
    python bench/tune.py linear,conv3x3 --size 39M,145M --batch 2 --key-seconds 4
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tune_search import L2, TORCH, Config, first_line, is_fatal, load_table, merged, search, search_order

from ldmperf.kernels import OPERATORS, Chip, Launch, tuned_table
from ldmperf.profiling.ahead.meta_runs import launches_of_call
from ldmperf.profiling.ahead.precompile import compile_work
from ldmperf.profiling.ahead.work import chip_here, kernel_of, plan
from ldmperf.profiling.commands.compile_command import told as compiled_told
from ldmperf.profiling.kernel_bench.device import (
    GraphCalls,
    input_sets,
    l2_cache_bytes,
    runs_per_sample,
    timed_run,
)
from ldmperf.profiling.kernel_bench.inputs import CallInputs, tolerance_of
from ldmperf.profiling.kernel_bench.selection import (
    BATCHES,
    SIZES,
    TOKENS,
    Job,
    first_of_each_key,
    head_dim_jobs,
    jobs,
)
from ldmperf.profiling.machines import MACHINES
from ldmperf.profiling.measure.environment import collect_environment
from ldmperf.profiling.measure.outcomes import release_memory
from ldmperf.profiling.measure.rates import device_ms
from ldmperf.profiling.measure.settings import measuring_settings, pinned_ptxas
from ldmperf.profiling.measure.store import write_whole
from ldmperf.profiling.measure.timing import Deadline
from ldmperf.profiling.options import CaseError, dtype_named, known_names, split_values, whole_number
from ldmperf.profiling.static.tuned import TUNED_BATCHES, TUNED_TOKENS, faults_of
from ldmperf.profiling.step.call import OperatorCall, TensorSpec
from ldmperf.profiling.step.calls import FAMILY_HEAD_DIMS
from ldmperf.profiling.terminal.visible import visible

# Arguments that a step reads once: weights, what `UNet.condition` made of them and of the prompt, and a skip
# connection, which was written long before. Keys and values of a text are recognized by their memory.
READ_ONCE = frozenset({"weight", "bias", "norm_weight", "norm_bias", "x_bias", "skip"})
# A graph of one call would be timed with the host's way in.
LEAST_CALLS = 16
# Compiling takes this part of the time at most.
COMPILING = 1 / 3
# Why a candidate of a call cannot be launched; None where it may be.
Refused = Callable[[OperatorCall, Config], str | None]
# What its machine code has that no tuned launch may have.
Faults = Callable[[OperatorCall, Config], Sequence[str]]


class Wrong(Exception):
    """A candidate whose result is not the reference's."""


def read_once(case: OperatorCall) -> OperatorCall:
    """The case with only those of its tensors that a step reads once."""
    memory_of_q = next((t.memory for t in case.tensors if t.name == "q"), None)

    def is_read_once(t: TensorSpec) -> bool:
        return t.name in READ_ONCE or (t.name in ("k", "v") and (t.memory is None or t.memory != memory_of_q))

    return case.model_copy(update={"tensors": tuple(filter(is_read_once, case.tensors))})


def as_in_a_step(
    case: OperatorCall, arguments: dict[str, Any], l2_bytes: int | None, generator: torch.Generator | None = None
) -> list[dict[str, Any]]:
    """Arguments of calls in a row, all with the same activations: what is read once rotates past the L2 cache.

    Weights of all calls that fit into it together, as those of a norm do, stay there.
    """
    kept = read_once(case)
    count = input_sets(sum(t.nbytes for t in kept.tensors), l2_bytes)[0] if kept.tensors else 1
    device = arguments[case.tensors[0].name].device
    sets = [arguments] + [arguments | kept.arguments(device, generator) for _ in range(count - 1)]
    return list(itertools.islice(itertools.cycle(sets), max(len(sets), LEAST_CALLS)))


def as_timed(config: Config, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments; of torch's operator those of a network that takes it, which asks for no statistics beside its
    result.

    A kernel that leaves them is so judged without what the next norm gains by them.
    """
    asks = config == TORCH and arguments.get("statistics") is True
    return arguments | {"statistics": False} if asks else arguments


class GpuTimer:
    """Times configurations of one case; a configuration is compared with the reference before its first time."""

    def __init__(self, case: OperatorCall, device: torch.device, l2: L2 = "cold") -> None:
        self.case, self.device = case, device
        l2_bytes = l2_cache_bytes(device)
        self.keeps_results = l2 == "cold"
        sets = input_sets(case.bytes_moved, l2_bytes)[0] if l2 == "cold" else 1
        self.inputs = CallInputs(case, sets, device, seed=0)
        self.reference = self.inputs.reference()
        self.calls = self.inputs.sets
        if l2 == "step":
            self.calls = as_in_a_step(case, self.inputs.sets[0], l2_bytes)
        self._right: set[Config] = set()

    def __call__(self, config: Config) -> float:
        """Median ms of a call."""
        if config not in self._right:
            self._check(config)

        def call(arguments: dict[str, Any]) -> Any:
            result = self._call(config, as_timed(config, arguments))
            # Where it is not kept the next call writes to the same memory, as in a step.
            return result if self.keeps_results else None

        graph = GraphCalls([lambda arguments=arguments: call(arguments) for arguments in self.calls], self.device)
        graph.run(1)
        once = device_ms(timed_run(graph, 1, self.device))
        runs = runs_per_sample(once, 0.5)
        samples = [device_ms(timed_run(graph, runs, self.device)) for _ in range(5)]
        return statistics.median(samples) / (runs * graph.calls_per_run)

    def _check(self, config: Config) -> None:
        self.inputs.restore()
        error = self.inputs.error(self._call(config, self.inputs.sets[0]), self.reference)
        if error > tolerance_of(self.case):
            raise Wrong(f"off by {error:.3g} (relative RMS)")
        self._right.add(config)

    def _call(self, config: Config, arguments: dict[str, Any]) -> Any:
        operator = OPERATORS[self.case.operator]
        if config == TORCH:
            assert operator.torchs_own is not None
            return operator.torchs_own(**arguments)
        result, launches = operator.plan(operator.bind(**arguments), config=config)
        for launch in launches:
            launch.run()
        return result


def compile_ahead(given: Sequence[tuple[str, Job]], chip: Chip, seconds: float) -> Refused:
    """Compiles what will be tried, in that order; returns what it found out about candidates.

    Before CUDA is initialized here: it forks.
    """
    machine = MACHINES.get(chip.arch)
    if machine is None:
        tell(f"no candidates are compiled ahead for {chip.arch}: each is where it is tried")
        return lambda case, config: None

    def tried() -> Iterator[tuple[Launch, bool]]:
        for key, job in given:
            yield from launches_of_call(job.call)
            operator, call = OPERATORS[job.call.operator], job.call.bound("meta")
            for config in search_order(operator.candidates(call), key):
                yield from ((launch, True) for launch in operator.plan(call, config=config)[1])

    report = compile_work(plan([tried], machine, chips=[chip], in_order=True), seconds=seconds)
    for line in compiled_told(report):
        tell(line)
    useless = report.useless

    def reason(case: OperatorCall, config: Config) -> str | None:
        if not useless:
            return None
        launches = OPERATORS[case.operator].plan(case.bound("meta"), config=config)[1]
        digests = (kernel_of(launch, machine).digest for launch in launches)
        return next((useless[digest] for digest in digests if digest in useless), None)

    return reason


def faults_on(chip: Chip) -> Faults:
    """The faults of a candidate's code on this chip; in both 16-bit dtypes where the call is in one of them."""
    machine = MACHINES.get(chip.arch)
    if machine is None:
        tell(f"machine code of {chip.arch} is not inspected: an entry may spill")
        return lambda case, config: ()

    def faults(case: OperatorCall, config: Config) -> Sequence[str]:
        try:
            with pinned_ptxas():
                return faults_of(case, config, machine)
        except Exception as failure:
            if is_fatal(failure):
                raise
            return [f"its code cannot be inspected: {first_line(failure)}"]

    return faults


def tune(
    given: Iterable[tuple[str, Job]],
    timer_of: Callable[[OperatorCall], Callable[[Config], float]],
    path: Path,
    head: dict[str, Any],
    deadline: Deadline,
    key_seconds: float,
    *,
    l2: L2 = "cold",
    refused: Refused = lambda case, config: None,
    faults: Faults = lambda case, config: (),
) -> int:
    """Searches key by key until the deadline, writing each entry as it is found; returns how many were written.

    refused: why a candidate cannot be launched; such a one is not tried.
    faults: of a candidate's machine code; such a one is not written.
    """
    document = load_table(path, head["gpu"])
    written = 0
    for key, job in given:
        if deadline.passed:
            break
        operator = OPERATORS[job.call.operator]
        candidates = operator.candidates(job.call.bound("meta"))
        limit = Deadline(min(deadline.left, key_seconds))
        try:
            with_torch = operator.torchs_own is not None
            timer = passing_over(refused, job.call, timer_of(job.call))
            faults_here = functools.partial(faults, job.call)
            found = search(candidates, timer, limit, seed=key, with_torch=with_torch, faults=faults_here)
        except Exception as failure:
            if is_fatal(failure):
                raise
            tell(f"{operator.name} {key}: {first_line(failure)}")
            release_memory()
            continue
        told = f"{found.now:.4g} ms now, {found.tried} of {len(candidates)} tried, {len(found.failures)} failed"
        told += ": nothing better" if found.best is None else f": {found.ms:.4g} ms with {found.best}"
        if found.torch is not None:
            told += f"; torch {found.torch:.4g} ms" + (", which auto will take" if found.torch_is_faster else "")
        if found.best is not None or found.torch is not None:
            document = merged(document, head, operator.name, key, found, l2)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, (json.dumps(document, indent=1) + "\n").encode())
            written += 1
        tell(f"{operator.name} {key}: {told}")
        for passed in found.passed_over:
            tell(f"    faster, and not taken: {passed}")
        for failure in found.failures[:3]:
            tell(f"    {failure}")
        release_memory()
    return written


def passing_over(
    refused: Refused, case: OperatorCall, time_one: Callable[[Config], float]
) -> Callable[[Config], float]:
    """`time_one`, which raises `Wrong` at once for a candidate that is refused."""

    def unless_refused(config: Config) -> float:
        if config not in (None, TORCH) and (reason := refused(case, config)) is not None:
            raise Wrong(reason)
        return time_one(config)

    return unless_refused


def tell(line: str) -> None:
    print(visible(line), file=sys.stderr, flush=True)


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="tune.py"
    )
    parser.add_argument("kernel", help=f"Of {', '.join(OPERATORS)}; separate several by commas.")
    parser.add_argument(
        "--size", action="append", default=[], help="Sizes of the family, or vae; all unless told."
    )
    parser.add_argument("--batch", action="append", default=[], help="The UNet's batch: 2 and 16 unless told.")
    parser.add_argument(
        "--head-dim", action="append", default=[], help="Attention of 8 heads of these, not the family's calls."
    )
    parser.add_argument(
        "--tokens", action="append", default=[], help="With --head-dim: 4096, 1024, 256, 64 unless told."
    )
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seconds", type=float, default=540.0, help="No search begins after so long.")
    parser.add_argument("--key-seconds", type=float, default=45.0, help="For the candidates of one key.")
    parser.add_argument(
        "--l2",
        choices=("cold", "step"),
        default="cold",
        help="What the caches hold before a call: nothing of it, or its activations as in a step.",
    )
    parser.add_argument("--out", type=Path, help="The folder of the tables; that of the kernels unless told.")
    return parser.parse_args(given)


@torch.inference_mode()
def main(given: Sequence[str] | None = None) -> int:
    try:
        return run(arguments(given))
    except CaseError as wrong:
        tell(f"tune.py: {wrong}")
        return 2


def run(options: argparse.Namespace) -> int:
    kernels = known_names("kernel", [options.kernel], OPERATORS)
    if not kernels:
        raise CaseError(f"name a kernel: {', '.join(OPERATORS)}")
    sizes = known_names("size", options.size, SIZES) or SIZES
    batches = tuple(sorted({whole_number("batch", b) for b in split_values(options.batch)})) or BATCHES
    dtype = dtype_named(options.dtype)
    head_dims = [whole_number("head-dim", text, 1024) for text in split_values(options.head_dim)]
    tokens = [whole_number("tokens", text, 2**20) for text in split_values(options.tokens)] or TOKENS
    if head_dims and kernels != ("attention",):
        raise CaseError("--head-dim chooses attention's calls; tune attention with it")
    for option, asked, known in (
        ("batch", batches, TUNED_BATCHES),
        ("head-dim", head_dims, FAMILY_HEAD_DIMS),
        ("tokens", tokens, TUNED_TOKENS),
    ):
        # The tests compile every entry of a table, and look for its call among these.
        if unknown := sorted(set(asked) - set(known)):
            choices = ", ".join(str(value) for value in sorted(known))
            raise CaseError(f"--{option} {unknown[0]}: tuned tables are of {choices}")
    deadline = Deadline(options.seconds)
    # Asked by another process: what is compiled ahead is compiled by forked ones, before CUDA is initialized here.
    chip = chip_here()
    if chip is None:
        raise CaseError("there is no GPU here, and configurations are chosen by measuring on one")
    calls = head_dim_jobs(head_dims, tokens, batches, dtype) if head_dims else jobs(kernels, sizes, batches, dtype)
    # The first of the kernels to the end, then the next.
    given = sorted(first_of_each_key(calls), key=lambda one: kernels.index(one[1].call.operator))
    refused = compile_ahead(given, chip, options.seconds * COMPILING)
    device = torch.device("cuda", 0)
    environment = collect_environment("cuda:0")
    head = {
        "gpu": chip.name,
        "chip": dataclasses.asdict(chip),
        "commit": environment.git_commit,
        "versions": {
            "torch": environment.torch,
            "triton": environment.triton,
            "cuda": environment.cuda,
            "ptxas": environment.ptxas,
        },
    }
    path = tuned_table(chip) if options.out is None else options.out / tuned_table(chip).name
    with measuring_settings():
        written = tune(
            given,
            lambda case: GpuTimer(case, device, options.l2),
            path,
            head,
            deadline,
            options.key_seconds,
            l2=options.l2,
            refused=refused,
            faults=faults_on(chip),
        )
    tell(f"{path}: {written} entries written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
