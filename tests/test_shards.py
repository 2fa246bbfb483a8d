"""Shards: which task measures what, dealt alike everywhere."""

import json
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldmperf.profiling import Case
from ldmperf.profiling.measure.folders import RunError
from ldmperf.profiling.measure.timing import RepetitionRule
from ldmperf.profiling.options import CaseError
from ldmperf.profiling.sweep.shards import _group, dealt, latest_of_shard, planned, shard_named, slurm_shard
from ldmperf.profiling.trajectory.presets import PRESETS, select_cases
from ldmperf.profiling.trajectory.runs import Run, Shard, create_run, open_run

CASES = st.lists(
    st.builds(
        Case,
        unet=st.sampled_from(["39M", "83M", "866M"]),
        steps=st.integers(1, 4),
        batch=st.integers(1, 3),
        device=st.sampled_from(["cpu", "cuda", "cuda:0", "cuda:3"]),
        backend=st.sampled_from(["torch", "diffusers", "graph"]),
    ),
    max_size=40,
)
SPARE = Case(unet="5B")


def comparison(case):
    """What cases share whose times are compared, spelled out here: all but the backend and the card's number."""
    return case.model_dump() | {"backend": None, "device": case.device.partition(":")[0]}


@given(CASES, st.integers(1, 9))
def test_shards_cover_each_group_once_and_whole(cases, count):
    shards = [dealt(cases, Shard(index=index, count=count)) for index in range(1, count + 1)]
    assert Counter(case for shard in shards for case in shard) == Counter(cases)
    groups = [{json.dumps(comparison(case)) for case in shard} for shard in shards]
    assert sum(map(len, groups)) == len(set().union(*groups)), "a group is in one shard"
    assert max(map(len, groups)) - min(map(len, groups)) <= 1
    for shard in shards:
        assert shard == [case for case in cases if case in shard], "in the order of the sweep"


@given(CASES, st.randoms(), st.integers(1, 5), st.data())
def test_the_order_of_cases_and_the_cards_number_do_not_matter(cases, random, count, data):
    shard = Shard(index=data.draw(st.integers(1, count)), count=count)
    other = [case.model_copy(update={"device": "cuda:7"}) if case.device != "cpu" else case for case in cases]
    random.shuffle(other)
    assert {json.dumps(comparison(case)) for case in dealt(cases, shard)} == {
        json.dumps(comparison(case)) for case in dealt(other, shard)
    }
    if cases:
        assert planned(shard, other).plan == planned(shard, cases).plan != planned(shard, [SPARE]).plan


def test_another_process_deals_the_same():
    """python's own hash() of a text depends on PYTHONHASHSEED."""
    code = """
from ldmperf.profiling.sweep.shards import dealt, planned, shard_named
from ldmperf.profiling.trajectory.presets import select_cases
cases = select_cases("family", {})
print(planned(shard_named("2/4"), cases), [case.key for case in dealt(cases, shard_named("2/4"))])
"""
    told = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(told) == 1


@pytest.mark.parametrize("preset", PRESETS)
def test_no_shard_of_a_preset_is_empty_while_there_are_groups(preset):
    cases = select_cases(preset, {})
    filled = sum(bool(dealt(cases, Shard(index=index, count=4))) for index in range(1, 5))
    assert filled == min(4, len(set(map(_group, cases))))


def test_the_dealing_is_pinned():
    """Shards of one array may run days apart: a new python or pydantic may not deal otherwise."""
    cases = select_cases("ladder", {})
    assert [{case.unet for case in dealt(cases, Shard(index=index, count=4))} for index in range(1, 5)] == [
        {"39M"},
        {"866M"},
        {"145M"},
        {"5B"},
    ]
    assert planned(Shard(index=1, count=4), cases) == Shard(index=1, count=4, plan="83553ba1ced64ddf", cases=64)


@pytest.mark.parametrize(("text", "said"), [("2/4", (2, 4)), ("1/1", (1, 1)), (" 3 / 12", (3, 12))])
def test_shards_count_from_one(text, said):
    shard = shard_named(text)
    assert (shard.index, shard.count) == said
    assert str(shard) == f"{said[0]}/{said[1]}"


