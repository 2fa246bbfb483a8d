"""The one command for a GPU machine: `make gpu-check`.

Runs the GPU tests, the ladder of backends at four sizes, the compiled peers, the benches of attention and of the
other kernels and the sweep of the family, the most important first, each in a process of its own and within its
share of the time. Every record is on disk as it is made; a part that overruns is stopped and the next begins; a
signal stops what runs and the table of what is there comes last. What one check had no time for another takes up:
given the folder of the one before, profiles go on where they stopped, on the same commit and machine.

    python bench/gpu_check.py
    python bench/gpu_check.py --only compiled-max,sweep-rest
    python bench/gpu_check.py --resume runs/20260101T120000Z-gpu-check --only sweep-rest
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# make's own process and Python's start fall into the nine minutes.
SECONDS = 520.0
# A child begins nothing new so long before its limit; stopped, it has so long to end by itself.
MARGIN, GRACE = 20.0, 10.0
NAMES = (
    "tests",
    "ladder",
    "compiled",
    "sweep",
    "attention",
    "kernels",
    "attention-family",
    "attention-flex",
    "compiled-max",
    "sweep-rest",
)
LDMPERF = (sys.executable, "-c", "from ldmperf.profiling.cli import main; main()")
OTHERS = "group_norm_silu,layer_norm,linear,geglu,residual_add,sampler_update"
ATTENTION_PEERS = "triton,auto,eager,sdpa-cudnn,sdpa-flash,sdpa-efficient,flex,xformers"
# Where the bound and the largest gain are to be shown (issue 4).
HEAD_DIMS = "40,64,80,128,160,384,8"
# Without the compiled peers, which take minutes to compile: they come in parts of their own, beside what is best.
LADDER = "diffusers,torch,triton,triton+hoist,triton+hoist+merge,graph"


class Stopped(BaseException):
    """A signal asked for the end."""


@dataclass(frozen=True)
class Part:
    """A command that takes `weight` shares of the time that is left when it begins; `reason` why it cannot run."""

    name: str
    weight: float
    command: tuple[str, ...] = ()
    takes_seconds: bool = False
    reason: str | None = None


@dataclass
class Outcome:
    part: Part
    text: str
    ok: bool
    seconds: float = 0.0


def shares(left: float, weights: Sequence[float]) -> float:
    """The seconds of the first of the parts that are left: what it does not use, the others get."""
    return max(left, 0.0) * weights[0] / sum(weights)


def gpu_test_files(tests: Path) -> list[str]:
    """The files that hold tests for a GPU: others may need packages that a GPU machine is without."""
    return sorted(str(path) for path in tests.rglob("test_*.py") if "mark.gpu" in path.read_text(encoding="utf-8"))


def parts(device: str, folder: Path) -> list[Part]:
    """The most important first. On a CPU what a CPU can: the family's smallest size, and few calls."""
    is_cpu = device == "cpu"
    files = gpu_test_files(ROOT / "tests")
    missing = None
    if importlib.util.find_spec("pytest") is None:
        missing = "pytest is not installed"
    elif not files:
        missing = "there are no tests with the mark gpu"
    tests = (sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-rs", "-p", "no:cacheprovider", *files)

    def kernels(name: str, weight: float, *options: str) -> Part:
        if is_cpu:
            options += ("--dtype", "float32")
        command = (*LDMPERF, "kernels", "--device", device, "--out", str(folder / name), *options)
        return Part(name, weight, command, takes_seconds=True)

    def profile(name: str, weight: float, *options: str) -> Part:
        begun = sorted(path.parent for path in (folder / name).glob("*/run.json"))
        if begun:
            return Part(name, weight, (*LDMPERF, "profile", "--resume", str(begun[-1])))
        command = (*LDMPERF, "profile", "--device", device, "--out", str(folder / name), *options)
        return Part(name, weight, command)

    first = Part("tests", 2, tests, reason=missing)
    if is_cpu:
        least = ("--size", "39M", "--steps", "1", "--min-count", "1", "--min-seconds", "0")
        return [
            first,
            profile("ladder", 3, *least, "--backend", LADDER),
            profile("compiled", 1, *least, "--backend", "diffusers,diffusers-compile,graph"),
            profile("sweep", 2, *least, "--sampler", "ddim,dpmpp_2m", "--backend", "torch,diffusers"),
            kernels("attention", 1, "--head-dim", "8,40", "--tokens", "256", "--batch", "2"),
            kernels("kernels", 3, "--kernel", OTHERS, "--size", "39M", "--batch", "2"),
        ]
    attention = ("--kernel", "attention")
    # FlexAttention compiles for tens of seconds a call: a few calls, beside all other peers.
    few = ("--peer", ATTENTION_PEERS, "--head-dim", "40,8,64", "--batch", "2")
    ladder = ("--preset", "ladder", "--backend")
    return [
        first,
        profile("ladder", 4, *ladder, LADDER),
        profile("compiled", 4, *ladder, "diffusers,diffusers-compile,graph"),
        profile("sweep", 3, "--preset", "family"),
        kernels("attention", 1, *attention, "--head-dim", HEAD_DIMS, "--tokens", "4096"),
        kernels("kernels", 1, "--kernel", OTHERS),
        kernels("attention-family", 1, *attention),
        kernels("attention-flex", 1, *attention, *few),
        profile("compiled-max", 2, *ladder, "diffusers,diffusers-compile-max,graph"),
        profile("sweep-rest", 1, "--preset", "family-all"),
    ]


def run_part(part: Part, limit: float, folder: Path, grace: float = GRACE) -> Outcome:
    """Runs a part for at most `limit` seconds, its output on the terminal and in a log as it comes.

    Raises Stopped after ending the part, when a signal comes.
    """
    if part.reason is not None:
        return Outcome(part, f"skipped: {part.reason}", ok=True)
    command = list(part.command)
    if part.takes_seconds:
        command += ["--seconds", f"{max(limit - MARGIN, 1.0):.0f}"]
    start = time.monotonic()
    with (folder / f"{part.name}.log").open("ab") as log:
        # A session of its own: its workers can be ended with it, and a terminal's Ctrl-C comes through us.
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environment()
        )
        try:
            code: int | None = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end(process, grace)
    seconds = time.monotonic() - start
    if code is None:
        return Outcome(part, f"stopped at its limit of {limit:.0f} s", ok=True, seconds=seconds)
    if part.name == "tests" and code == 5:
        return Outcome(part, "there were no tests to run", ok=True, seconds=seconds)
    text = "done" if code == 0 else f"failed (exit code {code}); see {part.name}.log"
    return Outcome(part, text, ok=code == 0, seconds=seconds)


