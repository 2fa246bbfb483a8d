"""The judge reads real latents, and a judge that learned nonsense fails its own check."""

import pytest
import torch
from closed_world.data import Source
from closed_world.family import WORLDS
from closed_world.judge import FEATURES, Judge, JudgeError, ceiling, load_judge, save_judge, trained_judge
from closed_world.networks import COMMITTED
from closed_world.scenes import COUNTS, FACTORS

WORLD = WORLDS[8]


def test_the_committed_judge_reads_every_factor_of_real_latents():
    found = ceiling(load_judge(COMMITTED / "judge.safetensors", WORLD), WORLD)
    assert found.keys() == FACTORS.keys()
    assert min(found.values()) > 0.99


def test_a_judge_of_shuffled_labels_fails_its_own_check():
    """The same training as a short right one, which reads colours by then."""
    told = []
    right, wrong = (
        trained_judge(WORLD, steps=60, batch=64, shuffled=shuffled, tell=told.append) for shuffled in (False, True)
    )
    assert told == [step / 60 for step in range(1, 61)] * 2
    real = Source(WORLD, 77).read(0, 500)
    colours = right.answers(real.latents, real.factors).right[:, 1].double().mean()
    shuffled = wrong.answers(real.latents, real.factors).right.double().mean(0)
    assert colours > 0.6
    for share, count in zip(shuffled.tolist(), COUNTS, strict=True):
        assert abs(share - 1 / count) < 0.12
    with pytest.raises(JudgeError, match="train it longer"):
        ceiling(wrong, WORLD)


def test_answers_are_each_latents_own():
    """Whatever else is judged with it: statistics of a batch are those of training."""
    torch.manual_seed(0)
    judge = Judge(WORLD).eval()
    real = Source(WORLD, 5).read(0, 6)
    together = judge.answers(real.latents, real.factors)
    assert together.features.shape == (6, FEATURES)
    for i in range(6):
        alone = judge.answers(real.latents[i : i + 1], real.factors[i : i + 1])
        torch.testing.assert_close(alone.features[0], together.features[i], rtol=1e-4, atol=1e-4)
        assert torch.equal(alone.right[0], together.right[i])


def test_a_saved_judge_gives_the_same_answers_to_16_bits(tmp_path):
    torch.manual_seed(0)
    judge = Judge(WORLD).eval()
    save_judge(judge, tmp_path / "judge.safetensors")
    real = Source(WORLD, 5).read(0, 20)
    first, second = (
        one.answers(real.latents, real.factors).features
        for one in (judge, load_judge(tmp_path / "judge.safetensors", WORLD))
    )
    torch.testing.assert_close(first, second, rtol=2e-2, atol=2e-2)
    assert not torch.equal(first, torch.zeros_like(first))


def test_a_larger_world_has_a_judge_too():
    judge = Judge(WORLDS[16]).eval()
    features, logits = judge(torch.randn(2, 4, 16, 16))
    assert features.shape == (2, FEATURES)
    assert tuple(one.shape[1] for one in logits) == COUNTS
