"""bench/training_step.py: what it compares, and the table of what it found."""

import torch
import training_step
from training_step import batch, in_place, network, ours, plain, step, written_table

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


def test_the_table_tells_ratios_and_core_minutes():
    widths = {
        "8": {"ours": 40.0, "plain": 32.0, "training": 50.0},
        "32": {"ours": 84, "plain": 80, "training": 90},
    }
    found = {
        "environment": collect_environment().model_dump(mode="json"),
        **{"steps": 30, "training_steps": 2000, "seeds": 3, "widths": widths},
    }
    told = written_table(found)
    # 50 ms x 2000 x 3 are 5 minutes, 90 ms 9 of them.
    assert "| w8 | 40.0 | 32.0 | 1.25 | 50.0 | 5 |" in told
    assert "| w32 | 84.0 | 80.0 | 1.05 | 90.0 | 9 |" in told
    assert "medians of 30 steps" in told.replace("\n", " ")
    assert "3 trainings of 2000 steps at that, 14 for all networks" in told.replace("\n", " ")
