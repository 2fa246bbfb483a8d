"""The command `ldmperf compare`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..compare.metrics import COMPARED, USUAL
from ..options import CaseError, percentage
from ..terminal.visible import console, counted
from .shared import DEFAULT_OUT, AsJson, print_json, stop, tell, terminated_as_interrupted, whole_option

if TYPE_CHECKING:
    from ..compare.comparison import VerdictRule
    from ..compare.gate import Threshold
    from ..compare.metrics import Metric
    from ..compare.sets import RecordSet
    from ..compare.turns import Side

# Commands of ours that write records, and take --out.
_MEASURING = ("profile", "kernels")
# As many of either order; Student's t of five degrees of freedom makes the interval 1.05 standard deviations wide.
_ROUNDS = 6


def compare(
    what: Annotated[
        list[str] | None,
        typer.Argument(
            help="Two sets of records: run folders, folders of several runs, or files. With --commits the "
            "command to run, after --.",
            metavar="A B | -- COMMAND",
        ),
    ] = None,
    commits: Annotated[
        tuple[str, str] | None,
        typer.Option(
            help="Run COMMAND on both commits of the repository around the current folder, in turn, each in a "
            "worktree. Twice the same commit shows the noise.",
            metavar="A B",
        ),
    ] = None,
    rounds: Annotated[int | None, whole_option(f"Runs of each commit; {_ROUNDS} unless told.", 3, 999)] = None,
    whole_runs: Annotated[
        bool,
        typer.Option(
            "--whole-runs",
            help="Run each commit to its end before the other, for what does not fit into memory twice. Noisier.",
        ),
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Where the folder with the runs of both commits goes; runs unless told.")
    ] = None,
    fail_over: Annotated[
        list[str] | None,
        typer.Option(
            help="Exit code 1 where B is worse for certain, and perhaps by that much: wall_ms:5%. Repeat it or "
            "separate values by commas.",
            metavar="METRIC:PERCENT",
        ),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{', '.join(COMPARED)}; unless told {', '.join(USUAL)}, where there are values. Repeat it or "
            "separate values by commas.",
            metavar="LIST",
        ),
    ] = None,
    min_effect: Annotated[
        str, typer.Option(help="The least difference that counts; SAME is within it.", metavar="PERCENT")
    ] = "2%",
    noise: Annotated[
        str,
        typer.Option(help="What two runs of one commit differ by, where each side is one run.", metavar="PERCENT"),
    ] = "5%",
    force: Annotated[
        bool, typer.Option("--force", help="Compare across hardware, versions, settings and uncommitted changes.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compare two sets of records, or two commits, case by case.

    Each is SAME, FASTER, SLOWER or AMBIGUOUS, beside what noise explains. A run counts as one observation, since
    runs of one commit differ by more than the samples of one run. So name folders of several runs, or let
    --commits make them: each round runs both commits on this machine, each in a process of its own, which take
    their samples in turn. p-values are adjusted for the number of tests.

    COMMAND is `profile` or `kernels` with options, or any command that writes records to {out}. It runs in the
    worktree, so name what git does not track by absolute paths. In a checkout of ldmperf each side runs its own
    code.

    Exit code 1 past a threshold of --fail-over, and where a case that had a time in A fails in B; 2 where the sets
    are not to be compared.

    \b
    Examples:
      ldmperf compare runs/20261124T093000Z-1a84ffb runs/20261125T101500Z-2b95aac
      ldmperf compare before after --fail-over wall_ms:5%,peak_memory_bytes:1%
      ldmperf compare --commits HEAD~1 HEAD -- profile --size 39M --steps 4 --min-count 5
      ldmperf compare --commits HEAD HEAD --fail-over wall_ms:5% -- profile --size 39M --steps 4
      ldmperf compare --commits main my-branch -- python bench.py --records {out}
    """
    from ..compare.comparison import VerdictRule
    from ..compare.gate import thresholds_named
    from ..compare.metrics import metrics_named
    from ..compare.sets import read_set

    given = what or []
    thresholds = thresholds_named(fail_over or [])
    metrics = metrics_named(metric or [])
    metrics = tuple(dict.fromkeys((*metrics, *(threshold.metric for threshold in thresholds))))
    rule = VerdictRule(percentage("min-effect", min_effect), percentage("noise", noise))
    if commits is None:
        for option, value in (("rounds", rounds), ("out", out), ("whole-runs", whole_runs or None)):
            if value is not None:
                raise CaseError(f"--{option} is for --commits A B -- COMMAND; leave it out to compare records")
        if len(given) != 2:
            raise CaseError(
                f"compare two sets of records, not {len(given)}; name A and B, or give --commits A B -- COMMAND"
            )
        _compared(read_set(Path(given[0])), read_set(Path(given[1])), metrics, thresholds, rule, force, as_json)
        return
    a, b, hashes = _measured(commits, given, rounds or _ROUNDS, out or DEFAULT_OUT, whole_runs)
    # Measured side by side: what differs is of the commits, and is said.
    _compared(a, b, metrics, thresholds, rule, True, as_json, hashes)


