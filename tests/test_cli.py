"""The command: one line for a wrong call, the right exit code, and a killed run that goes on."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from ldmperf.model import CheckpointError, load_unet
from ldmperf.profiling import Record, load_records
from ldmperf.profiling.cli import app
from ldmperf.profiling.commands.shared import whole_option
from ldmperf.profiling.measure.environment import collect_environment
from ldmperf.profiling.measure.store import rejected_path
from ldmperf.profiling.measure.timing import Deadline, RepetitionRule
from ldmperf.profiling.sweep.events import Event, Recorded
from ldmperf.profiling.sweep.group_task import GroupTask
from ldmperf.profiling.sweep.local import Workers
from ldmperf.profiling.trajectory.case import Case
from ldmperf.profiling.trajectory.progress import Remaining, readable
from ldmperf.profiling.trajectory.records import RECORDS_NAME
from ldmperf.profiling.trajectory.runs import RUN_NAME, create_run, open_run

pytestmark = pytest.mark.usefixtures("_one_thread")
ROOT = Path(__file__).parents[1]


Run = Callable[..., Any]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["profile", "--size", "7M"], "39M, 83M, 145M"),
        (["profile", "--sizes", "39M"], "--size"),
        (["profile", "--steps", "0"], "from 1 to 1000"),
        (["profile", "--steps"], "requires an argument"),
        (["profile", "--dtype", "int8"], "float32"),
        (["profile", "--device", "tpu"], "cpu, cuda"),
        (["profile", "--device", "cuda:99"], "choose cpu"),
        (["profile", "--task", "video"], "t2i, sr"),
        (["profile", "--backend", "tensorrt"], "torch, triton, triton+hoist, triton+hoist+merge, graph"),
        (["profile", "--preset", "tpu"], "cpu, gpu"),
        (["profile", "--unet", "/no/where"], "/no/where"),
        (["profile", "--unet", "/,/no/where"], "/no/where"),
        (["profile", "--tokens", "0"], "from 1 to 1048576"),
        (["profile", "--seed", "-1"], "from 0 to 18446744073709551615"),
        (["profile", "--min-count", "0"], "--min-count must be at least 1"),
        (["profile", "--min-count", "x"], "'x' is not a whole number"),
        (["profile", "--min-seconds", "nan"], "--min-seconds"),
        (["profile", "--seconds", "-1"], "--seconds"),
        (["profile", "--seconds", "nan"], "--seconds"),
        # An option never switches a check off.
        (
            ["profile", "--schema", "--size", "7M"],
            "prints the schema and measures nothing: give it alone",
        ),
        (["profile", "--schema", "--min-count", "0"], "give it alone"),
        (["profile", "--schema", "--resume"], "give it alone"),
        (["profile", "--schema", "--out", "elsewhere"], "give it alone"),
        (["profile", "--size", "39M", "--references", __file__], "is no folder; name one"),
        (["profile", "--resume", "/no/where"], "no run folder"),
        (["profile", "stray"], "stray"),
        (["report", "/no/where"], "no run folder"),
        (["env", "--device", "tpu"], "cpu, cuda"),
        (["measure"], "measure"),
    ],
)
def test_a_wrong_call_is_one_line_and_exit_code_2(run: Run, arguments: Sequence[str], said: str) -> None:
    outcome = run(*arguments)
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err.startswith("ldmperf: ")
    assert outcome.err.count("\n") == 1
    assert said in outcome.err


def test_no_run_to_resume_or_report(run: Run, tmp_path: Path) -> None:
    for arguments in (["profile", "--resume", "--out", tmp_path], ["report", "--out", tmp_path]):
        outcome = run(*arguments)
        assert outcome.code == 2
        assert f"no run in {tmp_path}" in outcome.err


def test_a_folder_that_cannot_be_written_is_one_line_and_exit_code_1(run: Run, tmp_path: Path) -> None:
    # Below a file: not even root can write there.
    (tmp_path / "file").write_text("")
    outcome = run("profile", "--out", tmp_path / "file" / "runs", "--size", "39M", "--steps", "1")
    assert outcome.code == 1
    assert outcome.err.count("\n") == 1
    assert "cannot write to" in outcome.err
    assert "--out" in outcome.err


@pytest.mark.parametrize("command", [[], ["profile"], ["report"], ["env"], ["trace"]])
def test_every_command_has_help_with_an_example(run: Run, command: Sequence[str]) -> None:
    outcome = run(*command, "--help")
    assert outcome.code == 0
    assert "Usage: ldmperf" in outcome.out
    assert not command or "Example" in outcome.out


def test_no_option_is_called_by_its_metavar() -> None:
    """typer 0.27 would take the metavar SECONDS of `seconds` for its name, and know no --seconds."""
    commands = typer.main.get_group(app).commands
    assert len(commands) > 10
    for command in commands.values():
        for option in command.params:
            assert (option.metavar or "").lower().replace("-", "_") != option.name, (command.name, option.opts)


def test_without_arguments_it_helps(run: Run) -> None:
    assert run().out == run("--help").out


def test_help_is_quick_because_nothing_heavy_is_imported() -> None:
    code = (
        "import sys\nfrom ldmperf.profiling.cli import main\n"
        "try: main(['profile', '--help'])\n"
        "except SystemExit: pass\n"
        "try: main(['--version'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'diffusers', 'altair', 'jinja2', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_version_and_the_commit_are_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    known = metadata.version("ldmperf")
    monkeypatch.setattr("ldmperf.profiling.measure.checkout.checkout", lambda: ("0123456789" * 4, False))
    assert run("--version").out == f"ldmperf {known} (commit 0123456)\n"
    monkeypatch.setattr("ldmperf.profiling.measure.checkout.checkout", lambda: (None, None))
    outcome = run("--version")
    assert (outcome.code, outcome.out, outcome.err) == (0, f"ldmperf {known}\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["profile", "--schema"],
        ["env", "--device", "cpu"],
        ["kernels", "--device", "cpu", "--seconds", "0"],
    ],
)
def test_a_reader_that_has_gone_is_no_failure(arguments: list[str], tmp_path: Path) -> None:
    """As `ldmperf ... | head -1`: nothing on stderr, and the exit code that a shell gives for SIGPIPE."""
    more = ["--out", str(tmp_path)] if arguments[0] == "kernels" else []
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run(
        command(*arguments, *more), stdout=writing, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writing)
    assert ended.returncode == 141
    assert not [line for line in ended.stderr.splitlines() if "Error" in line or "Traceback" in line]
    assert more or ended.stderr == ""


@pytest.mark.parametrize(
    ("given", "code", "said"), [([], 0, "7"), (["--rows", "9"], 0, "9"), (["--rows", "0"], 2, "")]
)
def test_a_whole_option_may_have_a_number_as_its_default(given: list[str], code: int, said: str) -> None:
    app = typer.Typer()

    @app.command()
    def command(rows: Annotated[int, whole_option("Rows.", 1)] = 7) -> None:
        typer.echo(rows)

    done = CliRunner().invoke(app, given)
    assert (done.exit_code, done.stdout.strip()) == (code, said)


def test_a_checkpoint_whose_name_is_no_utf8_is_found_and_named_in_a_refusal(run: Run, tmp_path: Path) -> None:
    folder = Path(os.fsdecode(bytes(tmp_path) + b"/\xff"))
    folder.mkdir()
    outcome = run("profile", "--unet", folder, "--out", tmp_path / "runs")
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert r"\udcff: no config.json here" in outcome.err


def test_a_folder_whose_name_looks_like_markup(run: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs[" / "x]\x1b"
    options = ("--unet", tiny_checkpoint, "--steps", "1", "--backend", "torch", *QUICK)
    outcome = run("profile", *options, "--out", out, "--seconds", "0")
    assert outcome.code == 1
    (folder,) = out.iterdir()
    shown = str(folder).replace("\x1b", r"\x1b")
    assert outcome.err.startswith(f"{shown}: 1 case to measure")
    assert f"--resume '{shown}'" in outcome.err
    assert "\x1b" not in outcome.out + outcome.err
    assert run("report", folder).err.startswith(f"ldmperf: {shown} has no record yet")


def test_the_schema_is_printed_as_json(run: Run) -> None:
    schema = json.loads(run("profile", "--schema").out)
    assert schema["title"] == "Record"
    assert "wall_ms" in schema["properties"]


def test_env_prints_the_environment_as_json(run: Run) -> None:
    printed = json.loads(run("env", "--device", "cpu").out)
    assert printed["torch"] == torch.__version__
    assert printed["gpu"] is None
    assert "load_average_1min" in printed["device_now"]
    # As a run and its records have it, whatever this process is set to.
    assert (printed["cudnn_benchmark"], printed["cudnn_tf32"]) == (True, False)


QUICK = ("--device", "cpu", "--min-count", "1")


def test_a_checkpoint_that_diffusers_wrote_end_to_end(run: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    outcome = run("profile", "--unet", tiny_checkpoint, "--steps", "1,2", *QUICK, "--out", tmp_path)
    assert outcome.code == 0, outcome.err
    (folder,) = tmp_path.iterdir()
    records, rejected = load_records(folder)
    assert rejected == 0
    assert [(r.case.steps, r.case.backend, r.status) for r in records] == [
        (1, "torch", "ok"), (1, "diffusers", "ok"), (2, "torch", "ok"), (2, "diffusers", "ok"),
    ]  # fmt: skip
    assert {r.case.label for r in records} == {"tiny-unet"}
    assert "tiny-unet" in outcome.out
    commit = records[0].environment.git_commit
    assert folder.name.endswith(commit[:7] if commit else f"v{records[0].environment.ldmperf}")
    assert "[1/2]" in outcome.err
    assert (folder / "report.html").exists()
    assert list(folder.glob("*.png"))

    # The report once more, from what is on disk alone.
    (folder / "report.html").unlink()
    again = run("report", folder)
    assert again.code == 0
    assert (folder / "report.html").exists()
    assert "tiny-unet" in again.out

    # Resuming what is complete measures nothing.
    before = (folder / RECORDS_NAME).read_bytes()
    assert run("profile", "--resume", "--out", tmp_path).code == 0
    assert (folder / RECORDS_NAME).read_bytes() == before


def test_a_context_length_and_a_seed_end_to_end(run: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The largest seed too, whose later rounds and images begin again at 0; a resumed run has to name the same."""
    options = ("--unet", tiny_checkpoint, "--steps", "1", "--sampler", "ddpm", "--batch", "2", *QUICK)
    named = (*options, "--tokens", "5", "--seed", f"3,{2**64 - 1}", "--latent", "8x16", "--out", tmp_path)
    outcome = run("profile", *named)
    assert outcome.code == 0, outcome.err
    (folder,) = tmp_path.iterdir()
    records = load_records(folder)[0]
    assert [(r.case.context_tokens, r.case.seed, r.status) for r in records] == [
        (5, seed, "ok") for seed in (3, 2**64 - 1) for _ in ("torch", "diffusers")
    ]
    assert run("profile", *named, "--resume").code == 0
    for other in ("6", "77"):
        assert "other cases" in run("profile", *named, "--tokens", other, "--resume").err


