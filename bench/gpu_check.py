"""The one command for a GPU machine: `make gpu-check`.

First whether all is right, as far as a minute tells, and the headline; then the GPU tests, the ladder, the family,
the kernels, tuning and the compiled peers. Every part is a process of its own with a limit; what it launches is
compiled ahead on all cores. Every record is on disk as it is made. A part that overruns is stopped and the next
begins; a signal stops what runs, and the table of what is there comes last. The check needs neither network nor
installation nor git.

    python bench/gpu_check.py --plan --minutes 9
    python bench/gpu_check.py --minutes 9 --archive check.txz
    python bench/gpu_check.py --minutes 9 --archive check.txz --from ladder
    python bench/gpu_check.py --minutes 9 --archive check.txz --only tune-linear,tune-attention,headline,ladder
    python bench/gpu_check.py --import check.txz

Exit code 1 where a part failed, or ended without a record; what time did not reach is named, and is no failure.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from check_archive import ArchiveError, import_archive, state_of, write_archive
from check_parts import NAMES, ROOT, Part, parts, with_compilations
from check_plan import plan_lines
from check_run import GRACE, Outcome, Stopped, environment, find_this_checkout, run_parts, stopped_part, tell

# For the summary and the last archive, at the end of the call.
CLOSING = 15.0


def print_summary(folder: Path, outcomes: Sequence[Outcome]) -> None:
    """The short table: the profiles, our kernels against their peers, and how each part went."""
    from ldmperf.profiling import load_records
    from ldmperf.profiling.figures import overview
    from ldmperf.profiling.kernel_bench.attention_table import attention_lines, attention_rows
    from ldmperf.profiling.kernel_bench.kernel_records import read_kernels
    from ldmperf.profiling.kernel_bench.table import conditions, summary_lines
    from ldmperf.profiling.report import print_table
    from ldmperf.profiling.terminal.visible import console, prepare_streams, say

    prepare_streams()
    out = console()

    for path in sorted(folder.glob("*/*/records.jsonl")):
        print_table(overview(load_records(path)[0]), out)
        say(out)
    for path in sorted(folder.glob("*/*/kernels.jsonl")):
        if measured := read_kernels(path)[0]:
            beside_the_best = attention_lines(attention_rows(measured))
            for line in (conditions(measured), *beside_the_best, *summary_lines(measured), ""):
                say(out, line)
    for line in outcome_lines(outcomes):
        say(out, line)
    left = [outcome.part.name for outcome in outcomes if not outcome.was_begun and outcome.ok]
    if left := [name for name in left if name in NAMES]:
        say(out, f"time did not reach: {', '.join(left)}; go on with: --only {','.join(left)}")
    say(out, str(folder))


def outcome_lines(outcomes: Sequence[Outcome]) -> list[str]:
    """A line for each part: its seconds, how it ended, its records by status."""
    lines = []
    for outcome in outcomes:
        counts = ", ".join(f"{count} {status}" for status, count in outcome.records.items())
        told = f"  [{counts}]" if counts else ""
        lines.append(f"{outcome.part.name:28} {outcome.seconds:4.0f} s  {outcome.text}{told}")
    return lines


def write_summary(folder: Path, device: str, outcomes: Sequence[Outcome]) -> None:
    """summary.json: how each part went so far, and by which command."""
    told = [
        {
            "part": outcome.part.name,
            "ok": outcome.ok,
            "text": outcome.text,
            "seconds": round(outcome.seconds, 1),
            "records": dict(outcome.records),
            "command": outcome.part.command,
        }
        for outcome in outcomes
    ]
    summary = {"device": device, "commit": os.environ.get("LDMPERF_COMMIT"), "parts": told}
    path, text = folder / "summary.json", json.dumps(summary, indent=1) + "\n"
    # One that says the same is left as it is, so that an archive need not be written again.
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def raise_stopped(number: int, _: object) -> None:
    raise Stopped(number)


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="gpu_check.py"
    )
    named = f"of {', '.join(NAMES)}"
    parser.add_argument("--only", help=f"Parts, comma separated, in this order, {named}.")
    parser.add_argument(
        "--from", dest="first", metavar="PART", help="The part to begin with; those before are left."
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="For the whole call: 9 unless told.")
    parser.add_argument("--plan", action="store_true", help="Print the parts and what they compile; run nothing.")
    parser.add_argument(
        "--archive", type=Path, metavar="FILE", help="Written again after each part: .txz, below 16 MiB."
    )
    parser.add_argument(
        "--import", dest="archives", type=Path, nargs="+", metavar="FILE", help="Lay archives into this checkout."
    )
    parser.add_argument(
        "--keep-going", action="store_true", help="Begin all parts after a failed smoke too, not the tests alone."
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda unless told; cpu rehearses what it can.")
    parser.add_argument("--out", type=Path, default=ROOT / "runs", help="Where the folder of this check goes.")
    parser.add_argument("--resume", type=Path, help="The folder of an earlier check, whose runs go on.")
    options = parser.parse_args(given)
    for option, names in (("--only", options.only), ("--from", options.first)):
        unknown = set((names or NAMES[0]).split(",")) - set(NAMES)
        if unknown:
            parser.error(f"{option}: no part {', '.join(sorted(unknown))}; choose {named}")
    if options.only and options.first:
        parser.error("--only and --from both choose parts; give one of them")
    return options


def chosen_parts(options: argparse.Namespace, device: str, folder: Path) -> list[Part]:
    """The parts that the options name, with their compilations on a GPU."""
    first = NAMES.index(options.first) if options.first else 0
    names = options.only.split(",") if options.only else NAMES[first:]
    known = {part.name: part for part in parts(device, folder)}
    chosen = [known[name] for name in names if name in known]
    if options.only and (left_out := [name for name in names if name not in known]):
        tell(f"not on a CPU: {', '.join(left_out)}")
    return chosen if device == "cpu" else list(with_compilations(chosen))


def main(given: Sequence[str] | None = None) -> int:
    began = time.monotonic()
    options = arguments(given)
    find_this_checkout()
    if options.archives:
        return import_archives(options.archives, options.out)
    if options.plan:
        chosen = chosen_parts(options, options.device or "cuda", options.out)
        print("\n".join(plan_lines(chosen, 60 * options.minutes - CLOSING, GRACE)))
        return 0
    return check(options, began)


def no_commit() -> str | None:
    """Why records could not name the commit that is measured; None where they can.

    A copy of a checkout may have come with a .git of before: records would name the commit of that.
    """
    from ldmperf.profiling.measure.checkout import checkout

    told = os.environ.get("LDMPERF_COMMIT", "").strip().lower()
    if not (ROOT / ".git").exists():
        if re.fullmatch("[0-9a-f]{7,40}", told):
            return None
        what = "set LDMPERF_COMMIT to what `git rev-parse HEAD` prints in the checkout it is from"
        return f"there is no .git here: {what}"
    head, _ = checkout()
    if told and head and not head.startswith(told):
        return f"LDMPERF_COMMIT is {told}, and .git here is at {head}: unset the one, or remove the other"
    return None


def ended(code: int, why: str) -> int:
    """The exit code, with the reason told."""
    tell(f"gpu_check.py: {why}")
    return code


def import_archives(paths: Sequence[Path], out: Path) -> int:
    from ldmperf.profiling.terminal.visible import console, prepare_streams, say

    prepare_streams()
    for path in paths:
        try:
            for line in import_archive(path, ROOT, out) or [f"{path}: nothing new"]:
                say(console(), line)
        except ArchiveError as wrong:
            return ended(2, str(wrong))
    return 0


def check(options: argparse.Namespace, began: float) -> int:
    """Runs the parts; the exit code."""
    device = options.device
    if device is None:
        import torch

        if not torch.cuda.is_available():
            return ended(2, f"no GPU is here (torch {torch.__version__}); rehearse the check with --device cpu")
        device = "cuda"
    if device == "cuda" and (why := no_commit()) is not None:
        return ended(2, why)
    folder = options.out.resolve() / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-gpu-check"
    if options.resume is not None:
        folder = options.resume.resolve()
        if not folder.is_dir():
            return ended(2, f"{options.resume} is no folder of a check; start a new one without --resume")
    try:
        folder.mkdir(parents=True, exist_ok=options.resume is not None)
    except OSError as failure:
        return ended(1, f"cannot write to {options.out} ({failure.strerror}); choose another folder with --out")
    chosen = chosen_parts(options, device, folder)
    tell(f"ptxas: {environment().get('TRITON_PTXAS_PATH')}; {device}; {folder}")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, raise_stopped)
    outcomes: list[Outcome] = []
    code = 0
    tuned = ROOT / "kernels" / "tuned"
    archived: object = None

    def keep() -> bool:
        """Writes the summary and the archive; False, with the reason told, where that fails."""
        nonlocal archived
        try:
            write_summary(folder, device, outcomes)
            if options.archive is not None and (state := state_of(folder, tuned)) != archived:
                for line in write_archive(options.archive, folder, tuned):
                    tell(line)
                archived = state
        except OSError as failure:
            tell(f"gpu_check.py: cannot write {failure.filename} ({failure.strerror}); records are in {folder}")
            return False
        return True

    if not keep():
        return 1
    try:
        seconds = 60 * options.minutes - CLOSING - (time.monotonic() - began)
        for outcome in run_parts(chosen, seconds, folder, options.keep_going):
            outcomes.append(outcome)
            if outcome.was_begun:
                keep()
    except Stopped as stopped:
        code = 128 + int(stopped.args[0])
        outcomes += [stopped_part(part, folder) for part in chosen[len(outcomes) :][:1]]
    if not keep():
        code = code or 1
    print_summary(folder, outcomes)
    was_begun = any(outcome.was_begun for outcome in outcomes)
    return code or int(not was_begun or not all(outcome.ok for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
