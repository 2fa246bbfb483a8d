"""Run folders: runs/<UTC time>-<commit>/ with run.json (what was to be measured, and where) and records.jsonl."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Self

from pydantic import AwareDatetime, Field, model_validator

from ..measure.environment import Environment
from ..measure.folders import RunError, holds, new_folder
from ..measure.recorded import SCHEMA_VERSION, RecordModel, SchemaVersion, new_run_id, utc_now
from ..measure.store import parsed, write_whole
from ..measure.timing import RepetitionRule
from .case import Case
from .records import RECORDS_NAME

RUN_NAME = "run.json"


class Shard(RecordModel):
    """One of `count` parts of a sweep, the first of which has index 1.

    `plan` is the same for all parts of one sweep, which has so many `cases` in all.
    """

    index: Annotated[int, Field(ge=1)]
    count: Annotated[int, Field(ge=1)]
    plan: Annotated[str | None, Field(min_length=1)] = None
    cases: Annotated[int | None, Field(ge=1)] = None

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if self.index > self.count:
            raise ValueError(f"there is no part {self.index} of {self.count}")
        return self

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


class Run(RecordModel):
    """What a run set out to do, and where: with it a killed run resumes without its options.

    `cases` have the paths of checkpoints and the digests of their weights; records have names alone. `run_id` is
    that of its records; null in version 1. `with_decoder`: whether records have the decoder's time.
    `one_process`: whether one process measures all groups of a device. `shard`: the part of a sweep that `cases`
    are; null where they are all of it.
    """

    schema_version: SchemaVersion = SCHEMA_VERSION
    run_id: Annotated[str | None, Field(min_length=1)] = None
    started_at: AwareDatetime
    cases: tuple[Case, ...]
    min_count: int
    min_seconds: float
    with_decoder: bool = False
    one_process: bool = False
    shard: Shard | None = None
    environment: Environment

    @property
    def rule(self) -> RepetitionRule:
        return RepetitionRule(self.min_count, self.min_seconds)


def create_run(
    out: Path,
    cases: Iterable[Case],
    rule: RepetitionRule,
    environment: Environment,
    with_decoder: bool = False,
    shard: Shard | None = None,
    one_process: bool = False,
) -> Path:
    """A new folder in `out` (made if need be), its run.json written. Raises OSError where it cannot be."""
    now = utc_now()
    run = Run(
        run_id=new_run_id(),
        started_at=now,
        cases=tuple(cases),
        min_count=rule.min_count,
        min_seconds=rule.min_seconds,
        with_decoder=with_decoder,
        one_process=one_process,
        shard=shard,
        environment=environment,
    )
    suffix = "" if shard is None else f"-{shard.index}of{shard.count}"
    folder = new_folder(out, now, environment, suffix)
    write_whole(folder / RUN_NAME, (run.model_dump_json(indent=2) + "\n").encode())
    return folder


def find_run(out: Path, name: str) -> Path:
    """The run folder of that path, or the newest in `out` for "latest". Raises RunError when there is none."""
    if name != "latest":
        folder = Path(name)
        if not holds(folder, RECORDS_NAME) and not holds(folder, RUN_NAME):
            raise RunError(f"{folder} is no run folder: it has no {RECORDS_NAME}; name one, or leave its name out")
        return folder
    # Names begin with the time, so the newest is the last; a name with a counter is after the one without.
    runs = sorted(path.parent for path in out.glob(f"*/{RUN_NAME}"))
    if not runs:
        raise RunError(f"there is no run in {out}; start one with: ldmperf profile --out {out}")
    return runs[-1]


def open_run(folder: Path) -> Run:
    """What the folder's run set out to do. Raises RunError when that cannot be read."""
    path = folder / RUN_NAME
    try:
        run = parsed(path.read_bytes(), Run)
    except OSError as failure:
        run = str(failure.strerror)
    if isinstance(run, str):
        raise RunError(f"{path} cannot be read ({run}); start a new run without --resume")
    return run


def resume_command(folder: Path) -> str:
    """The command that goes on with a run."""
    return f"ldmperf profile --resume {shlex.quote(str(folder))}"
