"""The command `ldmperf profile`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from ..measure.folders import RunError, check_environment, locked
from ..measure.recorded import new_run_id
from ..measure.timing import Deadline, RepetitionRule
from ..options import CaseError
from ..report.reporting import ReportNotWritten, report_run
from ..rivals.decoding import check_decoders
from ..rivals.rival_selection import RIVAL_OPTIONS, cases_beside
from ..sweep.shards import check_shard, dealt, latest_of_shard, planned, shard_named, slurm_shard
from ..terminal.visible import console, counted
from ..trajectory.case import Case
from ..trajectory.case_options import OPTIONS, OPTIONS_ELSEWHERE, Choices
from ..trajectory.checkpoints import check_loadable, check_unchanged, identified
from ..trajectory.presets import PRESETS, check_devices, preset_named, usual_preset
from ..trajectory.records import RECORDS_NAME, RecordStore, record_schema
from ..trajectory.runs import create_run, find_run, open_run, resume_command
from .shared import (
    DEFAULT_OUT,
    exit_by,
    list_option,
    print_json,
    seconds_option,
    stop,
    tell,
    whole_option,
    with_options,
)

if TYPE_CHECKING:
    from ..sweep.local import Sweep, Workers


class ResumeTakesAnOptionalValue(TyperCommand):
    """`--resume` alone means the latest run; neither typer nor its options have optional values."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        spelled = []
        for position, argument in enumerate(args):
            spelled.append(argument)
            alone = position + 1 == len(args) or args[position + 1].startswith("-")
            if argument == "--resume" and alone:
                spelled.append("latest")
        return super().parse_args(ctx, spelled)


_LISTS = {**{name: option.help for name, option in OPTIONS.items()}, **RIVAL_OPTIONS}


