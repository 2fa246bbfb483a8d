"""Shards of a sweep: its groups dealt to several machines, each of which deals for itself and alike.

A group is dealt whole. Its backends, whose times are compared, stay on one card.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..measure.folders import RunError
from ..measure.recorded import short_id
from ..measure.turn import TURNS_VARIABLE
from ..options import CaseError, device_kind, whole
from ..trajectory.case import Case
from ..trajectory.runs import RUN_NAME, Shard, open_run

# What Slurm tells a task of an array (sbatch, "OUTPUT ENVIRONMENT VARIABLES"). Lists of tasks may have no step.
_TASK, _COUNT, _FIRST, _STEP = (f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "COUNT", "MIN", "STEP"))


def shard_named(text: str) -> Shard:
    """The shard that "2/4" names, the second of four; CaseError for another text."""
    index, slash, count = text.partition("/")
    numbers = whole(index.strip()), whole(count.strip())
    if not slash or None in numbers:
        raise CaseError(f"--shard: {text!r} is no shard; give i/n, as in 2/4 for the second of four")
    if not numbers[1] or not 1 <= (numbers[0] or 0) <= numbers[1]:
        raise CaseError(f"--shard: there is no shard {text}; the shards of n are 1/n to n/n")
    return Shard(index=numbers[0] or 0, count=numbers[1])


def slurm_shard(variables: Mapping[str, str]) -> Shard | None:
    """The shard of a task of a Slurm array, by its place in the array; None outside an array.

    A side of a comparison measures all of its cases, wherever it runs. Raises CaseError where the array's numbers
    do not say the place, as in --array=1,2,7.
    """
    task = variables.get(_TASK)
    if not task or TURNS_VARIABLE in variables:
        return None
    number, count, first = whole(task), whole(variables.get(_COUNT, "")), whole(variables.get(_FIRST, ""))
    step = whole(variables.get(_STEP, "1"))
    if number is None or not count or first is None or not step:
        raise CaseError(f"{_TASK} is {task!r} without a usable {_COUNT}, {_FIRST} and {_STEP}; give --shard i/n")
    place, rest = divmod(number - first, step)
    if rest or not 0 <= place < count:
        raise CaseError(
            f"task {number} has no place among {count} from {first} on in steps of {step}; submit an array that "
            "is evenly spaced, as --array=1-4, or give --shard i/n"
        )
    return Shard(index=place + 1, count=count)


def dealt(cases: Iterable[Case], shard: Shard) -> list[Case]:
    """The cases of that shard, in their order: groups sorted by a hash, and dealt in turn as cards are.

    Counts of groups differ by at most one. Who deals has to have all cases of the sweep, with the digests of
    checkpoints; `planned` tells whether others had the same.
    """
    given = list(cases)
    order = sorted(dict.fromkeys(map(_group, given)), key=_digest)
    own = set(order[shard.index - 1 :: shard.count])
    return [case for case in given if _group(case) in own]


def planned(shard: Shard, cases: Sequence[Case]) -> Shard:
    """The shard as its run folder says it, with the plan: a digest of all cases of the sweep, in any order."""
    ids = {case.case_id for case in cases}
    return shard.model_copy(update={"plan": short_id({"cases": sorted(ids)}), "cases": len(ids)})


def latest_of_shard(out: Path, shard: Shard) -> Path:
    """The newest run folder of that shard in `out`: others' may be newer. Raises RunError where there is none."""
    runs = sorted((path.parent for path in out.glob(f"*/{RUN_NAME}")), reverse=True)
    for folder in runs:
        begun = open_run(folder).shard
        if begun is not None and (begun.index, begun.count) == (shard.index, shard.count):
            return folder
    raise RunError(f"there is no run of shard {shard} in {out}; start one without --resume")


def check_shard(folder: Path, asked: Shard | None) -> None:
    """Raises RunError where the folder's run is not of that shard; None is any."""
    begun = open_run(folder).shard
    if asked is not None and (begun is None or (begun.index, begun.count) != (asked.index, asked.count)):
        of = "all cases" if begun is None else f"shard {begun}"
        raise RunError(f"{folder} was begun for {of}, not shard {asked}; leave --shard out to go on with it")


def _group(case: Case) -> str:
    """All but the backend and the device's number, which another machine counts otherwise."""
    return case.model_copy(update={"device": device_kind(case.device)}).group_key


def _digest(text: str) -> str:
    # python's own hash of a text differs in each process.
    return hashlib.sha256(text.encode()).hexdigest()
