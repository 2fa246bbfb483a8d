"""The command `ldmperf`. Errors are one line on stderr; exit code 2 for a wrong call, 1 for a failed run."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, NoReturn, cast

import typer
from typer.core import TyperCommand

from .cases import (
    BACKENDS,
    Case,
    CaseError,
    Choices,
    best_device,
    check_devices,
    device_named,
    preset_named,
    select_cases,
)
from .checkpoints import check_loadable, check_unchanged, identified
from .kernel_bench.cli import kernels
from .locked import locked
from .options import seconds_option, whole_option
from .records import RECORDS_NAME, RecordStore, record_schema
from .reporting import ReportNotWritten, report_path, report_run, resume_command
from .runs import RunError, check_resumable, create_run, find_run, open_run
from .static.ahead import compile_ahead
from .static.cli import inspect
from .timing import Deadline, RepetitionRule
from .visible import console, counted, prepare_streams, say

app = typer.Typer(
    help="What one sample of each latent-diffusion UNet size really costs in wall-clock time.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)

DEFAULT_OUT = Path("runs")
# click's ClickException, for which typer, which carries click inside, has no public name.
_WRONG_CALL = cast("type[typer.BadParameter]", typer.BadParameter.__mro__[2])
# The exit code that a shell reports for a program ended by SIGPIPE.
_READER_GONE = 141


def _tell_version(asked: bool) -> None:
    if asked:
        say(console(), f"ldmperf {metadata.version('ldmperf')}{_commit_of_checkout()}")
        raise typer.Exit


def _commit_of_checkout() -> str:
    from .environment import checkout

    commit, is_dirty = checkout()
    changed = " with uncommitted changes" if is_dirty else ""
    return "" if commit is None else f" (commit {commit[:7]}{changed})"


# With a callback typer keeps `profile` a command of its own, however many others there are.
@app.callback()
def _every_command(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_tell_version, is_eager=True, help="Print the version and the commit."),
    ] = False,
) -> None:
    pass


class _ResumeTakesAnOptionalValue(TyperCommand):
    """`--resume` alone means the latest run; neither typer nor its options have optional values."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        spelled = []
        for position, argument in enumerate(args):
            spelled.append(argument)
            alone = position + 1 == len(args) or args[position + 1].startswith("-")
            if argument == "--resume" and alone:
                spelled.append("latest")
        return super().parse_args(ctx, spelled)


def _list_option(text: str) -> Any:
    return typer.Option(help=f"{text} Repeat it or separate values by commas.", metavar="LIST")


