"""Merging: each case once for each kind of machine, in lines as they were written, whatever the order."""

import json
from collections import Counter
from datetime import UTC, datetime, timedelta
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ldmperf.profiling import Case, Record
from ldmperf.profiling.compare import merging
from ldmperf.profiling.compare.merging import machine_folder, merged, read_written, write_merged
from ldmperf.profiling.compare.unmeasured import missing_shards, runs_at, unmeasured
from ldmperf.profiling.figures.derived import overview
from ldmperf.profiling.kernel_bench.table import by_conditions
from ldmperf.profiling.measure.environment import Environment, Gpu
from ldmperf.profiling.measure.timing import RepetitionRule
from ldmperf.profiling.record_files import gather
from ldmperf.profiling.sweep.shards import dealt, planned
from ldmperf.profiling.trajectory.record_parts import Energy, Harness
from ldmperf.profiling.trajectory.runs import Shard, create_run

ROOT = Path(__file__).parents[1]
COMMITTED = sorted((ROOT / "bench" / "results").glob("*/*.jsonl"))
START = datetime(2026, 11, 26, 23, 59, 58, tzinfo=UTC)
COMMIT = "7d35813a1b2c3d4e5f60718293a4b5c6d7e8f901"
H200 = Gpu(name="NVIDIA H200", count=1, driver="570.1")
ENVIRONMENTS = [
    Environment(
        os="Linux", python="3.11", cpu=cpu, usable_cores=cores, git_commit=COMMIT, gpu=gpu, machine_id=host
    )
    for cpu, cores, gpu, host in (
        ("Intel(R) Xeon(R) Processor @ 2.20GHz", 2, None, "a"),
        ("Intel(R) Xeon(R) Processor @ 2.20GHz", 4, None, "b"),
        ("AMD EPYC", 2, H200, "c"),
        ("AMD EPYC", 2, H200, "d"),
        ("AMD EPYC", 2, H200.model_copy(update={"driver": "580.2"}), "e"),
    )
]
# What `machine_folder` and the numbering make of them, by the place of the environment in the list.
KINDS = {0: "cpu", 1: "cpu", 2: "570", 3: "570", 4: "580"}


@st.composite
def trajectories(draw, make_record):
    """A record, and perhaps the same again with its energy: few cases, times and machines, so that they meet."""
    gpu = draw(st.sampled_from(["cuda", "cuda:1"]))
    environment = draw(st.sampled_from(ENVIRONMENTS))
    case = Case(
        unet="39M",
        steps=draw(st.integers(1, 2)),
        backend=draw(st.sampled_from(["torch", "diffusers"])),
        device="cpu" if environment.gpu is None else gpu,
    )
    record = make_record(
        case,
        status=draw(st.sampled_from(["ok", "ok", "error", "oom"])),
        environment=environment,
        harness=Harness(
            min_count=1,
            min_seconds=0.0,
            warmup_count=0,
            interleaved=draw(st.sampled_from([("torch",), ("torch", "diffusers")])),
        ),
        started_at=START + timedelta(seconds=draw(st.integers(0, 3))),
        run_id=draw(st.sampled_from(["r", "s"])),
    )
    again = [record.model_copy(update={"energy": Energy(message="no NVML")})] if draw(st.booleans()) else []
    return [record, *again]


def others(make_kernel, make_inspection):
    return st.builds(
        lambda make, number, environment, when: [make(number, environment=environment, started_at=when)],
        st.sampled_from([make_kernel, make_inspection]),
        st.sampled_from([16, 32]),
        st.sampled_from(ENVIRONMENTS),
        st.sampled_from([START, START + timedelta(seconds=9)]),
    )


def written(tmp_path_factory, files):
    """The files of those lines, in a new folder, and what is read from them."""
    folder = tmp_path_factory.mktemp("written")
    paths = [folder / f"{place}.jsonl" for place in range(len(files))]
    for path, lines in zip(paths, files, strict=True):
        path.write_text("".join(line + "\n" for line in lines))
    return paths, read_written(paths)[0]


def contents(merge):
    return {file.path: file.content for file in merge.files}


