"""`python -m closed_world`: wrong options are told in a line, what is done is not done again."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import closed_world.__main__
import pytest
import typer
from closed_world import cells
from closed_world.__main__ import _STAGES
from closed_world.adversarial import gan_folder
from closed_world.judge import JudgeError
from closed_world.networks import COMMITTED
from closed_world.options import OptionsError, hold_to
from closed_world.pool import run_all
from closed_world.study import Study, kept
from closed_world.super_resolution import super_folder
from closed_world.tasks import JudgeReal, TrainJudge, stages
from closed_world_tasks import Leaves, Stopped, TellsBlocked, WaitsForTheBar
from rich.progress import Progress

BENCH = Path(__file__).parents[1] / "bench"


def command(*words, timeout=300):
    return subprocess.run(
        [sys.executable, "-P", "-m", "closed_world", *map(str, words)],
        env={**os.environ, "PYTHONPATH": f"{BENCH}:{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def test_the_help_names_every_stage():
    study = Study(COMMITTED, COMMITTED, "a" * 32)
    assert _STAGES.split(", ") == [*stages(study, ("ddim",)), "time"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--latent", 12), "no world has latent 12: give one of 8, 16"),
        (("--samplers", "ddim,plms"), "no sampler plms"),
        (("--samplers", "ddim, ddpm", "--only", "trian"), "no stage trian"),
        (("--only", "trian"), "no stage trian"),
        (("--seeds", 0), "--seeds"),
        (("--samples", 3), "--samples"),
        (("--fine-tuned", "100,0"), "no numbers of steps: 100,0"),
        (("--distill-steps", 0), "--distill-steps"),
        (("--gan-steps", 0), "--gan-steps"),
        (("--committed", "--weights", "w"), "leave --weights out"),
        (("--only", ""), "give some of judge"),
        (("--device", "tpu"), "--device tpu: give cpu or cuda"),
        (("--committed", "--only", "train"), "no stage train: give some of tune"),
        (("--committed", "--seeds", 4), "is not there: give fewer --seeds"),
        (("--only", "sample"), "train it (--only judge,train), or give fewer --seeds"),
    ],
)
def test_a_wrong_option_is_told_before_anything_is_done(words, told, tmp_path):
    found = command("--out", tmp_path / "out", *words)
    assert found.returncode == 2
    # Lines stand in a box, and break anywhere.
    assert told in " ".join(found.stderr.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "out").write_text("mine")
    found = command("--out", tmp_path / "out", "--only", "judge")
    assert found.returncode == 2
    assert "is a file: give a folder" in " ".join(found.stderr.replace("│", " ").split())
    assert (tmp_path / "out").read_text() == "mine"


def test_a_study_without_a_judge_says_how_to_get_one(tmp_path):
    found = command("--out", tmp_path / "out", "--only", "sample")
    assert found.returncode == 2
    assert "--only judge" in " ".join(found.stderr.split())


@pytest.mark.parametrize("stage", ["tune", "gan"])
def test_a_folder_without_networks_is_left_as_it_is(stage, tmp_path):
    """Options written there would hold whoever comes next to those of a command that did nothing."""
    found = command("--out", tmp_path / "out", "--weights", tmp_path / "typo", "--only", stage)
    assert found.returncode == 2
    assert not list(tmp_path.iterdir())


def test_generators_of_other_kinds_need_the_judge_alone(tmp_path, monkeypatch):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "judge.safetensors").write_bytes((COMMITTED / "judge.safetensors").read_bytes())
    ran = []
    monkeypatch.setattr(closed_world.__main__, "run_all", lambda name, *_: ran.append(name))
    closed_world.__main__.main(tmp_path, only="gan, masked", samplers="ddim")
    assert ran == ["gan", "masked"]
    # Not so a stage beside them.
    with pytest.raises(typer.BadParameter, match="is not there: train it"):
        closed_world.__main__.main(tmp_path, only="gan, tune", samplers="ddim")
    assert ran == ["gan", "masked"]


def test_training_and_times_need_no_judge(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(closed_world.__main__, "run_all", lambda name, *_: ran.append(name))
    monkeypatch.setattr(closed_world.__main__, "_time", lambda study: ran.append("time"))
    closed_world.__main__.main(tmp_path, only="train, time", samplers="ddim")
    assert ran == ["train", "time"]
    for beside in ("train, tune", "train, gan"):
        with pytest.raises(typer.BadParameter, match=r"judge\.safetensors is not there"):
            closed_world.__main__.main(tmp_path, only=beside, samplers="ddim")
    assert ran == ["train", "time"]


@pytest.mark.parametrize("stage", ["tune", "gan"])
def test_the_ceiling_of_a_judge_that_is_there_is_told_once(stage, tmp_path, monkeypatch):
    """Of the committed judge, which no stage trains, too."""
    told = []
    monkeypatch.setattr(closed_world.__main__, "run_all", lambda name, *_: None)
    monkeypatch.setattr(closed_world.__main__, "_tell_ceiling", told.append)
    closed_world.__main__.main(tmp_path, committed=True, only=stage, samplers="ddim")
    assert len(told) == 1


@pytest.mark.parametrize("words", [("--latent", 16), ("--steps", 2)], ids=["latent", "steps"])
def test_committed_networks_are_what_they_were_trained_as(words, tmp_path):
    """With another number of steps records would tell of a training that never was."""
    before = sorted(COMMITTED.rglob("*"))
    found = command("--out", tmp_path / "out", "--committed", *words)
    assert (found.returncode, found.stdout) == (1, "")
    assert f"was begun with {words[0]}" in found.stderr
    assert found.stderr.endswith(f": leave {words[0]} out\n")
    assert "Traceback" not in found.stderr
    assert not (tmp_path / "out").exists()
    assert sorted(COMMITTED.rglob("*")) == before


def test_a_folder_of_one_study_takes_no_other(tmp_path):
    begun = {"--latent": 8, "--steps": 20, "--weights": "committed"}
    hold_to(tmp_path / "out", begun)
    hold_to(tmp_path / "out", begun)
    for name, value in (("--latent", 16), ("--steps", 3), ("--weights", "its own")):
        with pytest.raises(OptionsError, match=f"was begun with {name} {begun[name]}, not {value}: give another"):
            hold_to(tmp_path / "out", begun | {name: value})


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGKILL], ids=lambda by: by.name)
def test_a_stopped_worker_takes_no_other_task_and_prints_nothing(by, tmp_path, capfd):
    with pytest.raises(BrokenProcessPool):
        run_all("judge", [Leaves(), Stopped(by)], Study(tmp_path, tmp_path, "a" * 32), workers=1)
    assert not (tmp_path / "left").exists()
    assert "Traceback" not in capfd.readouterr().err


def test_the_bar_moves_within_a_task(tmp_path, monkeypatch):
    """By the share of its cost; a task that tells nothing counts when it ends."""
    shown = []
    update = Progress.update

    def watched(self, bar, *, completed):
        shown.append(completed)
        if completed >= 1.5:
            (tmp_path / "seen").touch()
        update(self, bar, completed=completed)

    monkeypatch.setattr(Progress, "update", watched)
    run_all("judge", [Leaves(), WaitsForTheBar()], Study(tmp_path, tmp_path, "a" * 32), workers=1)
    assert 1.5 in shown
    assert shown == sorted(shown)
    assert shown[-1] == 4.0


def test_what_is_trained_is_timed_too(tmp_path, monkeypatch):
    """A GAN's pass as DDIM without guidance; nothing of networks that are not all there."""
    one, asked = Study(tmp_path, tmp_path / "weights", "a" * 32), []
    monkeypatch.setattr(closed_world.__main__, "_profile", lambda study, *words: asked.append(words))
    closed_world.__main__._time(one)
    assert [words[1] for words in asked] == ["t2i", "t2i"]
    for width in one.world.widths:
        gan_folder(one, width, 0).mkdir(parents=True)
    super_folder(one, 8, 0, 1000, True).mkdir(parents=True)
    asked.clear()
    closed_world.__main__._time(one)
    family, gans, *_ = asked
    assert (family[1:3], gans[1:4]) == (("t2i", "1,2"), ("t2i", "1", ("ddim",)))
    assert gans[4] == (1,)
    assert [folder.name for folder in gans[0]] == [f"w{width}-gan" for width in one.world.widths]
    assert len(asked) == 2 * len(cells.TIMED)
    for width in one.world.widths[1:]:
        super_folder(one, width, 0, 1000, True).mkdir(parents=True)
    asked.clear()
    closed_world.__main__._time(one)
    of_super_resolution = [words[2:] for words in asked if words[1] == "sr"]
    assert of_super_resolution == [("1", ("ddim",), steps, batch) for batch, (_, steps) in cells.TIMED.items()]