def test_one_process_is_kept_for_what_is_gone_on_with(
    run: Run, tiny_checkpoint: Path, tmp_path: Path, make_record: Callable[..., Record]
) -> None:
    tasks: list[int] = []

    def measured(task: GroupTask) -> Generator[Event, None, None]:
        tasks.append(len(task.cases))
        for case in task.cases:
            yield Recorded(make_record(case.as_recorded()))

    options = ("--unet", tiny_checkpoint, "--steps", "1,2", "--backend", "torch", *QUICK, "--out", tmp_path)
    assert run("profile", "--one-process", *options, workers=Workers(measured)).code == 0
    (folder,) = tmp_path.iterdir()
    (folder / RECORDS_NAME).unlink()
    assert run("profile", "--resume", folder, workers=Workers(measured)).code == 0
    assert tasks == [2, 2]
    assert json.loads((folder / RUN_NAME).read_text())["one_process"] is True


def test_out_of_memory_is_data_but_a_run_with_no_time_at_all_has_failed(
    run: Run,
    tiny_checkpoint: Path,
    tmp_path: Path,
    make_record: Callable[..., Record],
) -> None:
    statuses = ["ok", "oom"]

    def measured(task: GroupTask) -> Generator[Event, None, None]:
        for case, status in zip(task.cases, statuses, strict=True):
            yield Recorded(make_record(case.as_recorded(), status=status))

    for codes, statuses in (
        (0, ["ok", "oom"]), (0, ["unsupported", "ok"]), (1, ["ok", "error"]),
        (1, ["incorrect", "ok"]), (1, ["oom", "unsupported"]),
    ):  # fmt: skip
        options = ("--unet", tiny_checkpoint, "--steps", "1", *QUICK, "--out", tmp_path)
        outcome = run("profile", *options, workers=Workers(measured))
        assert outcome.code == codes, (statuses, outcome.err)


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-c", "from ldmperf.profiling.cli import main; main()", *map(str, arguments)]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(process.communicate())
        time.sleep(0.02)


