"""Write the blocks of docs/emulate.md: `make emulate-page`, or some of them with ARGS="--blocks faults,kinds".

Kinds and faults take seconds; operators and mutants a quarter of an hour and two processes. No GPU.
"""

import argparse
import multiprocessing
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

import torch
from emulated_faults import EDITS, WRITTEN, find_edited, find_written
from emulated_kernels import ARCHS, DTYPES, Row, jobs, run_job
from emulated_mutants import SUBJECTS, Noticed, Subject, summed, try_mutants
from markers import with_blocks

from ldmperf.kernels import OPERATORS
from ldmperf.profiling.emulator.findings import KINDS
from ldmperf.profiling.measure.store import write_whole

PAGE = Path(__file__).parents[1] / "docs" / "emulate.md"
WITH = f"Triton {version('triton')}, torch {version('torch').partition('+')[0]}"


def kinds_block(_: str) -> str:
    return "\n".join(
        ["| kind | what it means |", "|---|---|", *(f"| {kind} | {what} |" for kind, what in KINDS.items())]
    )


def faults_block(_: str) -> str:
    """Each fault's finding, as the command prints it."""
    torch.set_num_threads(1)
    shown = ["```console"]
    for kind, function in WRITTEN.items():
        shown += [f"$ ldmperf emulate examples/emulate/faults.py:{function}", f"FINDING {find_written(kind)}"]
    shown += ["```", "", f"And in compiled kernels of ldmperf that were edited ({WITH}, sm_90):", "", "```"]
    for edit in EDITS:
        shown += [f"{edit.words}, {edit.subject.name}:", f"FINDING {find_edited(edit)}"]
    return "\n".join([*shown, "```"])


def operators_block(_: str) -> str:
    return operators_table(run_all(run_job, jobs(OPERATORS, DTYPES, ARCHS)))


def operators_table(rows: Sequence[Row]) -> str:
    found = sum(len(row.findings) for row in rows)
    instructions = sum(row.instructions for row in rows)
    return "\n".join(
        [
            f"{WITH}. {sum(row.codes for row in rows)} codes, {instructions / 1e9:.1f} billion instructions of "
            f"threads, {found or 'no'} findings.",
            "",
            "| operator | dtype | arch | codes | launches | thread-instructions | relative RMS error "
            "| of its bound | findings |",
            "|---|---|---|---|---|---|---|---|---|",
            *map(_operator_line, rows),
        ]
    )


def _operator_line(row: Row) -> str:
    job = row.job
    return (
        f"| {job.operator} | {job.dtype} | {job.arch} | {row.codes} | {row.launches} "
        f"| {row.instructions / 1e6:,.1f} M | {row.rms:.1e} | {row.share:.2f} | {len(row.findings)} |"
    )


def _mutants_of(subject: Subject, arch: str) -> dict[str, Noticed]:
    torch.set_num_threads(1)
    return try_mutants(subject, arch)


def mutants_block(_: str) -> str:
    found = {arch: summed(run_all(_mutants_of, SUBJECTS, [arch] * len(SUBJECTS))) for arch in ARCHS}
    shown = [
        f"{WITH}.",
        "",
        "| taken away or weakened | arch | mutants | a finding | wrong numbers | not noticed |",
        "|---|---|---|---|---|---|",
    ]
    for arch, of_kind in found.items():
        for one in of_kind:
            if one.made:
                shown.append(
                    f"| {one.kind} | {arch} | {one.made} | {one.found} | {one.wrong} | {len(one.unnoticed)} |"
                )
        made = sum(one.made for one in of_kind)
        missed = sum(len(one.unnoticed) for one in of_kind)
        shown.append(f"| **all** | {arch} | {made} | | | {missed} |")
    return "\n".join(shown)


def run_all(run: Callable, *arguments: Sequence) -> list:
    """Results of calls in two processes, in order."""
    results = []
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        for result in pool.map(run, *arguments):
            print(result, flush=True)
            results.append(result)
    return results


BLOCKS: Mapping[str, Callable[[str], str]] = {
    "kinds": kinds_block,
    "faults": faults_block,
    "operators": operators_block,
    "mutants": mutants_block,
}


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", default=",".join(BLOCKS), help="which, with commas")
    chosen = parser.parse_args(arguments).blocks.split(",")
    if unknown := set(chosen) - BLOCKS.keys():
        raise SystemExit(f"no block {', '.join(unknown)}; there are {', '.join(BLOCKS)}")
    for name in chosen:
        # Before the page is read, which may be edited meanwhile.
        written = BLOCKS[name]("")
        page = with_blocks(PAGE.read_text(), {name: lambda _, text=written: text})
        write_whole(PAGE, page.encode())


if __name__ == "__main__":
    main(sys.argv[1:])