@app.command(cls=_ResumeTakesAnOptionalValue)
def profile(
    size: Annotated[list[str] | None, _list_option("Sizes of the family: 39M ... 5B.")] = None,
    unet: Annotated[
        list[str] | None,
        typer.Option(help="A checkpoint: a diffusers folder or a .safetensors file. Repeat it.", metavar="PATH"),
    ] = None,
    sampler: Annotated[list[str] | None, _list_option("Samplers: ddim, ddpm, dpmpp_2m, ...")] = None,
    steps: Annotated[list[str] | None, _list_option("Sampling steps.")] = None,
    batch: Annotated[list[str] | None, _list_option("Images made at once.")] = None,
    guidance: Annotated[list[str] | None, _list_option("Guidance scales; 1 is without.")] = None,
    dtype: Annotated[list[str] | None, _list_option("float32, bfloat16, float16.")] = None,
    device: Annotated[list[str] | None, _list_option("cpu, cuda, cuda:N.")] = None,
    backend: Annotated[
        list[str] | None, _list_option(f"{', '.join(BACKENDS)}; torch and diffusers unless told.")
    ] = None,
    task: Annotated[list[str] | None, _list_option("t2i; sr: 8 input channels, without guidance.")] = None,
    latent: Annotated[
        list[str] | None,
        _list_option(
            "Latent sizes, height x width: 64x64 (unless told) is an image of 512x512, 128x128 of 1024x1024."
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="cpu, gpu, ladder, family or family-all: what is measured unless told; cpu or gpu by the device."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Where run folders go.")] = DEFAULT_OUT,
    resume: Annotated[
        str | None, typer.Option(help="Go on with a run folder that was stopped; alone, the latest in --out.")
    ] = None,
    min_count: Annotated[int | None, whole_option("Timed trajectories of each case, at least.")] = None,
    min_seconds: Annotated[float | None, seconds_option("Timed seconds of each case, at least.")] = None,
    seconds: Annotated[
        float | None,
        seconds_option(
            "Begin nothing after so long (on a GPU a fifth of it is for traces); --resume does the rest."
        ),
    ] = None,
    references: Annotated[
        Path | None,
        typer.Option(help="Where float32 references are kept and found; in the run folder unless told."),
    ] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of a record.")] = False,
) -> None:
    """Measure whole sampling trajectories, from noise to latents, and write a run folder with the report.

    Without options it takes the preset for this machine; options replace the preset's lists, and their product is
    measured. Exit code 1 when a case ended as error or incorrect, none as ok, or no record was made in --seconds;
    oom and unsupported are data.

    \b
    Examples:
      ldmperf profile
      ldmperf profile --size 39M,866M --steps 4,20,50 --batch 1,8 --dtype bfloat16
      ldmperf profile --unet ./my-unet --sampler dpmpp_2m --steps 20
      ldmperf profile --unet ./my-sdxl --latent 128x128 --steps 20
      ldmperf profile --preset ladder --size 866M --dtype bfloat16,float16 --seconds 120
      ldmperf profile --resume
    """
    deadline = Deadline(seconds)
    choices = Choices(
        **{
            name: tuple(values or ())
            for name, values in {
                "size": size,
                "unet": unet,
                "sampler": sampler,
                "steps": steps,
                "batch": batch,
                "guidance": guidance,
                "dtype": dtype,
                "device": device,
                "backend": backend,
                "task": task,
                "latent": latent,
            }.items()
        }
    )
    if schema:
        others = (preset, resume, min_count, min_seconds, seconds, references)
        if choices or out != DEFAULT_OUT or any(value is not None for value in others):
            raise CaseError("--schema prints the schema and measures nothing: give it alone")
        typer.echo(json.dumps(record_schema(), indent=2))
        return
    if references is not None and references.exists() and not references.is_dir():
        raise CaseError(f"--references: {references} is no folder; name one, new or old")
    if resume is None:
        cases, rule = _chosen(choices, preset, min_count, min_seconds)
        folder = _create(out, cases, rule)
    else:
        folder = find_run(out, resume)
        cases, rule = _resumed(folder, choices, preset, min_count, min_seconds)
    _run(folder, cases, rule, deadline, references or folder / "references")


@app.command()
def report(
    run: Annotated[
        str,
        typer.Argument(
            help="A run's folder, one of `ldmperf kernels`, or a file of records; without it the latest run.",
            metavar="[FOLDER | RECORDS.jsonl]",
        ),
    ] = "latest",
    out: Annotated[
        Path | None,
        typer.Option(
            help="Where the page is written; the folder itself unless told. Without FOLDER: where run folders are."
        ),
    ] = None,
) -> None:
    """Print the table of a run and write its report.html and charts anew; of kernels, the tables and kernels.md.

    Of a file of records only the tables are printed, unless --out says where the page goes. A line that is no
    whole record, or one of a later version, is set aside: the first 20 are named with number and reason, and the
    exit code is 1. A file without any record is a wrong call.

    \b
    Examples:
      ldmperf report
      ldmperf report runs/20261124T093000Z-1a84ffb
      ldmperf report bench/results/h200/2026-11-24-1a84ffb.jsonl --out page
    """
    try:
        if run == "latest":
            whole = report_path(find_run(out or DEFAULT_OUT, run), None)
        else:
            whole = report_path(Path(run), out)
    except ReportNotWritten as failure:
        _stop(str(failure), 1)
    if not whole:
        raise typer.Exit(1)


@app.command()
def env(
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:N; cuda where there is one.")] = None,
) -> None:
    """Print what is recorded of this machine, as JSON.

    \b
    Example:
      ldmperf env --device cpu
    """
    from .environment import collect_environment, device_state

    name = best_device() if device is None else device_named(device)
    state = device_state(name).model_dump(mode="json")
    typer.echo(json.dumps(collect_environment(name).model_dump(mode="json") | {"device_now": state}, indent=2))


app.command()(inspect)
app.command()(kernels)
app.command("compile")(compile_ahead)


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point: runs the command with these arguments (sys.argv's by default) and exits."""
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    prepare_streams()
    try:
        code = typer.main.get_command(app).main(args=given, prog_name="ldmperf", standalone_mode=False)
        # Flushed here, where a closed pipe is understood; at the end of the process python would report it.
        sys.stdout.flush()
    except _WRONG_CALL as wrong_call:
        command = "ldmperf" if wrong_call.ctx is None else wrong_call.ctx.command_path
        _stop(f"{wrong_call.format_message().rstrip('.')}; see: {command} --help", 2)
    except (CaseError, RunError) as wrong_call:
        _stop(str(wrong_call), 2)
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        code = _reader_gone()
    except OSError as failure:
        _drop_output()
        what = failure.filename or "the output"
        _stop(f"cannot write {what} ({failure.strerror}); make room, or write elsewhere", 1)
    except SystemExit as stopped:
        # What click and rich raise where they meet a closed pipe.
        if not isinstance(stopped.__context__, BrokenPipeError):
            raise
        code = _reader_gone()
    sys.exit(code or 0)


def _reader_gone() -> int:
    """The exit code where a reader had enough (`ldmperf report | head -1`), which is no failure to report."""
    _drop_output()
    return _READER_GONE


def _drop_output() -> None:
    """Discards what is buffered for a closed stream, so that python does not complain about it at its exit."""
    for stream in filter(None, (sys.__stdout__, sys.__stderr__)):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _stop(message: str, code: int) -> NoReturn:
    say(console(stderr=True), f"ldmperf: {message.strip()}")
    sys.exit(code)


def _chosen(
    choices: Choices, preset: str | None, min_count: int | None, min_seconds: float | None
) -> tuple[list[Case], RepetitionRule]:
    """The cases of a new run and how often they are repeated."""
    devices = ",".join(choices.device) or best_device()
    name = preset or ("gpu" if "cuda" in devices else "cpu")
    cases = select_cases(name, choices)
    check_devices(name, cases)
    check_loadable(cases)
    return identified(cases, _tell), _rule(preset_named(name).rule, min_count, min_seconds)


def _rule(rule: RepetitionRule, min_count: int | None, min_seconds: float | None) -> RepetitionRule:
    try:
        return RepetitionRule(
            rule.min_count if min_count is None else min_count,
            rule.min_seconds if min_seconds is None else min_seconds,
        )
    except ValueError as wrong:
        raise CaseError(str(wrong).replace("min_", "--min-")) from None


def _resumed(
    folder: Path, choices: Choices, preset: str | None, min_count: int | None, min_seconds: float | None
) -> tuple[list[Case], RepetitionRule]:
    """The cases and the rule that the run began with; options beside --resume may repeat them, not change them."""
    from .environment import collect_environment

    run = open_run(folder)
    if not run.cases:
        raise RunError(f"{folder} names no case to measure; start a new run without --resume")
    if choices or preset is not None:
        cases, _ = _chosen(choices, preset, min_count, min_seconds)
        if set(cases) != set(run.cases):
            raise RunError(
                f"{folder} has other cases than these options name; give --resume without them, "
                "or start a new run without --resume"
            )
    check_resumable(folder, run, collect_environment(run.cases[0].device))
    check_unchanged(run.cases, _tell)
    return list(run.cases), _rule(run.rule, min_count, min_seconds)


def _create(out: Path, cases: list[Case], rule: RepetitionRule) -> Path:
    from .environment import collect_environment

    try:
        return create_run(out, cases, rule, collect_environment(cases[0].device))
    except OSError as failure:
        _stop(f"cannot write to {out} ({failure.strerror}); choose another folder with --out", 1)


def _tell(line: str) -> None:
    say(console(stderr=True), line)


def _run(folder: Path, cases: list[Case], rule: RepetitionRule, deadline: Deadline, references: Path) -> None:
    """Measures what the folder has no record of yet, then reports; exit codes as `profile` says."""
    from .progress import ProgressLines
    from .runner import profile as measure
    from .short_traces import timing_deadline

    go_on = f"go on with: {resume_command(folder)}"
    try:
        with locked(folder, _tell):
            store = RecordStore(folder / RECORDS_NAME)
            # What was cut short is measured again.
            recorded = {record.case_key for record in store.load() if record.harness.stopped_by is None}
            left = [case for case in cases if case.key not in recorded]
            until = timing_deadline(cases, deadline)
            _tell(f"{folder}: {counted(len(left), 'case')} to measure, {len(recorded)} recorded")
            lines = ProgressLines(console(stderr=True), left, rule, until)
            with _terminated_as_interrupted(), lines:
                made = measure(
                    cases,
                    rule=rule,
                    store=store,
                    skip=recorded,
                    listener=lines,
                    deadline=deadline,
                    references=references,
                    run_id=open_run(folder).run_id,
                )
    except KeyboardInterrupt:
        _stop(f"stopped; what was measured is in {folder}; {go_on}", 130)
    except BrokenPipeError:
        raise
    except OSError as failure:
        _stop(f"cannot write to {failure.filename or folder} ({failure.strerror}); then {go_on}", 1)
    try:
        records, _ = report_run(folder)
    except ReportNotWritten as failure:
        _stop(str(failure), 1)
    if left and not made:
        _stop(f"no case was done within --seconds; give more, and {go_on}", 1)
    statuses = {record.status for record in records}
    if statuses & {"error", "incorrect"} or "ok" not in statuses:
        raise typer.Exit(1)


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM ends a profile as Ctrl-C does: it says where its records are."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:
        # Not the main thread: signals are somebody else's.
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
