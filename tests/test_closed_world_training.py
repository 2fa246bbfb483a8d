"""Training in the closed world: it learns, it is the same twice, and a break does not change it."""

import dataclasses
import itertools

import pytest
import torch
from closed_world import networks
from closed_world.captions import CONTEXT_DIM, TOKENS
from closed_world.family import SCHEDULE, WORLDS
from closed_world.networks import forward_gflop, load_network, network_folder, save_network
from closed_world.training import Recipe, Training, drawn_network, trained
from closed_world_tasks import cut_off_after
from torch.utils.flop_counter import FlopCounterMode

WORLD = WORLDS[8]
SHORT = Recipe(steps=20, batch=16, warmup=5)


def begun(width, seed, recipe):
    return Training(WORLD, drawn_network(WORLD.config(width), seed), seed, recipe)


def losses(training, steps):
    return [training.step() for _ in range(steps)]


def test_twenty_steps_of_the_narrowest_lower_the_loss():
    found = losses(begun(WORLD.widths[0], 0, SHORT), 20)
    assert sum(found[-4:]) < 0.95 * sum(found[:4])


def test_a_seed_gives_the_same_bits_and_another_seed_others():
    first, second, other = (begun(8, seed, SHORT) for seed in (3, 3, 4))
    assert losses(first, 3) == losses(second, 3) != losses(other, 3)
    for name, value in first.averaged.items():
        assert torch.equal(value, second.averaged[name])


def test_a_training_that_was_cut_off_goes_on_to_the_same_bits(tmp_path):
    whole = trained(begun(8, 1, dataclasses.replace(SHORT, steps=6)), tmp_path / "whole.pt")
    cut = cut_off_after(5, begun(8, 1, dataclasses.replace(SHORT, steps=6)))
    with pytest.raises(KeyboardInterrupt):
        trained(cut, tmp_path / "cut.pt", every=2)
    told = []
    again = trained(
        begun(8, 1, dataclasses.replace(SHORT, steps=6)), tmp_path / "cut.pt", every=2, tell=told.append
    )
    assert again.done == 6
    assert told == [5 / 6, 1.0]
    for name, value in whole.averaged.items():
        assert torch.equal(value, again.averaged[name])


def test_widths_see_the_same_scenes_noise_and_timesteps(monkeypatch):
    seen = {}
    for width in (8, 12):
        training = begun(width, 2, SHORT)
        monkeypatch.setattr(
            training.network, "forward", lambda *given, width=width: seen.setdefault(width, given)[0]
        )
        training._loss(7)
    for narrow, wide in zip(seen[8], seen[12], strict=True):
        assert torch.equal(narrow, wide)


def test_the_target_is_v_of_diffusers():
    """With a network that knows the answer the loss is zero: v as diffusers' scheduler defines it."""
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction"
    )
    torch.testing.assert_close(
        torch.tensor(SCHEDULE.alphas_cumprod, dtype=torch.float32), theirs.alphas_cumprod, rtol=1e-5, atol=1e-7
    )
    training = begun(8, 0, SHORT)
    draws = torch.Generator().manual_seed(training.seed << 32 | 1)
    latents = training._source.read(0, SHORT.batch).latents
    noise = torch.randn(latents.shape, generator=draws)
    timesteps = torch.randint(0, 1000, (SHORT.batch,), generator=draws)
    asked = {}

    def knows(x, t, context):
        asked["x"] = x
        return theirs.get_velocity(latents, noise, t.long())

    training.network.forward = knows
    assert training._loss(1).item() < 1e-10
    torch.testing.assert_close(asked["x"], theirs.add_noise(latents, noise, timesteps))


def test_averaged_weights_follow_by_a_share_that_shrinks():
    """By hand in float64: the share of a new weight is 9 / (10 + step), at least 1 less `averaging`."""
    training = begun(8, 0, dataclasses.replace(SHORT, averaging=0.25))
    expected = {name: value.double() for name, value in training.averaged.items()}
    for number in range(1, 5):
        training.step()
        share = max(9 / (10 + number), 0.75)
        for name, value in training.network.state_dict().items():
            expected[name] = (1 - share) * expected[name] + share * value.double()
    for name, value in training.averaged.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_the_rate_rises_then_falls_to_the_last():
    recipe = Recipe(steps=1000, learning_rate=1.0, last_rate=0.01, warmup=100)
    rates = [recipe.rate(step) for step in range(1, 1001)]
    assert rates[0] < 0.02
    assert max(rates) == rates[99] or max(rates) == rates[100]
    assert rates[-1] == pytest.approx(0.01)
    assert all(a >= b for a, b in itertools.pairwise(rates[100:]))


def test_a_saved_network_is_the_averaged_one_in_16_bits(tmp_path):
    training = begun(8, 0, SHORT)
    losses(training, 2)
    folder = network_folder(tmp_path, 8, 0)
    save_network(training.averaged_network(), folder)
    assert folder.name == "w8"
    found = load_network(folder).state_dict()
    for name, value in training.averaged.items():
        assert torch.equal(found[name], value.half().float()), name


def test_a_network_that_was_cut_off_while_written_is_not_there(tmp_path, monkeypatch):
    """A training is done where its folder is."""
    folder = network_folder(tmp_path, 8, 0)
    network = begun(8, 0, SHORT).averaged_network()
    with monkeypatch.context() as broken:
        broken.setattr(networks, "save_unet", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            save_network(network, folder)
    assert not folder.exists()
    save_network(network, folder)
    assert [path.name for path in folder.parent.iterdir()] == ["w8"]


@pytest.mark.parametrize(("width", "share"), [(8, 0.013), (32, 0.006)])
def test_flops_leave_out_the_conditioning(width, share):
    """By torch's counter of a forward of training; the shares are told in docs/closed-world.md."""
    config = WORLD.config(width)
    with FlopCounterMode(display=False) as counter:
        drawn_network(config, 0)(torch.zeros(1, 4, 8, 8), torch.zeros(1), torch.zeros(1, TOKENS, CONTEXT_DIM))
    left_out = counter.get_total_flops() / 1e9 - forward_gflop(config, 8)
    assert left_out / forward_gflop(config, 8) == pytest.approx(share, abs=0.0005)


def test_flops_span_the_papers_range():
    costs = [forward_gflop(WORLD.config(width), WORLD.latent) for width in WORLD.widths]
    assert len(costs) == 5
    assert costs == sorted(costs)
    assert costs[0] / costs[-1] == pytest.approx(0.07, abs=0.005)
