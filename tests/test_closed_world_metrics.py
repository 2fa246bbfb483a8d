"""Distances of the closed world: closed forms, double loops and scipy; replicates that pair and cover."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from closed_world.metrics import DIRECTIONS, FEWEST, KID_ROWS, Reference, draws, proportion
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg, stats

METRICS = ("frechet", "kid", "sliced_wasserstein")
SHAPES = {
    "m": st.integers(FEWEST, 60),
    "n": st.integers(FEWEST, 60),
    "d": st.integers(1, 12),
    "latent": st.sampled_from([(1,), (5,), (4, 2, 2), (3, 1)]),
    "seed": st.integers(0, 2**32 - 1),
}


def standard(reference: Reference, features: np.ndarray) -> np.ndarray:
    return (features - reference.centre) / reference.scale


def drawn_samples(m, n, d, latent, seed):
    rng = np.random.default_rng(seed)
    mix, turn = rng.normal(size=(d, d)), rng.normal(size=(d, d))
    real = rng.normal(size=(m, d)) @ mix + 3, rng.normal(size=(m, *latent))
    ours = rng.normal(size=(n, d)) @ turn + rng.normal(size=d), 0.7 * rng.normal(size=(n, *latent)) + 0.2
    return real, ours


def nuclear_frechet(real: np.ndarray, ours: np.ndarray) -> float:
    """The Frechet distance by singular values of data matrices: no covariance, no root."""
    a, b = (rows - rows.mean(0) for rows in (real, ours))
    a, b = a / math.sqrt(len(a) - 1), b / math.sqrt(len(b) - 1)
    shift = real.mean(0) - ours.mean(0)
    return shift @ shift + (a * a).sum() + (b * b).sum() - 2 * linalg.svdvals(b @ a.T).sum()


def loop_kid(real: np.ndarray, ours: np.ndarray, names: list[int] | None = None) -> float:
    """KID by loops over pairs; `names` tells which of our samples are one sample drawn twice."""

    def kernel(x, y):
        return (sum(a * b for a, b in zip(x, y, strict=True)) / len(x) + 1) ** 3

    def within(rows, names):
        pairs = [(i, j) for i, j in product(range(len(rows)), repeat=2) if names[i] != names[j]]
        return math.fsum(kernel(rows[i], rows[j]) for i, j in pairs) / len(pairs)

    across = math.fsum(kernel(x, y) for x in ours for y in real) / len(real) / len(ours)
    return within(real, range(len(real))) + within(ours, names or range(len(ours))) - 2 * across


def repeated_wasserstein(real: np.ndarray, ours: np.ndarray) -> float:
    """Squared Wasserstein-2 of numbers, by as many copies of each as make both sides equally many."""
    length = math.lcm(len(real), len(ours))
    a, b = (np.sort(np.repeat(side, length // len(side))) for side in (real, ours))
    return float(np.mean((a - b) ** 2))


def sliced(reference: Reference, real: np.ndarray, ours: np.ndarray) -> float:
    flat = [side.reshape(len(side), -1) for side in (real, ours)]
    return float(np.mean([repeated_wasserstein(flat[0] @ line, flat[1] @ line) for line in reference.directions]))


@settings(deadline=None, max_examples=25)
@given(**SHAPES)
def test_of_any_shape_the_values_are_those_of_the_oracles(m, n, d, latent, seed):
    (features, latents), (ours, points) = drawn_samples(m, n, d, latent, seed)
    reference = Reference(features, latents)
    found = reference.distances(ours, points, resamples=0)
    real, ours = standard(reference, features), standard(reference, ours)
    assert found["frechet"][0] == pytest.approx(nuclear_frechet(real, ours), rel=1e-7, abs=1e-6)
    assert found["kid"][0] == pytest.approx(loop_kid(real, ours), rel=1e-9, abs=1e-9)
    assert found["sliced_wasserstein"][0] == pytest.approx(sliced(reference, latents, points), rel=1e-9, abs=1e-12)
    assert [replicates for _, replicates in found.values()] == [[], [], []]


@settings(deadline=None, max_examples=15)
@given(**SHAPES)
def test_a_replicate_is_the_distance_of_the_samples_that_it_drew(m, n, d, latent, seed):
    (features, latents), (ours, points) = drawn_samples(m, n, d, latent, seed)
    reference = Reference(features, latents)
    found = reference.distances(ours, points, resamples=4, seed=seed)
    real, rows = standard(reference, features), standard(reference, ours)
    oracle = {name: [] for name in METRICS}
    for count in draws(n, 4, seed):
        chosen = np.repeat(np.arange(n), count)
        oracle["frechet"].append(nuclear_frechet(real, rows[chosen]))
        oracle["kid"].append(loop_kid(real, rows[chosen], chosen.tolist()))
        oracle["sliced_wasserstein"].append(sliced(reference, latents, points[chosen]))
    for name in ("frechet", "sliced_wasserstein"):
        value, replicates = found[name]
        shifted = np.array(oracle[name]) - np.mean(oracle[name]) + value
        assert replicates == pytest.approx(shifted, rel=1e-7, abs=1e-6)
    assert found["kid"][1] == pytest.approx(oracle["kid"], rel=1e-9, abs=1e-9)


def gaussian(n: int, mean, covariance, seed: int) -> np.ndarray:
    """Samples with this mean and covariance to the last digits."""
    rows = np.random.default_rng(seed).normal(size=(n, len(mean)))
    rows -= rows.mean(0)
    whitened = np.linalg.solve(np.linalg.cholesky(np.cov(rows, rowvar=False)), rows.T).T
    return whitened @ np.linalg.cholesky(covariance).T + mean


def test_frechet_of_gaussians_is_the_closed_form():
    # Of covariances that commute: |mean - mean'|^2 + sum of (deviation - deviation')^2.
    reference = Reference(gaussian(300, [0, 0, 0], np.eye(3), 0), np.zeros((300, 1)))
    ours = gaussian(200, [1.0, -2.0, 0.5], np.diag([4.0, 0.25, 1.0]), 1)
    value, _ = reference.distances(ours, np.zeros((200, 1)), resamples=0)["frechet"]
    assert value == pytest.approx(1 + 4 + 0.25 + (2 - 1) ** 2 + (0.5 - 1) ** 2, rel=1e-10)
    # Of those that do not: scipy's root of the matrix that is not symmetric.
    first = np.array([[1.0, 0.6, 0.1], [0.6, 1.0, -0.3], [0.1, -0.3, 1.0]])
    second = np.array([[2.0, -0.7, 0.0], [-0.7, 0.5, 0.1], [0.0, 0.1, 3.0]])
    reference = Reference(gaussian(300, [5, 0, 0], first, 2), np.zeros((300, 1)))
    value, _ = reference.distances(gaussian(150, [5, 1, 0], second, 3), np.zeros((150, 1)), resamples=0)["frechet"]
    assert value == pytest.approx(1 + np.trace(first + second - 2 * linalg.sqrtm(first @ second).real), rel=1e-9)


def test_sliced_wasserstein_of_gaussians_is_the_closed_form():
    # One number a sample: every direction is 1 or -1. Quantiles at the middle of n parts are nearly the normal's.
    n = 4000
    normal = stats.norm.ppf((np.arange(n) + 0.5) / n)
    rng = np.random.default_rng(0)
    reference = Reference(np.arange(n)[:, None], rng.permutation(normal)[:, None])
    value, _ = reference.distances(np.arange(n)[:, None], (0.5 + 3 * normal)[:, None], resamples=0)[
        "sliced_wasserstein"
    ]
    assert value == pytest.approx(0.5**2 + (3 - 1) ** 2, rel=2e-3)
    # Fewer samples of the same two.
    few = stats.norm.ppf((np.arange(1500) + 0.5) / 1500)
    value, _ = reference.distances(few[:, None], (0.5 + 3 * few)[:, None], resamples=0)["sliced_wasserstein"]
    assert value == pytest.approx(0.5**2 + (3 - 1) ** 2, rel=5e-3)


def test_sliced_wasserstein_of_a_scaled_and_shifted_copy_is_exact():
    # Along any line the map is monotonic: the distance is that of matched samples.
    rng = np.random.default_rng(0)
    latents, shift = rng.exponential(size=(90, 4, 2, 3)), rng.normal(size=24)
    reference = Reference(rng.normal(size=(90, 2)), latents)
    flat = latents.reshape(90, 24)
    moved = 1.7 * flat + shift
    expected = np.mean(((moved - flat) @ reference.directions.T) ** 2)
    value, _ = reference.distances(rng.normal(size=(90, 2)), rng.permutation(moved), resamples=0)[
        "sliced_wasserstein"
    ]
    assert value == pytest.approx(expected, rel=1e-12)


def test_directions_are_unit_vectors_without_a_preference():
    lines = Reference(np.arange(20.0)[:, None], np.zeros((20, 16))).directions
    assert lines.shape == (DIRECTIONS, 16)
    assert np.linalg.norm(lines, axis=1) == pytest.approx(np.ones(DIRECTIONS), abs=1e-14)
    # Of uniform directions: mean 0, second moments 1 / 16 with variance 2 (1 - 1/16) / (16 * 18).
    assert np.abs(lines.mean(0)).max() < 4 * math.sqrt(1 / 16 / DIRECTIONS)
    off = lines.T @ lines / DIRECTIONS - np.eye(16) / 16
    assert np.abs(off).max() < 4.5 * math.sqrt(2 * (1 - 1 / 16) / (16 * 18) / DIRECTIONS)
    # A coordinate's square has the distribution beta(1/2, 15/2).
    assert stats.kstest((lines[:, ::5] ** 2).ravel(), stats.beta(0.5, 7.5).cdf).pvalue > 1e-3


@pytest.mark.parametrize("seed", range(8))
def test_the_real_samples_themselves_are_at_distance_zero(seed):
    rng = np.random.default_rng(seed)
    features, latents = rng.normal(size=(80, 10)) @ rng.normal(size=(10, 10)) + 4, rng.normal(size=(80, 3, 2, 2))
    found = Reference(features, latents).distances(features[::-1], latents[::-1], resamples=0)
    assert abs(found["frechet"][0]) < 1e-9
    # Never below, where rounding is all that there is.
    assert 0 <= found["sliced_wasserstein"][0] < 1e-13


def test_a_shift_is_measured_exactly():
    rng = np.random.default_rng(1)
    features, latents = rng.normal(size=(70, 6)), rng.normal(size=(70, 8))
    reference = Reference(features, latents)
    by, move = rng.normal(size=6), rng.normal(size=8)
    found = reference.distances(features + by * features.std(0, ddof=1), latents + move, resamples=0)
    assert found["frechet"][0] == pytest.approx(by @ by, rel=1e-9)
    assert found["sliced_wasserstein"][0] == pytest.approx(np.mean((reference.directions @ move) ** 2), rel=1e-10)


def test_other_real_samples_are_near_and_generated_ones_are_not():
    rng = np.random.default_rng(2)
    mix = rng.normal(size=(12, 12))

    def sample(shift=0.0):
        rows = rng.normal(size=(600, 12)) + shift
        return rows @ mix, rows[:, :8]

    reference = Reference(*sample())
    near, far = reference.distances(*sample()), reference.distances(*sample(0.5))
    for name in METRICS:
        assert near[name][0] < 0.1 * far[name][0]
    assert abs(near["kid"][0]) < 4 * np.std(near["kid"][1])


def test_a_covariance_without_full_rank_is_no_trouble():
    rng = np.random.default_rng(3)
    # Fewer samples than features, most of which are combinations of five, and ten that are 0 for every sample.
    mix = np.concatenate([rng.normal(size=(5, 54)), np.zeros((5, 10))], axis=1)
    features, ours = rng.normal(size=(40, 5)) @ mix, (rng.normal(size=(30, 5)) + 0.3) @ mix
    reference = Reference(features, np.zeros((40, 1)))
    value, replicates = reference.distances(ours, np.zeros((30, 1)), resamples=20)["frechet"]
    expected = nuclear_frechet(standard(reference, features), standard(reference, ours))
    assert value == pytest.approx(expected, rel=1e-9)
    assert np.isfinite(replicates).all()
    assert abs(reference.distances(features, np.zeros((40, 1)), resamples=0)["frechet"][0]) < 1e-9


def test_a_feature_that_no_real_sample_varies_counts_by_the_largest_deviation():
    rng = np.random.default_rng(4)
    features = rng.normal(size=(50, 3)) * [1.0, 7.0, 0.0] + [0.0, 0.0, 0.1]
    reference = Reference(features, np.zeros((50, 1)))
    value, _ = reference.distances(features + np.array([0, 0, 2.0]), np.zeros((50, 1)), resamples=0)["frechet"]
    assert value == pytest.approx((2.0 / features[:, 1].std(ddof=1)) ** 2, rel=1e-9)


@settings(deadline=None, max_examples=20)
@given(**SHAPES)
def test_what_the_distances_do_not_depend_on(m, n, d, latent, seed):
    (features, latents), (ours, points) = drawn_samples(m, n, d, latent, seed)
    rng = np.random.default_rng(seed)
    plain = Reference(features, latents).distances(ours, points, resamples=3)
    # Units of features and where they are zero; the shape of latents; the order of real samples.
    units, zero, order = 10 ** rng.uniform(-3, 3, d), rng.normal(size=d), rng.permutation(m)
    other = Reference((features * units + zero)[order], latents.reshape(m, -1)[order] + 5)
    changed = other.distances(ours * units + zero, points.reshape(n, -1) + 5, resamples=3)
    # A unit of latents; the order of ours, which changes replicates alone.
    mixed = rng.permutation(n)
    scaled = Reference(features, 3 * latents).distances(ours[mixed], 3 * points[mixed], resamples=3)
    for name in METRICS:
        value, replicates = plain[name]
        tolerance = {"rel": 1e-7, "abs": 1e-6} if name == "frechet" else {"rel": 1e-7, "abs": 1e-9}
        assert changed[name][0] == pytest.approx(value, **tolerance)
        assert changed[name][1] == pytest.approx(replicates, **tolerance)
        factor = 9 if name == "sliced_wasserstein" else 1
        assert scaled[name][0] == pytest.approx(factor * value, **tolerance)


def test_the_same_call_gives_the_same_bits_and_changes_nothing():
    (features, latents), (ours, points) = drawn_samples(40, 30, 5, (4, 2, 2), 0)
    copies = [values.copy() for values in (features, latents, ours, points)]
    reference = Reference(features, latents)
    first = reference.distances(ours, points, resamples=20, seed=3)
    reference.distances(points.reshape(30, -1)[:, :5], points)
    assert Reference(features, latents).distances(ours, points, resamples=20, seed=3) == first
    assert all((now == then).all() for now, then in zip((features, latents, ours, points), copies, strict=True))
    assert first != reference.distances(ours, points, resamples=20, seed=4)
    # Numbers of half the width are taken as they are.
    singles = [values.astype(np.float32) for values in copies]
    doubles = [values.astype(np.float64) for values in singles]
    of = [Reference(*four[:2]).distances(*four[2:], resamples=20) for four in (singles, doubles)]
    assert of[0] == of[1]


def test_kid_sees_evenly_spaced_rows_of_many():
    rng = np.random.default_rng(5)
    features = rng.normal(size=(2 * KID_ROWS, 2))
    reference = Reference(features, np.zeros((2 * KID_ROWS, 1)))
    assert reference.kid_rows == pytest.approx(standard(reference, features)[::2])
    assert Reference(features[: FEWEST + 1], np.zeros((FEWEST + 1, 1))).kid_rows.shape == (FEWEST + 1, 2)
    # More of ours than a block of the matrix has rows.
    ours = rng.normal(size=(1003, 2)) + 1
    x, y = standard(reference, ours), reference.kid_rows
    full = [(a @ b.T / 2 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))]
    means = [(k.sum() - np.trace(k)) / len(k) / (len(k) - 1) for k in full[:2]]
    found = reference.distances(ours, np.zeros((1003, 1)), resamples=0)["kid"][0]
    assert found == pytest.approx(sum(means) - 2 * full[2].mean(), rel=1e-10)


def test_replicates_of_kid_have_the_value_as_their_mean():
    rng = np.random.default_rng(1)
    reference = Reference(rng.normal(size=(40, 3)), np.zeros((40, 1)))
    ours = rng.normal(size=(FEWEST, 3))
    value, replicates = reference.distances(ours, np.zeros((FEWEST, 1)), resamples=20_000)["kid"]
    rows = standard(reference, ours)
    kernel = (rows @ rows.T / 3 + 1) ** 3
    # What pairs of a sample with itself would add.
    own = (np.trace(kernel) / FEWEST - (kernel.sum() - np.trace(kernel)) / FEWEST / (FEWEST - 1)) / FEWEST
    assert abs(np.mean(replicates) - value) < 0.1 * own


@given(count=st.integers(1, 300), resamples=st.integers(0, 30), seed=st.integers(0, 2**64 - 1))
def test_a_draw_has_as_many_as_there_are(count, resamples, seed):
    counts = draws(count, resamples, seed)
    assert counts.shape == (resamples, count)
    assert (counts >= 0).all()
    assert (counts.sum(1) == count).all()
    assert (draws(count, resamples + 3, seed)[:resamples] == counts).all()


def test_draws_are_uniform_and_pinned():
    # How often a sample is drawn in 4000 draws of 50 by 50.
    assert stats.chisquare(draws(50, 4000, 0).sum(0)).pvalue > 1e-3
    # And how often in one draw: binomial of 50 and 1 / 50.
    seen = np.bincount(draws(50, 4000, 1).ravel(), minlength=5)
    chances = stats.binom(50, 0.02).pmf(np.arange(4))
    expected = np.append(chances, 1 - chances.sum()) * 50 * 4000
    assert stats.chisquare(np.append(seen[:4], seen[4:].sum()), expected).pvalue > 1e-3
    assert draws(10, 2, 7).tolist() == PINNED


PINNED = [[0, 0, 0, 4, 0, 1, 0, 2, 2, 1], [1, 2, 2, 1, 0, 0, 0, 0, 1, 3]]


def covered(truth: float, replicates: np.ndarray) -> np.ndarray:
    low, high = np.quantile(replicates, (0.025, 0.975), axis=-1)
    return (low <= truth) & (truth <= high)


def within_binomial(hits: int, trials: int, low: float, high: float) -> bool:
    return stats.binom.ppf(1e-4, trials, low) <= hits <= stats.binom.ppf(1 - 1e-4, trials, high)


def test_intervals_of_a_mean_cover_it_at_their_rate():
    rng = np.random.default_rng(0)
    trials, n = 1000, 100
    hits = sum(covered(3.0, draws(n, 200, seed) @ rng.normal(3.0, 2.0, n) / n).item() for seed in range(trials))
    # 200 replicates and 100 samples give a little less than 95 %.
    assert within_binomial(hits, trials, 0.93, 0.95)
    hits = sum(
        covered(0.3, np.array(proportion(rng.random(n) < 0.3, 200, seed)[1])).item() for seed in range(trials)
    )
    assert within_binomial(hits, trials, 0.93, 0.95)


def test_intervals_of_ratios_cover_although_finite_samples_are_too_far():
    # Two generators a few times as far as so many real samples would be. The truth is the mean over all trials.
    # One in three of the intervals from replicates without a shift misses it.
    rng = np.random.default_rng(1)
    trials, n, size = 100, 100, 6
    reference = Reference(rng.normal(size=(1000, size)), rng.normal(size=(1000, size)))
    values = {name: np.empty((2, trials, 61)) for name in ("frechet", "sliced_wasserstein")}
    for trial in range(trials):
        rows = rng.normal(size=(n, size))
        for place, ours in enumerate((rows + 0.2, 0.9 * rows + 0.43 * rng.normal(size=(n, size)) + 0.35)):
            found = reference.distances(ours, ours, resamples=60)
            for name, of in values.items():
                of[place, trial] = np.append(*found[name])
    for of in values.values():
        logs = np.log(of)
        truth = (logs[0, :, 0] - logs[1, :, 0]).mean()
        hits = covered(truth, (logs[0] - logs[1])[:, 1:]).sum()
        assert within_binomial(int(hits), trials, 0.90, 0.99)


def test_replicates_of_two_generators_pair():
    rng = np.random.default_rng(6)
    reference = Reference(rng.normal(size=(300, 8)), rng.normal(size=(300, 6)))
    rows = rng.normal(size=(200, 8)) + 0.5
    like, other = rows + 0.05 * rng.normal(size=rows.shape), rng.normal(size=rows.shape) + 0.5
    one, two, three = (reference.distances(ours, ours[:, :6]) for ours in (rows, like, other))
    for name in METRICS:
        assert np.corrcoef(one[name][1], two[name][1])[0, 1] > 0.9
        assert abs(np.corrcoef(one[name][1], three[name][1])[0, 1]) < 0.4
    right = rng.random((200, 6)) < 0.8
    flipped = right ^ (rng.random((200, 6)) < 0.01)
    assert np.corrcoef(proportion(right)[1], proportion(flipped)[1])[0, 1] > 0.8
    # Across kinds of estimates too: shares of the samples themselves against their mean.
    value, replicates = proportion(rows[:, 0] > 0.5, 20, 9)
    assert value == np.mean(rows[:, 0] > 0.5)
    assert replicates == pytest.approx([np.repeat(rows[:, 0] > 0.5, count).mean() for count in draws(200, 20, 9)])


@given(n=st.integers(FEWEST, 60), k=st.integers(1, 7), seed=st.integers(0, 1000))
def test_a_proportion_is_the_share_of_all_answers(n, k, seed):
    right = np.random.default_rng(seed).random((n, k)) < 0.7
    value, replicates = proportion(right, 5, seed)
    assert value == pytest.approx(right.sum() / (n * k), abs=1e-15)
    assert replicates == pytest.approx([np.repeat(right, count, axis=0).mean() for count in draws(n, 5, seed)])
    assert proportion(right, 0)[1] == []
    assert proportion(np.ones(n, bool), 2) == (1.0, [1.0, 1.0])


GOOD = np.random.default_rng(0).normal(size=(20, 3))
NAN, ENDLESS = GOOD.copy(), GOOD.copy()
NAN[3, 1], ENDLESS[3, 1] = math.nan, math.inf
REFERENCE = Reference(GOOD, GOOD)
BAD = {
    "features hold NaN or infinity": lambda: REFERENCE.distances(NAN, GOOD),
    "latents hold NaN or infinity": lambda: REFERENCE.distances(GOOD, ENDLESS),
    "latents hold NaN": lambda: Reference(GOOD, NAN),
    "features hold NaN": lambda: Reference(ENDLESS, GOOD),
    "15 samples: give 16 or more": lambda: REFERENCE.distances(GOOD[:15], GOOD[:15]),
    "1 samples: give 16": lambda: Reference(GOOD[:1], GOOD[:1]),
    "features have 2 numbers a sample, the real ones 3": lambda: REFERENCE.distances(GOOD[:, :2], GOOD),
    "latents have 2 numbers a sample, the real ones 3": lambda: REFERENCE.distances(GOOD, GOOD[:, :2]),
    "features of 20 samples, latents of 19": lambda: REFERENCE.distances(GOOD, GOOD[1:]),
    r"features \[20\], latents \[20, 3\]": lambda: REFERENCE.distances(GOOD[:, 0], GOOD),
    r"latents \[20\]: give": lambda: Reference(GOOD, GOOD[:, 0]),
    r"features \[20, 0\]": lambda: Reference(GOOD[:, :0], GOOD),
    "all features are constant": lambda: Reference(np.full((20, 3), 0.1), GOOD),
    "is too large for float64": lambda: REFERENCE.distances(GOOD * 1e200, GOOD),
    "sliced_wasserstein is too large": lambda: REFERENCE.distances(GOOD, GOOD * 1e200),
    "-1 resamples": lambda: REFERENCE.distances(GOOD, GOOD, resamples=-1),
    r"right answers are bool \[n\] or \[n, k\], not float64 \[20, 3\]": lambda: proportion(GOOD),
    r"not bool \[2, 20, 3\]": lambda: proportion(np.ones((2, 20, 3), bool)),
    "3 samples": lambda: proportion(np.ones(3, bool)),
    r"not bool \[20, 0\]": lambda: proportion(np.ones((20, 0), bool)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_line(message):
    with pytest.raises(ValueError, match=message) as caught:
        BAD[message]()
    assert "\n" not in str(caught.value)
