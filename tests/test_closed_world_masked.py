"""Masked transformers: tokens by brute force, torch's closed forms, the sampling loop of aMUSEd's pipeline."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from closed_world import cells, masked_cells, study, tokens
from closed_world.captions import embedded, none_embedded
from closed_world.data import Source
from closed_world.family import WORLDS
from closed_world.masked import (
    MASK,
    SHAPES,
    TrainingTokens,
    drawn_token_network,
    evaluation_gflop,
    guided_logits,
    load_token_network,
    logits_of,
    masked_places,
    sampled_tokens,
    save_token_network,
    token_loss,
)
from closed_world.masked_cells import JudgeTokens, Masked, masked_folder, masked_rates
from closed_world.networks import COMMITTED, parameters
from closed_world.sampling import Prompts
from closed_world.tasks import stages
from closed_world.tokens import CODES, Codebook, codebook, fitted
from closed_world.training import Recipe, trained
from closed_world_tasks import cut_off_after
from diffusers import AmusedScheduler, UVit2DModel
from hypothesis import given, settings
from hypothesis import strategies as st

WORLD = WORLDS[8]
SHORT = Recipe(steps=6, batch=16, learning_rate=5e-3, warmup=2)
M12 = SHAPES[8]["m12"]


def tiny(seed=0):
    return drawn_token_network(M12, seed).eval()


def training(recipe=SHORT, seed=0):
    return TrainingTokens(WORLD, drawn_token_network(M12, seed), seed, recipe)


# Tokens


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 9), st.integers(0, 999))
def test_a_token_is_the_nearest_code_and_the_first_of_equals(count, height, width, codes, seed):
    """By brute force in Python's own integers; the codes are near each other, so there are ties."""
    draws = np.random.default_rng(seed)
    book = Codebook(draws.integers(-2, 3, (codes, 4)))
    latents = torch.from_numpy(draws.normal(0, 0.01, (count, 4, height, width)).astype(np.float32))
    found = book.tokens(latents)
    assert found.shape == (count, height, width)
    for n, i, j in np.ndindex(count, height, width):
        place = [round(float(value) * 256) for value in latents[n, :, i, j]]
        far = [sum((int(a) - b) ** 2 for a, b in zip(code, place, strict=True)) for code in book.codes]
        assert found[n, i, j] == far.index(min(far))


def test_tokens_come_back_from_their_latents():
    book = codebook(WORLD)
    assert book.codes.shape == (CODES, 4)
    assert len(np.unique(book.codes, axis=0)) == CODES
    drawn = torch.randint(CODES, (3, 8, 8), generator=torch.Generator().manual_seed(0))
    latents = book.latents(drawn)
    assert (latents.shape, latents.dtype) == ((3, 4, 8, 8), torch.float32)
    assert latents[1, :, 2, 5].tolist() == [value / 256 for value in book.codes[drawn[1, 2, 5]].tolist()]
    assert torch.equal(book.tokens(latents), drawn)


def test_the_committed_codes_are_those_of_the_fit():
    assert np.array_equal(fitted(WORLD).codes, codebook(WORLD).codes)


def test_a_round_of_the_fit_is_a_rounded_mean():
    before, after = (fitted(WORLD, codes=5, scenes=3, rounds=rounds) for rounds in (1, 2))
    places = Source(WORLD, 2405).read(0, 3).latents.permute(0, 2, 3, 1).reshape(-1, 4)
    parts = torch.round(places.double() * 256)
    nearest = torch.cdist(parts, torch.from_numpy(before.codes).double()).argmin(1)
    means = torch.stack([parts[nearest == code].mean(0) for code in range(5)])
    assert np.array_equal(after.codes, means.round().long().numpy())


