"""Distances from generated samples to real ones, and shares of right answers, each with bootstrap replicates.

A replicate is the value over as many samples as there are, drawn from them with replacement. Which samples it
draws follows from their number and a seed alone, so replicates of two generators pair: where sample i of both
answers the same prompt from the same noise, replicate j of both holds the same prompts, and what is common to both
leaves their difference or ratio. Real samples are not drawn anew: an interval is for the real samples it had.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
# A value and its replicates.
Estimated = tuple[float, list[float]]

DIRECTIONS = 256
# Real samples that KID's kernel sees, and rows of its matrix that are in memory at a time.
KID_ROWS = 2000
_BLOCK = 1000
# With fewer samples, a replicate could draw one of them alone, which has no variance.
FEWEST = 16
# A feature whose deviation is a smaller share of its mean, or of the largest deviation, is taken as constant.
_CONSTANT = 1e-9
# Upper halves of keys, so that no scene, draw or direction uses the words of another.
_DRAWS, _DIRECTIONS = 1 << 64, 2 << 64


class Reference:
    """Real samples as features [m, d] and latents [m, ...], to which generated ones are compared.

    Features are centred and divided by their deviations over the real samples. One that is constant there, as a
    judge's dead unit is, is divided by the largest deviation of any.

    Raises ValueError for fewer than `FEWEST` samples, numbers that are not finite, and features all constant.
    """

    def __init__(self, features: ArrayLike, latents: ArrayLike) -> None:
        rows, points = _samples(features, latents)
        self.count, self.width = rows.shape
        self.latent_size = points.shape[1]
        self.centre, deviations = rows.mean(0), rows.std(0, ddof=1)
        least = _CONSTANT * np.maximum(np.abs(self.centre), deviations.max())
        if not (deviations > least).any():
            raise ValueError("all features are constant over the real samples: take them from a trained judge")
        self.scale: Floats = np.where(deviations > least, deviations, deviations.max())
        rows = (rows - self.centre) / self.scale
        self.mean, self.covariance = rows.mean(0), np.cov(rows, rowvar=False).reshape(self.width, self.width)
        self._root = _root(self.covariance)
        # Evenly spaced, so that an order of the real samples does not matter much.
        self.kid_rows = rows[np.arange(min(self.count, KID_ROWS)) * self.count // min(self.count, KID_ROWS)]
        self._kid_within = float(_mean_of_pairs(self.kid_rows, np.ones((1, len(self.kid_rows)), np.int64))[0])
        self.directions = _directions(self.latent_size)
        projected = points @ self.directions.T
        self.projected_centre = projected.mean(0)
        self.projections: Floats = np.sort((projected - self.projected_centre).T, axis=1)

    def distances(
        self, features: ArrayLike, latents: ArrayLike, resamples: int = 100, seed: int = 0
    ) -> dict[str, Estimated]:
        """Distances of generated samples, features [n, d] and latents [n, ...], none of them among the real ones.

        "frechet", "kid" and "sliced_wasserstein", each a value and `resamples` replicates (`draws`).

        The Frechet and the Wasserstein distance of finite samples are too large on average, and a draw with
        replacement adds about as much again: their replicates are shifted to have the value as their mean, and may
        be negative where the value is small. Compare values of equal n alone, and with that of n other real ones,
        which is not 0. KID has no such error, and may be negative.

        Raises ValueError for fewer than `FEWEST` samples, numbers that are not finite or too large, and another
        width than the real samples have.
        """
        rows, points = _samples(features, latents)
        for what, width, real in (
            ("features", rows.shape[1], self.width),
            ("latents", points.shape[1], self.latent_size),
        ):
            if width != real:
                raise ValueError(
                    f"{what} have {width} numbers a sample, the real ones {real}: take both from one model"
                )
        # The samples themselves are a draw of each once.
        counts = np.concatenate([np.ones((1, len(rows)), np.int64), draws(len(rows), resamples, seed)])
        with np.errstate(over="ignore", invalid="ignore"):
            rows = (rows - self.centre) / self.scale
            found = {
                "frechet": _around_value(self._frechet(rows, counts)),
                "kid": self._kid(rows, counts),
                "sliced_wasserstein": _around_value(self._sliced_wasserstein(points, counts)),
            }
        for name, values in found.items():
            if not np.isfinite(values).all():
                raise ValueError(f"{name} is too large for float64: the samples are far beyond all real ones")
        return {name: (float(values[0]), values[1:].tolist()) for name, values in found.items()}

    def _frechet(self, rows: Floats, counts: Ints) -> Floats:
        """|mean - mean'|^2 + tr(C + C' - 2 (C^1/2 C' C^1/2)^1/2) for each row of `counts`."""
        n, middle = len(rows), rows.mean(0)
        centred = rows - middle
        values = np.empty(len(counts))
        for place, count in enumerate(counts):
            offset = count @ centred / n
            second = (centred * count[:, None]).T @ centred
            covariance = (second - n * np.outer(offset, offset)) / (n - 1)
            roots = np.sqrt(_eigenvalues(self._root @ covariance @ self._root))
            shift = middle + offset - self.mean
            values[place] = shift @ shift + np.trace(covariance) + np.trace(self.covariance) - 2 * roots.sum()
        return values

    def _kid(self, rows: Floats, counts: Ints) -> Floats:
        """The unbiased squared MMD under the kernel (x.y / d + 1)^3 for each row of `counts`."""
        across = np.concatenate(
            [_kernel(rows[at : at + _BLOCK], self.kid_rows).mean(1) for at in range(0, len(rows), _BLOCK)]
        )
        values: Floats = _mean_of_pairs(rows, counts) + self._kid_within - 2 * (counts @ across) / len(rows)
        return values

    def _sliced_wasserstein(self, points: Floats, counts: Ints) -> Floats:
        """The mean over directions of the squared Wasserstein-2 distance of projections, for each row of `counts`.

        In one dimension it is the integral of (F^-1(p) - G^-1(p))^2 over p from 0 to 1. F^-1, the quantiles of the
        samples, is constant between multiples of 1/n. So of G^-1, of the real ones, its integrals from 0 to each
        multiple are enough: a sample's part of a replicate lies between two running sums of counts.
        """
        n, m = len(points), self.count
        whole, rest = np.divmod(np.arange(n + 1) * m, n)
        total = np.zeros(len(counts))
        for projected, real, centre in zip(
            self.directions @ points.T, self.projections, self.projected_centre, strict=True
        ):
            order = np.argsort(projected, kind="stable")
            ours, drawn = projected[order] - centre, counts[:, order]
            integral = (np.append(0.0, np.cumsum(real))[whole] + np.append(real, 0.0)[whole] * (rest / n)) / m
            # The integral of F^-1 G^-1, summed by parts.
            product = integral[np.cumsum(drawn, axis=1)] @ (ours - np.append(ours[1:], 0.0))
            total += np.maximum(drawn @ (ours * ours) / n + (real @ real) / m - 2 * product, 0.0)
        return total / len(self.directions)


def proportion(right: ArrayLike, resamples: int = 100, seed: int = 0) -> Estimated:
    """The share of right answers of samples, [n] or [n, answers each] of bool, and its replicates (`draws`).

    Raises ValueError for other dtypes and shapes, and for fewer than `FEWEST` samples.
    """
    answers = np.asarray(right)
    if answers.dtype != bool or answers.ndim not in (1, 2) or not answers.size:
        raise ValueError(f"right answers are bool [n] or [n, k], not {answers.dtype} {list(answers.shape)}")
    _enough(len(answers))
    each = answers.reshape(len(answers), -1).sum(1)
    return float(answers.mean()), (draws(len(each), resamples, seed) @ each / answers.size).tolist()


def draws(count: int, resamples: int, seed: int) -> Ints:
    """How often each replicate holds each of `count` samples, [resamples, count]; a row sums to `count`.

    The first rows are the same whatever `resamples`. They come from raw words of Philox4x64, which are the same in
    every release of numpy. A seed is from 0 to 2^64 - 1.
    """
    if resamples < 0:
        raise ValueError(f"{resamples} resamples: give 0 or more")
    words = np.random.Philox(key=_DRAWS + seed).random_raw(resamples * count).reshape(resamples, count)
    drawn = ((words >> np.uint64(32)) * np.uint64(count) >> np.uint64(32)).astype(np.int64)
    rows = np.arange(resamples)[:, None] * count
    return np.bincount((rows + drawn).ravel(), minlength=resamples * count).reshape(resamples, count)


def _around_value(values: Floats) -> Floats:
    """The value, and replicates with it as their mean."""
    return np.append(values[:1], values[1:] - values[1:].mean() + values[0]) if len(values) > 1 else values


def _mean_of_pairs(rows: Floats, counts: Ints) -> Floats:
    """The mean of the kernel over pairs of two samples, for each row of `counts`.

    A replicate that draws a sample twice has a pair of it with itself. The kernel is larger there than between two
    samples, and would raise the replicates' mean by 1/n of the difference. Such pairs are left out of the mean.
    """
    total = np.zeros(len(counts))
    for at in range(0, len(rows), _BLOCK):
        block = _kernel(rows[at : at + _BLOCK], rows)
        block[np.arange(len(block)), at + np.arange(len(block))] = 0.0
        total += ((counts[:, at : at + _BLOCK] @ block) * counts).sum(1)
    means: Floats = total / (len(rows) ** 2 - (counts * counts).sum(1))
    return means


def _kernel(left: Floats, right: Floats) -> Floats:
    base = left @ right.T
    base /= left.shape[1]
    base += 1.0
    cube: Floats = base * base * base
    return cube


def _eigenvalues(product: Floats) -> Floats:
    """Eigenvalues of a matrix that is symmetric and not negative but for rounding."""
    if not np.isfinite(product).all():
        return np.full(len(product), np.inf)
    return _without_rounding(np.linalg.eigvalsh((product + product.T) / 2))


def _root(covariance: Floats) -> Floats:
    values, vectors = np.linalg.eigh(covariance)
    root: Floats = (vectors * np.sqrt(_without_rounding(values))) @ vectors.T
    return root


def _without_rounding(eigenvalues: NDArray[np.floating]) -> Floats:
    """The eigenvalues, with 0 for those within rounding of 0: the root of 1e-16 is 1e-8, and there may be many."""
    least = eigenvalues.max() * len(eigenvalues) * np.finfo(np.float64).eps
    kept: Floats = np.where(eigenvalues > least, eigenvalues, 0.0)
    return kept


def _directions(size: int) -> Floats:
    """Unit vectors [256, size], uniform on the sphere: normal numbers (Box-Muller), divided by their length."""
    words = np.random.Philox(key=_DIRECTIONS).random_raw(2 * DIRECTIONS * size).reshape(2, DIRECTIONS, size)
    first, second = ((words >> np.uint64(11)) + 0.5) * 2.0**-53
    normal = np.sqrt(-2 * np.log(first)) * np.cos(2 * np.pi * second)
    directions: Floats = normal / np.linalg.norm(normal, axis=1, keepdims=True)
    return directions


def _samples(features: ArrayLike, latents: ArrayLike) -> tuple[Floats, Floats]:
    """Features [n, d] and latents [n, numbers] in float64, checked."""
    rows, points = np.asarray(features, np.float64), np.asarray(latents, np.float64)
    if rows.ndim != 2 or points.ndim < 2 or not rows.size or not points.size:
        shapes = f"features {list(rows.shape)}, latents {list(points.shape)}"
        raise ValueError(f"{shapes}: give features [n, d] and latents [n, ...]")
    if len(rows) != len(points):
        raise ValueError(f"features of {len(rows)} samples, latents of {len(points)}: give both of each sample")
    _enough(len(rows))
    for what, values in (("features", rows), ("latents", points)):
        if not np.isfinite(values).all():
            raise ValueError(f"{what} hold NaN or infinity: leave such samples out, or count the run as failed")
    return rows, points.reshape(len(points), -1)


def _enough(count: int) -> None:
    if count < FEWEST:
        raise ValueError(f"{count} samples: give {FEWEST} or more")