@pytest.mark.parametrize(
    ("failure", "told"),
    [(BrokenProcessPool(), "A worker was killed"), (JudgeError("too little: train it longer"), "too little")],
    ids=["killed", "judge"],
)
def test_a_stage_that_fails_is_told_in_a_line(failure, told, tmp_path, monkeypatch):
    def fails(*_):
        raise failure

    monkeypatch.setattr(closed_world.__main__, "run_all", fails)
    with pytest.raises(SystemExit, match=told):
        closed_world.__main__.main(tmp_path, only="judge", samplers="ddim")


def test_ctrl_c_is_told_in_a_line(tmp_path, monkeypatch, capsys):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(closed_world.__main__, "run_all", stopped)
    with pytest.raises(SystemExit) as found:
        closed_world.__main__.main(tmp_path, only="judge", samplers="ddim")
    assert found.value.code == 130
    assert capsys.readouterr().err == "Stopped; the same command goes on from here.\n"


def test_ctrl_c_waits_for_workers_that_are_starting(tmp_path, monkeypatch):
    """Blocked where they start, so that no import prints a traceback; free in a task, and here afterwards."""
    seen = []
    submit = ProcessPoolExecutor.submit

    def watched(self, *words):
        seen.append(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        return submit(self, *words)

    monkeypatch.setattr(ProcessPoolExecutor, "submit", watched)
    run_all("judge", [TellsBlocked()], Study(tmp_path, tmp_path, "a" * 32), workers=1)
    assert seen == [True]
    assert (tmp_path / "blocked").read_text() == "False"
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_the_judges_ceiling_is_printed(tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "judge.safetensors").write_bytes((COMMITTED / "judge.safetensors").read_bytes())
    found = command("--out", tmp_path, "--only", "judge")
    assert found.returncode == 0, found.stderr
    assert "right, of real latents: left shape 99." in found.stderr


def test_a_training_on_disk_is_not_done_again(tmp_path):
    words = ("--out", tmp_path, "--only", "train", "--steps", 2, "--seeds", 1)
    first = command(*words)
    assert first.returncode == 0, first.stderr
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "weights").rglob("*.safetensors")}
    assert sorted(path.parent.name for path in files) == ["w12", "w16", "w24", "w32", "w8"]
    assert command(*words).returncode == 0
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "weights").rglob("*.safetensors")}


def test_the_first_failure_is_raised(tmp_path):
    """The pool runs what is given: a judge that is there, then one that is not."""
    (tmp_path / "judge.safetensors").write_bytes((COMMITTED / "judge.safetensors").read_bytes())
    study = Study(tmp_path, tmp_path, "a" * 32, samples=20)
    run_all("judge", [TrainJudge(), JudgeReal()], study, workers=1)
    assert len(kept(study)) == 1
    missing = replace(study, folder=tmp_path / "other", weights=tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="nothing"):
        run_all("judge", [JudgeReal()], missing, workers=1)
