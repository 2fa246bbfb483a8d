"""The world's latents and captions: exact, near the best of their kind, and frozen."""

import hashlib

import numpy as np
import pytest
import torch
from closed_world.captions import CONTEXT_DIM, TOKENS, embedded, none_embedded
from closed_world.data import Source
from closed_world.family import WORLDS
from closed_world.latents import PATCH, LinearAutoencoder, autoencoder, fitted
from closed_world.scenes import COUNTS, Scenes
from hypothesis import given, settings
from hypothesis import strategies as st

SIDES = (32, 64)


@pytest.mark.parametrize("side", SIDES)
def test_the_components_are_nearly_the_best_four(side):
    """Of other scenes than they were fitted on, by torch's SVD: no four directions keep much more."""
    images, _ = Scenes(9, side).images(0, 400)
    patches = torch.nn.functional.pixel_unshuffle(torch.from_numpy(images).double(), PATCH)
    rows = patches.permute(0, 2, 3, 1).reshape(-1, 3 * PATCH**2)
    rows = rows - rows.mean(0)
    best = torch.linalg.svdvals(rows).square()
    # Channels of pixel_unshuffle are colour, row, column, as ours.
    components = torch.from_numpy(autoencoder(side).components).double() / 1024
    kept = (rows @ components.T).square().sum()
    torch.testing.assert_close(components @ components.T, torch.eye(4).double(), rtol=0, atol=3e-3)
    assert kept / best[:4].sum() > 0.995
    assert best[:4].sum() / best.sum() > 0.8


def test_the_committed_weights_are_those_of_a_fit_here():
    """Within what rounding of an eigenvector allows."""
    one, again = autoencoder(32), fitted(32)
    assert np.abs(one.mean - again.mean).max() <= 1
    assert np.abs(one.components - again.components).max() <= 1
    np.testing.assert_allclose(one.deviations, again.deviations, atol=0.011)


@pytest.mark.parametrize("side", SIDES)
def test_latents_are_decoded_to_the_nearest_image_of_their_kind(side):
    """decode is the transpose: what it gives is encoded to the same latent, but for rounded and clipped pixels."""
    images, _ = Scenes(3, side).images(0, 20)
    one = autoencoder(side)
    latents = one.encode(images)
    assert latents.shape == (20, 4, side // 4, side // 4)
    assert latents.dtype == np.float32
    decoded = one.decode(latents)
    assert decoded.dtype == np.uint8
    error = np.abs(decoded.astype(int) - images).mean()
    assert error < 20
    assert np.corrcoef(one.encode(decoded).ravel(), latents.ravel())[0, 1] > 0.995


def test_channels_have_about_unit_variance():
    images, _ = Scenes(8).images(0, 500)
    np.testing.assert_allclose(autoencoder(32).encode(images).std((0, 2, 3)), 1, atol=0.06)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.permutations(range(48)))
def test_sums_are_exact_in_any_order(seed, order):
    """With pixels and components in another order, every bit of a latent is the same."""
    one = autoencoder(32)
    patches = np.random.default_rng(seed).integers(0, 256, (5, 48))
    images = patches.reshape(5, 3, 4, 4).astype(np.uint8)
    shuffled = LinearAutoencoder(one.mean[order], one.components[:, order], one.deviations)
    other = patches[:, order].reshape(5, 3, 4, 4).astype(np.uint8)
    assert (one.encode(images) == shuffled.encode(other)).all()


def test_latents_have_the_bits_that_they_have_on_every_machine():
    found = {latent: Source(world, 1).read(0, 64).latents.numpy() for latent, world in WORLDS.items()}
    digests = {latent: hashlib.sha256(values.tobytes()).hexdigest()[:16] for latent, values in found.items()}
    assert digests == DIGESTS


def test_a_source_gives_the_same_scene_whatever_is_read_before():
    world = WORLDS[8]
    whole = Source(world, 4).read(0, 40)
    other = Source(world, 4)
    for first, count in ((30, 10), (0, 5), (5, 25)):
        part = other.read(first, count)
        assert torch.equal(part.latents, whole.latents[first : first + count])
        assert torch.equal(part.factors, whole.factors[first : first + count])


def test_every_value_of_every_factor_has_a_token_of_its_own():
    rows = [
        embedded(torch.tensor([[value if i == which else 0 for i in range(TOKENS)]]))[0, which]
        for which, count in enumerate(COUNTS)
        for value in range(count)
    ]
    rows += list(none_embedded(1)[0])
    table = torch.stack(rows)
    assert table.shape == (sum(COUNTS) + TOKENS, CONTEXT_DIM)
    assert set(table.unique().tolist()) == {-1.0, 1.0}
    assert len({tuple(row.tolist()) for row in table}) == len(table)
    digest = hashlib.sha256(table.numpy().tobytes()).hexdigest()[:16]
    assert digest == TOKENS_DIGEST


def test_an_untold_caption_is_none():
    factors = torch.from_numpy(Scenes(2).factors(0, 4))
    told = torch.tensor([True, False, True, False])
    context = embedded(factors, told)
    assert torch.equal(context[told], embedded(factors[told]))
    assert torch.equal(context[~told], none_embedded(2))


TOKENS_DIGEST = "3f3e8b9e5859da84"
DIGESTS = {8: "e1ba6e02ac548d95", 16: "c111382834797f12"}