def test_codes_that_are_fitted_tell_scenes_better_than_drawn_ones():
    """And what a fit leaves is little beside the latents' unit variance."""
    latents = Source(WORLD, 3).read(0, 200).latents
    first, last = (
        (book.latents(book.tokens(latents)) - latents).square().mean().item()
        for book in (fitted(WORLD, scenes=200, rounds=0), codebook(WORLD))
    )
    assert last < min(first, 0.05)


# Training


def test_the_share_that_is_masked_is_the_cosines():
    """u is uniform, so a share is below s with the probability 1 - 2 arccos(s) / pi; the mean is 2 / pi."""
    masked = masked_places(4000, 8, torch.Generator().manual_seed(0))
    counts = masked.flatten(1).sum(1)
    assert 1 <= counts.min() <= 2
    assert counts.max() == 64
    assert counts.double().mean().item() / 64 == pytest.approx(2 / math.pi, abs=0.015)
    for share in (0.25, 0.5, 0.9):
        below = (counts < 64 * share).double().mean().item()
        # A rounded count is below where the share is below by half a place.
        expected = 1 - 2 / math.pi * math.acos(share - 0.5 / 64)
        assert below == pytest.approx(expected, abs=0.025)
    # Every place is masked alike.
    torch.testing.assert_close(
        masked.double().mean(0), torch.full((8, 8), 2 / math.pi).double(), rtol=0, atol=0.04
    )


def test_the_loss_is_the_mean_surprise_of_masked_tokens():
    logits = torch.tensor([[[[1.0, 0.0]], [[3.0, 0.0]], [[0.0, 9.0]]]])
    found = torch.tensor([[[1, 0]]])
    only_first = token_loss(logits, found, torch.tensor([[[True, False]]]))
    first = math.log(math.e + math.exp(3) + 1) - 3
    assert only_first.item() == pytest.approx(first, rel=1e-5)
    both = token_loss(logits, found, torch.ones(1, 1, 2, dtype=torch.bool))
    second = math.log(2 + math.exp(9))
    assert both.item() == pytest.approx((first + second) / 2, rel=1e-5)


def test_a_step_tells_the_network_no_masked_token_and_learns_those_alone(monkeypatch):
    one, seen = training(dataclasses.replace(SHORT, untold=0.5)), {}
    real = one._read(one._source, 1)

    def watched(network, given, context):
        seen.update(given=given, context=context)
        return torch.zeros(len(given), CODES, 8, 8, requires_grad=True)

    monkeypatch.setattr("closed_world.masked.logits_of", watched)
    # Logits all alike: the surprise is that of one code among all.
    assert one._loss(1).item() == pytest.approx(math.log(CODES), rel=1e-6)
    is_masked = seen["given"] == MASK
    told = codebook(WORLD).tokens(real.latents)
    assert 0 < is_masked.sum() < is_masked.numel()
    assert torch.equal(seen["given"][~is_masked], told[~is_masked])
    is_told = (seen["context"] == embedded(real.factors)).flatten(1).all(1)
    is_untold = (seen["context"] == none_embedded(SHORT.batch)).flatten(1).all(1)
    assert torch.equal(is_told, ~is_untold)
    assert is_told.any()
    assert is_untold.any()


def test_a_short_training_lowers_the_loss():
    """The same scenes and masks each time."""
    one = training(dataclasses.replace(SHORT, steps=20))
    with torch.no_grad():
        before = one._loss(1).item()
    for _ in range(20):
        one.step()
    with torch.no_grad():
        assert one._loss(1).item() < 0.95 * before


def test_a_training_that_was_cut_off_goes_on_to_the_same_bits(tmp_path):
    whole = trained(training(), tmp_path / "whole.pt")
    with pytest.raises(KeyboardInterrupt):
        trained(cut_off_after(5, training()), tmp_path / "cut.pt", every=2)
    again = trained(training(), tmp_path / "cut.pt", every=2)
    assert again.done == 6
    for name, value in whole.averaged.items():
        assert torch.equal(value, again.averaged[name])
    network = again.averaged_network()
    assert not network.training
    for name, value in network.state_dict().items():
        assert torch.equal(value, whole.averaged[name])


