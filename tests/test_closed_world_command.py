"""`python -m closed_world`: wrong options are told in a line, what is done is not done again."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from closed_world.__main__ import _STAGES
from closed_world.networks import COMMITTED
from closed_world.pool import run_all
from closed_world.study import Study, kept
from closed_world.tasks import JudgeReal, TrainJudge, stages

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
        (("--samplers", "ddim,plms"), "no cells for plms"),
        (("--only", "trian"), "no stage trian"),
        (("--seeds", 0), "--seeds"),
        (("--samples", 3), "--samples"),
        (("--fine-tuned", "100,0"), "no numbers of steps: 100,0"),
        (("--distill-steps", 0), "--distill-steps"),
    ],
)
def test_a_wrong_option_is_told_before_anything_is_done(words, told, tmp_path):
    found = command("--out", tmp_path / "out", *words)
    assert found.returncode == 2
    assert told in " ".join(found.stderr.split())
    assert not (tmp_path / "out").exists()


def test_a_study_without_a_judge_says_how_to_get_one(tmp_path):
    found = command("--out", tmp_path / "out", "--only", "sample")
    assert found.returncode == 2
    assert "--only judge" in " ".join(found.stderr.split())


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