@with_options("choices", {name: list_option(text) for name, text in _LISTS.items()})
def profile(
    context: typer.Context,
    choices: Choices,
    preset: Annotated[
        str | None,
        typer.Option(help=f"What is measured: {', '.join(PRESETS)}; cpu or gpu by the device unless told."),
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
    with_decoder: Annotated[
        bool,
        typer.Option("--with-decoder", help="Also time what makes images of the latents, and show its share."),
    ] = False,
    timeout: Annotated[
        float | None,
        seconds_option(
            "Give up a case whose process gives no sign of life for so long; half an hour or more unless told."
        ),
    ] = None,
    one_process: Annotated[
        bool,
        typer.Option(
            "--one-process",
            help="All groups in one process: one context, libraries loaded once; a group is no longer by itself.",
        ),
    ] = False,
    shard: Annotated[
        str | None,
        typer.Option(
            help="Measure a share of the groups: 2/4 is the second of four; in a Slurm array the task's own.",
            metavar="I/N",
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            help="Measure on a Ray cluster, each group on one GPU: auto, HOST:PORT of its head, or local.",
            metavar="ADDRESS",
        ),
    ] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of a record.")] = False,
) -> None:
    """Measure whole sampling trajectories, and write a run folder.

    A trajectory goes from noise to latents. The folder has the records, the page and its charts. Without options
    it takes the preset for this machine; options replace the preset's lists, and all combinations are measured.
    Cases that differ only in the backend have a process of their own, unless --one-process: if it crashes or
    hangs, the case in flight has failed, and the others go on. Ctrl-C lets the cases in flight finish; twice, it
    stops at once. Exit code 1 when a case ended as error, incorrect or impossible, none as ok, or no record was
    made in --seconds; oom and unsupported are data.

    \b
    Examples:
      ldmperf profile
      ldmperf profile --size 39M,866M --steps 4,20,50 --batch 1,8 --dtype bfloat16
      ldmperf profile --unet ./my-unet --sampler dpmpp_2m --steps 20
      ldmperf profile --unet ./my-sdxl,./my-other --latent 128x128 --tokens 77,154 --steps 20
      ldmperf profile --preset ladder --size 866M --dtype bfloat16,float16 --seconds 120
      ldmperf profile --size 39M,866M --rival gan,vae-decoder,masked-transformer --with-decoder
      ldmperf profile --task pipeline --size SD1.5 --backend pipe,pipe-rebuilt --latent 8x8 --steps 1
      ldmperf profile --preset family-all --shard 2/4
      ldmperf profile --resume
    """
    deadline = Deadline(seconds)
    if schema:
        others = (
            one_process or None,
            preset,
            resume,
            min_count,
            min_seconds,
            seconds,
            references,
            timeout,
            shard,
            ray,
        )
        if choices or with_decoder or out != DEFAULT_OUT or any(value is not None for value in others):
            raise CaseError("--schema prints the schema and measures nothing: give it alone")
        print_json(record_schema())
        return
    if references is not None and references.exists() and not references.is_dir():
        raise CaseError(f"--references: {references} is no folder; name one, new or old")
    if one_process and ray is not None:
        raise CaseError("--one-process: a cluster measures each group by itself; leave it out with --ray")
    if with_decoder:
        check_decoders()
    part = shard_named(shard) if shard is not None else slurm_shard(os.environ)
    if part is not None and shard is None:
        tell(f"shard {part} by the task's place in Slurm's array; --shard 1/1 measures all cases")
    if resume is None:
        cases, usual = _chosen(choices, preset, ray)
        if part is not None:
            whole, cases = cases, dealt(cases, part)
            if not cases:
                tell(f"shard {part} has nothing to measure: there are fewer groups than shards")
                return
            part = planned(part, whole)
    else:
        folder = find_run(out, resume) if part is None or resume != "latest" else latest_of_shard(out, part)
        cases, usual = _resumed(folder, choices, preset, ray)
        check_shard(folder, None if shard is None else part)
        if with_decoder and not open_run(folder).with_decoder:
            raise RunError(f"{folder} was begun without --with-decoder; start a new run without --resume")
    try:
        rule = RepetitionRule(
            usual.min_count if min_count is None else min_count,
            usual.min_seconds if min_seconds is None else min_seconds,
        )
    except ValueError as wrong:
        raise CaseError(str(wrong).replace("min_", "--min-")) from None
    if ray is not None:
        from ..sweep.cluster import connected

        # Before there is a folder: the cluster may not be there.
        context.with_resource(connected(ray))
    from ..sweep.local import Sweep, Workers

    workers = context.obj or Workers()
    environments = {
        device: workers.environment_of(device) for device in dict.fromkeys(case.device for case in cases)
    }
    here = environments[cases[0].device]
    if resume is None:
        try:
            folder = create_run(out, cases, rule, here, with_decoder, part, one_process)
        except OSError as failure:
            stop(f"cannot write to {out} ({failure.strerror}); choose another folder with --out", 1)
    run = open_run(folder)
    if resume is not None:
        check_environment(folder, run.environment, here, "run")
        check_unchanged(run.cases, tell)
    sweep = Sweep(
        cases=tuple(cases),
        rule=rule,
        run_id=run.run_id or new_run_id(),
        environments=environments,
        # Another machine may not reach the folder.
        references=references or (folder / "references" if ray is None else None),
        with_decoder=run.with_decoder,
        timeout=timeout,
        # Asked for at its start, or now.
        in_one_process=one_process or (run.one_process and ray is None),
    )
    _run(folder, sweep, deadline, workers, ray)


def _chosen(choices: Choices, preset: str | None, ray: str | None) -> tuple[list[Case], RepetitionRule]:
    """The cases of a new run, and how often the preset repeats them."""
    if ray is not None and preset is None and "device" not in choices:
        raise CaseError("--ray: other machines measure; give --preset, or --device cpu or cuda")
    name = preset or usual_preset(choices)
    options = OPTIONS if ray is None else OPTIONS_ELSEWHERE
    cases = cases_beside(name, choices, is_preset_given=preset is not None, options=options)
    if ray is None:
        check_devices(name, cases)
    check_loadable(cases)
    return identified(cases, tell), preset_named(name).rule


def _resumed(
    folder: Path, choices: Choices, preset: str | None, ray: str | None
) -> tuple[list[Case], RepetitionRule]:
    """The cases and the rule that the run began with; options may repeat the cases, not change them."""
    run = open_run(folder)
    if not run.cases:
        raise RunError(f"{folder} names no case to measure; start a new run without --resume")
    if choices or preset is not None:
        cases, _ = _chosen(choices, preset, ray)
        if run.shard is not None:
            cases = dealt(cases, run.shard)
        if set(cases) != set(run.cases):
            raise RunError(
                f"{folder} has other cases than these options name; give --resume without them, "
                "or start a new run without --resume"
            )
    return list(run.cases), run.rule


def _run(folder: Path, sweep: Sweep, deadline: Deadline, workers: Workers, ray: str | None) -> None:
    """Measures what the folder has no record of yet, then reports; exit codes as `profile` says."""
    from ..rivals.subjects import all_subjects
    from ..sweep.cluster import run_on_cluster
    from ..sweep.cluster_lines import ClusterLines
    from ..sweep.local import run_sweep
    from ..trajectory.progress import ProgressLines
    from ..trajectory.short_traces import timing_deadline

    go_on = f"go on with: {resume_command(folder)}"
    try:
        with locked(folder, tell):
            store = RecordStore(folder / RECORDS_NAME)
            # What was cut short is measured again.
            recorded = {record.case_key for record in store.load() if record.harness.stopped_by is None}
            left = [case for case in sweep.cases if case.key not in recorded]
            until = timing_deadline(sweep.cases, deadline)
            tell(f"{folder}: {counted(len(left), 'case')} to measure, {len(recorded)} recorded")
            progress = console(stderr=True), left, sweep.rule, until, all_subjects()
            if ray is None:
                with ProgressLines(*progress) as lines:
                    made, is_cut_short = run_sweep(sweep, store, lines, deadline, recorded, workers.executor)
            else:
                with ClusterLines(*progress) as lines:
                    made, is_cut_short = run_on_cluster(sweep, store, lines, deadline, recorded)
    except KeyboardInterrupt:
        is_cut_short = True
    except BrokenPipeError:
        raise
    except OSError as failure:
        stop(f"cannot write to {failure.filename or folder} ({failure.strerror}); then {go_on}", 1)
    if is_cut_short:
        kept = "what was measured is" if _has_any(folder / RECORDS_NAME) else "nothing was measured yet"
        stop(f"stopped; {kept} in {folder}; {go_on}", 130)
    try:
        records = report_run(folder).trajectories
    except ReportNotWritten as failure:
        stop(str(failure), 1)
    if left and not made:
        stop(f"no case was done within --seconds; give more, and {go_on}", 1)
    exit_by({record.status for record in records})


def _has_any(records: Path) -> bool:
    try:
        return records.stat().st_size > 0
    except OSError:
        return False