@pytest.mark.parametrize(("name", "of"), [("m12", 116_164), ("m32", 792_964)])
def test_a_size_has_about_the_parameters_of_the_familys(name, of):
    assert parameters(drawn_token_network(SHAPES[8][name], 0)) == pytest.approx(of, rel=0.01)


def test_a_folder_is_diffusers_and_holds_the_weights_in_16_bits(tmp_path):
    network = tiny()
    save_token_network(network, tmp_path / "m12")
    assert network.dtype == torch.float32
    theirs = UVit2DModel.from_pretrained(tmp_path / "m12", low_cpu_mem_usage=False)
    assert theirs.config.codebook_size == CODES
    ours = load_token_network(tmp_path / "m12").state_dict()
    for name, value in network.state_dict().items():
        assert torch.equal(ours[name], value.half().float())
    assert (tmp_path / "m12" / "diffusion_pytorch_model.safetensors").stat().st_size < 2.2 * parameters(network)


# Sampling


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_an_image_is_that_of_amuseds_loop(guidance):
    """diffusers' AmusedPipeline's steps on one image, which draws from a generator of its seed."""
    network, prompts = tiny(), Prompts.of("test", 3)
    found = sampled_tokens(network, 8, 4, prompts, guidance, batch=2)
    assert (found.shape, found.max() < MASK) == ((3, 8, 8), True)
    context, none = embedded(prompts.factors), none_embedded(3)
    for i, seed in enumerate(prompts.seeds):
        scheduler = AmusedScheduler(mask_token_id=MASK)
        scheduler.set_timesteps(4)
        latents, generator = torch.full((1, 8, 8), MASK), torch.Generator().manual_seed(seed)
        for timestep in scheduler.timesteps:
            with torch.no_grad():
                uncond, cond = (logits_of(network, latents, one[i : i + 1]) for one in (none, context))
            logits = uncond + guidance * (cond - uncond)
            latents = scheduler.step(logits, timestep, latents, generator=generator).prev_sample
        # Batches round differently, which may flip a draw.
        assert (found[i] == latents[0]).double().mean() > 0.9


def test_a_network_sees_as_many_masks_as_the_cosine_leaves():
    seen = []

    class Watched(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, given, *_):
            seen.append((given == MASK).flatten(1).sum(1).tolist())
            return torch.zeros(len(given), CODES, 8, 8)

    sampled_tokens(Watched(), 8, 4, Prompts.of("test", 2), 1.0)
    assert seen == [2 * [math.floor(64 * math.cos(math.pi * k / 8))] for k in range(4)]


def test_guidance_goes_on_from_no_caption_to_the_caption():
    network, prompts = tiny(), Prompts.of("test", 2)
    masks, told, untold = torch.full((2, 8, 8), MASK), embedded(prompts.factors), none_embedded(2)
    with torch.no_grad():
        far, near = logits_of(network, masks, untold), logits_of(network, masks, told)
        found = guided_logits(network, masks, told, untold, 2.5)
        assert torch.equal(guided_logits(network, masks, told, untold, 1.0), near)
    torch.testing.assert_close(found, 2.5 * near - 1.5 * far, rtol=1e-4, atol=1e-4)


def test_flops_are_those_of_linear_layers_convolutions_and_attention():
    """By hooks on the layers, two per multiply-add; attention by its formula."""
    network, found = tiny(), []

    def linear(layer, given, made):
        found.append(2 * made.numel() * layer.in_features)

    def convolution(layer, given, made):
        found.append(2 * made.numel() * layer.weight[0].numel())

    for layer in network.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_hook(linear)
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(convolution)
    with torch.no_grad():
        logits_of(network, torch.full((1, 8, 8), MASK), none_embedded(1))
    # Attention to 64 places in each transformer layer, to six words there; around it only among skips.
    attentions = [module for module in network.modules() if type(module).__name__ == "Attention"]
    keys = [6 if module.is_cross_attention else 64 for module in attentions]
    found += [4 * 64 * number * module.inner_dim for number, module in zip(keys, attentions, strict=True)]
    assert evaluation_gflop(tiny(), 8) == pytest.approx(sum(found) / 1e9, rel=1e-6)