@pytest.mark.parametrize(
    "text", ["0/4", "5/4", "1/0", "0/0", "", "2", "2/", "/4", "-1/4", "1/4/2", "a/b", "1.5/2", "١/٢"]
)
def test_what_is_no_shard_is_refused_in_one_line(text):
    with pytest.raises(CaseError, match=r"--shard: .*/n") as refused:
        shard_named(text)
    assert "\n" not in str(refused.value)


@given(st.integers(1, 50), st.integers(0, 9), st.integers(1, 5))
def test_a_slurm_array_is_numbered_from_anywhere_in_any_steps(count, first, step):
    """As Slurm numbers its tasks: MIN, MIN + STEP, ..., COUNT of them."""
    shards = [
        slurm_shard(
            {
                "SLURM_ARRAY_TASK_ID": str(task),
                "SLURM_ARRAY_TASK_COUNT": str(count),
                "SLURM_ARRAY_TASK_MIN": str(first),
                "SLURM_ARRAY_TASK_STEP": str(step),
            }
        )
        for task in range(first, first + count * step, step)
    ]
    assert [str(shard) for shard in shards] == [f"{index}/{count}" for index in range(1, count + 1)]


def test_outside_an_array_there_is_no_shard():
    assert slurm_shard({}) is None
    assert slurm_shard({"SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": ""}) is None
    # A side of `ldmperf compare --commits` that runs in a task.
    assert slurm_shard({"SLURM_ARRAY_TASK_ID": "1", "LDMPERF_TURNS": "socket"}) is None


@pytest.mark.parametrize(
    "changed",
    [
        {"SLURM_ARRAY_TASK_ID": "7"},
        {"SLURM_ARRAY_TASK_ID": "x"},
        {"SLURM_ARRAY_TASK_COUNT": ""},
        {"SLURM_ARRAY_TASK_COUNT": "0"},
        {"SLURM_ARRAY_TASK_MIN": "2"},
        {"SLURM_ARRAY_TASK_STEP": "0"},
        {"SLURM_ARRAY_TASK_STEP": "2", "SLURM_ARRAY_TASK_ID": "2"},
    ],
)
def test_an_array_that_does_not_say_the_place_is_refused(changed):
    told = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "1"} | changed
    with pytest.raises(CaseError, match="--shard"):
        slurm_shard(told)


@pytest.fixture
def environment(make_record):
    return make_record().environment


def begun(out, environment, shard=None):
    return create_run(out, [Case(unet="39M", steps=1)], RepetitionRule(), environment, shard=shard)


def test_runs_begun_in_the_same_second_have_folders_of_their_own(tmp_path, environment):
    """Of one shard too, as a job that is started again: making a folder is one step on a shared file system."""
    shards = [Shard(index=index, count=2, plan="p") for index in (1, 2)] * 8
    with ThreadPoolExecutor(16) as pool:
        folders = list(pool.map(lambda shard: begun(tmp_path, environment, shard), shards))
    assert len(set(folders)) == 16
    assert [open_run(folder).shard for folder in folders] == shards
    assert all(f"-{shard.index}of2" in folder.name for folder, shard in zip(folders, shards, strict=True))


def test_the_latest_run_of_a_shard_is_not_anothers(tmp_path, environment):
    mine = begun(tmp_path, environment, Shard(index=1, count=2, plan="p"))
    for other in (Shard(index=2, count=2), Shard(index=1, count=3), None):
        begun(tmp_path, environment, other)
    assert latest_of_shard(tmp_path, shard_named("1/2")) == mine
    with pytest.raises(RunError, match="no run of shard 3/3"):
        latest_of_shard(tmp_path, shard_named("3/3"))


def test_a_run_file_from_before_shards_is_read(tmp_path, environment):
    folder = begun(tmp_path, environment)
    fields = json.loads((folder / "run.json").read_text())
    assert fields.pop("shard") is None
    assert Run.model_validate_json(json.dumps(fields)).shard is None
