"""The parts of a GPU check: what each runs, for how long, and what it must have compiled."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
LDMPERF = (sys.executable, "-c", "from ldmperf.profiling.cli import main; main()")
NAMES = (
    *("smoke", "headline", "tests", "ladder", "ideas", "tests-alone", "drop-in", "pipelines", "family"),
    *("attention", "kernels", "tune-linear", "tune-attention", "tune-group_norm_silu"),
    *("tune-conv3x3", "tune-transformer_front", "tune-transformer_tail", "compiled"),
    *("drop-in-compiled", "pipelines-compiled"),
    *("attention-family", "kernels-compiled", "conv-padding", "attention-flex", "compiled-max", "sanitizer"),
    "family-all",
)
OTHERS = (
    "group_norm_silu,layer_norm,linear,conv3x3,geglu,residual_add,transformer_front,transformer_tail,"
    "sampler_update"
)
# Operators that are there for the smallest networks.
SMALL_SIZES = ("conv3x3", "transformer_front", "transformer_tail")
KERNEL_PEERS = "triton,auto,separate,eager"
COMPILED_PEERS = "triton,auto,eager,compile,diffusers,diffusers-compile"
ATTENTION_PEERS = "triton,auto,eager,sdpa-cudnn,sdpa-flash,sdpa-efficient,flex,xformers"
# Where the bound and the largest gain are to be shown.
HEAD_DIMS = "40,64,80,128,160,384,8"
# The most telling first; a file that is not named here comes behind.
TEST_FILES = (
    *("test_3_unet.py", "test_2_properties.py", "test_1_family.py", "test_5_dependent.py", "test_4_graph_pool.py"),
    *("test_gpu_philox.py", "test_gpu_timing.py"),
)
SMOKE_FILE = "test_0_smoke.py"
SANITIZER_FILES = ("test_2_properties.py",)
# One GPU holds the contexts and tests of so many processes.
TEST_PROCESSES = 10
# What is compiled in one go, which begins once and keeps every core busy.
TOGETHER = ({"smoke", "ladder"}, {"family", "kernels"})
COMPILATION_FLOOR = 5.0
Evidence = Literal["tests", "tests or skips", "profile", "kernels", "tuning", "convolutions", "compilation"]


@dataclass(frozen=True)
class Part:
    """A command that runs for at most `limit` seconds, and is not begun where fewer than `floor` are left.

    evidence       what its records are (`check_evidence.recorded`)
    launches       what it launches, as names for `ldmperf compile --for`: these are compiled before it begins
    own_launches   the same of what it compiles itself, on all cores
    beside         the same of what later parts launch, compiled while it runs, as it times nothing
    resumes        the file by which a run of an earlier check is known that goes on
    takes_seconds  whether the command takes --seconds, after which it begins nothing new
    processes      of how many processes its command is
    reason         why it cannot run here
    """

    name: str
    limit: float
    floor: float
    evidence: Evidence
    command: tuple[str, ...] = ()
    launches: tuple[str, ...] = ()
    own_launches: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    resumes: str = ""
    takes_seconds: bool = False
    processes: int = 1
    reason: str | None = None


def parts(device: str, folder: Path) -> list[Part]:
    """The parts in order of importance. On a CPU what a CPU can: the family's smallest size, and few calls."""
    from ldmperf.profiling.trajectory.case import IDEAS, PIPELINE_BACKENDS, RUNGS

    # The compiled peers take minutes to compile: they come in parts of their own, beside what is best.
    rungs = ",".join(name for name in RUNGS if "compile" not in name and name not in IDEAS)
    graphs = ",".join(name for name in RUNGS if name.startswith("graph") and name not in IDEAS)
    ideas = ",".join(("graph+separate", *IDEAS, "graph", "graph+pdl", "graph+fp8"))
    pipes = ",".join(name for name in PIPELINE_BACKENDS if "compile" not in name)

    def profile(name: str, limit: float, floor: float, *options: str, launches: Sequence[str] = ()) -> Part:
        command = (*LDMPERF, "profile", "--one-process", "--device", device, "--out", str(folder / name), *options)
        # One folder for all parts: they measure the same cases on several backends.
        command += ("--references", str(folder / "references"))
        return Part(
            name, limit, floor, "profile", command, tuple(launches), resumes="run.json", takes_seconds=True
        )

    def kernels(name: str, limit: float, floor: float, *options: str) -> Part:
        command = (*LDMPERF, "kernels", "--device", device, "--out", str(folder / name), *options)
        launches = () if device == "cpu" else ("kernels",)
        return Part(name, limit, floor, "kernels", command, launches, resumes="kernels.jsonl", takes_seconds=True)

    if device == "cpu":
        once = ("--steps", "1", "--min-count", "1", "--min-seconds", "0")
        least = ("--size", "39M", *once)
        float32 = ("--dtype", "float32")
        return [
            pytest_part("smoke", 300, 10, device, [SMOKE_FILE]),
            pytest_part("tests", 300, 10, device),
            profile("ladder", 300, 10, *least, "--backend", rungs),
            profile("pipelines", 300, 10, "--task", "pipeline", "--size", "SD1.5", "--latent", "16x16", *once),
            profile("family", 300, 10, *least, "--sampler", "ddim,dpmpp_2m", "--backend", "torch,diffusers"),
            kernels("attention", 300, 10, *float32, "--head-dim", "8,40", "--tokens", "256", "--batch", "2"),
            kernels("kernels", 300, 10, *float32, "--kernel", OTHERS, "--size", "39M", "--batch", "2"),
            profile("compiled", 300, 10, *least, "--backend", f"diffusers,diffusers-compile,{graphs}"),
        ]

    def tune(operator: str, size: str = "866M") -> Part:
        command = (sys.executable, str(ROOT / "bench" / "tune.py"), operator, "--size", size, "--batch", "2")
        command += ("--l2", "step", "--key-seconds", "4")
        own = (f"tune:{operator}:{size}:2",)
        return Part(f"tune-{operator}", 110, 40, "tuning", command, own_launches=own, takes_seconds=True)

    # In float16, as the ladder is in bfloat16; a few samples, so that both sizes have times on a slow host too.
    both = ("--preset", "ladder", "--size", "866M,39M", "--dtype", "float16", "--min-seconds", "0.5")
    few = ("--peer", ATTENTION_PEERS, "--head-dim", "40,8,64", "--batch", "2")
    attention = ("--kernel", "attention")
    ladder = ("--preset", "ladder", "--backend")
    idea_sizes = ("--size", "39M,866M,145M,5B", "--min-seconds", "1")
    drop_in = ("--preset", "drop-in")
    pipelines = ("--preset", "pipelines", "--backend")
    compiled = "diffusers,diffusers-accelerated,diffusers-compile,diffusers-accelerated-compile"
    return [
        replace(pytest_part("smoke", 55, 20, device, [SMOKE_FILE], launches=("smoke",)), beside=("tests",)),
        profile("headline", 120, 90, *both, "--backend", f"{graphs},diffusers", launches=("ladder",)),
        pytest_part("tests", 120, 40, device, marks="gpu and not alone and not sanitizer", launches=("tests",)),
        profile("ladder", 180, 45, *ladder, rungs, launches=("ladder",)),
        profile("ideas", 240, 45, *ladder, ideas, *idea_sizes, launches=("ladder",)),
        # A few tests: what they launch is compiled with `tests`, or by themselves.
        pytest_part("tests-alone", 150, 60, device, marks="gpu and alone"),
        profile("drop-in", 180, 60, *drop_in, launches=("drop-in",)),
        # The decoder's own launches are compiled at its first call.
        profile("pipelines", 150, 60, *pipelines, pipes, launches=("drop-in",)),
        profile("family", 150, 40, "--preset", "family", launches=("family",)),
        kernels("attention", 75, 30, *attention, "--head-dim", HEAD_DIMS, "--tokens", "4096"),
        kernels("kernels", 90, 30, "--kernel", OTHERS, "--peer", KERNEL_PEERS),
        tune("linear"),
        tune("attention"),
        tune("group_norm_silu"),
        *(tune(operator, "39M") for operator in SMALL_SIZES),
        profile("compiled", 240, 90, *ladder, f"diffusers,diffusers-compile,{graphs}", launches=("ladder",)),
        profile("drop-in-compiled", 300, 120, *drop_in, "--backend", compiled, launches=("drop-in",)),
        profile(
            "pipelines-compiled", 300, 150, *pipelines, "pipe,pipe-compile,sample-graph", launches=("drop-in",)
        ),
        kernels("attention-family", 75, 30, *attention),
        kernels("kernels-compiled", 120, 45, "--kernel", OTHERS, "--peer", COMPILED_PEERS),
        Part("conv-padding", 60, 20, "convolutions", (sys.executable, str(ROOT / "bench" / "conv_padding.py"))),
        # FlexAttention compiles for tens of seconds a call: a few calls, beside all other peers.
        kernels("attention-flex", 120, 45, *attention, *few),
        profile(
            "compiled-max", 300, 150, *ladder, f"diffusers,diffusers-compile-max,{graphs}", launches=("ladder",)
        ),
        # It slows a process many times, and is not installed everywhere.
        replace(
            pytest_part("sanitizer", 200, 60, device, SANITIZER_FILES, marks="gpu and sanitizer"),
            evidence="tests or skips",
        ),
        profile("family-all", 240, 40, "--preset", "family-all", launches=("family",)),
    ]


