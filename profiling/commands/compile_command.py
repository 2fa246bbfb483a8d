"""The command `ldmperf compile`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..options import CaseError, split_values
from ..terminal.visible import console, counted, say
from .shared import seconds_option, stop, whole_option

if TYPE_CHECKING:
    from ..ahead.precompile import Precompilation
    from ..ahead.work import Work

# Names of failures that are printed; the rest is counted.
_SHOWN = 10


def compile_ahead(
    work: Annotated[
        list[str],
        typer.Option(
            "--for",
            help="What is to start at once: smoke, ladder, family, drop-in, kernels, tests, "
            "tune:OPERATOR[+OPERATOR...][:SIZE[+SIZE...][:BATCH[+BATCH...]]]. Repeat it or separate by commas.",
            metavar="LIST",
        ),
    ],
    arch: Annotated[
        str | None,
        typer.Option(help="sm_80, sm_90 or gfx942; none has to be there. The GPU's here unless told, else sm_90."),
    ] = None,
    jobs: Annotated[int | None, whole_option("Processes; as many as cores unless told.", 1)] = None,
    seconds: Annotated[
        float | None, seconds_option("Begin nothing more after so long; the slowest come first.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Only count what there is to compile.")] = False,
) -> None:
    """Compile kernels ahead of a run, on all cores.

    They are in triton's own cache then, and a first run compiles nothing. It needs no GPU. Where one is, launches
    are those chosen for it, tuned ones included. The modules that launch kernels are compiled too where
    libcuda.so.1 is; elsewhere the first launch does that.

    The cache is TRITON_CACHE_DIR, or .triton/cache below home. It holds absolute paths and the key of this very
    build of triton: a copy is found only at the same path, by the same triton. Exit code 1 when a kernel does not
    compile; a tuner's candidate that does not compile is counted, and no failure.

    \b
    Examples:
      ldmperf compile --for ladder
      ldmperf compile --arch sm_90 --for family,kernels --jobs 8
      ldmperf compile --for tune:group_norm_silu+linear:866M:2
      ldmperf compile --for tests --plan
    """
    from ..static.compile import cache_folder, cache_refused, require_compiler

    require_compiler()
    from ..ahead.launch_sets import work_for
    from ..ahead.precompile import compile_work
    from ..ahead.work import chip_here
    from ..machines import MACHINES
    from ..terminal.counting import counting

    if arch is None:
        chip = chip_here()
        arch = "sm_90" if chip is None else chip.arch
    if arch not in MACHINES:
        raise CaseError(f"--arch: no architecture {arch!r}; choose from {', '.join(MACHINES)}")
    names = split_values(work)
    if not names:
        raise CaseError("--for: no work given; name some, as --for smoke (see --help)")
    errors, out = console(stderr=True), console()
    try:
        planned = work_for(names, MACHINES[arch], processes=jobs)
        say(out, counts(planned))
        if plan:
            return
        try:
            Path(cache_folder()).mkdir(parents=True, exist_ok=True)
        except OSError as failure:
            stop(cache_refused(failure), 1)
        with counting(errors, len(planned.stubs) + len(planned.launches), "compilations") as count:
            report = compile_work(
                planned, processes=jobs, seconds=seconds, told=lambda done: count(done.name.partition("[")[0])
            )
    except KeyboardInterrupt:
        stop("stopped; what was compiled is kept; go on with the same command", 130)
    for line in told(report):
        say(out, line)
    if report.failures:
        raise typer.Exit(1)


def counts(work: Work) -> str:
    """One line: how many kernels and launchers there are, and how many of them are to be compiled."""
    candidates = sum(kernel.candidate for kernel in work.launches)
    text = f"{counted(len(work.launches), 'kernel')} for {work.machine.arch}"
    text += f", {candidates} of them candidates of a tuner" if candidates else ""
    if work.no_stubs is None:
        stubs = counted(len(work.stubs), "module that launches", "modules that launch")
        return f"{text}; {stubs} them; {work.missing} to compile"
    left = f"modules that launch them are left to the first launch: {work.no_stubs}"
    return f"{text}; {work.missing} to compile; {left}"


def told(report: Precompilation) -> list[str]:
    """What was done, in lines."""
    from ..static.compile import cache_folder

    stubs = [report.count(status, stubs=True) for status in ("compiled", "there")]
    unfit = [one for one in report.done if one.candidate and one.status in ("failed", "unfit")]
    lines = [
        f"{counted(report.count('compiled'), 'kernel')} compiled, {report.count('there')} there before; "
        f"{counted(stubs[0], 'module')} compiled, {stubs[1]} there before; "
        f"{report.seconds:.0f} s; {cache_folder()}"
    ]
    if unfit:
        first = f"{unfit[0].name}: {unfit[0].message}"
        some = counted(len(unfit), "candidate")
        lines.append(f"{some} cannot be launched, which a tuner passes over; the first: {first}")
    if report.left:
        lines.append(f"{report.left} not begun in time; the same command goes on, or give more --seconds")
    lines += [f"failed: {one.name}: {one.message}" for one in report.failures[:_SHOWN]]
    if len(report.failures) > _SHOWN:
        lines.append(f"and {len(report.failures) - _SHOWN} more failed")
    return lines
