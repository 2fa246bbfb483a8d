"""The command that measures a set of cases: what `ldmperf profile` makes of it are these cases and no others."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldmperf.profiling.measure.timing import RepetitionRule
from ldmperf.profiling.rivals.command_line import cases_in_words, measuring_command
from ldmperf.profiling.rivals.rival import RIVAL_BACKENDS, RIVALS
from ldmperf.profiling.rivals.rival_selection import cases_beside
from ldmperf.profiling.trajectory.case import BACKENDS, Case
from ldmperf.profiling.trajectory.presets import PRESETS, select_cases, usual_preset


@pytest.fixture(autouse=True)
def _eight_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)


def options(command: str) -> dict[str, list[str]]:
    program, name, *words = shlex.split(command)
    assert (program, name) == ("ldmperf", "profile")
    assert all(word.startswith("--") for word in words[::2])
    return {word.removeprefix("--"): [value] for word, value in zip(words[::2], words[1::2], strict=True)}


def parsed(command: str) -> set[Case]:
    """The cases that the command chooses, by the code that `ldmperf profile` runs."""
    choices = options(command)
    for name in ("min-count", "min-seconds"):
        choices.pop(name, None)
    (preset,) = choices.pop("preset", [usual_preset(choices)])
    return set(cases_beside(preset, choices, is_preset_given="preset" in options(command)))


def lists(values: Sequence[object], most: int = 2) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from([str(v) for v in values]), min_size=1, max_size=most, unique=True)


CHOICES = st.fixed_dictionaries(
    {"size": lists(["39M", "83M", "866M", "5B"]), "device": lists(["cpu", "cuda", "cuda:3"])},
    optional={
        "steps": lists([1, 4, 20, 50]), "batch": lists([1, 8]), "dtype": lists(["float32", "bfloat16"]),
        "sampler": lists(["ddim", "ddpm", "dpmpp_2m"]), "guidance": lists([1, 7.5, 2.25]),
        "task": lists(["t2i", "sr"]), "latent": lists(["64x64", "32x96"]), "tokens": lists([77, 154]),
        "seed": lists([0, 7]), "backend": lists(BACKENDS), "rival": lists(tuple(RIVALS)),
    },
)  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(choices=CHOICES, data=st.data())
def test_the_command_makes_what_was_measured(choices: dict[str, list[str]], data: st.DataObject) -> None:
    if "rival" in choices:
        # Named apart: a device has backends of its own unless told.
        choices["rival-backend"] = data.draw(lists(RIVAL_BACKENDS))
    made = set(cases_beside(usual_preset(choices), choices, is_preset_given=False))
    command = measuring_command(data.draw(st.permutations(sorted(made, key=lambda case: case.key))))
    assert command is not None
    assert parsed(command) == made
    if len(made) > 1:
        # With one case less, no command makes what is left and the case with it.
        less = made - {data.draw(st.sampled_from(sorted(made, key=lambda case: case.key)))}
        other = measuring_command(less)
        assert other is None or parsed(other) == less


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_told_by_its_name(name: str) -> None:
    cases = select_cases(name, {})
    command = measuring_command(cases, PRESETS[name].rule)
    assert command is not None
    assert parsed(command) == set(cases)


def test_rivals_alone() -> None:
    choices = {"rival": ["gan", "masked-transformer"], "tokens": ["77,154"]}
    cases = cases_beside("cpu", choices, is_preset_given=False)
    command = measuring_command(cases)
    assert command is not None
    assert "--size" not in command
    assert parsed(command) == set(cases)


def test_how_often_is_told_where_it_is_not_the_presets() -> None:
    def told(rule: RepetitionRule, cases: Iterable[Case], with_decoder: bool = False) -> str:
        return measuring_command(cases, rule, with_decoder) or ""

    case = [Case(unet="39M", steps=7)]
    assert told(RepetitionRule(3, 0.0), case) == (
        "ldmperf profile --size 39M --steps 7 --batch 1 --dtype float32 --device cpu --backend torch"
    )
    assert told(RepetitionRule(9, 0.5), case).endswith("--backend torch --min-count 9 --min-seconds 0.5")
    assert told(RepetitionRule(3, 0.0), case, True).endswith("--with-decoder")
    assert "--min" not in told(RepetitionRule(5, 2.0), [Case(unet="39M", steps=7, device="cuda")])


@pytest.mark.parametrize(
    "case",
    [
        Case(unet="mine", weights_sha256="ab" * 32),
        Case(unet="/home/me/mine"),
        Case(unet="39M", backend="$(reboot)"),
        Case(unet="40M"),
        Case(unet="gan-1M", task="rival", backend="eager", sampler="none", steps=1),
    ],
)
def test_what_no_option_names_has_no_command(case: Case) -> None:
    assert measuring_command([case]) is None
    assert cases_in_words([case, case]) == "1 case of 1 network on 1 backend"
    assert measuring_command([]) is None
