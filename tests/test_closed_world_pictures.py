"""Pictures of a study: by what its records say, never by sampling it anew."""

import pytest
import typer
from closed_world import pictures
from closed_world.networks import COMMITTED
from closed_world.study import Study, keep

RUN = "a" * 32


@pytest.fixture
def study(tmp_path):
    return Study(tmp_path, COMMITTED, RUN)


def kept(study, make_quality, *, steps=1, rate=3.0, split="test", tuned=True):
    case = study.case([8] * steps, 0, "ddim", rate, split)
    keep(study, make_quality(run_id=RUN, case=case, case_key=case.key, takes=(("w8", steps),), tuned=tuned))


def test_the_guidance_is_that_of_the_tuned_records_on_test_prompts(study, make_quality):
    kept(study, make_quality)
    kept(study, make_quality, steps=4, rate=2.0)
    kept(study, make_quality, rate=8.0, tuned=False)
    kept(study, make_quality, rate=5.0, split="held-out")
    assert pictures._rates(study, 8) == {1: 3.0, 4: 2.0}


def test_the_rows_have_real_scenes_and_samples(study, make_quality):
    kept(study, make_quality)
    before = study.records.read_bytes()
    rows = pictures.grid(study, (8,), (1,))
    assert {name: tuple(latents.shape) for name, latents in rows.items()} == {
        "real": (14, 4, 8, 8),
        "w8, 1 step": (14, 4, 8, 8),
    }
    assert pictures.drawn(rows, study.world.side).size == (92 + 14 * 64, 2 * 64)
    assert study.records.read_bytes() == before


def test_a_study_that_has_not_ended_is_refused_and_left_as_it_is(tmp_path):
    with pytest.raises(typer.BadParameter, match="no record of w8 with ddim at 1, 2, 4, 8, 50 steps: end the"):
        pictures.main(tmp_path, tmp_path / "picture.png", COMMITTED)
    with pytest.raises(typer.BadParameter, match="w8 is not there: give the networks' folder by --weights"):
        pictures.main(tmp_path, tmp_path / "picture.png")
    assert not list(tmp_path.iterdir())
