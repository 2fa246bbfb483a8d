"""Philox noise: the published bijection; noise of the seed, the element and the step, and of nothing else."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldmperf.kernels import philox_normal, seed_tensor
from ldmperf.kernels.philox import INITIAL_NOISE, STEP_NOISE, _box_muller, philox4x32

INT64 = st.integers(-(2**63), 2**63 - 1)


def words(*values):
    return tuple(torch.tensor(value, dtype=torch.int64) for value in values)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers_of_random123(counter, key, expected):
    assert [int(word) for word in philox4x32(words(*counter), words(*key))] == list(expected)


def plain_philox(counter, key, rounds):
    """In Python's own integers."""
    c, k = list(counter), list(key)
    for _ in range(rounds):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def test_the_smallest_and_the_largest_word_are_finite():
    extremes = torch.tensor([0, 2**32 - 1])
    cosine, sine = _box_muller(extremes, torch.zeros(2, dtype=torch.int64))
    assert cosine.tolist() == pytest.approx([math.sqrt(66 * math.log(2)), 0.0], rel=1e-6)
    assert sine.tolist() == [0.0, 0.0]


WORD = st.integers(0, 2**32 - 1)


@given(st.tuples(WORD, WORD, WORD, WORD), st.tuples(WORD, WORD), st.integers(0, 12))
@settings(max_examples=60, deadline=None)
def test_equals_plain_integers(counter, key, rounds):
    result = philox4x32(words(*counter), words(*key), rounds)
    assert [int(word) for word in result] == plain_philox(counter, key, rounds)


@given(INT64, st.integers(1, 23), st.integers(0, 2**31 - 1), st.sampled_from([INITIAL_NOISE, STEP_NOISE]))
@settings(max_examples=60, deadline=None)
def test_elements_equal_the_documented_formula(seed, numel, step, stream):
    noise = philox_normal(torch.tensor([seed]), [numel], step, stream)[0]
    key = (seed % 2**32, (seed >> 32) % 2**32)
    for element, value in enumerate(noise.tolist()):
        out = plain_philox((element // 4, 0, step, stream), key, 10)
        lane = element % 4
        a, b = out[2 * (lane // 2)], out[2 * (lane // 2) + 1]
        radius = math.sqrt(-2.0 * math.log((a + 0.5) * 2.0**-32))
        angle = 2.0 * math.pi * b * 2.0**-32
        expected = radius * (math.cos(angle) if lane % 2 == 0 else math.sin(angle))
        assert value == pytest.approx(expected, abs=4e-6)


@given(st.lists(INT64, min_size=1, max_size=5), st.data())
@settings(max_examples=40, deadline=None)
def test_a_seed_gives_the_same_image_in_any_batch_and_position(seeds, data):
    position = data.draw(st.integers(0, len(seeds) - 1))
    shape = (3, 5, 7)
    batch = philox_normal(seed_tensor(seeds, "cpu"), shape, 3, STEP_NOISE)
    alone = philox_normal(seed_tensor([seeds[position]], "cpu"), shape, 3, STEP_NOISE)
    assert batch.shape == (len(seeds), *shape)
    assert torch.equal(batch[position], alone[0])


def test_a_smaller_image_is_a_prefix_and_the_layout_plays_no_part():
    seeds = torch.tensor([5])
    flat = philox_normal(seeds, [4 * 6 * 7], 0)
    assert torch.equal(philox_normal(seeds, [4, 6, 7], 0).flatten(1), flat)
    assert torch.equal(philox_normal(seeds, [10], 0), flat[:, :10])


def test_step_from_the_device_equals_step_from_the_host():
    seeds = torch.tensor([-1, 2**62])
    for step in (torch.tensor([7]), torch.tensor(7)):
        assert torch.equal(philox_normal(seeds, [4, 3, 3], step, 1), philox_normal(seeds, [4, 3, 3], 7, 1))


@given(INT64, INT64)
@settings(max_examples=30, deadline=None)
def test_every_bit_of_a_seed_counts(seed, other):
    same = torch.equal(philox_normal(torch.tensor([seed]), [64]), philox_normal(torch.tensor([other]), [64]))
    assert same == (seed == other)


def test_seeds_are_taken_modulo_2_to_the_64():
    assert seed_tensor([2**64 - 1, 2**63, 0], "cpu").tolist() == [-1, -(2**63), 0]


@pytest.mark.parametrize("seeds", [[1.0], 3, [True], torch.tensor([1.5]), torch.tensor(3), "12", [None]])
def test_seeds_that_are_no_whole_numbers_are_refused(seeds):
    with pytest.raises(ValueError, match="seeds must be"):
        seed_tensor(seeds, "cpu")


def test_philox_normal_refuses_other_dtypes():
    with pytest.raises(ValueError, match="int64"):
        philox_normal(torch.tensor([1], dtype=torch.int32), [4])


SAMPLES = philox_normal(torch.arange(64), [4, 64, 64])
COUNT = SAMPLES.numel()


def test_moments():
    x = SAMPLES.double().flatten()
    assert x.dtype == torch.float64
    assert SAMPLES.dtype == torch.float32
    assert torch.isfinite(x).all()
    # Five standard errors of each moment of COUNT normal numbers.
    assert abs(float(x.mean())) < 5 / COUNT**0.5
    assert abs(float(x.var()) - 1) < 5 * (2 / COUNT) ** 0.5
    assert abs(float((x**3).mean())) < 5 * (15 / COUNT) ** 0.5
    assert abs(float((x**4).mean()) - 3) < 5 * (96 / COUNT) ** 0.5


@pytest.mark.parametrize("lane", range(4))
def test_distribution_of_every_lane(lane):
    """Kolmogorov-Smirnov: the largest distance to the normal distribution, at a level of about 1e-6."""
    x = SAMPLES.double().flatten(1)[:, lane::4].flatten().sort().values
    below = 0.5 * (1 + torch.erf(x / 2**0.5))
    rank = torch.arange(1, x.numel() + 1, dtype=torch.float64) / x.numel()
    assert float((rank - below).abs().max()) < 2.7 / x.numel() ** 0.5


def correlation(a, b):
    return abs(float((a.double() * b.double()).mean()))


def test_no_correlation_between_elements_seeds_steps_and_streams():
    seeds = torch.arange(32)
    x = philox_normal(seeds, [4, 64, 64], 0)
    bound = 5 / x.numel() ** 0.5
    flat = x.flatten(1)
    for lag in (1, 2, 3, 4, 64, 4096):
        assert correlation(flat[:, lag:], flat[:, :-lag]) < 1.1 * bound, lag
        assert correlation(flat[:, lag:] ** 2 - 1, flat[:, :-lag] ** 2 - 1) < 2.2 * bound, lag
    assert correlation(x, x.roll(1, 0)) < bound
    assert correlation(x, philox_normal(seeds, [4, 64, 64], 1)) < bound
    assert correlation(x, philox_normal(seeds, [4, 64, 64], 0, STEP_NOISE)) < bound
    assert correlation(x, philox_normal(seeds << 32, [4, 64, 64], 0).roll(1, 0)) < bound
    assert correlation(x, philox_normal(-seeds - 1, [4, 64, 64], 0)) < bound