def pytest_part(
    name: str,
    limit: float,
    floor: float,
    device: str,
    files: Sequence[str] = TEST_FILES,
    *,
    marks: str = "gpu",
    launches: Sequence[str] = (),
) -> Part:
    """The GPU tests in these files, and where these are all in every other file but the smoke tests'."""
    found = gpu_test_files(ROOT / "tests")
    if tuple(files) == TEST_FILES:
        found = [path for path in found if Path(path).name != SMOKE_FILE]
        found.sort(key=lambda path: (*files, Path(path).name).index(Path(path).name))
    else:
        found = [path for path in found if Path(path).name in files]
    reason = None
    if importlib.util.find_spec("pytest") is None:
        reason = "pytest is not installed"
    elif not found:
        reason = f"there are no tests with the mark gpu in {', '.join(files)}"
    command = (sys.executable, "-m", "pytest", "-m", marks, "-v", "-rfEs", "--color=no", "--tb=short")
    command += ("--durations=15", "-p", "no:cacheprovider", *found)
    # Tests that need much of the GPU's memory or its time to themselves have the mark alone.
    processes = 1
    if "not alone" in marks and importlib.util.find_spec("xdist") is not None:
        processes = min(TEST_PROCESSES, os.cpu_count() or 1)
        command += ("-n", str(processes), "--dist", "worksteal")
    evidence: Evidence = "tests or skips" if device == "cpu" else "tests"
    return Part(name, limit, floor, evidence, command, tuple(launches), processes=processes, reason=reason)