def test_killed_and_resumed_it_repeats_only_what_was_in_flight(
    run: Run, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    # The second case has a thousand steps: it is in flight for as long as it takes to kill it.
    options = ("--unet", tiny_checkpoint, "--backend", "torch", *QUICK, "--out", tmp_path)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command("profile", "--steps", "1,1000", *options),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip

    def first_is_recorded() -> bool:
        return any(path.read_bytes().endswith(b"\n") for path in tmp_path.glob(f"*/{RECORDS_NAME}"))

    wait_for(first_is_recorded, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    (folder,) = tmp_path.iterdir()
    records_file = folder / RECORDS_NAME
    first = records_file.read_bytes()
    assert len(load_records(folder)[0]) == 1

    # What a kill inside a write leaves: half a line. And three steps instead of a thousand, to be done today.
    records_file.write_bytes(first + first[: len(first) // 2])
    plan = json.loads((folder / RUN_NAME).read_text())
    assert [case["steps"] for case in plan["cases"]] == [1, 1000]
    plan["cases"][1]["steps"] = 3
    plan["environment"] = collect_environment("cpu").model_dump(mode="json")
    (folder / RUN_NAME).write_text(json.dumps(plan))

    outcome = run("profile", "--steps", "1,3", *options, "--resume")
    assert outcome.code == 0, outcome.err
    assert records_file.read_bytes().startswith(first)
    records, rejected = load_records(folder)
    assert [record.case.steps for record in records] == [1, 3]
    assert rejected == 1
    assert rejected_path(folder / RECORDS_NAME).exists()
    assert "records.rejected.jsonl:1: no JSON: torn" in outcome.err
    assert "1 line set aside" in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_a_preset_for_a_gpu_is_a_wrong_call_without_one(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    outcome = run("profile", "--preset", "ladder", "--out", tmp_path)
    assert outcome.code == 2
    assert "cuda is not here" in outcome.err
    assert outcome.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_no_record_in_the_time_given_is_a_failure_and_resuming_takes_up_the_rest(
    run: Run, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    options = ("--unet", tiny_checkpoint, "--steps", "1", *QUICK, "--out", tmp_path)
    outcome = run("profile", *options, "--seconds", "0")
    assert outcome.code == 1
    (folder,) = tmp_path.iterdir()
    assert f"no case was done within --seconds; give more, and go on with: ldmperf profile --resume {folder}" in (
        outcome.err
    )
    # It was written on disk that nothing was left: some of the time, and now all of it.
    outcome = run("profile", *options, "--resume", "--seconds", "600")
    assert outcome.code == 0, outcome.err
    assert [(r.case.backend, r.status) for r in load_records(folder)[0]] == [("torch", "ok"), ("diffusers", "ok")]
    # With records of before, none of this call's is a failure still.
    (folder / RECORDS_NAME).write_text((folder / RECORDS_NAME).read_text().splitlines()[0] + "\n")
    outcome = run("profile", *options, "--resume", "--seconds", "0")
    assert outcome.code == 1
    assert "no case was done" in outcome.err


def test_what_was_cut_short_is_measured_again_when_resumed(
    run: Run, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    options = ("--unet", tiny_checkpoint, "--steps", "1", "--backend", "torch", *QUICK, "--out", tmp_path)
    assert run("profile", *options).code == 0
    (folder,) = tmp_path.iterdir()
    (record,) = load_records(folder)[0]
    cut = record.model_copy(update={"harness": record.harness.model_copy(update={"stopped_by": "seconds"})})
    (folder / RECORDS_NAME).write_text(cut.model_dump_json() + "\n")
    outcome = run("profile", *options, "--resume")
    assert outcome.code == 0
    assert "1 case to measure, 0 recorded" in outcome.err
    assert [r.harness.stopped_by for r in load_records(folder)[0]] == ["seconds", None]


def test_a_terminated_profile_says_where_its_records_are(tiny_checkpoint: Path, tmp_path: Path) -> None:
    options = ("--unet", tiny_checkpoint, "--backend", "torch", *QUICK, "--out", tmp_path)
    process = subprocess.Popen(
        command("profile", "--steps", "1,1000", *options),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip

    def first_is_recorded() -> bool:
        return any(path.read_bytes().endswith(b"\n") for path in tmp_path.glob(f"*/{RECORDS_NAME}"))

    wait_for(first_is_recorded, process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    (folder,) = tmp_path.iterdir()
    assert f"what was measured is in {folder}; go on with: ldmperf profile --resume {folder}" in said
    assert "Traceback" not in said


def test_an_interrupt_says_how_to_go_on_and_exits_130(run: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    def interrupted(task: GroupTask) -> Generator[Event, None, None]:
        raise KeyboardInterrupt
        yield

    options = ("--unet", tiny_checkpoint, "--steps", "1", *QUICK, "--out", tmp_path)
    outcome = run("profile", *options, workers=Workers(interrupted))
    assert outcome.code == 130
    (folder,) = tmp_path.iterdir()
    assert f"ldmperf profile --resume {folder}" in outcome.err
    assert "Traceback" not in outcome.err


def test_a_run_of_another_commit_or_machine_is_not_resumed(run: Run, tmp_path: Path) -> None:
    here = collect_environment("cpu")
    elsewhere = here.model_copy(update={"git_commit": "0" * 40, "cpu": "another"})
    folder = create_run(tmp_path, [Case(unet="39M", steps=1)], RepetitionRule(1, 0.0), elsewhere)
    outcome = run("profile", "--resume", folder)
    assert outcome.code == 2
    assert "cpu: another" in outcome.err
    assert "start a new run" in outcome.err
    assert not (folder / RECORDS_NAME).exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--size", "7M"], "39M, 83M"),
        (["--min-count", "0"], "--min-count must be at least 1"),
        (["--min-seconds", "nan"], "--min-seconds"),
        (["--preset", "tpu"], "cpu, gpu"),
        (["--seconds", "nan"], "--seconds"),
        (["--references", __file__], "is no folder"),
        (["--device", "cuda:99"], "choose cpu"),
        (["--unet", "/no/where"], "/no/where"),
    ],
)
def test_what_is_refused_without_resume_is_refused_with_it(
    run: Run, tmp_path: Path, options: list[str], said: str
) -> None:
    create_run(tmp_path, [Case(unet="39M", steps=1)], RepetitionRule(1, 0.0), collect_environment("cpu"))
    outcome = run("profile", "--resume", "--out", tmp_path, *options)
    assert outcome.code == 2
    assert said in outcome.err
    assert outcome.err.count("\n") == 1


def test_a_run_that_names_no_case_is_not_resumed(run: Run, tmp_path: Path) -> None:
    create_run(tmp_path, [], RepetitionRule(1, 0.0), collect_environment("cpu"))
    outcome = run("profile", "--resume", "--out", tmp_path)
    assert outcome.code == 2
    assert "names no case to measure; start a new run without --resume" in outcome.err


def test_a_run_has_one_id_and_says_of_the_machine_what_its_records_say(
    run: Run, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Two checkpoints under one name; a changed one is not resumed."""
    paths = [tmp_path / folder / "x.safetensors" for folder in "ab"]
    for number, path in enumerate(paths):
        path.parent.mkdir()
        tensors = load_file(tiny_checkpoint / "diffusion_pytorch_model.safetensors")
        save_file({name: tensor + 0.001 * number for name, tensor in tensors.items()}, path)
        (path.parent / "config.json").write_bytes((tiny_checkpoint / "config.json").read_bytes())
    runs = tmp_path / "runs"
    unets = [option for path in paths for option in ("--unet", path.parent)]
    options = [*unets, "--steps", "1", "--backend", "torch", *QUICK, "--out", runs]
    assert run("profile", *options, "--seconds", "0").code == 1
    outcome = run("profile", *options, "--resume")
    assert outcome.code == 0, outcome.err
    (folder,) = runs.iterdir()
    plan = open_run(folder)
    records, _ = load_records(folder)
    assert {record.run_id for record in records} == {plan.run_id} != {None}
    assert {record.environment for record in records} == {plan.environment}
    assert [case.path for case in plan.cases] == [path.parent for path in paths]
    assert [record.case_key for record in records] == [case.key for case in plan.cases]
    assert len({record.case_id for record in records}) == 2
    assert {record.case.weights_sha256 for record in records} == {
        hashlib.sha256(path.read_bytes()).hexdigest() for path in paths
    }
    assert str(tmp_path) not in (folder / RECORDS_NAME).read_text()
    paths[0].write_bytes(paths[1].read_bytes())
    outcome = run("profile", "--resume", folder)
    assert outcome.code == 2
    assert outcome.err == (
        f"ldmperf: {paths[0].parent} has changed since the run began; start a new run, or put the old file back\n"
    )


def test_resuming_with_other_cases_is_refused(run: Run, tmp_path: Path) -> None:
    case = Case(unet="39M", steps=1, device="cpu")
    create_run(tmp_path, [case], RepetitionRule(1, 0.0), collect_environment("cpu"))
    outcome = run("profile", "--resume", "--out", tmp_path, "--steps", "9", "--device", "cpu")
    assert outcome.code == 2
    assert "other cases" in outcome.err


def test_the_latest_run_is_the_newest(run: Run, tmp_path: Path) -> None:
    environment = collect_environment("cpu").model_copy(update={"git_commit": None, "ldmperf": "9"})
    made = [create_run(tmp_path, [], RepetitionRule(1, 0.0), environment) for _ in range(3)]
    assert len(set(made)) == 3
    from ldmperf.profiling.trajectory.runs import find_run

    assert find_run(tmp_path, "latest") == made[-1]


def test_the_time_left_counts_work_not_cases() -> None:
    now = [0.0]
    small, large = Case(unet="39M", steps=1), Case(unet="39M", steps=9)
    remaining = Remaining([small, large], RepetitionRule(3, 0.0), clock=lambda: now[0])
    assert remaining.seconds is None
    now[0] = 10.0
    remaining.ran(small)
    # One of 4 + 36 equal portions took 10 s.
    assert remaining.seconds == pytest.approx(390.0)
    remaining.end(small)
    assert remaining.fraction == pytest.approx(0.1)
    # Trajectories beyond the expected do not count beyond the whole.
    for _ in range(9):
        remaining.ran(large)
    assert remaining.fraction == pytest.approx(1.0)


def test_the_time_left_is_no_more_than_the_deadline_leaves() -> None:
    now = [0.0]
    case = Case(unet="39M", steps=1)
    deadline = Deadline(30.0, clock=lambda: now[0])
    remaining = Remaining([case], RepetitionRule(3, 0.0), clock=lambda: now[0], deadline=deadline)
    now[0] = 20.0
    remaining.ran(case)
    assert remaining.seconds == pytest.approx(10.0)
    # Traced after a resume, it is none of the work that was left.
    remaining.ran(Case(unet="83M"))
    assert remaining.fraction == pytest.approx(0.25)


def test_times_are_readable() -> None:
    assert (readable(None), readable(0.2), readable(61), readable(125)) == (
        "", "about 1 s left", "about 61 s left", "about 2 min left"
    )  # fmt: skip


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["--version"],
        ["report", ROOT / "bench" / "results" / "cpu-amd-epyc-2-cores" / "2026-11-25-ec91de2.jsonl"],
        ["env", "--device", "cpu"],
        ["profile", "--schema"],
        ["profile", "--size", "7M"],
        ["kernels", "--kernel", "none"],
        ["inspect", "none"],
        ["emulate", "none"],
        ["compile", "--for", "none"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_stream_that_was_closed_is_no_failure(
    run: Run, arguments: list[str | Path], closed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = run(*arguments).code
    # What python has there when the process was begun so.
    for stream in ["stderr"] * ("2" in closed) + ["stdout"] * closed.startswith(">"):
        monkeypatch.setattr(sys, stream, None)
        monkeypatch.setattr(sys, f"__{stream}__", None)
    assert run(*arguments).code == code


def test_a_process_begun_without_stdout_and_stderr() -> None:
    line = shlex.join(command("--version"))
    assert subprocess.run(f"{line} >&- 2>&-", shell=True, check=False).returncode == 0
    told = subprocess.run(f"{line} >&-", shell=True, check=False, capture_output=True, text=True)
    assert (told.returncode, told.stderr) == (0, "")


@pytest.mark.parametrize("text", ["١", "1_0", "+1", "²"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["profile", "--steps"],
        ["profile", "--batch"],
        ["profile", "--tokens"],
        ["profile", "--seed"],
        ["profile", "--guidance"],
        ["profile", "--min-count"],
        ["profile", "--min-seconds"],
        ["profile", "--seconds"],
        ["kernels", "--batch"],
        ["kernels", "--head-dim"],
        ["kernels", "--seconds"],
        ["kernels", "--head-dim", "40", "--tokens"],
        ["inspect", "geglu", "--batch"],
        ["inspect", "attention", "--context"],
        ["inspect", "attention", "--head-dim"],
        ["emulate", "geglu", "--batch"],
        ["emulate", "geglu", "--perturb"],
        ["emulate", "attention", "--head-dim"],
        ["compile", "--for", "smoke", "--jobs"],
        ["compile", "--for", "smoke", "--seconds"],
    ],
    ids=" ".join,
)
def test_numbers_are_written_in_ascii_digits(
    run: Run, arguments: list[str], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if text == "+1" and arguments[-1] in ("--seconds", "--min-seconds", "--guidance"):
        pytest.skip("a float may have a sign")
    monkeypatch.chdir(tmp_path)
    outcome = run(*arguments, text)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert arguments[-1] in outcome.err
    assert text in outcome.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["garbage", "truncated", "misshapen", "config"])
def test_a_checkpoint_that_cannot_be_loaded_is_a_wrong_call_before_anything_is_made(
    run: Run, tiny_checkpoint: Path, tmp_path: Path, damage: str
) -> None:
    folder = tmp_path / "a\xa0b\x1b"
    shutil.copytree(tiny_checkpoint, folder)
    weights, config = folder / "diffusion_pytorch_model.safetensors", folder / "config.json"
    if damage == "garbage":
        weights.write_bytes(b"garbage\n" * 100)
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1])
    else:
        changes = {"norm_eps": "no"} if damage == "config" else {"cross_attention_dim": 64}
        config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(CheckpointError) as refused:
        load_unet(folder)
    outcome = run("profile", "--unet", folder, "--steps", "1", *QUICK, "--out", tmp_path / "runs")
    assert (outcome.code, outcome.out) == (2, "")
    # Nothing is escaped twice: what the error spells out is printed as it is.
    assert outcome.err == f"ldmperf: --unet: {refused.value}\n"
    assert r"a\xa0b\x1b" in outcome.err
    assert not (tmp_path / "runs").exists()


def test_an_sdxl_checkpoint_end_to_end(run: Run, tiny_sdxl: Path, tmp_path: Path) -> None:
    outcome = run("profile", "--unet", tiny_sdxl, "--steps", "1", *QUICK, "--out", tmp_path)
    assert outcome.code == 0, outcome.err
    (folder,) = tmp_path.iterdir()
    records, _ = load_records(folder)
    assert [(r.case.backend, r.status) for r in records] == [("torch", "ok"), ("diffusers", "ok")]
    assert "tiny-sdxl-unet" in outcome.out
