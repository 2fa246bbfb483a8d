"""bench/training_step.py: what it compares, and the table of what it found."""

import json
import sys

import pytest
import torch
import training_step
from closed_world.training import Training
from training_step import (
    WARMUP,
    batch,
    cpu_ms,
    in_place,
    main,
    medians,
    network,
    ours,
    plain,
    step,
    training_table,
)

from ldmperf.kernels import modules
from ldmperf.profiling.measure.environment import collect_environment


def test_both_train_the_same_network():
    """The operators and plain torch in their place have the same gradients."""
    gradients = []
    for which in (ours, plain):
        unet = network(8)
        with which():
            step(unet, *batch())
        gradients.append({name: of.grad for name, of in unet.named_parameters() if of.grad is not None})
    first, second = gradients
    assert first.keys() == second.keys()
    assert len(first) > 50
    for name, gradient in first.items():
        torch.testing.assert_close(gradient, second[name], rtol=1e-3, atol=1e-5)


def test_every_operator_gives_way_to_plain_torch():
    called = set()

    def counting(operator, own):
        def run(*arguments, **options):
            called.add(operator)
            return own(*arguments, **options)

        return run

    with in_place(counting):
        step(network(8), *batch())
    assert called == {operator for _, operator in training_step.CALLED.values()}


def test_times_are_medians_in_turns_after_the_warmup(monkeypatch):
    own, turns = modules.group_norm_silu, []

    def clock(run):
        if getattr(run, "__func__", None) is Training.step:
            what, ms = "training", 10_000
        else:
            what, ms = ("ours", 1) if modules.group_norm_silu is own else ("plain", 100)
        turns.append(what)
        return ms * ([1000] * WARMUP + [1, 2, 6])[turns.count(what) - 1]

    monkeypatch.setattr(training_step, "cpu_ms", clock)
    assert medians(8, 3) == {"ours": 2, "plain": 200, "training": 20_000}
    assert turns == ["ours", "plain", "training"] * (WARMUP + 3)
    assert modules.group_norm_silu is own


def test_a_time_is_in_milliseconds(monkeypatch):
    monkeypatch.setattr(training_step.time, "process_time", iter([2.0, 2.25]).__next__)
    assert cpu_ms(lambda: None) == 250


def test_what_was_found_is_written_with_what_the_study_trains(monkeypatch, tmp_path):
    """Of the widths that were asked for; the steps that were timed are not those of a training."""
    ms = {"ours": 40.0, "plain": 32.0, "training": 50.0}
    monkeypatch.setattr(training_step, "medians", lambda width, steps: ms)
    monkeypatch.setattr(training_step, "operator_lines", lambda width: [])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    out = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["training_step.py", "--width", "12", "--steps", "7", "--out", str(out)])
    main()
    found = json.loads(out.read_bytes())
    assert (found["steps"], found["training_steps"], found["seeds"], found["widths"]) == (7, 3000, 3, {"12": ms})
    assert "| w12 | 40.0 | 32.0 | 1.25 | 50.0 | 8 |" in training_table(found)


@pytest.mark.parametrize(
    ("words", "told"),
    [(("--width", "7"), "choose from 8, 12, 16, 24, 32"), (("--out", "{}/no/found.json"), "make it first")],
    ids=["width", "folder"],
)
def test_what_cannot_be_measured_or_kept_is_told_first(words, told, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(training_step, "medians", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(sys, "argv", ["training_step.py", *(word.format(tmp_path) for word in words)])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert told in capsys.readouterr().err


def test_the_table_tells_ratios_and_core_minutes():
    widths = {
        "8": {"ours": 40.0, "plain": 32.0, "training": 50.0},
        "32": {"ours": 84, "plain": 80, "training": 90},
    }
    found = {
        "environment": collect_environment().model_dump(mode="json"),
        **{"steps": 30, "training_steps": 2000, "seeds": 3, "widths": widths},
    }
    told = training_table(found)
    # 50 ms x 2000 x 3 are 5 minutes, 90 ms 9 of them.
    assert "| w8 | 40.0 | 32.0 | 1.25 | 50.0 | 5 |" in told
    assert "| w32 | 84.0 | 80.0 | 1.05 | 90.0 | 9 |" in told
    assert "medians of 30 steps" in told.replace("\n", " ")
    assert "3 trainings of 2000 steps at that, 14 for all networks" in told.replace("\n", " ")