def _compared(
    a: RecordSet,
    b: RecordSet,
    metrics: Sequence[Metric],
    thresholds: Sequence[Threshold],
    rule: VerdictRule,
    force: bool,
    json: bool,
    commits: tuple[str, str] | None = None,
) -> None:
    """Prints the comparison and the gate's answers; exit codes as `compare` says."""
    from ..compare.comparison import compare_sets
    from ..compare.comparison_json import as_json
    from ..compare.comparison_table import print_answers, print_comparison
    from ..compare.gate import answers
    from ..compare.sets import check_comparable

    unlike = check_comparable(a, b, force)
    for side in (a, b):
        if side.aside:
            tell(f"{side.path}: {counted(side.aside, 'line')} set aside; `ldmperf report` names them")
    found = compare_sets(a, b, metrics, rule)
    given = answers(found, thresholds, rule)
    if json:
        print_json(as_json(found, rule, given, commits, unlike))
    else:
        print_comparison(found, rule, console(), commits, unlike)
        print_answers(found, given, console())
    if found.broken or any(answer == "fails" for _, _, answer in given):
        raise typer.Exit(1)


def _measured(
    commits: tuple[str, str], command: Sequence[str], rounds: int, out: Path, whole_runs: bool
) -> tuple[RecordSet, RecordSet, tuple[str, str]]:
    """Both commits measured in turn, each in its worktree, which is gone afterwards; and the commits' hashes."""
    from ..compare.turns import RoundFailed, run_rounds
    from ..compare.worktrees import commit_named, git, repository_of, worktrees
    from ..measure.folders import folder_of_time
    from ..measure.recorded import utc_now

    spelled = _spelled(command)
    here = Path.cwd().resolve()
    repository = repository_of(here)
    hashes = commit_named(repository, commits[0]), commit_named(repository, commits[1])
    if git(repository, "status", "--porcelain", "--untracked-files=no"):
        tell(f"{repository} has uncommitted changes, which are in neither commit and are not measured")
    try:
        with terminated_as_interrupted(), worktrees(repository, hashes) as places:
            # Absolute: the runs are elsewhere.
            folder = folder_of_time(out, utc_now(), f"{hashes[0][:7]}-{hashes[1][:7]}-compare").resolve()
            sides = _sides(spelled, commits, hashes, places, here.relative_to(repository), folder)
            tell(f"{folder}: {counted(rounds, 'round')}")
            for side in sides:
                says = "its own ldmperf, as its records have to say" if side.commit else "the installed ldmperf"
                tell(f"{side.name}: in {side.place}, with {says}")
            try:
                a, b = run_rounds(sides, rounds, tell, whole_runs=whole_runs)
            except KeyboardInterrupt:
                tell(f"compare what there is with: ldmperf compare {folder / 'a'} {folder / 'b'}")
                raise
    except KeyboardInterrupt:
        stop("stopped; the worktrees are removed", 130)
    except RoundFailed as failed:
        stop(str(failed), failed.code)
    except OSError as failure:
        stop(
            f"cannot write to {failure.filename or out} ({failure.strerror}); choose another folder with --out", 1
        )
    return a, b, hashes


def _spelled(command: Sequence[str]) -> tuple[str, ...]:
    """The command as it is run, OUT in it where it takes the folder for its records. Raises CaseError."""
    from ..compare.turns import OUT

    words = tuple(command[1:] if command[:1] == ["ldmperf"] else command)
    if not words:
        raise CaseError("--commits: no command; name it after --, as in -- profile --size 39M")
    if words[0] in _MEASURING:
        # -P: the folder that it runs in is not searched for modules.
        return sys.executable, "-P", "-c", "from ldmperf.profiling.cli import main; main()", *words, "--out", OUT
    if any(OUT in word for word in words):
        return words
    raise CaseError(
        f"--commits: {words[0]!r} does not say where its records go; write {OUT} where it takes a folder, or name "
        "profile or kernels"
    )


def _sides(
    command: tuple[str, ...],
    names: Sequence[str],
    hashes: Sequence[str],
    places: Sequence[Path],
    below: Path,
    folder: Path,
) -> list[Side]:
    """The side of each commit; `below`: where in its worktree the command runs. Raises CaseError."""
    from ..compare.turns import Side
    from ..compare.worktrees import is_ours, outside_git, python_path

    ours = [is_ours(place) for place in places]
    if len(set(ours)) > 1:
        raise CaseError(
            f"--commits: {names[ours.index(False)]} has no .types/ldmperf, so its code cannot be run beside what "
            "is installed; name a later commit"
        )
    sides = []
    for letter, name, commit, place in zip("ab", names, hashes, places, strict=True):
        if not (place / below).is_dir():
            raise CaseError(f"--commits: {name} has no folder {below}; go to one that both commits have")
        variables = outside_git() | ({"PYTHONPATH": python_path(place)} if ours[0] else {})
        label = f"{letter.upper()} {commit[:7]} ({name})"
        own = commit if ours[0] else None
        sides.append(Side(label, command, folder / letter, place / below, variables, own))
    return sides
