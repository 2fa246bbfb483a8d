"""What the commands share: kinds of options, and how a command tells and stops."""

from __future__ import annotations

import functools
import inspect
import json
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from ..measure.gpu_lock import waits_for_gpu
from ..options import real, whole_within
from ..terminal.visible import console, say

if TYPE_CHECKING:
    from ..record_files import Gathered
    from ..trajectory.records import Record

DEFAULT_OUT = Path("runs")
# What a command reads records from, all together.
RecordPaths = Annotated[
    list[Path] | None,
    typer.Argument(
        help="Run folders and files of records, of every schema version; without any the latest run.",
        metavar="FOLDER | RECORDS.jsonl",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def with_options(place: str, options: Mapping[str, Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command these options (by name, their types as typer takes them) where its parameter `place` stands.

    That parameter gets the values of the options that were given, by name.
    """

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def called(**given: Any) -> None:
            values = {name: given.pop(name.replace("-", "_")) for name in options}
            command(**given, **{place: {name: value for name, value in values.items() if value is not None}})

        kind = inspect.Parameter.KEYWORD_ONLY
        parameters = []
        for parameter in inspect.signature(command, eval_str=True).parameters.values():
            if parameter.name != place:
                parameters.append(parameter.replace(kind=kind))
                continue
            for name, option in options.items():
                spelled = name.replace("-", "_")
                parameters.append(inspect.Parameter(spelled, kind, default=None, annotation=option))
        # What typer reads.
        called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return called

    return decorated


def list_option(text: str) -> Any:
    """The type of an option that takes a list of values; `text` is its help."""
    option = typer.Option(help=f"{text} Repeat it or separate values by commas.", metavar="LIST")
    return Annotated[list[str] | None, option]


def whole_option(text: str, least: int = 0, most: int | None = None) -> Any:
    """An option that takes a whole number from `least` to `most`; `text` is its help."""

    def parse(given: object) -> int:
        # A default comes as the number that it is.
        try:
            return whole_within(str(given), least, most)
        except ValueError as wrong:
            raise typer.BadParameter(str(wrong)) from None

    return typer.Option(help=text, parser=parse, metavar="NUMBER")


def seconds_option(text: str) -> Any:
    """An option that takes seconds, of at least 0; `text` is its help."""

    def parse(given: object) -> float:
        # A default comes as the number that it is.
        value = real(str(given))
        if not value >= 0:
            raise typer.BadParameter(f"{given!r} is not a number of seconds of at least 0")
        return value

    return typer.Option(help=text, parser=parse, metavar="NUMBER")


def gathered(paths: Sequence[Path] | None) -> Gathered:
    """The records at those paths, or of the latest run; lines that are none are named on stderr.

    Raises RunError where there are no records.
    """
    from ..record_files import gather
    from ..report.reporting import tell_aside
    from ..trajectory.runs import find_run

    found = gather(paths or [find_run(DEFAULT_OUT, "latest")])
    tell_aside(found.aside)
    return found


def given_records(paths: Sequence[Path] | None) -> tuple[list[Record], bool]:
    """The trajectories of `gathered`, and whether each line of their files is a record.

    Raises RunError where there are none.
    """
    from ..measure.folders import RunError

    found = gathered(paths)
    if not found.trajectories:
        where = paths[0] if paths else "the latest run"
        raise RunError(f"{where}: no record of a trajectory in it; give records of ldmperf profile")
    return list(found.trajectories), not found.aside.in_file


def tell(line: str, style: str = "") -> None:
    """A line on stderr."""
    say(console(stderr=True), line, style)


def print_json(value: object) -> None:
    """Prints a value as JSON, which has no NaN."""
    typer.echo(json.dumps(value, indent=2, allow_nan=False))


def stop(message: str, code: int) -> NoReturn:
    """Ends the process with that exit code, the message its last line on stderr."""
    tell(f"ldmperf: {message.strip()}")
    sys.exit(code)


def exit_by(statuses: Collection[str]) -> None:
    """Exit code 1 where something ended as error, incorrect or impossible, or nothing as ok."""
    from ..measure.recorded import FAILED

    if not set(FAILED).isdisjoint(statuses) or "ok" not in statuses:
        raise typer.Exit(1)


@contextmanager
def alone_on_gpu(device: str) -> Iterator[None]:
    """Holds the GPU of that device inside; a line says for whom it is waited before."""
    from ..measure.gpu_lock import held_gpu

    with held_gpu(device, lambda holder: tell(waits_for_gpu(holder))):
        yield


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
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
