"""What run folders set out to measure and have no record of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from ..measure.environment import Environment
from ..measure.folders import holds
from ..record_files import folders_at
from ..trajectory.records import RECORDS_NAME, Record
from ..trajectory.runs import RUN_NAME, Run, open_run


def runs_at(paths: Sequence[Path]) -> list[Run]:
    """What the run folders at these paths, and in folders there, set out to do. Raises RunError."""
    folders: list[Path] = []
    for path in paths:
        if path.name == RECORDS_NAME:
            folders.append(path.parent)
        elif path.is_dir():
            folders += folders_at(path)
    return [open_run(folder) for folder in dict.fromkeys(folders) if holds(folder, RUN_NAME)]


def unmeasured(runs: Iterable[Run], records: Iterable[Record]) -> list[str]:
    """The keys of planned cases without a record, of the run itself or of the same kind of machine."""
    of_run: dict[str | None, set[str]] = {}
    of_environment: dict[Environment, set[str]] = {}
    for record in records:
        of_run.setdefault(record.run_id, set()).add(record.case_id)
        of_environment.setdefault(record.environment, set()).add(record.case_id)
    missing: dict[str, None] = {}
    for run in runs:
        there = set() if run.run_id is None else set(of_run.get(run.run_id, ()))
        for environment, ids in of_environment.items():
            if not run.environment.differences(environment):
                there |= ids
        missing |= dict.fromkeys(case.key for case in run.cases if case.case_id not in there)
    return list(missing)


def missing_shards(runs: Iterable[Run]) -> list[str]:
    """A line for each sweep whose shards are not all there: which are, and how many cases the others have."""
    sweeps: dict[tuple[str, int, int], dict[int, int]] = {}
    for run in runs:
        if (shard := run.shard) is not None and shard.plan is not None and shard.cases is not None:
            sweeps.setdefault((shard.plan, shard.count, shard.cases), {})[shard.index] = len(run.cases)
    lines = []
    for (plan, count, cases), found in sorted(sweeps.items()):
        if left := cases - sum(found.values()):
            absent = ", ".join(str(index) for index in range(1, count + 1) if index not in found)
            lines.append(
                f"missing of sweep {plan[:7]}: shard {absent} of {count}, with {left} of its {cases} cases; "
                "measure it with the same options and --shard"
            )
    return lines