def kind_of_machine(record):
    return KINDS[ENVIRONMENTS.index(record.environment)], type(record)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_nothing_is_lost_but_repeats_and_merging_again_changes_nothing(
    tmp_path_factory, make_record, make_kernel, make_inspection, data
):
    lines_of_a_case = trajectories(make_record) | others(make_kernel, make_inspection)
    drawn = data.draw(st.lists(lines_of_a_case, min_size=1, max_size=14))
    records = list(chain.from_iterable(drawn))
    lines = [record.model_dump_json() for record in records]
    # Some lines are in several files, or twice in one.
    more = data.draw(st.lists(st.lists(st.sampled_from(lines), min_size=1), max_size=2))
    files = [lines, *more]
    _, read = written(tmp_path_factory, files)
    merge = merged(read)
    found = [line.decode() for file in merge.files for line in file.content.splitlines()]
    assert set(found) <= set(lines), "lines are as they were written"
    by_line = dict(zip(lines, records, strict=True))
    kept = [by_line[line] for line in found]
    # Each case once for each kind of machine, and each that there was.
    cases = Counter((kind_of_machine(record), record.case_id) for record in kept)
    assert set(cases.values()) == {1}
    assert cases.keys() == {(kind_of_machine(record), record.case_id) for record in records}
    repeats = merge.repeats
    assert len(found) + repeats.same + repeats.completed + repeats.superseded == sum(map(len, files))
    assert repeats.same == sum(map(len, files)) - len(set(lines))

    # The order of files and of lines does not matter.
    other = data.draw(st.permutations(files).map(lambda order: [sorted(lines) for lines in order]))
    assert contents(merged(written(tmp_path_factory, other)[1])) == contents(merge)

    out = tmp_path_factory.mktemp("out")
    again = merged(read_written(write_merged(out, merge))[0])
    assert contents(again) == contents(merge)
    assert again.repeats == merging.Repeats()
    write_merged(out, again)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_record_kept_is_the_one_that_a_report_of_one_machine_shows(tmp_path_factory, make_record, data):
    drawn = list(chain.from_iterable(data.draw(st.lists(trajectories(make_record), min_size=1, max_size=12))))
    one = [
        record for record in drawn if record.environment == drawn[0].environment and record.case.device != "cuda:1"
    ]
    if not one:
        return
    (path,), read = written(tmp_path_factory, [[record.model_dump_json() for record in one]])
    kept = {each.record for file in merged(read).files for each in file.written}
    shown = {row.record for row in overview(gather([path]).trajectories).all_rows}
    assert kept == shown


def test_each_kind_of_machine_and_of_records_has_a_file_and_says_what_sets_it_apart(
    tmp_path_factory, make_record, make_kernel, make_inspection
):
    records = [
        *(
            make_record(Case(unet="39M", steps=n), environment=e, started_at=START)
            for n, e in enumerate(ENVIRONMENTS, 1)
        ),
        make_kernel(environment=ENVIRONMENTS[0], started_at=START + timedelta(seconds=9)),
        make_inspection(environment=ENVIRONMENTS[0], started_at=START),
    ]
    merge = merged(written(tmp_path_factory, [[record.model_dump_json() for record in records]])[1])
    assert {str(file.path): len(file.written) for file in merge.files} == {
        "cpu-intel-xeon-2-cores/2026-11-26-7d35813.jsonl": 2,
        # By the time of its first record, in UTC.
        "cpu-intel-xeon-2-cores/2026-11-27-7d35813-kernels.jsonl": 1,
        "cpu-intel-xeon-2-cores/2026-11-26-7d35813-inspections.jsonl": 1,
        "nvidia-h200/2026-11-26-7d35813.jsonl": 2,
        "nvidia-h200-2/2026-11-26-7d35813.jsonl": 1,
    }
    assert merge.differences == ["nvidia-h200-2 is apart from nvidia-h200: gpu.driver: 570.1, 580.2"]


