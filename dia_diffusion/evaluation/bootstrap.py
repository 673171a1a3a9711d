"""How far a Frechet distance would move with other images: the bootstrap (Efron 1979), centred for its bias."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from dia_diffusion.evaluation.extras import LEVEL, SEED
from dia_diffusion.evaluation.frechet import Moments

BLOCK = 8192  # rows multiplied at once in float64


@dataclass(frozen=True)
class Interval:
    """Where the distance of as many other images lies, and the standard deviation from set to set."""

    low: float
    high: float
    standard_error: float


def bootstrap_interval(
    features: torch.Tensor,
    reference: Moments,
    distance: float,
    resamples: int,
    progress: Callable[[int, int], None] | None = None,
) -> Interval:
    """The 95 % interval of `distance`, that of features (N, D) to the reference, over resamples of the N images.

    The interval is about the mean distance that N images of this model have: what a second set of N images would give.
    A resample has only 63 % of the images, and a Frechet distance falls with their number, so resampled distances lie
    above the one that was measured, often all of them, and their plain percentiles would be an interval beside the
    truth. Their spread is right where their place is not: the percentiles are taken of their deviations from their own
    mean, and added to the distance. (The "basic" interval, 2 x distance - percentiles, would subtract the bias of the
    distance itself and speak of infinitely many images, which no recorded distance does.)

    Against fresh sets drawn from Gaussians (tests/evaluation/test_bootstrap.py) the standard error is right where bias
    is under a tenth of the distance, a tenth too large where it is a sixth, and up to twice too large where it is
    nearly all, as between two sets of the same kind: the interval is then too wide, not too narrow.

    The reference is taken as exact, and other seeds of training are no part of it. The resamples are those of seed 0.
    Memory: up to 8 N D bytes, two float32 arrays. Time on one core: a resample of 5,000 images takes 0.04 s in 256
    features, 1.5 s in 2,048.
    """
    resampled = _ResampledDistance(features, reference)
    generator = np.random.default_rng(SEED)
    count = len(features)
    distances = np.empty(resamples)
    for index in range(resamples):
        times = np.bincount(generator.integers(count, size=count), minlength=count)
        distances[index] = resampled(times)
        if progress is not None:
            progress(index + 1, resamples)
    deviations = distances - distances.mean()
    low, high = np.quantile(deviations, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(max(distance + float(low), 0.0), distance + float(high), float(distances.std(ddof=1)))


class _ResampledDistance:
    """The Frechet distance where image k counts times[k] times.

    tr (A B)^(1/2) is the sum of the roots of the eigenvalues of R' A R with B = R R', so with rows Y = X R that are
    made once, a resample costs one product Y'Y and one set of eigenvalues.
    """

    def __init__(self, features: torch.Tensor, reference: Moments) -> None:
        values, vectors = np.linalg.eigh(reference.covariance)
        kept = values > values[-1] * len(values) * np.finfo(values.dtype).eps
        root = vectors[:, kept] * np.sqrt(values[kept])  # (D, rank)
        self.count = len(features)
        self.features = features.numpy()  # (N, D) float32
        mean = np.sum([rows.double().sum(0).numpy() for rows in features.split(BLOCK)], axis=0) / self.count
        self.squares = np.empty(self.count)  # (N,), squared distances to the mean
        self.rotated = np.empty((self.count, root.shape[1]), np.float32)  # (N, rank)
        for start in range(0, self.count, BLOCK):
            rows = self.features[start : start + BLOCK] - mean
            self.squares[start : start + BLOCK] = (rows**2).sum(1)
            self.rotated[start : start + BLOCK] = rows @ root
        self.offset = mean - reference.mean
        self.reference_trace = np.trace(reference.covariance)

    def __call__(self, times: np.ndarray) -> float:
        """The distance for integers times (N,), whose sum is N."""
        # The mean moves by sum_k (times[k] - 1) x_k / N; float32 is enough for that.
        move = ((times - 1).astype(np.float32) @ self.features).astype(np.float64) / self.count
        trace = (times @ self.squares - self.count * move @ move) / (self.count - 1)
        offset = self.offset + move
        return float(offset @ offset + trace + self.reference_trace - 2 * self._overlap(times))

    def _overlap(self, times: np.ndarray) -> float:
        """tr (A B)^(1/2)"""
        chosen = np.flatnonzero(times)
        center = (times.astype(np.float32) @ self.rotated).astype(np.float64) / self.count
        rank = self.rotated.shape[1]
        if len(chosen) < rank:  # fewer rows than columns: the other product has the same eigenvalues
            rows = self._rows(chosen, times, center)
            product = rows @ rows.T
        else:
            product = np.zeros((rank, rank))
            for start in range(0, len(chosen), BLOCK):
                rows = self._rows(chosen[start : start + BLOCK], times, center)
                product += rows.T @ rows
        values = np.linalg.eigvalsh(product / (self.count - 1))
        return float(np.sqrt(values.clip(min=0)).sum())

    def _rows(self, chosen: np.ndarray, times: np.ndarray, center: np.ndarray) -> np.ndarray:
        """The chosen rows of Y, centred, each times the root of its count, float64."""
        return (self.rotated[chosen] - center) * np.sqrt(times[chosen])[:, None]
