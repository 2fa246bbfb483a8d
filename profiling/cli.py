"""The command `ldmperf`. Errors are one line on stderr; exit code 2 for a wrong call, 1 for a failed run."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Annotated, cast

import typer

from .commands.claims_command import claims
from .commands.compare_command import compare
from .commands.compile_command import compile_ahead
from .commands.emulate_command import emulate
from .commands.env_command import env
from .commands.export_command import export
from .commands.inspect_command import inspect
from .commands.kernels_command import kernels
from .commands.merge_command import merge
from .commands.plan_command import plan
from .commands.profile_command import ResumeTakesAnOptionalValue, profile
from .commands.report_command import report
from .commands.sample_command import sample
from .commands.shared import stop
from .commands.trace_command import trace
from .measure.folders import RunError
from .options import CaseError
from .terminal.visible import console, prepare_streams, say

if TYPE_CHECKING:
    from .sweep.local import Workers

app = typer.Typer(
    help="What one sample of each latent-diffusion UNet size really costs in wall-clock time.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)

# click's ClickException, for which typer, which carries click inside, has no public name.
_WRONG_CALL = cast("type[typer.BadParameter]", typer.BadParameter.__mro__[2])
# The exit code that a shell reports for a program ended by SIGPIPE.
_READER_GONE = 141
# What a command that was interrupted and has not said so returns; those that say more exit by themselves.
_INTERRUPTED = 130


def _tell_version(asked: bool) -> None:
    if asked:
        from .measure.checkout import checkout

        commit, is_dirty = checkout()
        changed = " with uncommitted changes" if is_dirty else ""
        told = "" if commit is None else f" (commit {commit[:7]}{changed})"
        say(console(), f"ldmperf {metadata.version('ldmperf')}{told}")
        raise typer.Exit


# With a callback typer keeps `profile` a command of its own, however many others there are.
@app.callback()
def _every_command(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_tell_version, is_eager=True, help="Print the version and the commit."),
    ] = False,
) -> None:
    pass


# What measures, what reads records, what needs neither, what makes images.
app.command(cls=ResumeTakesAnOptionalValue)(profile)
app.command()(trace)
app.command()(kernels)
app.command()(report)
app.command()(claims)
app.command()(plan)
app.command()(compare)
app.command()(export)
app.command()(merge)
app.command()(inspect)
app.command()(emulate)
app.command("compile")(compile_ahead)
app.command()(env)
app.command()(sample)


def main(arguments: Sequence[str] | None = None, *, workers: Workers | None = None) -> None:
    """The entry point: runs the command with these arguments (sys.argv's by default) and exits.

    workers: who measures in place of the processes that `ldmperf profile` starts.
    """
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    prepare_streams()
    try:
        code = typer.main.get_command(app).main(
            args=given, prog_name="ldmperf", standalone_mode=False, obj=workers
        )
        # Flushed here, where a closed pipe is understood; at the end of the process python would report it.
        sys.stdout.flush()
    except _WRONG_CALL as wrong_call:
        command = "ldmperf" if wrong_call.ctx is None else wrong_call.ctx.command_path
        stop(f"{wrong_call.format_message().rstrip('.')}; see: {command} --help", 2)
    except (CaseError, RunError) as wrong_call:
        stop(str(wrong_call), 2)
    except KeyboardInterrupt:
        code = _INTERRUPTED
    except BrokenPipeError:
        code = _reader_gone()
    except OSError as failure:
        _drop_output()
        what = failure.filename or "the output"
        stop(f"cannot write {what} ({failure.strerror}); make room, or write elsewhere", 1)
    except SystemExit as stopped:
        # What click and rich raise where they meet a closed pipe.
        if not isinstance(stopped.__context__, BrokenPipeError):
            raise
        code = _reader_gone()
    if code == _INTERRUPTED:
        stop("stopped", _INTERRUPTED)
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