def environment() -> dict[str, str]:
    """The children's: output unbuffered, so that a log holds what was said before a part was ended."""
    return os.environ | {"PYTHONUNBUFFERED": "1"}


def end(process: subprocess.Popen[bytes], grace: float) -> None:
    """Ends a part and whatever it started: asked first, so that it can say where its records are."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=grace)
    # Workers that outlive it are of its session, which has its number.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def run_parts(chosen: Sequence[Part], seconds: float, folder: Path) -> Iterator[Outcome]:
    """The outcomes as they come; what is left of the time is shared anew before each part."""
    deadline = time.monotonic() + seconds
    for number, part in enumerate(chosen):
        left = deadline - time.monotonic()
        if left < 1.0:
            yield Outcome(part, "not begun: no time was left", ok=False)
            continue
        limit = shares(left, [other.weight for other in chosen[number:]])
        tell(f"{part.name}: at most {limit:.0f} s, {folder / (part.name + '.log')}")
        outcome = run_part(part, limit, folder)
        tell(f"{part.name}: {outcome.text}, {outcome.seconds:.0f} s")
        yield outcome


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def print_summary(folder: Path, outcomes: Sequence[Outcome]) -> None:
    """The short table: the profiles, our kernels against their peers, and how each part went."""
    from rich.console import Console

    from ldmperf.profiling import load_records
    from ldmperf.profiling.kernel_bench.attention_table import attention_lines, attention_rows
    from ldmperf.profiling.kernel_bench.records import KernelRecord
    from ldmperf.profiling.kernel_bench.table import conditions, summary_lines
    from ldmperf.profiling.report import print_table
    from ldmperf.profiling.store import load_lines

    counts: dict[str, str] = {}
    for path in sorted(folder.glob("*/*/records.jsonl")):
        records, _ = load_records(path)
        counts[path.parents[1].name] = by_status(record.status for record in records)
        print_table(records, Console())
        print()
    for path in sorted(folder.glob("*/*/kernels.jsonl")):
        measured, _ = load_lines(path, KernelRecord)
        counts[path.parents[1].name] = by_status(record.status for record in measured)
        if measured:
            beside_the_best = attention_lines(attention_rows(measured))
            print("\n".join([conditions(measured), *beside_the_best, *summary_lines(measured)]) + "\n")
    if (folder / "tests.log").exists():
        lines = (folder / "tests.log").read_text(errors="replace").split("\n")
        counts["tests"] = next((line.strip("= ") for line in reversed(lines) if line.startswith("=")), "")
    for outcome in outcomes:
        name, told = outcome.part.name, counts.get(outcome.part.name, "")
        print(f"{name:16} {outcome.seconds:4.0f} s  {outcome.text}" + (f"  [{told}]" if told else ""))
    print(folder)


def by_status(statuses: Iterator[str]) -> str:
    found = Counter(statuses)
    return ", ".join(f"{count} {status}" for status, count in found.items()) or "no record"


def raise_stopped(number: int, _: object) -> None:
    raise Stopped(number)


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="gpu_check.py"
    )
    parser.add_argument("--only", default=",".join(NAMES), help=f"Parts, comma separated: {', '.join(NAMES)}.")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="For all parts together.")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is one.")
    parser.add_argument("--out", type=Path, default=ROOT / "runs", help="Where the folder of this check goes.")
    parser.add_argument("--resume", type=Path, help="The folder of an earlier check, whose profiles go on.")
    options = parser.parse_args(given)
    unknown = set(options.only.split(",")) - set(NAMES)
    if unknown:
        parser.error(f"--only: no part {', '.join(sorted(unknown))}; choose from {', '.join(NAMES)}")
    if options.device is None:
        import torch

        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    return options


def main(given: Sequence[str] | None = None) -> int:
    began = time.monotonic()
    options = arguments(given)
    folder = options.out.resolve() / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-gpu-check"
    if options.resume is not None:
        folder = options.resume.resolve()
        if not folder.is_dir():
            tell(f"gpu_check.py: {options.resume} is no folder of a check; start a new one without --resume")
            return 2
    try:
        folder.mkdir(parents=True, exist_ok=options.resume is not None)
    except OSError as failure:
        tell(f"gpu_check.py: cannot write to {options.out} ({failure.strerror}); choose another folder with --out")
        return 1
    chosen = [part for part in parts(options.device, folder) if part.name in options.only.split(",")]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, raise_stopped)
    outcomes: list[Outcome] = []
    code = 0
    try:
        for outcome in run_parts(chosen, options.seconds - (time.monotonic() - began), folder):
            outcomes.append(outcome)
    except Stopped as stopped:
        code = 128 + int(stopped.args[0])
        outcomes += [Outcome(part, "stopped by a signal", ok=False) for part in chosen[len(outcomes) :][:1]]
    print_summary(folder, outcomes)
    return code or int(not all(outcome.ok for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