# Records


def of(folder):
    return study.Study(
        folder,
        folder / "given",
        "a" * 32,
        masked=dataclasses.replace(SHORT, steps=2),
        seeds=(0, 1),
        samples=60,
        held_out=40,
    )


def with_judge(one):
    one.weights.mkdir()
    one.judge.write_bytes((COMMITTED / "judge.safetensors").read_bytes())


def test_a_size_is_trained_tuned_on_the_first_seed_and_judged_once(tmp_path, monkeypatch):
    one = of(tmp_path)
    with_judge(one)
    monkeypatch.setattr(cells, "EVALUATIONS", (1, 2))
    Masked("m12", M12, one.seeds).run(one)
    records = list(study.kept(one).values())
    for record in records:
        case = record.case
        assert (case.kind, case.network, case.sampler) == ("masked-transformer", "m12", "masked")
        assert (case.training_steps, record.takes) == (2, (("m12", case.steps),))
        assert record.parameters == parameters(tiny())
        forward = evaluation_gflop(tiny(), 8)
        assert record.gflop_per_image == pytest.approx(forward * case.steps * (2 if case.guided else 1))
        assert record.training_gflop == pytest.approx(3 * forward * 2 * 16)
        assert record.tuned == (case.split == "test")
        assert len(record.frechet.replicates) == (200 if record.tuned else 0)
    held_out, test = ([r for r in records if r.case.split == split] for split in ("held-out", "test"))
    assert {record.case.training_seed for record in held_out} == {0}
    assert {(r.case.training_seed, r.case.steps) for r in test} == {(0, 1), (0, 2), (1, 1), (1, 2)}
    # The guidance is that of the least distance on held-out prompts, for all seeds.
    for record in test:
        alike = [r for r in held_out if r.case.steps == record.case.steps]
        best = min(alike, key=lambda r: r.frechet.value)
        assert record.case.guidance_scale == best.case.guidance_scale
        assert len(alike) >= 2
    assert masked_folder(one, "m12", 1).is_relative_to(one.folder / "weights")
    assert masked_folder(one, "m12", 1).name == "m12"
    monkeypatch.setattr(masked_cells, "trained", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(masked_cells, "sampled_tokens", lambda *_: pytest.fail("sampled again"))
    Masked("m12", M12, one.seeds).run(one)
    assert masked_rates(one, "m12").keys() == {1, 2}


def test_real_scenes_as_tokens_are_judged_as_a_ceiling(tmp_path):
    one = dataclasses.replace(of(tmp_path), samples=200)
    with_judge(one)
    JudgeTokens().run(one)
    JudgeTokens().run(one)
    (line,) = one.records.read_text().splitlines()
    assert json.loads(line)["case"]["network"] == "real-tokens"
    (record,) = study.kept(one).values()
    assert (record.case.kind, record.takes, record.tuned) == ("real", (), False)
    # Tokens lose little: a judge that reads them still reads nearly all.
    assert 0.97 < record.alignment.value < 1


def test_every_size_is_a_task_where_there_are_tokens():
    tasks = stages(of(COMMITTED), ("ddim",))["masked"]
    assert [type(task) for task in tasks] == [JudgeTokens, Masked, Masked]
    assert [task.name for task in tasks[1:]] == ["m12", "m32"]
    assert stages(dataclasses.replace(of(COMMITTED), latent=16), ("ddim",))["masked"] == []
    assert json.loads(tokens.WEIGHTS.read_text()).keys() == {WORLD.name}