def test_of_a_kernel_measured_twice_the_time_stays_that_a_report_shows(tmp_path_factory, make_kernel):
    later = START + timedelta(seconds=9)
    timed = make_kernel(environment=ENVIRONMENTS[0], started_at=START)
    nothing = {"ms": None, "clock": None, "calls_per_sample": None, "input_sets": None, "l2": None}
    for status, kept in (("oom", timed), ("incorrect", None)):
        again = timed.model_copy(
            update=nothing | {"started_at": later, "status": status, "message": "why", "correctness": None}
        )
        lines = [[record.model_dump_json() for record in (again, timed)]]
        (file,) = merged(written(tmp_path_factory, lines)[1]).files
        ((shown,),) = by_conditions([again, timed])
        assert file.written[0].record == shown == (kept or again)


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_committed_set_merges_into_the_file_that_it_is(path):
    (file,) = merged(read_written([path])[0]).files
    assert file.path == path.relative_to(ROOT / "bench" / "results")
    assert sorted(file.content.splitlines()) == sorted(path.read_bytes().splitlines())


@pytest.mark.parametrize(
    ("cpu", "name"),
    [
        ("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "cpu-intel-xeon-platinum-8481c-2-cores"),
        ("AMD EPYC 9654 96-Core Processor", "cpu-amd-epyc-9654-96-core-2-cores"),
        ("../../etc", "cpu-etc-2-cores"),
        ("\x1b[31m/", "cpu-31m-2-cores"),
        (None, "cpu-unknown-2-cores"),
    ],
)
def test_the_name_of_a_machine_is_a_folders(cpu, name):
    assert machine_folder([Environment(os="Linux", python="3", cpu=cpu, usable_cores=2)]) == name
    gpu = Gpu(name=cpu or "", count=1)
    assert "/" not in machine_folder([Environment(os="Linux", python="3", gpu=gpu)])


def with_environment(record, **changes):
    return record.model_copy(update={"environment": record.environment.model_copy(update=changes)})


def save(path, *records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(record.model_dump_json() + "\n" for record in records))
    return path


def test_several_commits_are_refused_in_one_line_that_names_them(tmp_path, make_record, run):
    record = make_record()
    save(tmp_path / "a" / "records.jsonl", record)
    save(tmp_path / "b" / "records.jsonl", with_environment(record, git_commit="0" * 40))
    refused = run("merge", tmp_path, "--out", tmp_path / "out")
    assert refused.code == 2
    assert refused.err.count("\n") == 1
    assert f"7d35813 ({tmp_path / 'a' / 'records.jsonl'})" in refused.err
    assert f"0000000 ({tmp_path / 'b' / 'records.jsonl'})" in refused.err
    assert not (tmp_path / "out").exists()


def test_a_dirty_checkout_is_refused(tmp_path, make_record, run):
    path = save(tmp_path / "records.jsonl", with_environment(make_record(), git_dirty=True))
    refused = run("merge", path, "--out", tmp_path / "out")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert str(path) in refused.err
    assert "uncommitted changes" in refused.err
    assert not (tmp_path / "out").exists()


def test_a_file_with_other_records_is_never_overwritten(tmp_path, make_record, run):
    first, more = make_record(), make_record(Case(unet="83M"))
    path = save(tmp_path / "records.jsonl", first)
    done = run("merge", path, "--out", tmp_path / "out")
    assert done.code == 0
    (file,) = (tmp_path / "out").glob("*/*.jsonl")
    assert done.out == f"{file}: 1 record\n"
    assert run("merge", path, file, "--out", tmp_path / "out").code == 0, "the same content is no harm"
    save(path, first, more)
    refused = run("merge", path, "--out", tmp_path / "out")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert str(file) in refused.err
    assert file.read_bytes() == first.model_dump_json().encode() + b"\n"


def test_where_one_file_cannot_be_written_none_is(tmp_path, make_record, run, monkeypatch):
    records = [make_record(environment=environment) for environment in ENVIRONMENTS]
    path = save(tmp_path / "records.jsonl", *records)
    write = merging.write_whole
    seen = []

    def full(path, content):
        seen.append(path)
        if len(seen) == 3:
            raise OSError(28, "No space left on device", str(path))
        write(path, content)

    monkeypatch.setattr(merging, "write_whole", full)
    failed = run("merge", path, "--out", tmp_path / "out")
    assert failed.code == 1
    assert "No space left on device" in failed.err
    assert len(seen) == 3
    assert not list((tmp_path / "out").glob("*/*"))


def test_lines_that_are_no_records_are_named_and_the_rest_is_merged(tmp_path, make_record, run):
    path = save(tmp_path / "records.jsonl", make_record())
    path.write_text(path.read_text() + '{"torn": \n')
    told = run("merge", path, "--out", tmp_path / "out")
    assert told.code == 1
    assert f"{path}:2: " in told.err
    assert ": 1 record\n" in told.out


def test_what_is_left_out_is_counted_by_its_reason(tmp_path, make_record, run):
    record = make_record()
    with_energy = record.model_copy(update={"energy": Energy(message="no NVML")})
    later = with_energy.model_copy(update={"started_at": with_energy.started_at + timedelta(hours=1)})
    save(tmp_path / "a" / "records.jsonl", record, with_energy)
    save(tmp_path / "b" / "records.jsonl", with_energy, later)
    told = run("merge", tmp_path, "--out", tmp_path / "out")
    assert told.code == 0
    assert told.err.splitlines() == [
        "left out: 1 record the same as another",
        "left out: 1 record written again with energy or trace",
        "left out: 1 record of a case measured again on the same kind of machine",
    ]
    (file,) = (tmp_path / "out").glob("*/*.jsonl")
    assert file.read_text() == later.model_dump_json() + "\n"


def test_planned_cases_without_a_record_and_shards_that_are_not_there_are_named(tmp_path, make_record, run):
    cases = [
        Case(unet="39M", steps=steps, backend=backend) for steps in (1, 2, 3) for backend in ("torch", "graph")
    ]
    environment = make_record().environment
    for index in (1, 3):
        shard = Shard(index=index, count=3)
        own = dealt(cases, shard)
        folder = create_run(tmp_path / "runs", own, RepetitionRule(), environment, shard=planned(shard, cases))
        save(folder / "records.jsonl", make_record(own[0], environment=environment))
    told = run("merge", tmp_path / "runs", "--out", tmp_path / "out")
    assert told.code == 1
    assert len(list((tmp_path / "out").glob("*/*.jsonl"))) == 1
    runs = runs_at([tmp_path / "runs"])
    plan = runs[0].shard.plan
    assert f"missing of sweep {plan[:7]}: shard 2 of 3, with 2 of its 6 cases" in told.err
    assert "without a record: 2 planned cases; go on with: ldmperf profile --resume FOLDER\n" in told.err
    missing = {case.key for index in (1, 3) for case in dealt(cases, Shard(index=index, count=3))[1:]}
    assert {line.strip() for line in told.err.splitlines() if line.startswith("  ")} == missing
    # A record of another machine of that kind will do; one of another kind will not.
    others = [make_record(case, environment=environment, run_id="other") for case in cases]
    assert unmeasured(runs, others) == []
    assert len(unmeasured(runs, [with_environment(record, cpu="another") for record in others])) == 4


def test_all_shards_there_is_nothing_to_say(make_record, tmp_path):
    """More shards than groups, of which some had nothing to measure and left no folder."""
    cases = [Case(unet="39M", steps=steps) for steps in (1, 2)]
    for index in range(1, 5):
        shard = Shard(index=index, count=4)
        if own := dealt(cases, shard):
            create_run(tmp_path, own, RepetitionRule(), make_record().environment, shard=planned(shard, cases))
    assert missing_shards(runs_at([tmp_path])) == []


def test_a_line_of_an_older_version_stays_as_it_was(tmp_path, make_record):
    fields = json.loads(make_record().model_dump_json()) | {"schema_version": 1}
    line = json.dumps(fields | {"of a later writer": 1}, indent=None)
    path = tmp_path / "records.jsonl"
    path.write_text(line + "\n")
    (file,) = merged(read_written([path])[0]).files
    assert file.content == (line + "\n").encode()
    assert isinstance(file.written[0].record, Record)