def gpu_test_files(folder: Path) -> list[str]:
    """The files that hold tests for a GPU: others may need packages that a GPU machine is without."""
    return sorted(
        str(path) for path in folder.rglob("test_*.py") if "mark.gpu" in path.read_text(encoding="utf-8")
    )


def with_compilations(chosen: Sequence[Part]) -> Iterator[Part]:
    """The parts, each behind the compilation of those of its launches that no earlier one has compiled.

    What is compiled beside a part may not be done when it ends: the rest is compiled where it belongs.
    """
    compiled: set[str] = set()
    for number, part in enumerate(chosen):
        names = [name for name in part.launches if name not in compiled]
        if names and part.reason is None:
            later = [name for other in chosen[number + 1 :] for name in other.launches if name not in compiled]
            names += [name for group in TOGETHER if group & set(names) for name in later if name in group]
            names = list(dict.fromkeys(names))
            compiled.update(names)
            yield compilation(names, part)
        launched = {name for other in chosen[number + 1 :] for name in other.launches} - compiled
        yield replace(part, beside=tuple(name for name in part.beside if name in launched))


def compilation(names: Sequence[str], before: Part) -> Part:
    """Compiles in as many processes as there are cores; what time leaves is compiled where it is launched."""
    limit = 90.0 if names[0] == "tests" else 60.0
    command = (*LDMPERF, "compile", "--for", ",".join(names))
    name, floor = f"compile-{before.name}", before.floor + COMPILATION_FLOOR
    return Part(name, limit, floor, "compilation", command, own_launches=tuple(names), takes_seconds=True)
